"""Run a table of tasks through lm-evaluation-harness, task by task, so that an interrupted run goes on.

Each result is a file of its own, written when its task is done, in a folder that is named after all that a result
follows from: weights, routers, data, shots, harness. A model that was evaluated before is not evaluated again, so the
dense base is evaluated once for all the checkpoints that were made from it.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from utils.io.files import read_json, write_json
from utils.model.base_identity import digest, identify_model
from utils.model.checkpoint import read_config
from utils.model.configuration_mod import MoDSettings
from utils.model.lora import ADAPTER_FILES, holds_adapter

from .lm_eval_model import MoDLM
from .tasks import Average, Column, Prepared, Table

logger = logging.getLogger(__name__)

SEED = 1234
"""The harness's own default, of the examples that are drawn."""

_NOT_OF_A_RESULT = ("base_model", "capacities", "sequence_pooling")
"""Settings that a result doesn't follow from, once its capacity and its pool are chosen."""


def identify_base(directory: str | Path) -> dict[str, Any]:
    """Return what makes a dense base: its config, weights, adapter and tokenizer, as hashes.

    The same for a base and for every checkpoint that has its weights, in whatever files, and no adapter of its own.
    """
    directory = Path(directory)
    identity, config = identify_model(directory), read_config(directory)
    identity["config"] |= {"dtype": config.get("dtype") or config.get("torch_dtype")}  # it is evaluated in that
    base = {part: digest(identity[part]) for part in ("config", "weights", "tokenizer")}
    adapter = ADAPTER_FILES if holds_adapter(directory) else ()
    return base | {"adapter": [_file_hash(directory / name) for name in adapter]}


def identify_routing(directory: str | Path, settings: MoDSettings, pool: str) -> dict[str, Any]:
    """Return what makes a checkpoint's routing: a hash of how it decides and of its routers and substitutes.

    Args:
        settings: the checkpoint's, at the capacity that is evaluated.
        pool: one of `lm_eval_model.POOLS`.
    """
    routing = identify_model(directory)["routing"] | settings.to_dict()
    routing = {name: value for name, value in routing.items() if name not in _NOT_OF_A_RESULT}
    return {"routing": digest(routing), "target_capacity": settings.target_capacity, "pool": pool}


def identify_task(column: Column, prepared: Prepared, data_dir: Path | None, limit: int | None) -> dict[str, Any]:
    """Return what makes a column's items and prompts."""
    files = [] if data_dir is None else [data_dir / f"{column.task}{end}.jsonl" for end in ("", "_shots")]
    return {
        "task": column.task,
        "shots": column.shots,
        "limit": limit,
        "data": "hub" if data_dir is None else [_file_hash(path) for path in files if path.is_file()],
        "metric": [column.metric, column.filter],
        "lm_eval": version("lm_eval"),
        "seed": SEED,
    }


def evaluate_columns(
    make_model: Callable[[], MoDLM],
    model_identity: dict[str, Any],
    columns: Sequence[Column],
    prepared: dict[str, Prepared],
    manager: TaskManager,
    folder: Path,
    limit: int | None = None,
    data_dir: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate one model on the columns that are not done yet.

    Args:
        make_model: returns the model; called only if something is left to do.
        model_identity: what a result follows from besides the task.
        folder: where results are kept, one file for each task.
        limit: items of each task, at most; spread evenly over the tasks of a group.
        data_dir: of local data.

    Returns:
        Task -> its result: `value`, `stderr`, `items`, `capacity` and the harness's own numbers.
    """
    results: dict[str, dict[str, Any]] = {}
    model: MoDLM | None = None
    for column in columns:
        identity = {"model": model_identity, "task": identify_task(column, prepared[column.task], data_dir, limit)}
        path = folder / f"{column.task}-{_hash(identity)[:12]}.json"
        done = _read(path)
        if done is not None and done["identity"] == identity:
            logger.info("%s: done before, %s", column.name, path)
            results[column.task] = done
            continue
        model = model or make_model()
        logger.info("%s: %d-shot", column.name, prepared[column.task].shots)
        result = _evaluate(model, column, prepared[column.task], manager, limit)
        results[column.task] = {"identity": identity, **result}
        write_json(path, results[column.task])
    return results


def average(wanted: Average, results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the mean over those of its tasks that have a result, its standard error and the tasks."""
    tasks = [task for task in wanted.tasks if task in results]
    if not tasks:
        return None
    errors = [results[task]["stderr"] for task in tasks]
    known = all(isinstance(error, float) for error in errors)
    return {
        "name": wanted.name,
        "tasks": tasks,
        "value": sum(results[task]["value"] for task in tasks) / len(tasks),
        "stderr": math.sqrt(sum(error**2 for error in errors)) / len(tasks) if known else None,
    }


def render(table: Table, rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table as text.

    Args:
        table: its columns and averages.
        rows: name of a model -> task -> result.
    """
    columns = [column for column in table.columns if any(column.task in results for results in rows.values())]
    first = next(iter(rows.values()))
    means = [(a, average(a, first)) for a in table.averages]
    heads = [column.name for column in columns] + [f"{a.name} ({len(m['tasks'])})" for a, m in means if m]
    widths = [max(8, len(head) + 2) for head in heads]

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:<12}" + "".join(f"{text:>{width}}" for text, width in zip(cells, widths, strict=True))

    def percent(value: Any) -> str:
        return f"{100 * value:.1f}" if isinstance(value, float) else "-"

    lines = [line("", heads)]
    empty = [""] * (len(heads) - len(columns))
    for name, results in rows.items():
        cells = [results[column.task] for column in columns] + [average(a, results) for a, m in means if m]
        lines.append(line(name, [percent(cell["value"]) for cell in cells]))
        lines.append(line("  +- stderr", [percent(cell["stderr"]) for cell in cells]))
        if any(results[column.task]["capacity"] for column in columns):
            shares = [results[column.task]["capacity"]["capacity"] for column in columns]
            lines.append(line("  capacity", [f"{share:.3f}" for share in shares] + empty))
            skipped = [results[column.task]["capacity"].get("skipped") for column in columns]
            if None not in skipped:  # as in results of before
                lines.append(line("  skipped", [f"{share:.3f}" for share in skipped] + empty))
    lines.append(line("shots", [str(first[column.task]["shots"]) for column in columns] + empty))
    lines.append(line("items", [str(first[column.task]["items"]) for column in columns] + empty))
    return "\n".join(lines)


def _evaluate(
    model: MoDLM, column: Column, prepared: Prepared, manager: TaskManager, limit: int | None
) -> dict[str, Any]:
    start = time.perf_counter()
    if model.meter:
        model.meter.read()
    output = simple_evaluate(
        model=model,
        tasks=[prepared.task],
        num_fewshot=prepared.num_fewshot,
        limit=prepared.limit_of_each(limit),
        task_manager=manager,
        log_samples=False,
        random_seed=0,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    numbers = output["results"].get(prepared.task) or output["groups"][prepared.task]
    metric, stderr = f"{column.metric},{column.filter}", f"{column.metric}_stderr,{column.filter}"
    return {
        "task": column.task,
        "value": float(numbers[metric]),
        "stderr": numbers[stderr] if isinstance(numbers.get(stderr), float) else None,
        "shots": prepared.shots,
        "data": prepared.data,
        "items": sum(count["effective"] for count in output["n-samples"].values()),
        "capacity": model.meter.read() if model.meter else None,
        "seconds": time.perf_counter() - start,
        "lm_eval": {name: value for name, value in numbers.items() if isinstance(value, int | float | str)},
        "subtasks": {name: values[metric] for name, values in output["results"].items() if metric in values},
    }


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
