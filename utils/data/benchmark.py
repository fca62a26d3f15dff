"""Measures the data commands: rows per second against plain ways of doing the same, and peak memory at full size.

Every measurement is taken in a process of its own; ways that are compared take turns, and the fastest run of each
counts, since the noise of a shared machine only ever adds.
"""

import json
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from utils.data.formats import SOURCES
from utils.data.reformat import reformat_set
from utils.io.errors import UserError

_NAME = "vicuna_sharegpt"


def write_sharegpt(path: Path, size: int, seed: int = 0) -> int:
    """Write a JSON array of invented conversations, as long and as escaped as ShareGPT's, of about `size` bytes.

    Returns:
        The number of rows.
    """
    draw = random.Random(seed)
    syllables = ["".join(draw.choices("aeioubdfgklmnprst", k=draw.randint(2, 9))) for _ in range(5000)]
    glue = [" "] * 12 + [", ", ". ", "\n", "\n\n", ' "', "é", " 你好 "]
    texts = [
        "".join(draw.choice(syllables) + draw.choice(glue) for _ in range(draw.randint(5, 400))) for _ in range(2000)
    ]
    rows, written = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        written += file.write("[\n")
        while written < size:
            turns = [
                {"from": ("human", "gpt")[number % 2], "value": draw.choice(texts)}
                for number in range(draw.choice((0, 1, 2, 2, 4, 4, 6, 8, 12)))
            ]
            row = json.dumps({"id": f"{rows:07d}_0", "conversations": turns}, indent=2)
            written += file.write(("," if rows else "") + row)
            rows += 1
        file.write("\n]\n")
    return rows


def write_reformatted(path: Path, rows: int, seed: int = 0) -> None:
    """Write a `data.jsonl` of `rows` invented rows of about 1 KB."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices("abcdefghij klmnop", k=draw.randint(100, 1700))) for _ in range(1000)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": draw.choice(texts)}]
            file.write(json.dumps({"dataset": "made", "id": f"made_{number}", "messages": messages}) + "\n")


def compare_speeds(file: Path, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Time three ways over a ShareGPT file: this one, a plain loop around `json`, and `json.load` and no more.

    Args:
        file: JSON array of ShareGPT rows.
        folder: for the outputs.
        repeats: runs of each way.

    Returns:
        By way, `rows` read, `seconds` and `cpu_seconds` of the fastest run, and `rows_per_second`.
    """
    ways = {"reformat": _reformat, "plain json loop": _plain_loop, "bare json.load": _bare_parse}
    runs: dict[str, list[tuple[int, float, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, function in ways.items():
            runs[way].append(_in_fresh_process(function, file, folder / "out.jsonl"))
    results = {}
    for way, measured in runs.items():
        rows, seconds = measured[0][0], min(wall for _, wall, _ in measured)
        cpu = min(cpu for _, _, cpu in measured)
        results[way] = {"rows": rows, "seconds": seconds, "cpu_seconds": cpu, "rows_per_second": rows / seconds}
    return results


def run_and_measure(command: list[str]) -> dict[str, float]:
    """Run a command and wait for it.

    Returns:
        `seconds`, and `peak_mib`: the largest resident memory of any of its processes.

    Raises:
        UserError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}


def _in_fresh_process(function: Callable[..., int], *arguments: Any) -> tuple[int, float, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_timed, function, *arguments).result()


def _timed(function: Callable[..., int], *arguments: Any) -> tuple[int, float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    rows = function(*arguments)
    return rows, time.perf_counter() - start, time.process_time() - cpu


def _reformat(file: Path, target: Path) -> int:
    return reformat_set(_NAME, [file], target).read


def _plain_loop(file: Path, target: Path) -> int:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}
    dataset = SOURCES[_NAME].dataset
    with open(file, encoding="utf-8") as raw:
        rows = json.load(raw)
    with open(target, "w", encoding="utf-8") as out:
        for number, row in enumerate(rows):
            senders = [turn["from"] for turn in row["conversations"]]
            if not senders or "bing" in senders:
                continue
            messages = [
                {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
                for turn in row["conversations"]
            ]
            line = {"dataset": dataset, "id": f"{dataset}_{number}", "messages": messages}
            out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())  # the other way makes sure of its file too
    return len(rows)


def _bare_parse(file: Path, target: Path) -> int:
    with open(file, encoding="utf-8") as raw:
        return len(json.load(raw))
