#!/usr/bin/env bash
# Quality against computation skipped: ours, the published recipe, random routing, layers left out for all inputs
#
#   bash scripts/reproduce/frontier.sh [--scale small|paper] [--dry_run] [arguments for entrypoints/evaluation/reproduce.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/evaluation/reproduce.py" frontier "$@"
