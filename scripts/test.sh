#!/usr/bin/env bash
# Runs the checks and the tests.
#
#   bash scripts/test.sh [--tier default|slow|gpu|all] [arguments for pytest]
#
#   default  fast tests, offline, on a CPU
#   slow     tests that take minutes, such as whole training runs
#   gpu      tests that need a CUDA device
#   all      every test; those that need a device that is not here are skipped
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
  slow) markers=(-m "slow and not gpu") ;;
  gpu) markers=(-m gpu) ;;
  all) markers=(-m "") ;;
  *)
    echo "error: --tier ${tier:-(nothing)}: allowed are default, slow, gpu and all" >&2
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
step "pytest ($tier)" python -m pytest ${markers[@]+"${markers[@]}"} ${pytest_arguments[@]+"${pytest_arguments[@]}"}

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
