"""Download the six raw datasets from the Hugging Face hub into `data/raw`, at fixed commits, and check them.

    python entrypoints/data/download_datasets.py
    python entrypoints/data/download_datasets.py --datasets alpaca meta_math_qa

An interrupted download is resumed by the same command; files that are there and whole are not fetched again. All six
take about 2.5 GB.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.errors import run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="datasets to download (default: all of --config)")
    parser.add_argument(
        "--raw_data_root",
        type=Path,
        default=ROOT / "data" / "raw",
        help="folder for NAME/... of each dataset (default: data/raw of this repository)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "data" / "hub_datasets.yaml",
        help="YAML file with repository, revision and files of each dataset (default: configs/data/hub_datasets.yaml)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from utils.data.download import choose, download, read_hub_datasets  # costs half a second, not to be paid by --help

    sources = choose(read_hub_datasets(arguments.config), arguments.datasets)
    for name, source in sources.items():
        print(f"{name}: {source.repo} at {source.revision}", flush=True)
        record = download(name, source, arguments.raw_data_root)
        size = sum(file["bytes"] for file in record["files"].values())
        print(f"  {len(record['files'])} files, {size / 1e6:.1f} MB, commit {record['commit']}, hashes right")


if __name__ == "__main__":
    run_command(main)
