"""A model of Llama-3-8B's shape with random weights, through every command, on a CPU: what it takes is in the log.

`REHEARSAL_LAYERS=4` rehearses with fewer layers. With all of them it needs 40 GB of disk and 24 GB of memory.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time

import pytest

logger = logging.getLogger(__name__)
LAYERS = int(os.environ.get("REHEARSAL_LAYERS", "32"))
DISK = 40e9 * LAYERS / 32

pytestmark = pytest.mark.slow


@pytest.fixture
def measured(repository, tmp_path):
    """Runs a command of the repository, and logs its peak memory and time."""

    def run(script, *arguments):
        command = [sys.executable, repository / "entrypoints" / script, *arguments]
        start = time.monotonic()
        with open(tmp_path / "log", "w+") as log:
            process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            said = log.read()
        logger.warning(
            "%s: %.1f GB resident at most, %.0f s", script, usage.ru_maxrss * 1024 / 1e9, time.monotonic() - start
        )
        assert process.returncode == 0, said
        assert "Traceback" not in said
        return said, usage.ru_maxrss * 1024

    return run


def test_a_model_of_8b_goes_through_every_command(measured, workplace, tmp_path):
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk")
    base, output = tmp_path / "base", tmp_path / "out"
    try:
        measured("checkpoint/make_random_base.py", "--output_dir", base, "--layers", LAYERS)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        build = ("--folder_name", "rehearsed", "--ckpt_root", tmp_path / "ckpt", "--base_model", base)
        measured("checkpoint/build_mod_checkpoint.py", *build)
        built = tmp_path / "ckpt/rehearsed"
        assert all(os.stat(path).st_nlink > 1 for path in built.glob("base*.safetensors"))
        said, _ = measured("evaluation/describe.py", built)
        assert "attn_sequence" in said
        train = (
            *("--model_name_or_path", built, "--train_file", workplace / "data/alpaca/data.jsonl"),
            *("--output_dir", output, "--use_cpu", "true", "--dtype", "bfloat16", "--max_seq_length", 64),
            *("--max_train_samples", 2, "--max_eval_samples", 1, "--max_use_prompts", 0, "--global_batch_size", 1),
            *("--per_device_train_batch_size", 1, "--save_steps", 1, "--report_to", "none", "--recipe", "paper"),
        )
        _, memory = measured("finetune/finetune_mod.py", *train, "--max_steps", 1)
        assert memory < 1.25 * size + 2e9
        routers = (output / "routers.safetensors").stat().st_size
        assert routers < 1e6
        said, _ = measured("finetune/finetune_mod.py", *train, "--max_steps", 1)
        assert "going on from" in said
        recalibrate = ("--capacity", 0.8, "--output_dir", tmp_path / "at-0.8", "--rows", 1, "--dtype", "bfloat16")
        measured("checkpoint/recalibrate.py", output, *recalibrate)
        assert json.loads((tmp_path / "at-0.8/config.json").read_text())["mod"]["target_capacity"] == 0.8
    finally:
        for folder in (base, output, tmp_path / "ckpt", tmp_path / "at-0.8"):
            shutil.rmtree(folder, ignore_errors=True)
