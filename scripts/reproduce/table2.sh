#!/usr/bin/env bash
# Table 2: attention, MLP and block, by sequence and by token
#
#   bash scripts/reproduce/table2.sh [--scale small|paper] [--dry_run] [arguments for entrypoints/evaluation/reproduce.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/evaluation/reproduce.py" table2 "$@"
