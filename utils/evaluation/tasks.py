"""Which tasks are evaluated, and the same tasks on local files.

A table of tasks is a file of `configs/evaluation`. With a data directory each task is the built-in one of
lm-evaluation-harness with its data replaced and nothing else: prompt, choices, metric and splits are its own. The task
files that say so are written to a folder, where `lm_eval --include_path FOLDER` finds them too.

Local files are JSON lines with the rows of the task's data set on the hub: `TASK.jsonl` holds the items, and
`TASK_shots.jsonl` the examples that come before them. Without the latter an item's examples are other items.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager

from utils.io.errors import UserError, suggest
from utils.io.files import atomic_file

BUILT_IN = Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True)
class Column:
    """One task of a table.

    Args:
        task: a task or group of lm-evaluation-harness.
        name: head of the column.
        shots: examples before each item.
        metric, filter: which of the task's numbers the column shows.
        folder: where the task lies in the package; None searches all of it.
        fields: what each row of a local file has.
        told_apart_by: field of a local file that says which task of the group a row belongs to.
    """

    task: str
    name: str
    shots: int
    metric: str
    filter: str = "none"
    folder: str | None = None
    fields: tuple[str, ...] = ()
    told_apart_by: str | None = None


@dataclass(frozen=True)
class Average:
    """A mean over columns, by the names of their tasks."""

    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The columns of a table and the means over them."""

    columns: tuple[Column, ...]
    averages: tuple[Average, ...]


@dataclass(frozen=True)
class Prepared:
    """A task that can be run.

    Args:
        task: its name in the harness.
        subtasks: how many tasks it consists of.
        num_fewshot: to be handed to the harness; None where the task's file says it.
        shots: examples before each item.
        data: where the data comes from: `hub`, or what the local files are.
    """

    task: str
    subtasks: int
    num_fewshot: int | None
    shots: int
    data: str

    def limit_of_each(self, limit: int | None) -> int | None:
        """Return how many items each of its tasks may have, that together they are about `limit`; None for all."""
        return None if limit is None else -(-limit // self.subtasks)


def read_table(path: str | Path, tasks: list[str] | None = None) -> Table:
    """Read a table of `configs/evaluation`, or those of its columns that are named.

    Raises:
        UserError: the file is not such a table, or a task is not in it (the message names the nearest one).
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        columns = {
            item["task"]: Column(**item | {"fields": tuple(item.get("fields", ()))}) for item in values["columns"]
        }
        averages = tuple(Average(item["name"], tuple(item["tasks"])) for item in values.get("averages", ()))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a table of tasks: {error!r}") from None
    for task in tasks or ():
        if task not in columns:
            raise UserError(f"task {task!r}{suggest(task, columns)} is not in {path}, which has {', '.join(columns)}")
    return Table(tuple(column for task, column in columns.items() if not tasks or task in tasks), averages)


def find_tasks(columns: tuple[Column, ...], include: Path | None = None) -> TaskManager:
    """Return the harness's index of the columns' tasks.

    Args:
        include: a folder with further task files.

    Raises:
        UserError: a task is not in it.
    """
    folders = [column.folder for column in columns]
    further = [] if include is None else [include]
    if None in folders:
        manager = TaskManager(include_path=further)
    else:
        manager = TaskManager(include_defaults=False, include_path=[*(BUILT_IN / f for f in folders if f), *further])
    for column in columns:
        if column.task not in manager.task_index:
            near = suggest(column.task, manager.all_tasks)
            raise UserError(f"task {column.task!r}{near}: lm-evaluation-harness has none of that name")
    return manager


def prepare_hub_tasks(columns: tuple[Column, ...], manager: TaskManager) -> dict[str, Prepared]:
    """Return the tasks of the columns as they are, on the hub's data."""
    return {
        column.task: Prepared(column.task, len(_leaves(column.task, manager)), column.shots, column.shots, "hub")
        for column in columns
    }


def prepare_local_tasks(
    columns: tuple[Column, ...], manager: TaskManager, data_dir: str | Path, folder: Path
) -> dict[str, Prepared]:
    """Write task files that read local data, `local_TASK`, and return the tasks.

    Args:
        columns: each needs `DATA_DIR/TASK.jsonl`.
        manager: index of the built-in tasks.
        data_dir: folder of the local files.
        folder: where the task files go.

    Raises:
        UserError: a file is missing, is not JSON lines, or a row lacks a field.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"data_dir {data_dir}: no such folder")
    missing = [column.task for column in columns if not (data_dir / f"{column.task}.jsonl").is_file()]
    if missing:
        there = ", ".join(sorted(c.task for c in columns if c.task not in missing)) or "none of the tasks"
        raise UserError(f"data_dir {data_dir}: there is no {missing[0]}.jsonl; it has {there}: name those with --tasks")
    return {column.task: _prepare_local(column, manager, data_dir, folder) for column in columns}


def _prepare_local(column: Column, manager: TaskManager, data_dir: Path, folder: Path) -> Prepared:
    files = {
        "items": data_dir / f"{column.task}.jsonl",
        "shots": data_dir / f"{column.task}_shots.jsonl",
    }
    if not files["shots"].is_file():
        del files["shots"]
    rows = {kind: _read_rows(path, column.fields) for kind, path in files.items()}
    source = "local files" if "shots" in files or not column.shots else "a local file; examples are other items"
    name = f"local_{column.task}"
    if column.told_apart_by is None:
        shots = _write_task(column.task, name, column.shots, files, rows, manager, folder)
        return Prepared(name, 1, None, shots, source)

    by_subject = {kind: defaultdict(list) for kind in rows}
    for kind, some in rows.items():
        for row in some:
            by_subject[kind][row[column.told_apart_by]].append(row)
    leaves = {manager.task_index[leaf].cfg["dataset_name"]: leaf for leaf in _leaves(column.task, manager)}
    members, least = [], column.shots
    for subject, items in sorted(by_subject["items"].items()):
        if subject not in leaves:
            near = suggest(subject, leaves)
            raise UserError(f"{files['items']}: {column.told_apart_by} {subject!r}{near} is none of {column.task}'s")
        parts = {"items": items}
        if "shots" in rows:
            parts["shots"] = by_subject["shots"][subject]
        paths = {kind: folder / f"{leaves[subject]}_{kind}.jsonl" for kind in parts}
        for kind, path in paths.items():
            with atomic_file(path) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in parts[kind])
        members.append(f"local_{leaves[subject]}")
        shots = _write_task(leaves[subject], members[-1], column.shots, paths, parts, manager, folder)
        least = min(least, shots)
    aggregate = [{"metric": column.metric, "weight_by_size": True}]
    _write_yaml(folder / f"{name}.yaml", {"group": name, "task": members, "aggregate_metric_list": aggregate})
    return Prepared(name, len(members), None, least, source)


def _write_task(
    task: str,
    name: str,
    shots: int,
    files: dict[str, Path],
    rows: dict[str, list[Any]],
    manager: TaskManager,
    folder: Path,
) -> int:
    """Write the file of one task; returns how many examples its items get."""
    entry = manager.task_index[task]
    config = entry.cfg
    evaluated = "test_split" if config.get("test_split") else "validation_split"
    splits: dict[str, str | None] = dict.fromkeys(
        ("training_split", "validation_split", "test_split", "fewshot_split"), None
    )
    splits[evaluated] = config[evaluated]
    data = {config[evaluated]: str(files["items"].resolve())}
    # the harness leaves an item out of its own examples, and with it every row that is the same
    pool = len(rows["items"]) - max(Counter(json.dumps(row, sort_keys=True) for row in rows["items"]).values())
    if "shots" in files:
        source = "fewshot_split" if config.get("fewshot_split") else "training_split"
        splits[source] = config[source]
        data[config[source]] = str(files["shots"].resolve())
        pool = len(rows["shots"])
    elif evaluated == "test_split":
        # the harness leaves an item out of its own examples where both splits have the same name
        splits["fewshot_split"] = config["test_split"]
    # examples that are other items are as many as there are; of a file of examples enough are asked for
    if "shots" in files and pool < shots:
        raise UserError(f"{files['shots']}: {pool} examples for {task}, which takes {shots}")
    shots = min(shots, pool)
    spec = {
        "include": str(entry.yaml_path),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data},
        "num_fewshot": shots,
        **splits,
    }
    _write_yaml(folder / f"{name}.yaml", spec)
    return shots


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        yaml.safe_dump(value, file, sort_keys=False)


def _read_rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        lacking = [field for field in fields if not isinstance(row, dict) or field not in row]
        if lacking:
            raise UserError(f"{path}, line {number}: no {lacking[0]!r}; a row has {', '.join(fields)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def _leaves(task: str, manager: TaskManager) -> list[str]:
    """Return the tasks that a task, group or tag consists of."""
    entry = manager.task_index[task]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [task]
    members = (item if isinstance(item, str) else item.get("task") or item["group"] for item in entry.cfg["task"])
    return [leaf for member in members for leaf in _leaves(member, manager)]
