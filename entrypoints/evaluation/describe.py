#!/usr/bin/env python3
"""Say what a MoD checkpoint is: base, routed layers, thresholds, capacity seen in training, routers, savings.

    python entrypoints/evaluation/describe.py path/to/output --lengths 512 2048 --batch 64

Reads `config.json`, `results.json` of the training run where it is there, and the headers of the weights: no model is
loaded, so a folder of ckpt/ whose weights are not built yet will do. FLOPs are those of one prefill.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.errors import run_command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "ckpt/smollm2-135m-mod"
    parser.add_argument("checkpoint", nargs="?", type=Path, default=default, help=f"MoD checkpoint ({default})")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens (512 2048 8192)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (1)")
    parser.add_argument("--capacity", type=float, help="share executed (the run's, or its target)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    for name, values in (("lengths", arguments.lengths), ("batch", [arguments.batch])):
        if min(values) < 1:
            parser.error(f"--{name} {min(values)} must be at least 1")
    if arguments.capacity is not None and not 0 < arguments.capacity <= 1:
        parser.error(f"--capacity {arguments.capacity} must be above 0 and at most 1")
    return arguments


def main() -> None:
    """Inspect and print."""
    arguments = parse_arguments()

    from utils.evaluation.inspection import describe_checkpoint, inspect_checkpoint

    facts = inspect_checkpoint(arguments.checkpoint, arguments.lengths, arguments.batch, arguments.capacity)
    print(json.dumps(facts, indent=2) if arguments.json else describe_checkpoint(facts))


if __name__ == "__main__":
    run_command(main)
