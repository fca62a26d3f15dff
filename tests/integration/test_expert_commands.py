"""The commands on a mixture of experts: upcycle, train, reload elsewhere, count the load, drop experts, refuse."""

import json
import os
import sys

import pytest
import torch
from commands import run
from launches import LINUX, assert_same_result, launcher
from rounding import rounding
from safetensors.torch import load_file

from utils.evaluation.plots import read_figure
from utils.model.checkpoint import load_mod_model

RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(1, 40)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def moe_trained(workplace, finetune, upcycled):
    """A finished run: its directory and what it printed."""
    return workplace / "moe-out", finetune(workplace / "moe-out", "--model_name_or_path", upcycled, hinge=False)


def test_an_upcycled_base_is_an_ordinary_mixtral_with_the_llamas_attention(workplace, upcycled):
    from transformers import AutoModelForCausalLM, MixtralForCausalLM

    base = AutoModelForCausalLM.from_pretrained(workplace / "base")
    mixtral = AutoModelForCausalLM.from_pretrained(workplace / "ckpt/moe-mod-base")
    assert type(mixtral) is MixtralForCausalLM
    assert mixtral.config.rope_parameters["rope_theta"] == base.config.rope_parameters["rope_theta"]
    state = mixtral.state_dict()
    for name, weight in base.state_dict().items():
        assert ".mlp." in name or state[name].equal(weight), name
    experts = mixtral.model.layers[2].mlp.experts
    assert experts.gate_up_proj.shape[0] == 5
    assert not experts.gate_up_proj[0].equal(experts.gate_up_proj[1])
    for weight in load_file(upcycled / "routers.safetensors").values():
        assert weight.shape == (5, 16)
        assert not weight.any()


def test_training_gives_a_checkpoint_of_routers_and_a_report(moe_trained, upcycled):
    directory, result = moe_trained
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "mod_mixtral"
    assert config["architectures"] == ["MoDMixtralForCausalLM"]
    assert config["mod"]["granularity"] == "expert_token"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_moe_mod.MoDMixtralForCausalLM"
    assert os.path.samefile(directory / "base.safetensors", upcycled / "base.safetensors")
    routers = load_file(directory / "routers.safetensors")
    assert {name: tuple(weight.shape) for name, weight in routers.items()} == {
        f"model.layers.{i}.router.weight": (5, 16) for i in (2, 3, 4)
    }
    assert all(weight.any() for weight in routers.values())
    results = json.loads((directory / "results.json").read_text())["held_out"]["routed"]
    layers = [results[f"eval_capacity/layer_{i}"] for i in (2, 3, 4)]
    assert results["eval_capacity"] == pytest.approx(sum(layers) / 3)
    assert 0 <= results["eval_capacity"] < 1
    assert "capacity" in result.stdout


def test_the_output_loads_without_the_repository_with_the_same_logits(moe_trained, tmp_path):
    run(
        *(sys.executable, "-I", "-c", RELOAD, moe_trained[0], tmp_path / "logits.pt"),
        cwd=tmp_path,
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    with torch.no_grad():
        expected = load_mod_model(moe_trained[0]).eval()(torch.arange(1, 40)[None]).logits
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=rounding(expected, terms=1000)
    )


def test_the_load_of_each_expert_is_counted(moe_trained, repository, tmp_path):
    command = (sys.executable, repository / "entrypoints/evaluation/expert_load.py", moe_trained[0])
    run(*command, "--rows", 3, "--length", 50, "--output", tmp_path / "load.json")
    load = json.loads((tmp_path / "load.json").read_text())
    assert list(load["experts"]) == ["2", "3", "4"]
    for layer in load["experts"].values():
        assert sum(layer["assigned"]) == 3 * 50 * 2
        assert sum(layer["assigned_to_mean"]) == pytest.approx(5)
        assert all(e <= a for e, a in zip(layer["executed"], layer["assigned"], strict=True))
        assert layer["capacity"] == sum(layer["executed"]) / 300
    assert load["capacity"] == pytest.approx(sum(layer["capacity"] for layer in load["experts"].values()) / 3)
    drawn = read_figure("experts", [("load", load)], layer=3)
    assert drawn == {name: load["experts"]["3"][name] for name in ("assigned", "executed")}


def test_one_training_serves_another_capacity(moe_trained, repository, tmp_path):
    command = (sys.executable, repository / "entrypoints/checkpoint/recalibrate.py", moe_trained[0])
    run(*command, "--capacity", 0.3, "--rows", 24, "--output_dir", tmp_path / "out", cwd=repository)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["recalibration"]["calibration"]["capacity"] == pytest.approx(0.3, abs=0.01)
    assert results["held_out"]["routed"]["eval_capacity"] == pytest.approx(0.3, abs=0.1)


def build_baseline(kind, upcycled, workplace, repository, output_dir, *arguments, **options):
    command = (sys.executable, repository / "entrypoints/checkpoint/build_baseline.py", kind)
    text = ("--train_file", workplace / "data/alpaca/data.jsonl", "--rows", 12, "--max_seq_length", 96)
    where = ("--model_name_or_path", upcycled, "--output_dir", output_dir, "--max_use_prompts", 0)
    return run(*command, *where, *text, *arguments, **options)


def test_dropped_experts_are_never_executed_and_the_others_always(upcycled, workplace, repository, tmp_path):
    build_baseline("expert_drop", upcycled, workplace, repository, tmp_path / "dropped", "--drop_share", 0.4)
    text = ("--rows", 3, "--length", 50)
    run(*(sys.executable, repository / "entrypoints/evaluation/expert_load.py", tmp_path / "dropped"), *text)
    load = json.loads((tmp_path / "dropped/expert_load.json").read_text())
    thresholds = json.loads((tmp_path / "dropped/config.json").read_text())["mod"]["threshold"]
    assert sum(value > 0.5 for row in thresholds for value in row) == 6  # of 15
    for row, layer in zip(thresholds, load["experts"].values(), strict=True):
        for value, assigned, executed in zip(row, layer["assigned"], layer["executed"], strict=True):
            assert executed == (0 if value > 0.5 else assigned)


@pytest.mark.slow
def test_what_dropped_experts_leave_out_is_a_fitted_map(upcycled, workplace, repository, tmp_path):
    losses = []
    for name, arguments in (("nothing", ()), ("map", ("--substitute", "linear", "--substitute_rank", 5))):
        arguments = ("--capacity", 0.5, *arguments)
        build_baseline("expert_drop", upcycled, workplace, repository, tmp_path / name, *arguments)
        held_out = json.loads((tmp_path / name / "results.json").read_text())["held_out"]
        assert held_out["routed"]["eval_capacity"] == pytest.approx(0.5, abs=0.1)
        losses.append(held_out["routed"]["eval_loss"])
    maps = load_mod_model(tmp_path / "map").substitute_modules()
    assert [tuple(substitute.down.shape) for substitute in maps.values()] == [(5, 16)] * 3
    assert losses[0] != losses[1]


@pytest.mark.parametrize("kind", ["expert_drop", "random"])
def test_a_baseline_of_experts_is_at_its_capacity(upcycled, workplace, repository, tmp_path, kind):
    build_baseline(kind, upcycled, workplace, repository, tmp_path / "out", "--capacity", 0.7)
    held_out = json.loads((tmp_path / "out/results.json").read_text())["held_out"]
    # random thresholds are set on prompts that the model has answered, which these rows of a tiny model are not like
    bound = 0.15 if kind == "random" else 0.08
    assert held_out["routed"]["eval_capacity"] == pytest.approx(0.7, abs=bound)
    assert held_out["routed"]["eval_loss"] != held_out["dense"]["dense_loss"]
    assert load_mod_model(tmp_path / "out").config.mod_settings.granularity == "expert_token"
    if kind == "random":
        layers_dropped = build_baseline(
            "cosine", upcycled, workplace, repository, tmp_path / "other", "--capacity", 0.7, check=False
        )
        assert (
            layers_dropped.stderr.strip()
            .splitlines()[-1]
            .endswith("cosine is not for expert_token, whose baselines are expert_drop, random")
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--upcycle", 2), "a token has 2 experts, so there must be more than 2"),
        (("--granularity", "expert_token"), "needs a mixture-of-experts model"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_one_line(workplace, repository, tmp_path, arguments, message):
    build = (sys.executable, repository / "entrypoints/checkpoint/build_mod_checkpoint.py", "--folder_name", "new")
    result = run(*build, "--ckpt_root", tmp_path, "--base_model", workplace / "base", *arguments, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_the_same_routers_and_results_on_two_processes(workplace, finetune, upcycled, moe_trained, way):
    arguments = ("--model_name_or_path", upcycled, "--per_device_train_batch_size", 2)
    finetune(workplace / f"moe-{way}", *arguments, hinge=False, launcher=launcher(way), DS_ACCELERATOR="cpu")
    assert_same_result(moe_trained[0], workplace / f"moe-{way}", bound=2e-5)  # the rows' sums differ by rounding
