#!/usr/bin/env python3
"""Publish a run's routers on the hub: the small files of its output, and a model card with the results.

    python entrypoints/checkpoint/publish.py path/to/output OWNER/NAME --base_model OWNER/BASE

The base's weights stay where they are. `build_mod_checkpoint.py --routers OWNER/NAME` puts the routers on it again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.io.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="output directory of a run")
    parser.add_argument("repository", nargs="?", help="OWNER/NAME on the hub")
    parser.add_argument("--base_model", help="hub name of the base (what the checkpoint has)")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--folder", type=Path, help="write what would be published into this new folder, no more")
    return parser.parse_args()


def main() -> None:
    from utils.io.files import atomic_directory, read_json
    from utils.model.publishing import published, stage
    from utils.pipeline.report import run_table

    args = parse_arguments()
    if (args.repository is None) == (args.folder is None):
        raise UserError("say where to publish: either OWNER/NAME on the hub, or --folder")
    results, table = args.checkpoint / "results.json", ""
    if results.is_file():
        try:
            table = run_table(read_json(results))
        except (KeyError, TypeError):  # of a recalibration or a baseline, which have no such table
            table = ""
    if args.folder is not None:
        if args.folder.exists():
            raise UserError(f"folder {args.folder} is there already; choose another")
        with atomic_directory(args.folder) as unfinished:
            stage(args.checkpoint, unfinished, args.base_model, table)
        print(args.folder)
    else:
        print(published(args.checkpoint, args.repository, args.base_model, table, args.private))


if __name__ == "__main__":
    run_command(main)
