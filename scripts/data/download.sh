#!/usr/bin/env bash
# Downloads the raw datasets from the Hugging Face hub into data/raw.
#
#   bash scripts/data/download.sh [arguments for entrypoints/data/download_datasets.py; --help lists them]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

exec python "$root/entrypoints/data/download_datasets.py" "$@"
