"""One training serves any capacity: `recalibrate.py` shifts the thresholds of what was trained."""

import json
import math
import shutil
import sys

import pytest
from commands import run
from safetensors.torch import load_file, save_file

from entrypoints.checkpoint.recalibrate import main
from utils.evaluation.inspection import inspect_checkpoint
from utils.io.errors import UserError
from utils.model.checkpoint import read_settings, read_units

ROUTERS = "routers.safetensors"


@pytest.fixture(scope="module")
def by_budget(workplace, finetune):
    """A run held by the budget, calibrated on two rows."""
    directory = workplace / "by-budget"
    finetune(directory, "--granularity", "attn_token", "--target_capacity", 0.7, hinge=False)
    return directory


@pytest.fixture
def recalibrate(tmp_path, monkeypatch):
    """Run the command in this process."""

    def start(checkpoint, *arguments):
        given = (checkpoint, "--output_dir", tmp_path / "out", *arguments)
        monkeypatch.setattr(sys, "argv", ["recalibrate.py", *map(str, given)])
        main()

    return start


def results_of(directory):
    return json.loads((directory / "results.json").read_text())


def threshold_of(directory):
    return json.loads((directory / "config.json").read_text())["mod"]["threshold"]


def in_units(thresholds, directory):
    """What stays the same where routers and thresholds are scaled together."""
    units = read_units(directory).values()
    return [math.log(tau / (1 - tau)) / unit for tau, unit in zip(thresholds, units, strict=True)]


def test_another_capacity_is_met_on_rows_that_were_not_trained_on(by_budget, recalibrate, repository, tmp_path):
    command = (sys.executable, repository / "entrypoints/checkpoint/recalibrate.py", by_budget, "--capacity", 0.4)
    result = run(*command, "--rows", 24, "--output_dir", tmp_path / "out", cwd=repository)
    assert result.stdout.strip().splitlines()[-1] == str(tmp_path / "out")
    before, after = results_of(by_budget), results_of(tmp_path / "out")
    assert after["recalibration"]["calibration"]["capacity"] == pytest.approx(0.4, abs=0.01)
    assert after["recalibration"]["calibration"]["rows"] == 24
    assert after["held_out"]["routed"]["eval_capacity"] < before["held_out"]["routed"]["eval_capacity"] - 0.1
    assert after["held_out"]["rows"] == before["held_out"]["rows"]
    dense = before["held_out"]["dense"]["dense_loss"]
    assert after["held_out"]["dense"]["dense_loss"] == pytest.approx(dense, rel=1e-5), "the same held-out rows"
    mod = json.loads((tmp_path / "out/config.json").read_text())["mod"]
    assert mod["target_capacity"] == 0.4
    assert "sequence_pooling" not in mod, "of tokens"
    settable = [read_settings(path).capacities for path in (by_budget, tmp_path / "out")]
    assert [entry["capacity"] for entry in settable[1]] == [0.4, *(entry["capacity"] for entry in settable[0])]
    assert settable[1][0]["threshold"] == tuple(mod["threshold"])
    for before_it, entry in zip(settable[0], settable[1][1:], strict=True):
        assert in_units(entry["threshold"], tmp_path / "out") == pytest.approx(
            in_units(before_it["threshold"], by_budget), rel=1e-4
        )
    assert set(after["use"]) >= {"agreement", "executed", "foreign"}
    assert after["use"]["prompts"] == before["use"]["prompts"] == len(after["answers"])
    assert after["use"]["executed"]["mean"] < before["use"]["executed"]["mean"]
    facts = inspect_checkpoint(tmp_path / "out", [96])
    assert facts["trained"]["capacity"] == pytest.approx(after["held_out"]["routed"]["eval_capacity"])

    again = tmp_path / "again"  # there and back, by the record that it carries along
    recalibrate(tmp_path / "out", "--capacity", 0.7, "--rows", 2, "--max_use_prompts", 0, "--output_dir", again)
    assert threshold_of(again) == pytest.approx(threshold_of(by_budget), abs=0.02)


def test_the_capacity_that_was_trained_for_changes_nothing(by_budget, recalibrate, tmp_path):
    recalibrate(by_budget, "--capacity", 0.7, "--max_use_prompts", 0)
    wanted, got = results_of(by_budget)["held_out"]["routed"], results_of(tmp_path / "out")["held_out"]["routed"]
    more = ("--rows", 2, "--max_use_prompts", 0, "--output_dir", tmp_path / "same")
    recalibrate(by_budget, "--capacity", 0.7, *more)
    same = results_of(tmp_path / "same")["held_out"]["routed"]
    for name, value in same.items():
        assert value == pytest.approx(wanted[name], abs=0.01 if "capacity" in name else 1e-3)
    assert got["eval_capacity"] == pytest.approx(wanted["eval_capacity"], abs=0.1)
    assert threshold_of(tmp_path / "same") == pytest.approx(threshold_of(by_budget), abs=0.01)
    for name, weight in load_file(tmp_path / "same" / ROUTERS).items():
        assert weight.equal(load_file(by_budget / ROUTERS)[name])
    assert read_units(tmp_path / "same") == pytest.approx(read_units(by_budget))
    assert len(set(read_units(by_budget).values())) == 3


@pytest.mark.slow
def test_routers_of_sequences_shift_too(workplace, finetune, recalibrate, tmp_path):
    finetune(tmp_path / "run", "--target_capacity", 0.7, "--max_train_samples", 40, hinge=False)
    recalibrate(tmp_path / "run", "--capacity", 0.5)
    calibration = results_of(tmp_path / "out")["recalibration"]["calibration"]
    assert calibration["capacity"] == pytest.approx(0.5, abs=1 / calibration["rows"])
    back = tmp_path / "back"
    recalibrate(tmp_path / "out", "--capacity", 0.7, "--rows", 5, "--output_dir", back)
    wanted, got = results_of(tmp_path / "run")["held_out"]["routed"], results_of(back)["held_out"]["routed"]
    assert got["eval_capacity"] == pytest.approx(wanted["eval_capacity"], abs=0.05)
    cuts = [in_units(threshold_of(tmp_path / name), tmp_path / name) for name in ("run", "out", "back")]
    assert cuts[1] != pytest.approx(cuts[0], rel=0.02)
    assert cuts[2] == pytest.approx(cuts[0], rel=0.02)
    for name, pooling in (("out", "prompt"), ("all", "all")):
        if pooling == "all":
            recalibrate(
                tmp_path / "run", "--capacity", 0.5, "--sequence_pooling", "all", "--output_dir", tmp_path / name
            )
        mod = json.loads((tmp_path / name / "config.json").read_text())["mod"]
        assert mod["sequence_pooling"] == pooling


def test_a_checkpoint_that_has_no_table_gets_one_and_is_told_what_it_is(by_budget, recalibrate, tmp_path, caplog):
    bare = shutil.copytree(by_budget, tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    del config["mod"]["capacities"]
    (bare / "config.json").write_text(json.dumps(config))
    recalibrate(bare, "--capacity", 0.6, "--rows", 2, "--max_use_prompts", 0)
    facts = inspect_checkpoint(tmp_path / "out", [96])
    assert facts["capacities"] == [0.6]
    assert facts["target_is"] == "what it was calibrated for"
    settings = read_settings(tmp_path / "out")
    assert settings.at_capacity(0.6).threshold == settings.threshold
    assert "left out" not in caplog.text
    maps = [load_file(path / "substitutes.safetensors") for path in (bare, tmp_path / "out")]
    assert all(maps[1][name].equal(tensor) for name, tensor in maps[0].items())


def test_capacities_that_were_calibrated_on_other_text_are_left_out_and_it_is_said(
    by_budget, recalibrate, workplace, tmp_path, caplog
):
    other = ("--calibration_file", workplace / "data/alpaca/data.jsonl", "--max_use_prompts", 0)
    recalibrate(by_budget, "--capacity", 0.6, "--rows", 2, *other)
    assert [entry["capacity"] for entry in read_settings(tmp_path / "out").capacities] == [0.6]
    assert "the capacities 0.5, 0.7, 0.75, 0.9 are left out" in caplog.text


def strip_units(checkpoint, copy):
    """Copy a checkpoint, its routers as a program writes them that knows nothing of units."""
    shutil.copytree(checkpoint, copy)
    save_file(load_file(checkpoint / ROUTERS), copy / ROUTERS)
    return copy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--capacity", "1.5"), "capacity 1.5 must be above 0 and at most 1"),
        (("--capacity", "0.9", "--rows", "0"), "rows 0 must be at least 1"),
        (("--capacity", "0.9", "--max_use_prompts", "-1"), "max_use_prompts -1 must not be negative"),
        (("--capacity", "0.9", "--calibration_file", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--capacity", "0.9", "--max_train_samples", "100000"), ""),
    ],
)
def test_a_mistake_ends_in_one_line(by_budget, recalibrate, tmp_path, arguments, message):
    if not message:
        record = json.loads((by_budget / "run.json").read_text())
        checkpoint = shutil.copytree(by_budget, tmp_path / "uncalibrated")
        record["identity"]["calibration_rows"] = 0
        (checkpoint / "run.json").write_text(json.dumps(record))
        by_budget, message = checkpoint, "every row was trained on or is held out"
    with pytest.raises(UserError, match=message):
        recalibrate(by_budget, *arguments)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_cannot_be_shifted_are_refused(by_budget, workplace, recalibrate, tmp_path):
    old = strip_units(by_budget, tmp_path / "old")
    untrained, data = workplace / "ckpt/tiny-mod", workplace / "data/alpaca/data.jsonl"
    of_untrained = ("--train_file", data, "--max_train_samples", 8, "--max_seq_length", 96)
    refused = (
        (old, (), "trained with capacity_control budget, so they need not be 1"),
        (untrained, (), "no record of what it was trained on"),
        (untrained, of_untrained, "its routers are at zero"),
    )
    for number, (checkpoint, arguments, message) in enumerate(refused):  # a process holds its output until it ends
        with pytest.raises(UserError, match=message):
            recalibrate(checkpoint, "--capacity", 0.9, *arguments, "--output_dir", tmp_path / str(number))
