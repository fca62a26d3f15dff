"""What `finetune_mod.py` makes of the rows before training starts."""

import logging

import pytest
from datasets import Dataset

from entrypoints.finetune.finetune_mod import at_most
from utils.data.splitting import set_aside
from utils.io.errors import UserError
from utils.pipeline.arguments import RouterTrainingArguments
from utils.pipeline.processes import ACCELERATE_FLAGS, check_accelerate_variables


def test_a_regression_learns_from_so_many_rows_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    train_set, calibration_set = set_aside(Dataset.from_dict({"number": list(range(80))}), 8)
    assert at_most(train_set, 72) is train_set
    assert not caplog.messages
    assert at_most(train_set, 50)["number"][:] == list(range(50))
    assert caplog.messages == ["the regression learns from 50 of 72 rows (--regression_rows)"]
    assert calibration_set["number"][:] == list(range(72, 80))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"ACCELERATE_{name}", "maybe") for name in ACCELERATE_FLAGS),
        *(("ACCELERATE_MIXED_PRECISION", value) for value in ("fp99", "fp8", "")),
        ("ACCELERATE_DYNAMO_BACKEND", "fast"),
        ("ACCELERATE_TORCH_DEVICE", "gpu"),
    ],
)
def test_what_accelerate_cannot_read_in_the_environment_is_one_line(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value} in the environment: ") as refused:
        RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert "\n" not in str(refused.value)


def test_what_accelerate_can_read_in_the_environment_is_taken(monkeypatch):
    for name, value in {
        "USE_CPU": "TRUE",
        "DEBUG_MODE": "off",
        "DYNAMO_BACKEND": "no",
        "MIXED_PRECISION": "bf16",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_accelerate_variables()
