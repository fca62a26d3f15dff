"""Runs one job per dataset in processes of their own, shows a progress bar for each, and notices when one dies.

A worker tells its progress through a pipe. If the parent is gone the next telling fails, and the worker stops and
cleans up; if a worker is gone its pipe ends without a result, and that is an error of its job. Other jobs go on.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from utils.io.errors import UserError

_TELL_EVERY = 0.2  # seconds
_STOP_WITHIN = 5.0  # seconds that a worker has to clean up


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Args:
        name: shown at the progress bar.
        function: a function of a module; called as `function(*arguments, tell=tell)`. It must call `tell(rows, bytes)`
            often, which shows progress and ends it cleanly where it is to stop.
        arguments: what it is called with; must be picklable.
        size: bytes when it is done.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int


@contextmanager
def clean_exit_on_sigterm() -> Iterator[None]:
    """Let `kill` end the block with `SystemExit`, so that temporary files are removed on the way out."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_jobs(jobs: list[Job], num_workers: int) -> dict[str, Any]:
    """Run all jobs, at most `num_workers` at a time.

    Returns:
        By name of the job, what its function returned, or the `UserError` with which it failed.

    Raises:
        RuntimeError: a job failed with anything but a mistake of the user; the message holds its traceback.
    """
    context = multiprocessing.get_context("spawn")  # forked workers would hold each other's pipes open
    waiting, running, results = list(reversed(jobs)), {}, {}
    bars = {
        job.name: tqdm(total=job.size, desc=job.name, unit="B", unit_scale=True, position=number, disable=None)
        for number, job in enumerate(jobs)
    }
    try:
        with clean_exit_on_sigterm():
            while waiting or running:
                while waiting and len(running) < num_workers:
                    job = waiting.pop()
                    connection, process = _start(context, job)
                    running[connection] = (job, process)
                for connection in wait(list(running)):
                    job, process = running[connection]
                    kind, value = _receive(connection, process)
                    if kind == "progress":
                        rows, consumed = value
                        bars[job.name].set_postfix_str(f"{rows} rows", refresh=False)
                        bars[job.name].update(consumed - bars[job.name].n)
                        continue
                    del running[connection]
                    connection.close()
                    process.join()
                    if kind == "bug":
                        raise RuntimeError(f"{job.name} failed:\n{value}")
                    results[job.name] = UserError(value) if kind == "error" else value
                    bars[job.name].update(job.size - bars[job.name].n if kind == "result" else 0)
    finally:
        _stop([process for _, process in running.values()])
        for bar in bars.values():
            bar.close()
    return {job.name: results[job.name] for job in jobs}


def _start(context: Any, job: Job) -> tuple[Connection, Any]:
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, there), daemon=True, name=job.name)
    # Ctrl-C reaches every process of the terminal; workers inherit that it is blocked, and end by the parent's SIGTERM.
    # The resource tracker would unblock it if it were started together with the process.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    there.close()
    return here, process


def _receive(connection: Connection, process: Any) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? try --num_workers 1)" if code == -signal.SIGKILL else ""
        return "error", f"its process {how} before it was done{hint}"


def _stop(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    limit = time.monotonic() + _STOP_WITHIN
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _work(job: Job, connection: Connection) -> None:
    last, progress, stopped = 0.0, (0, 0), False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = True

    def tell(rows: int, consumed: int) -> None:
        nonlocal last, progress
        if stopped:
            sys.exit(128 + signal.SIGTERM)
        progress = rows, consumed
        if time.monotonic() - last >= _TELL_EVERY:
            last = time.monotonic()
            connection.send(("progress", progress))

    signal.signal(signal.SIGTERM, stop)
    try:
        result = job.function(*job.arguments, tell=tell)
        connection.send(("progress", progress))
        connection.send(("result", result))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone, there is nobody to tell
    except UserError as error:
        connection.send(("error", str(error)))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        connection.send(("error", f"{name}{error.strerror or error}"))
    except Exception:
        connection.send(("bug", traceback.format_exc()))
