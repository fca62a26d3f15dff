"""Reformats all datasets that are there, in parallel, and reports what became of their rows."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from utils.data.formats import SOURCES
from utils.data.raw_files import find_raw_files
from utils.data.reformat import SetReport, reformat_set
from utils.data.workers import Job, run_jobs
from utils.io.errors import UserError, suggest
from utils.io.files import write_json


def reformat_all(
    raw_data_root: Path, save_path: Path, datasets: list[str] | None, num_workers: int, on_error: str
) -> None:
    """Write `save_path/NAME/data.jsonl` for each dataset, `save_path/report.json` for all, and print the report.

    Args:
        raw_data_root: holds one folder for each dataset.
        save_path: made if it is not there.
        datasets: names, all of which must be there; None takes those that are.
        num_workers: datasets done at the same time.
        on_error: `stop` or `skip`, as `reformat_set` takes it.

    Raises:
        UserError: nothing to do, or a dataset failed; those that did not fail are written all the same.
    """
    if num_workers < 1:
        raise UserError(f"--num_workers {num_workers}: must be at least 1")
    names = _known(datasets or SOURCES)
    if not raw_data_root.is_dir():
        raise UserError(
            f"{raw_data_root}: no such folder; put the raw datasets there or set --raw_data_root "
            "(entrypoints/data/download_datasets.py fetches them)"
        )
    files = {name: find_raw_files(raw_data_root / name, SOURCES[name].file) for name in names}
    absent = [name for name in names if not files[name]]
    if absent and (datasets or len(absent) == len(names)):
        which = ", ".join(absent) if datasets else f"none of {', '.join(names)}"
        example = raw_data_root / absent[0] / SOURCES[absent[0]].file
        raise UserError(f"{raw_data_root}: {which}: not there; expected for example {example}")

    jobs = [
        Job(
            name=name,
            function=reformat_set,
            arguments=(name, files[name], save_path / name / "data.jsonl", on_error),
            size=sum(path.stat().st_size for path in files[name]),
        )
        for name in names
        if files[name]
    ]
    results = run_jobs(jobs, num_workers)

    entries = {name: _entry(results.get(name), files[name], save_path / name / "data.jsonl") for name in names}
    write_json(
        save_path / "report.json",
        {
            "datasets": entries,
            "arguments": {
                "raw_data_root": str(raw_data_root),
                "save_path": str(save_path),
                "datasets": datasets,
                "num_workers": num_workers,
                "on_error": on_error,
            },
            "versions": {
                "python": platform.python_version(),
                "orjson": version("orjson"),
                "pyarrow": version("pyarrow"),
            },
        },
    )
    print(_table(entries))
    print(f"report: {save_path / 'report.json'}")
    if failed := [name for name in names if entries[name]["status"] == "failed"]:
        more = f" ({len(failed)} datasets failed: {', '.join(failed)})" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}: {entries[failed[0]]['error']}{more}")


def _known(names: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in SOURCES:
            raise UserError(f"--datasets {name}: unknown{suggest(name, SOURCES)}; there are {', '.join(SOURCES)}")
    return names


def _entry(result: SetReport | UserError | None, files: list[Path], target: Path) -> dict[str, Any]:
    if result is None:
        return {"status": "absent"}
    entry = {"files": [str(path) for path in files]}
    if isinstance(result, UserError):
        return {"status": "failed", "error": str(result), **entry}
    return {"status": "written", **vars(result), **entry, "output": str(target)}


def _table(entries: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'dataset':<18}{'read':>9}{'written':>9}  left out"]
    for name, entry in entries.items():
        if entry["status"] != "written":
            lines.append(f"{name:<18}{'-':>9}{'-':>9}  {entry['status']}")
            continue
        reasons = {**entry["dropped"], **entry["faults"]}
        notes = [f"{reason} {count}" for reason, count in sorted(reasons.items())]
        notes += [f"damage: {reason} {count}" for reason, count in sorted(entry["damage"].items())]
        notes += [f"repaired surrogates {entry['repaired']}"] if entry["repaired"] else []
        lines.append(f"{name:<18}{entry['read']:>9}{entry['written']:>9}  {', '.join(notes) or '-'}")
    return "\n".join(lines)
