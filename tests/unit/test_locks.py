"""One writer for a folder: the others wait or are told who it is, and a dead one holds nothing."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.io.errors import UserError
from utils.io.locks import sole_writer

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from utils.io.locks import *
write_alone_until_exit(sys.argv[1])
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Start a process that holds the lock of a folder; it lets go when its input ends."""
    started = []

    def start(directory: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, directory], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"holds\n"
        return process

    yield start
    for process in started:
        process.communicate()


def test_a_second_writer_is_told_which_process_on_which_machine_since_when(tmp_path, holder):
    process = holder(tmp_path / "out")
    with (
        pytest.raises(UserError, match=rf"out is being written by process {process.pid} on \S+ since 20\d\d-"),
        sole_writer(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("name", ["a link", "elsewhere/../out", "out/"])
def test_another_name_of_the_folder_is_the_same_folder(tmp_path, holder, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a link").symlink_to("out")
    holder(tmp_path / "out")
    with pytest.raises(UserError, match="is being written by"), sole_writer(f"{tmp_path}/{name}"):
        pass


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_holder_that_has_ended_holds_nothing(tmp_path, holder, end):
    process = holder(tmp_path / "new/out")
    if end is None:
        process.communicate()
        assert not list(tmp_path.iterdir())
    else:
        process.send_signal(end)
        process.wait()
    with sole_writer(tmp_path / "new/out"):
        pass
    if end is None:  # what the dead one made stays, but for its lock
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.rglob(".*.lock"))


def test_who_waits_says_for_whom_and_goes_on_when_the_other_is_done(tmp_path, holder, caplog):
    process = holder(tmp_path / "out")
    timer = threading.Timer(0.7, process.stdin.close)
    timer.start()
    start = time.monotonic()
    with sole_writer(tmp_path / "out", wait=True):
        assert time.monotonic() - start >= 0.6
    timer.join()
    process.stdin = None
    assert f"waiting for process {process.pid} on " in caplog.text


def test_many_that_start_together_write_one_after_the_other(tmp_path):
    code = """
import sys, time
from pathlib import Path
from utils.io.locks import sole_writer
with sole_writer(sys.argv[1], wait=True):
    inside = Path(sys.argv[1] + ".inside")
    inside.touch(exist_ok=False)
    time.sleep(0.05)
    inside.unlink()
"""
    started = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT) for _ in range(6)]
    assert [process.wait() for process in started] == [0] * 6
    assert not list(tmp_path.iterdir())


def test_where_one_may_not_write_beside_the_folder_the_lock_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with sole_writer(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".out.lock"]
    assert not list((tmp_path / "out").iterdir())


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def unlocked(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unlocked)
    with sole_writer(tmp_path / "out"):
        assert "has no locks" in caplog.text
