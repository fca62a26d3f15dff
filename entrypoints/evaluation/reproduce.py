#!/usr/bin/env python3
"""Reproduce a table or figure of the paper: train, evaluate, benchmark, and put our numbers beside the paper's.

    python entrypoints/evaluation/reproduce.py table2 --scale small --dry_run

Every step is one of the repository's own commands; --dry_run lists them with the time they take. A step that is done
is not done again, so an interrupted reproduction goes on when the same command is given again. At the end stand
OUTPUT_DIR/NAME/SCALE/table.md, result.json and, where the paper has a figure or the table asks for one, figure.png
and figure.svg; the table is printed and its path comes last.
"""

import argparse
import os
import shlex
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
    parser.add_argument("name", help="a file of configs/reproduce: table2, figure7, ...")
    parser.add_argument("--scale", choices=("small", "paper"), default="small", help="SmolLM2 on a CPU, or the paper's")
    parser.add_argument("--dry_run", action="store_true", help="list the steps and their time, and stop")
    parser.add_argument("--runs", nargs="+", default=[], help="only these runs (all)")
    parser.add_argument("--max_train_samples", type=int, help="rows of a training (the scale's)")
    parser.add_argument("--limit", type=int, help="items of a task (the scale's)")
    parser.add_argument("--data_dir", type=Path, help="local data for the evaluation instead of the hub's")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce"), help="(outputs/reproduce)")
    arguments = parser.parse_args()
    for name in ("max_train_samples", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    return arguments


def main() -> None:
    """Plan, run, collect."""
    arguments = parse_arguments()

    from utils.evaluation.reproduction import collect, estimate, figure_of, make_plan, markdown, run_plan
    from utils.io.files import atomic_file, write_json

    # steps run from the root of the repository, whose paths stay short where they are inside it
    data_dir = arguments.data_dir and arguments.data_dir.resolve()
    output_dir = ROOT / arguments.output_dir
    os.chdir(ROOT)
    if output_dir.is_relative_to(ROOT):
        output_dir = output_dir.relative_to(ROOT)
    plan = make_plan(
        arguments.name,
        arguments.scale,
        ROOT / "configs/reproduce",
        output_dir,
        only=arguments.runs,
        max_train_samples=arguments.max_train_samples,
        limit=arguments.limit,
        data_dir=data_dir,
    )
    if arguments.dry_run:
        for step in plan.steps:
            print(f"{'done' if step.is_done() else estimate([step]):>8}  {step.text}")
        left = [step for step in plan.steps if not step.is_done()]
        print(f"{estimate(left)} for {len(left)} of {len(plan.steps)} steps; {plan.scale['machine']}")
        return
    run_plan(plan, ROOT, dict(os.environ), say=lambda text: print(text, file=sys.stderr, flush=True))

    result = collect(plan)
    write_json(plan.folder / "result.json", result)
    figure = figure_of(plan, result)
    if figure:
        from utils.evaluation.plots import save_figure

        kind, value = figure
        write_json(plan.folder / "figure.json", value)
        save_figure(kind, value, plan.folder / "figure", title=plan.config["title"])
    script = ROOT / f"scripts/reproduce/{arguments.name}.sh"
    given = [a for a in sys.argv[1:] if a != arguments.name]
    table = markdown(result, shlex.join(["bash", str(script.relative_to(ROOT)), *given]))
    with atomic_file(plan.folder / "table.md") as file:
        file.write(table)
    print(table)
    print(plan.folder / "table.md")


if __name__ == "__main__":
    run_command(main)
