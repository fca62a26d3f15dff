#!/usr/bin/env bash
# Evaluates a MoD checkpoint beside its dense base, or a dense base alone, on the nine tasks of the paper's Table 1:
# prints the table, and the path of its JSON last. Given again after an interruption, it goes on.
#
#   bash scripts/evaluate.sh [CHECKPOINT] [arguments for entrypoints/evaluation/evaluate.py; --help lists them]
#   bash scripts/evaluate.sh path/to/output --tasks piqa openbookqa --limit 200 --data_dir my/data
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

exec python "$root/entrypoints/evaluation/evaluate.py" "$@"
