#!/usr/bin/env bash
# Measures what skipping saves in a server: vLLM's load generator against a routed checkpoint and its dense base in turn,
# a prefill, then 1, 8 and 32 requests at a time, then a rate. Prints a table, writes JSON, and prints the
# JSON's path last.
#
#   bash scripts/benchmark_serving.sh path/to/output [--capacity SHARE] [--repeats N] [--scale X] [--rate R]
#                                     [--text FILE] [--output FILE.json] [--serve "vLLM's arguments for both"]
#
# Prompts are cut out of the embedded sample (--text for others). Processor time is that of the process that computes.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  "" | -*)
    echo "error: benchmark_serving.sh ${1:-}: the first argument is a checkpoint (--help for more)" >&2
    exit 1
    ;;
esac
[[ -d "$1" ]] || {
  echo "error: $1: no such directory; give the output directory of a training" >&2
  exit 1
}

venv="$(bash "$root/scripts/setup_serve.sh")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
# Otherwise glibc gives the memory of activations back to the system all the time, and fetching it again costs page faults,
# of a routed layer, which has more of them, more than of a dense one.
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2000000000}" MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"

defaults=()
[[ " $* " == *" --text"* ]] || defaults+=(--text "$root/data/sample/alpaca/alpaca_data.json")
[[ " $* " == *" --output"* ]] || defaults+=(--output "$root/outputs/serving/$(date +%Y%m%d-%H%M%S)/serving.json")
exec "$venv/bin/python" -m router_tuning_vllm.benchmark "$@" ${defaults[@]+"${defaults[@]}"}
