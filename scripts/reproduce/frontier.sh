#!/usr/bin/env bash
# Quality in use against measured speed: dense, static, and one routed checkpoint at several capacities
#
#   bash scripts/reproduce/frontier.sh [--scale small|paper] [--dry_run] [arguments for entrypoints/evaluation/reproduce.py]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/evaluation/reproduce.py" frontier "$@"
