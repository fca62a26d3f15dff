#!/usr/bin/env bash
# Mixes reformatted datasets into data/mixed/data.jsonl.
#
#   bash scripts/data/mix.sh [arguments for entrypoints/data/mix_datasets.py; --help lists them]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/data/mix_datasets.py" "$@"
