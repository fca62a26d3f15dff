"""The GPU script on a CPU: every piece runs, figures and bounds are written, and a miss is a non-zero exit code."""

import json

import pytest
from commands import run


def check(workplace, repository, output, *arguments, **options):
    command = ["bash", repository / "scripts/check_gpu.sh", workplace / "ckpt/tiny-mod", "--device", "cpu"]
    command += ["--shape", workplace / "ckpt/tiny-mod", "--tokens", 32, "--batches", 1, 2, "--output", output]
    return run(*command, *arguments, **options)


def test_figures_and_bounds_are_written(workplace, repository, tmp_path):
    done = check(workplace, repository, tmp_path / "found.json", "--pieces", "collective", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["missed"] == []
    assert found["findings"][0] == {
        "name": "all_reduce over gloo is off by",
        "figure": 0.0,
        "bound": 0.0,
        "note": "",
        "passed": True,
    }


@pytest.mark.slow
def test_every_piece_runs_on_a_cpu(workplace, repository, tmp_path):
    done = check(workplace, repository, tmp_path / "found.json", "--dtypes", "float32", "--train_rows", 40, check=False)
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    allowed = ("decode, batch", "activations of a training step")  # a CPU's attention and speed are others
    assert [name for name in found["missed"] if not name.startswith(allowed)] == []
    assert done.returncode == (1 if found["missed"] else 0)
    assert any("after a kill" in finding["name"] for finding in found["findings"])
    assert any("activations" in finding["name"] for finding in found["findings"])
