"""Every field of `scripts/finetune_mod.sh` with wrong values: one line, before anything is installed or loaded."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from utils.model.configuration_mod import ALL_GRANULARITIES

ROOT = Path(__file__).resolve().parents[2]
NODES = {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "10.0.0.1", "PORT": "29500", "OUTPUT_DIR": "/tmp/none"}
NO_COUNT = ("0", "-1", "1.5", "many", "08", "1e3", "99999999999999999999")
NO_NUMBER = ("-1", "x", "1,5", "nan", "inf", "--seed")
WRONG = {
    "FOLDER_NAME": ("a/b", "..", ".", "/"),
    "BASE_MODEL": ("/nowhere", "./nowhere", "a/b/c"),
    "DATA_TYPE": ("alpacca", "a/b", "mixed"),
    "TRAIN_FILE": ("nowhere.jsonl", "/tmp"),
    "MAX_TRAIN_SAMPLES": NO_COUNT,
    "MAX_SEQ_LENGTH": NO_COUNT,
    "MOD_N": NO_COUNT,
    "GRANULARITY": ("attn", "attn_tokens", "ATTN_TOKEN", " "),
    "ROUTER_ONLY": ("maybe", "True "),
    "TARGET_CAPACITY": (*NO_NUMBER, "0", "0.0", "1.01", "50"),
    "TARGET_SKIPPED": (*NO_NUMBER, "1", "0"),
    "RECIPE": ("papers", "Default"),
    "GRADIENT_SCALE": (*NO_NUMBER, "1e999"),
    "LEARNING_RATE": NO_NUMBER,
    "WARMUP": NO_NUMBER,
    "WEIGHT_DECAY": NO_NUMBER,
    "NUM_EPOCHS": (*NO_NUMBER, "0"),
    "GLOBAL_BATCH_SIZE": NO_COUNT,
    "MICRO_BATCH_SIZE": NO_COUNT,
    "SEED": ("-1", "x", "4294967296", "1.0"),
    "NUM_PROCESSES": NO_COUNT,
    "NUM_MACHINES": NO_COUNT,
    "MACHINE_RANK": ("-1", "1", "first"),
    "MAIN_PROCESS_IP": ("",),
    "PORT": ("-1", "65536", "http"),
    "ACCELERATE_CONFIG": ("nowhere.yaml", "/tmp"),
    "OUTPUT_DIR": (str(ROOT / "README.md"),),
    "DRY_RUN": ("yes", "2"),
}
"""Field -> values that it can't have."""


def script(tmp_path: Path, **fields: str) -> subprocess.CompletedProcess[str]:
    """Run the script where every Python that is called says so and fails."""
    for name in ("python", "python3", "pip"):
        (tmp_path / name).write_text(f"#!/bin/bash\ntouch {tmp_path}/called\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in WRONG and name != "VIRTUAL_ENV"}
    return subprocess.run(
        ["bash", ROOT / "scripts/finetune_mod.sh"],
        env=environment | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **fields},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, marks=[pytest.mark.slow] if number else [])
        for field in WRONG
        for number, value in enumerate(WRONG[field])
    ],
)
def test_a_wrong_value_is_one_line_before_anything_is_installed_or_loaded(tmp_path, field, value):
    beside = NODES if field == "MAIN_PROCESS_IP" else {}
    done = script(tmp_path, **{**beside, field: value})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert field in line or value in line or "/data/mixed/" in line
    assert not (tmp_path / "called").exists()


def test_only_one_of_two_targets_is_taken(tmp_path):
    done = script(tmp_path, TARGET_CAPACITY="0.5", TARGET_SKIPPED="0.2")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: TARGET_CAPACITY=0.5 and TARGET_SKIPPED=0.2: both say how much to skip; set one of the two"
    ]


def test_every_field_of_the_readme_has_wrong_values_here():
    readme = (ROOT / "scripts/README.md").read_text(encoding="utf-8")
    table = readme.partition("| variable | default | meaning |")[2].partition("\n\n")[0]
    fields = {
        name
        for row in table.splitlines()
        for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1] if "|" in row else "")
    }
    assert fields == set(WRONG)


def test_the_script_knows_the_granularities():
    text = (ROOT / "scripts/finetune_mod.sh").read_text(encoding="utf-8")
    assert re.search(r"GRANULARITIES=\((.*)\)", text)[1].split() == list(ALL_GRANULARITIES)
