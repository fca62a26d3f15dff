#!/usr/bin/env bash
# Runs the checks and the tests.
#
#   bash scripts/test.sh [--tier default|slow|gpu|serve|all] [arguments for pytest]
#
#   default  fast tests, offline, on a CPU
#   slow     tests that take minutes, such as whole training runs
#   gpu      tests that need a CUDA device
#   serve    tests of the vLLM plugin against the real engine, in .venv-serve, which is made if it isn't there; with
#            `-m "serve and not slow"` a short form of a few minutes
#   all      every test but those of serve; those that need a device that is not here are skipped
#
# Lint, format and shell checks run with every tier. The exit code is not zero when any step failed, and the last lines
# say which; with nothing failed, the last line is pytest's summary.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

tier=default
pytest_arguments=()
while (($#)); do
  case "$1" in
    --tier)
      tier="${2:-}"
      shift 2 || shift
      ;;
    --tier=*)
      tier="${1#*=}"
      shift
      ;;
    -h | --help)
      sed -n '2,/^set /{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      pytest_arguments+=("$1")
      shift
      ;;
  esac
done
case "$tier" in
  default) markers=() ;; # as pyproject.toml has it: not slow and not gpu
  slow) markers=(-m "slow and not gpu and not serve") ;;
  gpu) markers=(-m gpu) ;;
  serve) markers=(-m serve) ;;
  all) markers=(-m "not serve") ;;
  *)
    echo "error: --tier ${tier:-(nothing)}: allowed are default, slow, gpu, serve and all" >&2
    exit 2
    ;;
esac

# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh

failed=()
step() {
  local name="$1"
  shift
  printf '== %s\n' "$name"
  "$@" || failed+=("$name")
}

check_shell() {
  local scripts=(.ci/run) script
  while IFS= read -r -d '' script; do
    scripts+=("$script")
  done < <(find scripts -name '*.sh' -print0)
  shellcheck "${scripts[@]}"
}

step "ruff check" python -m ruff check .
step "ruff format" python -m ruff format --check .
step "shellcheck" check_shell
if [[ "$tier" == serve ]]; then
  serving="$(bash scripts/setup_serve.sh)" # another vLLM, torch and transformers than those of training
  export PATH="$serving/bin:$PATH" VIRTUAL_ENV="$serving"
  pytest_arguments=(tests/serving ${pytest_arguments[@]+"${pytest_arguments[@]}"})
fi
step "pytest ($tier)" python -m pytest ${markers[@]+"${markers[@]}"} ${pytest_arguments[@]+"${pytest_arguments[@]}"}

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
