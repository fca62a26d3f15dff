"""A table or figure of the paper as a list of steps: data, build, train, evaluate, benchmark.

A file of `configs/reproduce` says which runs a table has, what the paper measured for each, and which of our numbers
stand beside it. `scales.yaml` says what a run is at each scale: which model, how many rows and items. A step is a
command that leaves a file; it is done where that file is there and was made by the same command. A run's folder is
named after what makes its checkpoint, so tables that have a run in common share its training, evaluation and
benchmark. Nothing is kept in memory between steps: what `results_table.py` shows comes out of the files.
"""

import fcntl
import hashlib
import itertools
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.io.code import digest_of_code
from utils.io.errors import UserError, suggest
from utils.io.files import write_json
from utils.model.checkpoint import INDEX_FILE

WHAT_IS_TRAINED = frozenset(
    (
        *("FOLDER_NAME", "BASE_MODEL", "DATA_TYPE", "TRAIN_FILE", "MAX_TRAIN_SAMPLES", "MAX_SEQ_LENGTH", "MOD_N"),
        *("GRANULARITY", "ROUTER_ONLY", "RECIPE", "TARGET_CAPACITY", "TARGET_SKIPPED", "GRADIENT_SCALE"),
        *("LEARNING_RATE", "WARMUP", "WEIGHT_DECAY", "NUM_EPOCHS", "SEED", "GLOBAL_BATCH_SIZE"),
        *("OUTPUT_DIR", "DRY_RUN"),
    )
)
"""Fields of `scripts/finetune_mod.sh` that a step's own description sets or leaves at their defaults."""

TRAINING = ("utils/data", "utils/model", "utils/pipeline")
CODE = {
    "data": ("utils/data", "entrypoints/data"),
    "build": ("utils/model", "entrypoints/checkpoint/build_mod_checkpoint.py"),
    "train": (*TRAINING, "entrypoints/finetune/finetune_mod.py"),
    "baseline": (*TRAINING, "entrypoints/checkpoint/build_baseline.py"),
    "evaluate": ("utils/model", "utils/evaluation", "entrypoints/evaluation/evaluate.py"),
    "benchmark": ("utils/model", "utils/evaluation", "entrypoints/evaluation/benchmark.py"),
}
"""Kind of a step -> the code that its result follows from. A record without it is of before code was recorded."""

SAMPLE = Path("data/sample")
"""Rows of Alpaca that are in the repository; they are trained on where there is no other data."""


@dataclass(frozen=True)
class Step:
    """One command of a reproduction.

    Args:
        kind: `data`, `build`, `train`, `baseline`, `evaluate` or `benchmark`.
        command: what is executed, from the root of the repository.
        makes: the file that is there when it is done.
        minutes: how long it takes, about.
        environment: set for it.
    """

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

    @property
    def code(self) -> str:
        """What code makes it, as a hash; comments don't count."""
        return digest_of_code(*CODE[self.kind])

    def is_done(self) -> bool:
        """Tell whether the step's file is there.

        Raises:
            UserError: another command made it, or other code.
        """
        if not self.makes.exists():
            return False
        if self.record.is_file():
            before = json.loads(self.record.read_text(encoding="utf-8"))
            if before["command"] != self.text:
                raise UserError(
                    f"{self.makes} was made by another command, {before['command']!r} and not {self.text!r}: remove "
                    "it, or choose another --output_dir"
                )
            if before.get("code") not in (None, self.code):
                raise UserError(
                    f"{self.makes} was made by other code (of {', '.join(CODE[self.kind])}): remove it, choose another "
                    "--output_dir, or go on with that code"
                )
        return True


@dataclass(frozen=True)
class Run:
    """A checkpoint and what is measured of it: a row of a table.

    Args:
        name: in the table.
        entry: as it is in the table's file.
        folder: of its checkpoint and measurements.
        steps: in order.
    """

    name: str
    entry: dict[str, Any]
    folder: Path
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """All of a table or figure at one scale.

    Args:
        name: of its file.
        config: the file, as it is in YAML.
        description: what a reader has to know of the scale, and of what was asked for besides.
        machine: on which the estimated times were taken.
        runs: those that are done at this scale.
        left_out: names of those that are not.
        folder: where table and figure go.
    """

    name: str
    config: dict[str, Any]
    description: str
    machine: str
    runs: tuple[Run, ...]
    left_out: tuple[str, ...]
    folder: Path

    @property
    def steps(self) -> list[Step]:
        """Return the steps of all runs, each once."""
        return unique_steps([self])


@dataclass(frozen=True)
class Changes:
    """What is asked for instead of a scale's own settings; None leaves them.

    Args:
        max_train_samples: rows of a training.
        limit: items of a task.
        data_dir: local data of the evaluation.
        dtype: of training, evaluation and benchmark.
    """

    max_train_samples: int | None = None
    limit: int | None = None
    data_dir: Path | None = None
    dtype: str | None = None

    @property
    def sentences(self) -> str:
        """What a reader of the table has to know of them."""
        given = ((self.max_train_samples, "rows"), (self.limit, "items of each task"))
        less = " and ".join(f"{number} {what}" for number, what in given if number is not None)
        return (f" In {self.dtype}." if self.dtype else "") + (f" This one was made with {less} only." if less else "")

    @property
    def of_type(self) -> list[str]:
        """The argument that all commands take."""
        return [] if self.dtype is None else ["--dtype", self.dtype]


NO_CHANGES = Changes()


def table_names(configs: Path) -> list[str]:
    """Return the names of all tables and figures that have a file in `configs`, tables first."""
    names = sorted(path.stem for path in configs.glob("*.yaml") if path.stem != "scales")
    return sorted(names, key=lambda name: not name.startswith("table"))


def make_plan(
    name: str,
    scale_name: str,
    configs: Path,
    output_dir: Path,
    only: Sequence[str] = (),
    changes: Changes = NO_CHANGES,
) -> Plan:
    """Read a table's file and lay out its steps; runs nothing.

    Args:
        name: of the file in `configs`, such as `table2`.
        scale_name: an entry of `scales.yaml`.
        output_dir: `runs` and the scale's tables are folders in it.
        only: names of runs; none for all.

    Raises:
        UserError: there is no such table or run.
    """
    if name not in (tables := table_names(configs)):
        raise UserError(f"{name!r}{suggest(name, tables)} is none of all, {', '.join(tables)}")
    config = yaml.safe_load((configs / f"{name}.yaml").read_text(encoding="utf-8"))
    scales = yaml.safe_load((configs / "scales.yaml").read_text(encoding="utf-8"))
    scale = scales[scale_name]
    models = config.get("models", {}).get(scale_name, {None: None})
    config["runs"] = [
        of_model(run, model, scale_name, models[model]) for model in models for e in config["runs"] for run in varied(e)
    ]
    names = [run["name"] for run in config["runs"]]
    for run in only:
        if run not in names:
            raise UserError(f"run {run!r}{suggest(run, names)} is none of {name}'s: {', '.join(names)}")
    at_scale = [run for run in config["runs"] if scale_name in run.get("scales", list(scales))]
    chosen = [run for run in at_scale if not only or run["name"] in only]
    runs = tuple(_run_of(run, config, scale, scale_name, output_dir / "runs", changes) for run in chosen)
    embedded = any(step.makes.is_relative_to(SAMPLE) for run in runs for step in run.steps)
    return Plan(
        name,
        config,
        description=scale["description"] + changes.sentences + (" Trained on the embedded sample." if embedded else ""),
        machine=scale["machine"],
        runs=runs,
        left_out=tuple(run for run in dict.fromkeys(names) if run not in {run["name"] for run in chosen}),
        folder=output_dir / scale_name / name,
    )


def varied(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that an entry of a table's file stands for: one for each choice of the fields that it varies."""
    vary = entry.get("vary", {})
    runs = []
    for values in itertools.product(*vary.values()):
        chosen = dict(zip(vary, values, strict=True))
        environment = entry.get("environment", {}) | chosen
        name = " ".join([entry["name"], *(f"{field.lower()}={value}" for field, value in chosen.items())])
        runs.append(entry | {"name": name, "environment": environment, "kind": entry["name"], "settings": chosen})
    return runs


def of_model(run: dict[str, Any], name: str | None, scale_name: str, model: dict[str, Any] | None) -> dict[str, Any]:
    """Return a run as it is made for one of a table's models; for None as it is."""
    if name is None:
        return run
    return run | {"name": f"{name} {run['name']}", "model": {scale_name: model}, "model_name": name}


def unique_steps(plans: Sequence[Plan]) -> list[Step]:
    """Return the steps of several plans in order, those that they share once."""
    return list({step.makes: step for plan in plans for run in plan.runs for step in run.steps}.values())


def estimate(steps: Sequence[Step], jobs: int = 1) -> str:
    """Return the steps' time as text, `jobs` runs at a time."""
    minutes = sum(step.minutes for step in steps) / jobs
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"


def run_plan(
    plan: Plan,
    root: Path,
    environment: dict[str, str],
    failed: dict[Path, str],
    say: Callable[[str], None],
    jobs: int = 1,
) -> list[str]:
    """Execute the steps that are not done yet, in order. A run whose step fails goes no further; the others do.

    Args:
        failed: file that a step should have made -> how it failed; added to, and not tried again.
        jobs: runs at a time.

    Returns:
        The names of the runs that failed.
    """

    def carry_out(run: Run) -> bool:
        """Execute a run's steps; returns whether it came to its end."""
        for step in run.steps:
            where = f"{plan.name}, {run.name}, {step.kind}"
            if step.makes not in failed:
                with alone_at(step, root, lambda where=where: say(f"{where}: waiting for another reproduction")):
                    if step.is_done():
                        say(f"{where}: done before")
                        continue
                    say(f"{where}: about {estimate([step])}\n  {step.text}")
                    try:
                        run_step(step, root, environment)
                        continue
                    except UserError as error:
                        failed[step.makes] = str(error)
            say(f"{where}: {failed[step.makes]}")
            return False
        return True

    if jobs == 1:
        return [run.name for run in plan.runs if not carry_out(run)]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [run.name for run, done in zip(plan.runs, pool.map(carry_out, plan.runs), strict=True) if not done]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def alone_at(step: Step, root: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Keep other reproductions from this step, which tables share; `waits` is called where one of them is at it."""
    name = hashlib.sha256(os.path.abspath(root / step.makes).encode()).hexdigest()[:16]
    path = root / ".cache/steps" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_step(step: Step, root: Path, environment: dict[str, str]) -> None:
    """Execute a step and write down that it is done.

    Args:
        environment: for all steps; what it says about the training (`WHAT_IS_TRAINED`) does not reach them.

    Raises:
        UserError: it failed; its own message stands above.
    """
    step.makes.parent.mkdir(parents=True, exist_ok=True)
    start, code = time.perf_counter(), step.code
    passed_on = {name: value for name, value in environment.items() if name not in WHAT_IS_TRAINED}
    result = subprocess.run(step.command, cwd=root, env={**passed_on, **step.environment}, check=False)
    if result.returncode == 130:
        raise KeyboardInterrupt
    if result.returncode or not step.makes.exists():
        raise UserError(
            f"failed with exit code {result.returncode}; given again, this command goes on from there: {step.text}"
        )
    write_json(step.record, {"command": step.text, "code": code, "seconds": time.perf_counter() - start})


def _run_of(
    run: dict[str, Any],
    config: dict[str, Any],
    scale: dict[str, Any],
    scale_name: str,
    runs_folder: Path,
    changes: Changes,
) -> Run:
    minutes = scale["minutes"]
    model = run.get("model", {}).get(scale_name) or scale["model"]
    environment = {"FOLDER_NAME": model["folder"]}
    if "base" in model:
        environment["BASE_MODEL"] = model["base"]
    for source in (scale, config, run):
        given = source.get("environment", {})
        if "TARGET_SKIPPED" in given:  # the one target or the other
            environment.pop("TARGET_CAPACITY", None)
        environment |= {name: str(value) for name, value in given.items()}
    if changes.max_train_samples is not None:
        environment["MAX_TRAIN_SAMPLES"] = str(changes.max_train_samples)
    data = _data_step(environment.pop("DATA_TYPE"), minutes["data"])
    environment = dict(sorted((environment | {"TRAIN_FILE": str(data.makes)}).items()))
    build = ["python", "entrypoints/checkpoint/build_mod_checkpoint.py", "--folder_name", model["folder"]]
    build += ["--base_model", model["base"]] if "base" in model else []
    build += [str(a) for a in model.get("build_arguments", ())]
    built = Path("ckpt") / model["folder"] / INDEX_FILE
    arguments = [str(a) for source in (scale, config, run) for a in source.get("train_arguments", ())]
    if run.get("skipped"):
        arguments += ["--skipped", *map(str, run["skipped"])]

    def training(checkpoint: str) -> tuple[str, list[str], dict[str, str]]:
        if "baseline" in run:
            command = _baseline(run["baseline"], environment, checkpoint, changes)
            return "baseline", [*command, *map(str, run.get("baseline_arguments", ()))], {}
        command = ["bash", "scripts/finetune_mod.sh", *arguments, *changes.of_type]
        return "train", command, environment | {"OUTPUT_DIR": checkpoint}

    made_by = json.dumps([build, *training(""), changes.dtype], sort_keys=True)
    target = environment.get("TARGET_SKIPPED") or environment["TARGET_CAPACITY"]
    words = (environment["GRANULARITY"], target, run.get("baseline"))
    words = (*words, hashlib.sha256(made_by.encode()).hexdigest()[:8])
    folder = runs_folder / "-".join(word for word in words if word)
    checkpoint = folder / "checkpoint"
    kind, command, own = training(str(checkpoint))
    steps = [
        data,
        Step("build", tuple(build), built, minutes["build"]),
        Step(kind, tuple(command), checkpoint / "results.json", run.get("minutes", minutes[kind]), own),
    ]
    evaluate = [str(a) for a in scale["evaluate_arguments"]] + changes.of_type
    evaluate += [] if changes.limit is None else ["--limit", str(changes.limit)]
    evaluate += [] if changes.data_dir is None else ["--data_dir", str(changes.data_dir)]
    benchmark = [str(a) for a in scale["benchmark_arguments"]] + changes.of_type
    for kind, given in (("evaluate", evaluate), ("benchmark", benchmark)):
        if kind in run.get("measure", config["measure"]):
            output = folder / {"evaluate": "evaluation.json", "benchmark": "benchmark.json"}[kind]
            command = ["bash", f"scripts/{kind}.sh", str(checkpoint), "--output", str(output), *given]
            steps.append(Step(kind, tuple(command), output, minutes[kind]))
    return Run(run["name"], run, folder, tuple(steps))


def _data_step(data_type: str, minutes: float) -> Step:
    """Return the step that makes the rows that `scripts/finetune_mod.sh` trains on when given this data type."""
    if data_type == "mixed":
        return Step("data", ("bash", "scripts/data/mix.sh"), Path("data/mixed/data.jsonl"), minutes)
    command = ("python", "entrypoints/data/reformat_datasets.py", "--datasets", data_type)
    there = any(Path(folder, data_type).exists() for folder in ("data/reformatted", "data/raw"))
    if there or data_type != "alpaca":
        return Step("data", command, Path(f"data/reformatted/{data_type}/data.jsonl"), minutes)
    command += ("--raw_data_root", str(SAMPLE), "--save_path", str(SAMPLE / "reformatted"))
    return Step("data", command, SAMPLE / "reformatted/alpaca/data.jsonl", minutes)


def _baseline(kind: str, environment: dict[str, str], output: str, changes: Changes) -> list[str]:
    """Return the command that makes a checkpoint without training, for what a training would have been set to."""
    checkpoint = f"ckpt/{environment['FOLDER_NAME']}"
    wanted = {"skipped": "TARGET_SKIPPED"} if "TARGET_SKIPPED" in environment else {"capacity": "TARGET_CAPACITY"}
    optional = {"--mod_n": "MOD_N", "--seed": "SEED"}
    fields = [part for name, field in optional.items() if field in environment for part in (name, environment[field])]
    options = {
        "model_name_or_path": checkpoint,
        "output_dir": output,
        "train_file": environment["TRAIN_FILE"],
        **{name: f"{float(environment[field]):g}" for name, field in wanted.items()},
        "granularity": environment["GRANULARITY"],
        "max_seq_length": environment["MAX_SEQ_LENGTH"],
    }
    if kind in ("dlo", "skip_transformer"):  # which are trained: on as many rows as what they stand beside
        options["rows"] = environment["MAX_TRAIN_SAMPLES"]
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["python", "entrypoints/checkpoint/build_baseline.py", kind, *given, *fields, *changes.of_type]
