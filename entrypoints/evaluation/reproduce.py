#!/usr/bin/env python3
"""Reproduce a table or figure of the paper: train, evaluate, benchmark, and put our numbers beside the paper's.

    python entrypoints/evaluation/reproduce.py table2 --scale small --dry_run
    python entrypoints/evaluation/reproduce.py all --scale small

Every step is one of the repository's own commands; --dry_run lists them with the time they take. A step that is done
is not done again, neither for another table, so an interrupted reproduction goes on when the same command is given
again. A run that fails stops no other. At the end stand OUTPUT_DIR/SCALE/NAME/table.md, result.json and, where the
paper has a figure or the table asks for one, figure.json, figure.png and figure.svg; of the grid runs.jsonl too, a
line for each run. The table is printed and its path comes last. --publish writes the same files into a second folder,
if nothing failed.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "name", help="a file of configs/reproduce: table2, figure7, grid, ...; or all: every table and figure"
    )
    parser.add_argument("--scale", choices=("small", "paper"), default="small", help="SmolLM2 on a CPU, or the paper's")
    parser.add_argument("--dry_run", action="store_true", help="list the steps and their time, and stop")
    parser.add_argument("--runs", nargs="+", default=[], help="only these runs of a table (all)")
    parser.add_argument("--max_train_samples", type=int, help="rows of a training (the scale's)")
    parser.add_argument("--limit", type=int, help="items of a task (the scale's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of training, evaluation and benchmark (float32, on a GPU bfloat16); bfloat16 is about three times as "
        "fast on CPUs with AMX",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the CPU cores (1)")
    parser.add_argument("--data_dir", type=Path, help="local data for the evaluation instead of the hub's")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs/reproduce", help="(outputs/reproduce)")
    parser.add_argument("--publish", type=Path, help="folder for a second copy of what is made in the end")
    arguments = parser.parse_args()
    for name in ("max_train_samples", "limit", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    if arguments.name == "all" and arguments.runs:
        parser.error("--runs chooses among the runs of one table, and all has many")
    return arguments


def main() -> None:
    """Plan, run, collect."""
    arguments = parse_arguments()

    from utils.evaluation.reproduction import Changes, estimate, make_plan, run_plan, table_names, unique_steps

    configs = ROOT / "configs/reproduce"
    data_dir, output_dir, publish = (
        path and inside_root(path) for path in (arguments.data_dir, arguments.output_dir, arguments.publish)
    )
    os.chdir(ROOT)
    changes = Changes(arguments.max_train_samples, arguments.limit, data_dir, arguments.dtype)
    names = [arguments.name]
    if arguments.name == "all":
        names = [name for name in table_names(configs) if name.startswith(("table", "figure"))]
    plans = [make_plan(name, arguments.scale, configs, output_dir, arguments.runs, changes) for name in names]
    steps = unique_steps(plans)
    done = [step.is_done() for step in steps]  # refuses files of other commands before anything runs
    if arguments.dry_run:
        for step, is_done in zip(steps, done, strict=True):
            print(f"{'done' if is_done else estimate([step]):>8}  {step.text}")
        left = [step for step, is_done in zip(steps, done, strict=True) if not is_done]
        at_once = f", {arguments.jobs} runs at a time" if arguments.jobs > 1 else ""
        print(f"{estimate(left, arguments.jobs)} for {len(left)} of {len(steps)} steps{at_once}; {plans[0].machine}")
        return

    # the steps are run by the Python that runs this
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    if arguments.jobs > 1 and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    failed: dict[Path, str] = {}
    for plan in plans:
        runs = run_plan(plan, ROOT, environment, failed, say, arguments.jobs)
        table = write(plan, runs, plan.folder, arguments)
        if publish and not runs:
            write(plan, runs, publish / arguments.scale / plan.name, arguments)
        print(table)
        print(plan.folder / "table.md")
    if failed:
        raise UserError(f"{len(failed)} of {len(steps)} steps failed; the first one {next(iter(failed.values()))}")


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def inside_root(path: Path) -> Path:
    """Return a path that holds from the root of the repository, where the steps run; short where it is inside it."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def write(plan, failed: list[str], folder: Path, arguments: argparse.Namespace) -> str:
    """Write table, figure and the numbers of both into a folder; returns the table."""
    from utils.evaluation.plots import save_figure
    from utils.evaluation.results_table import collect, figure_of, markdown
    from utils.io.files import atomic_file, write_json

    result = collect(plan, failed)
    write_json(folder / "result.json", result)
    if result["lines"]:
        with atomic_file(folder / "runs.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in result["lines"])
    table = markdown(result, command_of(plan.name, arguments))
    figure = figure_of(plan, result)
    if figure:
        kind, value = figure
        write_json(folder / "figure.json", value)
        save_figure(kind, value, folder / "figure", title=plan.config["title"])
        table += "\n![figure](figure.png)\n"
    with atomic_file(folder / "table.md") as file:
        file.write(table)
    return table


def command_of(name: str, arguments: argparse.Namespace) -> str:
    """Return the command that makes a table, on whatever machine: where files lie is left open."""
    command = ["bash", f"scripts/reproduce/{name}.sh", "--scale", arguments.scale]
    for option in ("dtype", "max_train_samples", "limit"):
        value = getattr(arguments, option)
        command += [] if value is None else [f"--{option}", str(value)]
    command += ["--runs", *arguments.runs] if arguments.runs else []
    return shlex.join(command) + (" --data_dir FOLDER" if arguments.data_dir else "")


if __name__ == "__main__":
    run_command(main)
