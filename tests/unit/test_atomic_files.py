"""A file appears under its name whole or not at all, and what killed processes left behind does not pile up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.io.files import atomic_file

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys, time
from utils.io.files import atomic_file
with atomic_file(sys.argv[1]) as file:
    file.write("x" * 100000)
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing `data.jsonl`."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "data.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"written\n"
    yield process
    process.kill()
    process.communicate()


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("earlier")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a") as file:
        file.write(f"half{1 // 0}")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "earlier"


def test_what_a_killed_process_left_goes_with_the_next_write(writer, tmp_path):
    writer.kill()
    writer.wait()
    assert len(os.listdir(tmp_path)) == 1
    with atomic_file(tmp_path / "data.jsonl") as file:
        file.write("whole")
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_a_writer_that_lives_keeps_its_file(writer, tmp_path):
    with atomic_file(tmp_path / "data.jsonl") as file:
        file.write("whole")
    assert len(os.listdir(tmp_path)) == 2


def test_a_file_that_was_just_made_is_left_alone(tmp_path):
    young, old = tmp_path / ".a.young.tmp", tmp_path / ".a.old.tmp"
    for path in (young, old):
        path.touch()
    os.utime(old, (time.time() - 100, time.time() - 100))
    with atomic_file(tmp_path / "a") as file:
        file.write("whole")
    assert sorted(os.listdir(tmp_path)) == [".a.young.tmp", "a"]
