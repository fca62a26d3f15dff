"""The launcher: signals while workers come and go, and numbers of a config file."""

import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import psutil
import pytest

from entrypoints.launch import check_config, tell_workers
from utils.io.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_sigterm_ends_a_launcher_that_has_no_workers_yet():
    code = "import signal; from entrypoints.launch import *; signal.signal(15, tell_workers); signal.raise_signal(15)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 143


def test_sigterm_reaches_the_workers_beside_one_that_has_just_died(monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeper) as dead, subprocess.Popen(sleeper) as alive:
        workers = [psutil.Process(dead.pid), psutil.Process(alive.pid)]
        dead.kill()
        dead.wait()
        monkeypatch.setattr(psutil.Process, "children", lambda self: workers)
        tell_workers(signal.SIGTERM, None)
        assert alive.wait() == -signal.SIGTERM


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_processes: two", "num_processes 'two' is not a whole number"),
        ("num_processes: 1.5", "num_processes 1.5 is not"),
        ("num_machines: [2]", r"num_machines \[2\] is not"),
        ("machine_rank: first", "machine_rank 'first' is not"),
    ],
)
def test_a_number_that_is_none_is_one_line(tmp_path, line, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"distributed_type: MULTI_GPU\n{line}\n")
    given = Namespace(config_file=str(path), num_processes=None, num_machines=None, machine_rank=None)
    with pytest.raises(UserError, match=f"config_file .*mine.yaml: {message}"):
        check_config(given)
