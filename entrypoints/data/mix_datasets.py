"""Mix reformatted datasets by portions into one shuffled `data.jsonl`, with a manifest beside it.

    python entrypoints/data/mix_datasets.py
    python entrypoints/data/mix_datasets.py --portions alpaca=1 meta_math_qa=0.25 --dry_run

Rows are copied as they are, ids too: a row that is taken three times is there three times under its id.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data.mixing import find_parts, index_part, parse_portions, read_portions, write_mix
from utils.data.workers import clean_exit_on_sigterm
from utils.io.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--reformatted_dir",
        type=Path,
        default=ROOT / "data" / "reformatted",
        help="folder with NAME/data.jsonl for each dataset (default: data/reformatted of this repository)",
    )
    parser.add_argument(
        "--save_path",
        type=Path,
        default=ROOT / "data" / "mixed",
        help="folder for data.jsonl and manifest.json (default: data/mixed of this repository)",
    )
    parser.add_argument("--seed", type=int, default=233, help="seed of draw and order (default: 233, the method's)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--portions",
        nargs="+",
        metavar="NAME=NUMBER",
        help="mix exactly these datasets; 2.9 takes each row twice and nine tenths of the rows a third time",
    )
    choice.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "data" / "default_mix.yaml",
        help="YAML file with the portions (default: configs/data/default_mix.yaml, the method's mix)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check the inputs and say what would be written, but write nothing"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    portions = parse_portions(arguments.portions) if arguments.portions else read_portions(arguments.config)
    paths = find_parts(arguments.reformatted_dir, portions)
    parts = [index_part(name, path, portions[name]) for name, path in paths.items()]

    print(f"{'dataset':<18}{'rows':>9}{'portion':>9}{'taken':>9}")
    for part in parts:
        print(f"{part.name:<18}{part.rows:>9}{part.portion:>9}{part.taken:>9}")
    print(f"{'mix':<18}{sum(part.rows for part in parts):>9}{'':>9}{sum(part.taken for part in parts):>9}")
    if not any(part.taken for part in parts):
        raise UserError("the mix would be empty: the portions are too small for these datasets")
    if arguments.dry_run:
        print(f"dry run: would write {arguments.save_path / 'data.jsonl'}")
        return
    with clean_exit_on_sigterm():
        manifest = write_mix(parts, arguments.seed, arguments.save_path)
    print(f"{arguments.save_path / 'data.jsonl'}: {manifest['rows']} rows, SHA-256 {manifest['sha256']}")


if __name__ == "__main__":
    run_command(main)
