"""Which checkpoint a run goes on from, and which it refuses by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from utils.io.errors import UserError
from utils.pipeline.arguments import DataArguments, ModelArguments, RouterTrainingArguments
from utils.pipeline.run_directory import RUN_FILE, checkpoint_to_resume, describe_run
from utils.pipeline.training_checkpoint import MANIFEST_FILE

RUN = {"identity": {"seed": 1, "train_file_sha256": "a"}}


def make_checkpoint(directory, run=RUN["identity"], parts=None):
    directory.mkdir(parents=True)
    (directory / MANIFEST_FILE).write_text(json.dumps({"files": {}, "run": run, "parts": parts}))
    return str(directory)


def arguments(output_dir, **given):
    return RouterTrainingArguments(output_dir=str(output_dir), use_cpu=True, report_to="none", **given)


def test_the_newest_checkpoint_of_the_same_run_is_gone_on_from(tmp_path):
    (tmp_path / RUN_FILE).write_text(json.dumps(RUN))
    make_checkpoint(tmp_path / "checkpoint-9")
    make_checkpoint(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(arguments(tmp_path), RUN) == str(tmp_path / "checkpoint-10")


def test_what_a_kill_left_before_the_run_was_claimed_is_no_other_file(tmp_path):
    (tmp_path / f".{RUN_FILE}.abc.tmp").touch()
    assert checkpoint_to_resume(arguments(tmp_path), RUN) is None
    assert [path.name for path in tmp_path.iterdir()] == [f".{RUN_FILE}.abc.tmp"]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"run": {"seed": 2, "train_file_sha256": "a"}}, "another run: its seed is 2, this one's 1"),
        ({"run": {"seed": 1, "train_file_sha256": "b"}}, "another run: its train_file_sha256 is 'b', this one's 'a'"),
        ({"parts": 4}, "was written by 4 processes, each its part of the optimizer; there are 1 now: go on with 4"),
    ],
)
def test_a_named_checkpoint_of_something_else_is_refused_by_name(tmp_path, checkpoint, message):
    path = make_checkpoint(tmp_path / "other/checkpoint-3", **checkpoint)
    with pytest.raises(UserError, match=message):
        checkpoint_to_resume(arguments(tmp_path / "out", resume_from_checkpoint=path), RUN)
    assert not (tmp_path / "out").exists()


def test_another_model_under_the_same_name_is_another_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("{}")
    described = []
    for value in (0.0, 0.0, 1.0):
        save_file({"weight": torch.full((3,), value)}, tmp_path / "model.safetensors")
        data = DataArguments(str(tmp_path / "data.jsonl"))
        run = describe_run(ModelArguments(str(tmp_path)), data, arguments(tmp_path), tmp_path)
        described.append(run["identity"])
    assert described[0] == described[1]
    differing = {name for name, value in described[2].items() if value != described[0][name]}
    assert differing == {"model_fingerprint"}
