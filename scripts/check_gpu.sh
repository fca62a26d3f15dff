#!/usr/bin/env bash
# Checks on a GPU what only a GPU can show, in under ten minutes: versions and device, sparse execution against the dense
# specification, no waiting for the device, the training command with a kill and a resume, memory beside what was worked
# out, decode speed beside its bound, NCCL. Writes JSON of figures and bounds; not zero when one was missed.
#
#   bash scripts/check_gpu.sh [CHECKPOINT] [arguments for entrypoints/evaluation/check_gpu.py; --help lists them]
#
# Without CHECKPOINT it is ckpt/smollm2-135m-mod, built here if it isn't there yet.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

checkpoint="$root/ckpt/smollm2-135m-mod"
if (($#)) && [[ "$1" != -* ]]; then
  checkpoint="$1"
  shift
elif [[ " $* " != *" --help "* && ! -e "$checkpoint/model.safetensors.index.json" ]]; then
  python "$root/entrypoints/checkpoint/build_mod_checkpoint.py" --folder_name smollm2-135m-mod >&2
fi
exec python "$root/entrypoints/evaluation/check_gpu.py" "$checkpoint" "$@"
