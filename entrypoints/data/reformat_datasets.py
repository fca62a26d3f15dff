"""Turn the raw datasets under `data/raw` into training rows under `data/reformatted`.

Each dataset NAME becomes `NAME/data.jsonl`, one `{"dataset", "id", "messages"}` object a line; `report.json` beside
them says what became of every row.

    python entrypoints/data/reformat_datasets.py
    python entrypoints/data/reformat_datasets.py --raw_data_root data/sample --datasets alpaca
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data.formats import SOURCES
from utils.data.reformat_all import reformat_all
from utils.io.errors import run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--raw_data_root",
        type=Path,
        default=ROOT / "data" / "raw",
        help="folder with one folder for each dataset, named as below, as it came from the hub: JSON array, JSON lines "
        "or parquet, plain, .gz or .zst (default: data/raw of this repository)",
    )
    parser.add_argument(
        "--save_path",
        type=Path,
        default=ROOT / "data" / "reformatted",
        help="folder for NAME/data.jsonl and report.json (default: data/reformatted of this repository)",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help=f"datasets to do, all of which must be there; default: those that are there of {', '.join(SOURCES)}",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=os.cpu_count() or 1,
        help="datasets that are done at the same time, each in a process of its own (default: number of cores)",
    )
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="a damaged or unexpected row: `stop` ends its dataset with an error and writes no file for it, `skip` "
        "leaves the row out, keeps what is whole and counts the rest (default: stop)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    reformat_all(
        raw_data_root=arguments.raw_data_root,
        save_path=arguments.save_path,
        datasets=arguments.datasets,
        num_workers=arguments.num_workers,
        on_error=arguments.on_error,
    )


if __name__ == "__main__":
    run_command(main)
