"""A run that is killed, told to stop, or out of disk space goes on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from launches import LINUX, ROOT, assert_same_routers, launcher

from utils.pipeline.training_checkpoint import UNFINISHED, checkpoints

pytestmark = LINUX
STEPS = 24  # two epochs of 23 rows, with a last step of one row each


@pytest.fixture(scope="module")
def start(workplace):
    """Start a run of `STEPS` steps with a checkpoint after each, and return its process."""

    def popen(output_dir, *arguments, launcher=(sys.executable,)):
        command = [
            *launcher,
            *(ROOT / "entrypoints/finetune/finetune_mod.py", "--model_name_or_path", workplace / "ckpt/tiny-mod"),
            *("--train_file", workplace / "data/alpaca/data.jsonl", "--output_dir", output_dir, "--use_cpu", "true"),
            *("--max_train_samples", 23, "--max_eval_samples", 7, "--max_seq_length", 160, "--num_train_epochs", 2),
            *("--global_batch_size", 2, "--per_device_train_batch_size", 1, "--learning_rate", 1e-2),
            *("--capacity_control", "hinge", "--distillation_weight", 0, "--calibration_rows", 0),
            *("--save_steps", 1, "--gradient_scale", 1, *arguments),
        ]
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return popen


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Directories of finished runs, one for each way to launch."""
    finished = {}

    def directory(*launch):
        if launch not in finished:
            finished[launch] = tmp_path_factory.mktemp("uninterrupted") / "out"
            finish(start(finished[launch], launcher=launch or (sys.executable,)))
        return finished[launch]

    return directory


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def wait_for(process, condition):
    """Look often whether something is so while the process runs; fail with its output if it ends before that."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(process.communicate()[0])
        time.sleep(0.0005)


def steps(directory):
    """The step of the newest checkpoint."""
    there = checkpoints(directory)
    return int(there[-1].name.rsplit("-", 1)[1]) if there else 0


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_bit(start, uninterrupted, tmp_path):
    """One in the start-up, one after the last step, four in the middle of writing a checkpoint, the rest anywhere."""
    directory, chance, cut_short = tmp_path / "out", random.Random(0), 0
    moments = ["start", *chance.sample(["write"] * 4 + ["any"] * 4, 8), "end"]
    for moment in moments:
        before = steps(directory)
        process = start(directory)
        if moment == "start":
            time.sleep(chance.uniform(0.5, 4))
        elif moment == "end":
            wait_for(process, lambda: steps(directory) == STEPS)
        else:
            wait_for(process, lambda before=before: steps(directory) > before)
            if moment == "write":
                wait_for(process, (directory / UNFINISHED).exists)
            time.sleep(chance.uniform(0, 0.002 if moment == "write" else 0.1))
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
        assert steps(directory) < STEPS or moment == "end"
        cut_short += (directory / UNFINISHED).exists()
    assert cut_short >= 2, "too few kills came while a checkpoint was written"
    output = finish(start(directory))
    assert f"going on from {directory}/checkpoint-{STEPS}" in output
    assert_same_routers(uninterrupted(), directory)
    assert not (directory / UNFINISHED).exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_killing_the_launcher_or_a_worker_changes_no_bit(start, uninterrupted, tmp_path, way):
    launch = tuple(map(str, launcher(way)))
    directory = tmp_path / "out"
    for victim in ("launcher", "worker"):
        before = steps(directory)
        process = start(directory, launcher=launch)
        wait_for(process, lambda before=before: steps(directory) > before)
        workers = psutil.Process(process.pid).children(recursive=True)
        (psutil.Process(process.pid) if victim == "launcher" else workers[-1]).kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive, "workers train on without their launcher"
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert steps(directory) < STEPS
    finish(start(directory, launcher=launch))
    assert_same_routers(uninterrupted(*launch), directory)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one process", "cpu", "ddp", "deepspeed_zero1", "deepspeed_zero3"])
def test_sigterm_saves_and_exits_and_the_same_command_goes_on(start, uninterrupted, tmp_path, way):
    launch = (sys.executable,) if way == "one process" else tuple(map(str, launcher(way, 1 if way == "cpu" else 2)))
    directory, never = tmp_path / "out", ("--save_strategy", "no")
    process = start(directory, *never, launcher=launch)
    while not (line := process.stdout.readline()).strip().startswith("step 3/"):
        assert line, "it ended before its third step"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    (checkpoint,) = checkpoints(directory)
    assert 0 < steps(directory) < STEPS
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == steps(directory)
    output = finish(start(directory, *never, launcher=launch))
    assert f"going on from {checkpoint}" in output
    alone = way in ("one process", "cpu")
    assert_same_routers(uninterrupted() if alone else uninterrupted(*launch), directory)


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_another_number_of_processes_and_engine(start, uninterrupted, tmp_path):
    """From two processes under ZeRO-3 to one without, and to two under DDP: as without the change, but for rounding."""
    from launches import assert_same_result

    directory = tmp_path / "out"
    for way in ("deepspeed_zero3", None, "ddp"):
        before = steps(directory)
        process = start(directory, launcher=launcher(way) if way else (sys.executable,))
        wait_for(process, lambda before=before: steps(directory) > before + 2)
        process.terminate()
        process.communicate()
    finish(start(directory, launcher=launcher("deepspeed_zero1")))
    assert_same_result(uninterrupted(), directory, bound=2e-5)


@contextmanager
def small_disk(path, options):
    """A disk of its own at `path`, where this process may mount one."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", [None, "ddp"])
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(start, uninterrupted, tmp_path, way):
    launch = tuple(map(str, launcher(way))) if way else ()
    with small_disk(tmp_path / "disk", "size=120k") as disk:
        process = start(disk / "out", launcher=launch or (sys.executable,))
        output, _ = process.communicate()
        assert process.returncode == 1, output
        assert "Traceback" not in output
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert "No space left on device" in line
        kept = steps(disk / "out")
        assert 0 < kept < STEPS
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        output = finish(start(disk / "out", launcher=launch or (sys.executable,)))
        assert f"checkpoint-{kept}" in output
        assert_same_routers(uninterrupted(*launch), disk / "out")


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_to_is_found_out_before_any_work(start, tmp_path):
    with small_disk(tmp_path / "disk", "ro") as disk:
        process = start(disk / "out")
        output, _ = process.communicate()
        assert process.returncode == 1
        assert "Traceback" not in output
        assert "Read-only file system" in output
        assert "Tokenize" not in output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_write_its_part_ends_all_of_them_with_the_message(start, tmp_path, rank):
    script = tmp_path / "limited.py"
    script.write_text(
        "import os, resource, runpy, sys\n"
        f"if os.environ['LOCAL_RANK'] == '{rank}':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"  # of the optimizer's state there is more
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = ("--router_only", "false", "--learning_rate", "1e-3", "--save_steps", "2")
    process = start(tmp_path / "out", *arguments, launcher=(*launcher("deepspeed_zero1"), script))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    why = [line.partition("checkpoint-2 could not be written: ")[2] for line in errors]
    assert any("File too large" in reason or reason.startswith("is the disk full?") for reason in why), output
    assert "Traceback" not in output
    assert not list((tmp_path / "out").glob("checkpoint-*"))
