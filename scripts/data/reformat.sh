#!/usr/bin/env bash
# Turns the raw datasets under data/raw into training rows under data/reformatted.
#
#   bash scripts/data/reformat.sh [arguments for entrypoints/data/reformat_datasets.py; --help lists them]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/data/reformat_datasets.py" "$@"
