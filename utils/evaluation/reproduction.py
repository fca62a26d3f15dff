"""A table or figure of the paper as a list of steps: build, train, evaluate, benchmark, collect.

A file of `configs/reproduce` says which runs a table has, what the paper measured for each, and which of our numbers
stand beside it. `scales.yaml` says what a run is at each scale: which model, how many rows and items. A step is a
command that leaves a file; it is done where that file is there and was made by the same command. Nothing is kept in
memory between steps: what `collect` shows comes out of the files.
"""

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.io.errors import UserError, suggest
from utils.io.files import write_json
from utils.model.checkpoint import INDEX_FILE

from .plots import read_figure

METRICS: dict[str, str] = {
    "dense": "dense average (%)",
    "average": "average (%)",
    "without_rte": "without RTE (%)",
    "loss": "held-out loss",
    "loss_increase": "loss above dense",
    "capacity": "capacity",
    "speed": "speed",
    "kv_saved": "KV memory saved (%)",
}
"""Number that a run can show -> head of its column; tasks of the evaluation can be shown too, by their names."""


WHAT_IS_TRAINED = frozenset(
    (
        *("FOLDER_NAME", "BASE_MODEL", "DATA_TYPE", "TRAIN_FILE", "MAX_TRAIN_SAMPLES", "MAX_SEQ_LENGTH", "MOD_N"),
        *("GRANULARITY", "ROUTER_ONLY", "RECIPE", "TARGET_CAPACITY", "GRADIENT_SCALE", "LEARNING_RATE", "WARMUP"),
        *("WEIGHT_DECAY", "NUM_EPOCHS", "SEED", "GLOBAL_BATCH_SIZE", "OUTPUT_DIR", "DRY_RUN"),
    )
)
"""Fields of `scripts/finetune_mod.sh` that a step's own description sets or leaves at their defaults."""


@dataclass(frozen=True)
class Step:
    """One command of a reproduction.

    Args:
        run, kind: of which run it is, and `build`, `train`, `baseline`, `evaluate` or `benchmark`.
        command: what is executed, from the root of the repository.
        environment: set for it.
        makes: the file that is there when it is done.
        minutes: how long it takes, about.
    """

    run: str
    kind: str
    command: tuple[str, ...]
    makes: Path
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The step as one would type it."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.command)])

    @property
    def record(self) -> Path:
        """Where it is written down by which command the step was done, and in what time."""
        return self.makes.with_name(f".{self.kind}-{self.makes.name}.step.json")

    def is_done(self) -> bool:
        """Tell whether the step's file is there.

        Raises:
            UserError: another command made it.
        """
        if not self.makes.exists():
            return False
        if self.record.is_file() and json.loads(self.record.read_text(encoding="utf-8"))["command"] != self.text:
            raise UserError(
                f"{self.makes} was made by another command than {self.text!r}: remove {self.makes.parent}, or choose "
                "another --output_dir"
            )
        return True


@dataclass(frozen=True)
class Plan:
    """All of a reproduction at one scale.

    Args:
        config, scale: the table's file and the scale's entry, as they are in YAML.
        runs: the runs that are done at this scale, from the table's file.
        left_out: names of those that are not.
        steps: in order.
        folder: where all of it goes.
    """

    config: dict[str, Any]
    scale: dict[str, Any]
    runs: list[dict[str, Any]]
    left_out: list[str]
    steps: list[Step]
    folder: Path


def make_plan(
    name: str,
    scale_name: str,
    configs: Path,
    output_dir: Path,
    only: Sequence[str] = (),
    max_train_samples: int | None = None,
    limit: int | None = None,
    data_dir: Path | None = None,
) -> Plan:
    """Read a table's file and lay out its steps; runs nothing.

    Args:
        name: of the file in `configs`, such as `table2`.
        scale_name: an entry of `scales.yaml`.
        only: names of runs; none for all.
        max_train_samples, limit: rows and items instead of the scale's.
        data_dir: local data for the evaluation.

    Raises:
        UserError: there is no such table, scale or run.
    """
    tables = sorted(path.stem for path in configs.glob("*.yaml") if path.stem != "scales")
    if name not in tables:
        raise UserError(f"{name!r}{suggest(name, tables)} is none of {', '.join(tables)}")
    config = yaml.safe_load((configs / f"{name}.yaml").read_text(encoding="utf-8"))
    scales = yaml.safe_load((configs / "scales.yaml").read_text(encoding="utf-8"))
    scale = scales[scale_name]
    changed = [
        f"{n} {what}" for n, what in ((max_train_samples, "rows"), (limit, "items of each task")) if n is not None
    ]
    if changed:
        scale["description"] += f" This one was made with {' and '.join(changed)} only."
    names = [run["name"] for run in config["runs"]]
    for run in only:
        if run not in names:
            raise UserError(f"run {run!r}{suggest(run, names)} is none of {name}'s: {', '.join(names)}")
    runs = [
        run
        for run in config["runs"]
        if scale_name in run.get("scales", config.get("scales", list(scales))) and (not only or run["name"] in only)
    ]
    folder = output_dir / name / scale_name
    steps = [
        step
        for run in runs
        for step in _steps_of(run, config, scale, scale_name, folder, max_train_samples, limit, data_dir)
    ]
    steps = list({step.makes: step for step in steps}.values())  # runs may share a checkpoint to start from
    left_out = [run for run in names if run not in {run["name"] for run in runs}]
    return Plan(config, scale, runs, left_out, steps, folder)


def run_folder(folder: Path, run: str) -> Path:
    """Return where a run's files go: its name, without what a path had better not hold."""
    return folder / re.sub(r"[^\w.]+", "_", run).strip("_")


def run_step(step: Step, root: Path, environment: dict[str, str]) -> None:
    """Execute a step and write down that it is done.

    Args:
        environment: for all steps; what it says about the training (`WHAT_IS_TRAINED`) does not reach them.

    Raises:
        UserError: it failed; its own message stands above.
    """
    step.makes.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    passed_on = {name: value for name, value in environment.items() if name not in WHAT_IS_TRAINED}
    result = subprocess.run(step.command, cwd=root, env={**passed_on, **step.environment}, check=False)
    if result.returncode == 130:
        raise KeyboardInterrupt
    if result.returncode or not step.makes.exists():
        raise UserError(
            f"{step.run}, {step.kind}: failed with exit code {result.returncode}; given again, this command goes on "
            f"from there: {step.text}"
        )
    write_json(step.record, {"command": step.text, "seconds": time.perf_counter() - start})


def collect(plan: Plan) -> dict[str, Any]:
    """Gather what the runs' files say.

    Returns:
        `title`, `scale`, `rows` (each with `name`, `ours` and `paper`: metric -> number), `dense`, `paper_only` and
        `left_out`.
    """
    rows = []
    dense: dict[str, float] = {}
    for run in plan.runs:
        measured, base = _numbers(run_folder(plan.folder, run["name"]))
        measured |= {"dense": base["average"]} if "average" in base else {}
        dense = dense or base
        rows.append({"name": run["name"], "ours": measured, "paper": run.get("paper", {}), "x": run.get("x")})
    return {
        "title": plan.config["title"],
        "scale": plan.scale["description"],
        "metrics": plan.config["metrics"],
        "rows": rows,
        "dense": {"ours": dense, "paper": plan.config.get("paper_dense", {})},
        "paper_only": [run["name"] for run in plan.runs if run.get("paper_only")],
        "left_out": plan.left_out,
    }


def markdown(result: dict[str, Any], command: str) -> str:
    """Return the table, ours beside the paper's, with what it was made by."""
    metrics = result["metrics"]
    heads = ["", *(f"{METRICS.get(m, m)}{who}" for m in metrics for who in (", ours", ", paper"))]
    lines = [f"# {result['title']}", "", f"{result['scale']} Made by `{command}`.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    # where the runs have several bases, each row has its own
    bases = [] if "dense" in metrics else [{"name": "dense", **result["dense"]}]
    for row in [*bases, *result["rows"]]:
        cells = [_cell(row[who], metric) for metric in metrics for who in ("ours", "paper")]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    if result["paper_only"]:
        lines += ["", f"The paper's number alone, as there is no code for it here: {', '.join(result['paper_only'])}."]
    if result["left_out"]:
        lines += ["", f"Not at this scale: {', '.join(result['left_out'])}."]
    return "\n".join(lines) + "\n"


def figure_of(plan: Plan, result: dict[str, Any]) -> tuple[str, Any] | None:
    """Return kind and value of the plan's figure for `plots.save_figure`; None where it has none or lacks numbers."""
    wanted = plan.config.get("figure")
    if not wanted:
        return None
    rows = [row for row in result["rows"] if wanted.get("y") in row["ours"]]
    if wanted["kind"] == "layers":
        rows = result["rows"]
        shares = {row["name"]: row["ours"].get("layers") for row in rows}
        shares = {name: value for name, value in shares.items() if value}
        return ("layers", shares) if shares else None
    if wanted["kind"] == "experts":
        evaluations = [_read(run_folder(plan.folder, run["name"]) / "evaluation.json") for run in plan.runs]
        whole = [value for value in evaluations if value]
        return ("experts", read_figure("experts", [("", whole[0])])) if whole else None
    y_label = METRICS.get(wanted["y"], wanted["y"])
    if wanted["kind"] == "pareto":
        points = [{"name": row["name"], "x": row["ours"]["speed"], "y": row["ours"][wanted["y"]]} for row in rows]
        if wanted["y"] in result["dense"]["ours"]:
            points.append({"name": "dense", "x": 1.0, "y": result["dense"]["ours"][wanted["y"]]})
        value = {"x_label": "speed relative to dense", "y_label": y_label, "points": points}
        return ("pareto", value | {"less_is_better": wanted["y"].startswith("loss")}) if points else None
    series: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = re.split(r"[ ,]", row["name"])[0] if wanted.get("by_first_word") else "routed"
        one = series.setdefault(name, {"name": name, "x": [], "y": []})
        one["x"].append(row["x"])
        one["y"].append(row["ours"][wanted["y"]])
    value = {"x_label": wanted["x_label"], "y_label": y_label, "series": list(series.values())}
    return ("series", value | {"dense": result["dense"]["ours"].get(wanted["y"])}) if series else None


def estimate(steps: Sequence[Step]) -> str:
    """Return the steps' time as text."""
    minutes = sum(step.minutes for step in steps)
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"


def run_plan(plan: Plan, root: Path, environment: dict[str, str], say: Callable[[str], None]) -> None:
    """Execute the steps that are not done yet, in order."""
    for number, step in enumerate(plan.steps, start=1):
        where = f"[{number}/{len(plan.steps)}] {step.run}, {step.kind}"
        if step.is_done():
            say(f"{where}: done before")
            continue
        say(f"{where}: about {estimate([step])}\n  {step.text}")
        run_step(step, root, environment)


def _steps_of(
    run: dict[str, Any],
    config: dict[str, Any],
    scale: dict[str, Any],
    scale_name: str,
    folder: Path,
    max_train_samples: int | None,
    limit: int | None,
    data_dir: Path | None,
) -> list[Step]:
    if run.get("paper_only"):
        return []
    model = run.get("model", config.get("model", {})).get(scale_name) or scale["model"]
    output = run_folder(folder, run["name"])
    checkpoint = output / "checkpoint"
    environment = {"FOLDER_NAME": model["folder"], "OUTPUT_DIR": str(checkpoint)}
    if "base" in model:
        environment["BASE_MODEL"] = model["base"]
    for source in (scale, config, run):
        environment |= {name: str(value) for name, value in source.get("environment", {}).items()}
    if max_train_samples is not None:
        environment["MAX_TRAIN_SAMPLES"] = str(max_train_samples)
    build = ["python", "entrypoints/checkpoint/build_mod_checkpoint.py", "--folder_name", model["folder"]]
    build += ["--base_model", model["base"]] if "base" in model else []
    build += [str(a) for a in model.get("build_arguments", ())]
    arguments = [str(a) for source in (scale, config, run) for a in source.get("train_arguments", ())]
    evaluate = ["bash", "scripts/evaluate.sh", str(checkpoint), "--output", str(output / "evaluation.json")]
    evaluate += [str(a) for a in config.get("evaluate_arguments", scale["evaluate_arguments"])]
    evaluate += [] if limit is None else ["--limit", str(limit)]
    evaluate += [] if data_dir is None else ["--data_dir", str(data_dir)]
    benchmark = ["bash", "scripts/benchmark.sh", str(checkpoint), "--output", str(output / "benchmark.json")]
    benchmark += [str(a) for a in scale["benchmark_arguments"]]
    train = ["bash", "scripts/finetune_mod.sh", *arguments]
    made = {"train": (train, checkpoint / INDEX_FILE, environment)}
    if "baseline" in run:
        made = {"baseline": (_baseline(run["baseline"], environment), checkpoint / INDEX_FILE, {})}
    steps = {  # kind -> command, what it makes, its environment
        "build": (build, Path("ckpt") / model["folder"] / INDEX_FILE, {}),
        **made,
        "evaluate": (evaluate, output / "evaluation.json", {}),
        "benchmark": (benchmark, output / "benchmark.json", {}),
    }
    return [
        Step(run["name"], kind, tuple(command), makes, scale["minutes"][kind], environment)
        for kind, (command, makes, environment) in steps.items()
        if kind in made or kind in config.get("steps", steps)
    ]


def _baseline(kind: str, environment: dict[str, str]) -> list[str]:
    """Return the command that makes a checkpoint without training, for what a training would have been set to."""
    checkpoint, output = f"ckpt/{environment['FOLDER_NAME']}", environment["OUTPUT_DIR"]
    capacity = float(environment.get("TARGET_CAPACITY", 0.5))
    if kind == "expert_drop":
        share = ["--share", f"{1 - capacity:g}"]
        return ["python", "entrypoints/checkpoint/drop_experts.py", checkpoint, output, *share]
    options = {
        "model_name_or_path": checkpoint,
        "output_dir": output,
        "train_file": _train_file(environment["DATA_TYPE"]),
        "capacity": f"{capacity:g}",
        "granularity": environment["GRANULARITY"],
        "max_seq_length": environment["MAX_SEQ_LENGTH"],
    }
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["python", "entrypoints/checkpoint/build_baseline.py", kind, *given]


def _train_file(data_type: str) -> str:
    """Return the file that `scripts/finetune_mod.sh` trains on."""
    if data_type == "mixed":
        return "data/mixed/data.jsonl"
    there = any(Path(folder, data_type).exists() for folder in ("data/reformatted", "data/raw"))
    return f"data/{'' if there or data_type != 'alpaca' else 'sample/'}reformatted/{data_type}/data.jsonl"


def _numbers(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what a run's files say of it, and of its dense base."""
    ours: dict[str, Any] = {}
    dense: dict[str, float] = {}
    report = _read(folder / "checkpoint/results.json")
    if report:
        held_out = report["held_out"]
        ours |= {"loss": held_out["routed"]["eval_loss"], "capacity": held_out["routed"]["eval_capacity"]}
        dense |= {"loss": held_out["dense"]["dense_loss"], "capacity": 1.0}
        ours["loss_increase"] = ours["loss"] - dense["loss"]
        prefix = "eval_capacity/layer_"
        routed = held_out["routed"].items()
        ours["layers"] = {name.removeprefix(prefix): share for name, share in routed if name.startswith(prefix)}
    evaluation = _read(folder / "evaluation.json")
    if evaluation:
        for name, numbers in (("routed", ours), ("dense", dense)):
            numbers |= {task: 100 * result["value"] for task, result in evaluation["rows"].get(name, {}).items()}
            means = [mean for mean in evaluation["averages"].get(name, []) if mean]
            numbers |= {mean["name"].replace(" ", "_").lower(): 100 * mean["value"] for mean in means}
        counted = [task.get("capacity") for task in evaluation["rows"].get("routed", {}).values()]
        if any(counted) and "capacity" not in ours:  # of a baseline that reports no held-out rows
            ours["capacity"] = sum(capacity["capacity"] for capacity in counted) / len(counted)
    benchmark = _read(folder / "benchmark.json")
    if benchmark:
        columns = benchmark["cells"][-1]["columns"]
        seconds = {name: _generation_seconds(columns[name]) for name in ("dense", "tuned")}
        ours["speed"] = seconds["dense"] / seconds["tuned"]
        ours["kv_saved"] = 100 * (1 - columns["tuned"]["kv_bytes"] / columns["dense"]["kv_bytes"])
        dense |= {"speed": 1.0, "kv_saved": 0.0}
    return ours, dense


def _generation_seconds(column: dict[str, Any]) -> float:
    """Return what a whole generation takes, as the paper's speed counts it: prefill and decode."""
    return sum(column[phase]["seconds"]["median"] for phase in ("prefill", "decode") if phase in column)


def _cell(numbers: dict[str, Any], metric: str) -> str:
    value = numbers.get(metric)
    if value is None:
        return "-"
    return f"{value:.2f}x" if metric == "speed" else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
