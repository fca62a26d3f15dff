#!/usr/bin/env bash
# Measures speed and memory of a MoD checkpoint beside its dense base: a table, and JSON whose path is printed last.
#
#   bash scripts/benchmark.sh [CHECKPOINT] [arguments for entrypoints/evaluation/benchmark.py; --help lists them]
#   bash scripts/benchmark.sh path/to/output --grid 1x512 8x128 --threads 1
#
# Without CHECKPOINT it is ckpt/smollm2-135m-mod, built here if it isn't there yet.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

case "${1:-}" in
  "" | -*)
    if [[ " $* " != *" --help "* && " $* " != *" -h "* && ! -e "$root/ckpt/smollm2-135m-mod/model.safetensors.index.json" ]]; then
      python "$root/entrypoints/checkpoint/build_mod_checkpoint.py" --folder_name smollm2-135m-mod
    fi
    ;;
esac

# Otherwise glibc gives the memory of activations back to the system all the time, and the page faults that fetch it
# again fall on some columns more than on others (by up to 4% of a prefill).
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2000000000}" MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"

exec python "$root/entrypoints/evaluation/benchmark.py" "$@"
