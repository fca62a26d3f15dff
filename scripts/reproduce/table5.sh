#!/usr/bin/env bash
# Table 5: other models
#
#   bash scripts/reproduce/table5.sh [--scale small|paper] [--dry_run] [arguments for entrypoints/evaluation/reproduce.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/evaluation/reproduce.py" table5 "$@"
