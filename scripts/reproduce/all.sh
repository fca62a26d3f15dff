#!/usr/bin/env bash
# Every table and figure, one after the other; what fails stops nothing else
#
#   bash scripts/reproduce/all.sh [--scale small|paper] [--dry_run] [arguments for entrypoints/evaluation/reproduce.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/evaluation/reproduce.py" all "$@"
