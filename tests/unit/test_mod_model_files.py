"""A routed model in files: what is written, what is read back, what is refused, and a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from model_zoo import (
    ALL_ARCHITECTURES,
    ARCHITECTURES,
    HIDDEN_SIZE,
    LAYERS,
    make_pair,
    pad,
    randomize_routers,
    texts,
)
from rounding import rounding
from safetensors.torch import load_file, save_file

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))

ROUTER_NAMES = {f"model.layers.{index}.router.weight" for index in LAYERS}


def edit_weights(folder, edit) -> None:
    """Apply `edit` to the dictionary of the weights in `folder`, in place."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    """A routed Llama and the folder that it is saved in."""
    _, model = make_pair("llama", "attn_sequence")
    randomize_routers(model).save_pretrained(tmp_path)
    return model, tmp_path


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_has_the_names_of_the_base_and_float32_routers(arch, dtype, tmp_path):
    base, model = make_pair(arch, "attn_sequence")
    randomize_routers(model)
    base.to(dtype).save_pretrained(tmp_path / "base")
    model.to(dtype).save_pretrained(tmp_path / "mod")
    expected = load_file(tmp_path / "base" / "model.safetensors")
    weights = load_file(tmp_path / "mod" / "model.safetensors")
    assert weights.keys() == expected.keys() | ROUTER_NAMES
    for name, value in expected.items():
        assert weights[name].dtype == dtype
        assert weights[name].equal(value)
    for name in ROUTER_NAMES:
        assert weights[name].dtype == torch.float32
        assert weights[name].shape == (1, HIDDEN_SIZE)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_with_the_same_logits(arch, dtype, tmp_path):
    _, original = make_pair(arch, "mlp_token")
    randomize_routers(original, scale=0.7).save_pretrained(tmp_path / "original")
    # a load casts the weights and not the rotary frequencies, which `model.to(dtype)` would cast as well
    model = type(original).from_pretrained(tmp_path / "original", dtype=dtype)
    model.save_pretrained(tmp_path / "copy")
    loaded = type(original).from_pretrained(tmp_path / "copy", dtype="auto")
    assert loaded.lm_head.weight.dtype == dtype
    assert not loaded.training
    input_ids, mask = pad(texts((9, 4)), "left")
    with torch.no_grad():
        logits = loaded(input_ids, mask).logits
        for other in (model, original) if dtype == torch.float32 else (model,):
            expected = other(input_ids, mask).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=rounding(expected, terms=1000))
    for index, router in original.router_modules().items():
        assert loaded.router_modules()[index].weight.dtype == torch.float32
        assert loaded.router_modules()[index].weight.equal(router.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_stay_float32_in_a_low_precision_load_of_a_float32_checkpoint(saved, dtype):
    model, folder = saved
    loaded = type(model).from_pretrained(folder, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    for index, router in loaded.router_modules().items():
        assert router.weight.dtype == torch.float32
        assert router.weight.equal(model.router_modules()[index].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [False, True])
def test_missing_routers_start_at_zero_in_float32(saved, dtype, inner):
    model, folder = saved
    edit_weights(folder, lambda weights: [weights.pop(name) for name in ROUTER_NAMES])
    loaded = (type(model.model) if inner else type(model)).from_pretrained(folder, dtype=dtype)
    routers = loaded.router_modules()
    assert list(routers) == list(LAYERS)
    for router in routers.values():
        assert router.weight.dtype == torch.float32
        assert router.weight.eq(0).all()


def test_one_missing_router_starts_at_zero_and_the_others_are_read(saved):
    model, folder = saved
    edit_weights(folder, lambda weights: weights.pop("model.layers.3.router.weight"))
    routers = type(model).from_pretrained(folder).router_modules()
    assert routers[3].weight.eq(0).all()
    assert routers[4].weight.equal(model.router_modules()[4].weight)


@pytest.mark.parametrize(
    "name", ["model.layers.3.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_missing_weight_is_refused_by_name(saved, name):
    model, folder = saved
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"missing weights: {name}"):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.layers.3.gate.weight", "model.layers.9.self_attn.q_proj.weight", "extra"])
def test_an_unknown_weight_is_refused_by_name(saved, name):
    model, folder = saved
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(2)}))
    with pytest.raises(ValueError, match=f"unexpected weights: {name}"):
        type(model).from_pretrained(folder)


def test_many_missing_weights_are_named_by_the_first_and_counted(saved):
    model, folder = saved

    def drop_a_layer(weights):
        for name in [name for name in weights if name.startswith("model.layers.0.")]:
            del weights[name]

    edit_weights(folder, drop_a_layer)
    with pytest.raises(ValueError, match=r"missing weights: model\.layers\.0\..* and 6 more"):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.layers.3.router.weight", "model.layers.3.self_attn.q_proj.weight"])
def test_a_weight_of_another_shape_is_refused_by_name(saved, name):
    model, folder = saved
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(3, 5)}))
    with pytest.raises(
        ValueError, match=rf"{name} has the shape \[3, 5\] in the checkpoint, not \[\d+, {HIDDEN_SIZE}\]"
    ):
        type(model).from_pretrained(folder)


def test_loading_info_is_still_there_for_who_asks(saved):
    model, folder = saved
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"]


def test_a_tied_head_is_neither_written_nor_missed(tmp_path):
    _, model = make_pair("qwen3", "attn_sequence")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_auto_class_is_written_with_every_file_it_needs(saved):
    model, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == f"modeling_mod.{type(model).__name__}"
    assert config["auto_map"]["AutoConfig"] == f"configuration_mod.{type(model.config).__name__}"
    assert config["architectures"] == [type(model).__name__]
    assert {file.name for file in folder.glob("*.py")} >= {
        "modeling_mod.py",
        "configuration_mod.py",
        "routing_mod.py",
        "execution_mod.py",
    }
    assert all(file.name.endswith("_mod.py") for file in folder.glob("*.py"))


CHILD = """
import importlib.util, json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM

assert importlib.util.find_spec("utils") is None, "the repository is on the path: the test would prove nothing"
root = Path(sys.argv[1])
for folder in sorted(root.iterdir()):
    if not (folder / "config.json").exists():
        continue
    case = torch.load(root / f"{folder.name}.pt")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.mod_settings.granularity == case["granularity"]
    for source in (folder, folder / "again"):
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert not model.training
        with torch.no_grad():
            output = model(case["input_ids"], attention_mask=case["attention_mask"])
        difference = (output.logits - case["logits"]).abs().max().item()
        assert difference <= case["bound"], (folder.name, difference)
        assert output.router_gates.equal(case["gates"])
        generated = model.generate(case["input_ids"], attention_mask=case["attention_mask"], **case["generate"])
        assert generated.equal(case["generated"])
        if source == folder:
            model.save_pretrained(folder / "again")
    print("done", folder.name)
"""


def test_a_process_without_the_repository_loads_runs_generates_and_saves_again(tmp_path):
    """All architectures in one process, each with another granularity: starting it is what takes the time."""
    models = tmp_path / "models"
    names = ["attn_sequence", "block_token", "mlp_sequence", "attn_token"]
    names += ["expert_token", "expert_token", "expert_token", "block_token"]
    granularities = dict(zip(ALL_ARCHITECTURES, names, strict=True))
    input_ids, mask = pad(texts((9, 4)), "left")
    generate = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    for arch, granularity in granularities.items():
        _, model = make_pair(arch, granularity)
        randomize_routers(model, scale=0.7).save_pretrained(models / arch)
        with torch.no_grad():
            output = model(input_ids, mask)
        case = {"granularity": granularity, "input_ids": input_ids, "attention_mask": mask, "generate": generate}
        case |= {"logits": output.logits, "gates": output.router_gates, "bound": rounding(output.logits, terms=1000)}
        case["generated"] = model.generate(input_ids, attention_mask=mask, **generate)
        torch.save(case, models / f"{arch}.pt")

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    child = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, str(models)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert [line for line in child.stdout.splitlines() if line.startswith("done")] == [
        f"done {arch}" for arch in sorted(ALL_ARCHITECTURES)
    ]
    for arch in ALL_ARCHITECTURES:
        first, again = (
            json.loads((folder / "config.json").read_text()) for folder in (models / arch, models / arch / "again")
        )
        assert again == first
        ours, theirs = (
            load_file(models / arch / "model.safetensors"),
            load_file(models / arch / "again/model.safetensors"),
        )
        assert ours.keys() == theirs.keys()
        assert all(theirs[name].equal(value) for name, value in ours.items())
        for file in (models / arch).glob("*.py"):
            assert (models / arch / "again" / file.name).read_bytes() == file.read_bytes()
