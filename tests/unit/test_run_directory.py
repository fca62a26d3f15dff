"""Which checkpoint a run goes on from, and which it refuses by name."""

import json
from dataclasses import fields
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from utils.io.errors import UserError
from utils.io.files import write_json
from utils.pipeline.arguments import DataArguments, ModelArguments, RouterTrainingArguments
from utils.pipeline.run_directory import (
    BY_CONTENT,
    RESULT_NEUTRAL,
    RUN_FILE,
    agree_on_rows,
    check_output_directory,
    checkpoint_to_resume,
    describe_run,
)
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


def test_the_lock_of_a_folder_is_no_other_file(tmp_path):
    (tmp_path / ".out.lock").touch()
    assert checkpoint_to_resume(arguments(tmp_path), RUN) is None


@pytest.fixture
def describe(tmp_path):
    """Return the identity of a run on a tiny model, and what it is of."""
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model/config.json", {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4})
    (tmp_path / "model/tokenizer.json").write_text("{}")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model/model.safetensors")
    (tmp_path / "data.jsonl").write_text("{}")

    def of(model="model", data="data.jsonl", **given):
        data = DataArguments(str(tmp_path / data))
        return describe_run(ModelArguments("m"), data, arguments(tmp_path, **given), tmp_path / model)["identity"]

    return of


def differing(one, other):
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} - set(BY_CONTENT)


@pytest.mark.parametrize(
    ("file", "content", "differs"),
    [
        ("model/model.safetensors", {"weight": torch.ones(3)}, {"model_weights"}),
        ("model/config.json", '{"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 4}', {"model_config"}),
        ("model/tokenizer.json", "{ }", {"model_tokenizer"}),
        ("model/chat_template.jinja", "{{ messages }}", {"model_tokenizer"}),
        ("data.jsonl", "{ }", {"train_file_sha256"}),
    ],
)
def test_what_is_in_a_file_makes_the_run(tmp_path, describe, file, content, differs):
    before = describe()
    assert not differing(before, describe())
    save_file(content, tmp_path / file) if isinstance(content, dict) else (tmp_path / file).write_text(content)
    assert differing(before, describe()) == differs


def test_what_a_file_is_called_does_not(tmp_path, describe):
    before = describe()
    (tmp_path / "elsewhere").symlink_to("model")
    (tmp_path / "rows.jsonl").symlink_to("data.jsonl")
    assert not differing(before, describe("elsewhere", "rows.jsonl"))


def test_packages_code_and_device_are_part_of_a_run(describe, monkeypatch):
    before = describe()
    assert before["device"] == "cpu"
    monkeypatch.setattr(
        "utils.pipeline.run_directory.version", lambda name: "0.1" if name == "torch" else version(name)
    )
    monkeypatch.setattr("utils.pipeline.run_directory.CODE", ("utils/data",))
    assert differing(before, describe()) == {"torch version", "code_sha256"}


def test_every_argument_is_part_of_a_run_or_named_as_neutral(describe):
    groups = (ModelArguments, DataArguments, RouterTrainingArguments)
    names = {option.name for group in groups for option in fields(group)}
    assert set(describe()) >= names - RESULT_NEUTRAL
    assert not set(describe()) & RESULT_NEUTRAL
    assert not RESULT_NEUTRAL - names, "no such argument"
    assert {"seed", "learning_rate", "neftune_noise_alpha", "max_seq_length", "dtype", "mod_n"} <= set(describe())


def rows(labels):
    return Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": labels, "length": [2, 1]})


def test_rows_that_became_other_tokens_make_another_run(tmp_path):
    runs = []
    for labels in ([[1, 2], [3]], [[1, 2], [3]], [[-100, 2], [3]]):
        runs.append({"identity": dict(RUN["identity"])})
        agree_on_rows(arguments(tmp_path), runs[-1], (rows(labels), rows(labels)))
    assert runs[0] == runs[1] != runs[2]
    (tmp_path / RUN_FILE).write_text(json.dumps(runs[0]))
    check_output_directory(arguments(tmp_path), RUN)  # before there are rows
    assert checkpoint_to_resume(arguments(tmp_path), runs[1]) is None
    with pytest.raises(UserError, match="another run: its rows_sha256 is"):
        checkpoint_to_resume(arguments(tmp_path), runs[2])
