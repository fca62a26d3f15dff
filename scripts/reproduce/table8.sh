#!/usr/bin/env bash
# Table 8: LoRA and Router-Tuning together
#
#   bash scripts/reproduce/table8.sh [--scale small|paper] [--dry_run] [arguments for entrypoints/evaluation/reproduce.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/evaluation/reproduce.py" table8 "$@"
