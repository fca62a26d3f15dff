"""Two commands that would write the same folder, together or one after the other."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from commands import run

BUILD = "entrypoints/checkpoint/build_mod_checkpoint.py"


def build(repository, root, *arguments):
    command = [sys.executable, repository / BUILD, "--folder_name", "same-mod", "--ckpt_root", root, *arguments]
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


@pytest.mark.slow
def test_of_builds_that_start_together_one_builds_and_the_others_use_it(workplace, repository, tmp_path):
    base = workplace / "base"
    started = [build(repository, tmp_path, "--base_model", base, "--mod_n", "3", "--reuse") for _ in range(4)]
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * 4, outputs
    assert [stdout.strip() for stdout, _ in outputs] == [str(tmp_path / "same-mod")] * 4
    assert sum("base weights:" in stderr for _, stderr in outputs) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["same-mod"]


@pytest.mark.slow
def test_a_second_build_is_of_the_same_base_or_refused_whatever_it_is_called(workplace, repository, tmp_path):
    def finish(*arguments):
        process = build(repository, tmp_path / "ckpt", *arguments, "--reuse")
        return process.communicate()[1], process.returncode

    assert finish("--base_model", workplace / "base", "--mod_n", "3")[1] == 0
    (tmp_path / "link").symlink_to(workplace / "base")
    assert finish("--base_model", tmp_path / "link")[1] == 0
    shutil.copytree(workplace / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    stderr, code = finish("--base_model", tmp_path / "base")
    assert code == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "is already built from another base (rms_norm_eps of its config differs)" in line


@pytest.mark.slow
def test_a_second_run_with_the_same_output_is_told_who_writes_it_till_that_is_done(workplace, repository, finetune):
    output = workplace / "written-once"
    command = [sys.executable, "-c", f"from utils.io.locks import *; write_alone_until_exit({str(output)!r}); input()"]
    with subprocess.Popen(command, cwd=repository, stdin=subprocess.PIPE) as first:
        while not list(workplace.glob(".written-once.lock")):
            time.sleep(0.1)
        second = finetune(output, check=False)
        first.communicate(b"\n")
    assert second.returncode == 1
    assert f"is being written by process {first.pid}" in second.stderr.splitlines()[-1]
    finetune(output)
    again = run(*second.args, check=False, cwd=repository)
    assert "holds this run, finished" in again.stderr
