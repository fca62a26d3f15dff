#!/usr/bin/env bash
# The recipe over capacities and seeds, beside static and random baselines, with a line of JSON for each run
#
#   bash scripts/reproduce/grid.sh [--scale small|paper] [--dry_run] [arguments for entrypoints/evaluation/reproduce.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/evaluation/reproduce.py" grid "$@"
