#!/usr/bin/env python3
"""Draw a figure from JSON, as PNG and SVG.

python entrypoints/evaluation/plot.py layers path/to/output/results.json --output outputs/skipped
python entrypoints/evaluation/plot.py training path/to/output/trainer_state.json --output outputs/training

layers     share of inputs that each layer skips (Figure 4): results.json of training runs, or an evaluation's JSON
training   loss and capacity over the steps: trainer_state.json of training runs
experts    assigned and executed tokens by expert (Figure 8): JSON of expert_load.py or of an evaluation
series     quality against what was varied (Figures 5, 6, 7): {"x_label", "y_label", "dense", "series": [...]}
serving    what a routed server takes over its dense base: JSON of scripts/benchmark_serving.sh
pareto     quality against measured speed: {"x_label", "y_label", "points": [{"name", "x", "y"}, ...]}, or JSON lines
           with "name", "granularity" and numbers, of which --x and --y are drawn, a line for each name
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.errors import UserError, run_command


def main() -> None:
    """Read, draw, and print the paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = ("layers", "training", "experts", "series", "pareto", "serving")
    parser.add_argument("kind", choices=kinds, help="what to draw")
    parser.add_argument("files", type=Path, nargs="+", help="JSON")
    parser.add_argument("--names", nargs="+", help="names of the files in the legend (their folders')")
    parser.add_argument("--output", type=Path, required=True, help="path without an ending")
    parser.add_argument("--layer", type=int, help="whose experts are drawn (the first routed one)")
    parser.add_argument("--x", default="capacity", help="of JSON lines (capacity)")
    parser.add_argument("--y", default="loss_increase", help="of JSON lines (loss_increase)")
    parser.add_argument("--title", help="above the figure")
    arguments = parser.parse_args()
    names = arguments.names or [path.resolve().parent.name for path in arguments.files]
    if len(names) != len(arguments.files) or len(set(names)) != len(names):
        raise UserError(f"{len(arguments.files)} files need as many different --names, and {len(set(names))} are given")

    from utils.evaluation.plots import pareto_of, read_figure, save_figure

    values = []
    for name, path in zip(names, arguments.files, strict=True):
        try:
            text = path.read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else None
            values.append((name, json.loads(text) if lines is None else pareto_of(lines, arguments.x, arguments.y)))
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"{path}: not JSON: {error}") from None
    for path in save_figure(
        arguments.kind,
        read_figure(arguments.kind, values, arguments.layer),
        arguments.output,
        title=arguments.title,
    ):
        print(path)


if __name__ == "__main__":
    run_command(main)
