"""Models in the shapes that people have: saved again, with odd values in `config.json`, quantized."""

import json
import re
import shutil
from contextlib import suppress

import pytest
import torch
from call_options import tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from utils.evaluation.harness import identify_base, identify_routing
from utils.evaluation.inspection import describe_checkpoint, inspect_checkpoint
from utils.io.errors import UserError
from utils.model.base_identity import identify_model
from utils.model.base_models import resolve_base_model
from utils.model.checkpoint import (
    check_base_weights,
    load_mod_model,
    load_routers,
    load_tokenizer,
    make_settings,
    read_config,
    read_units,
    write_checkpoint,
)
from utils.model.lora import adapter_of, add_lora

UNITS = {0: 0.25, 1: 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny dense model."""
    directory = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mod(base):
    """Its MoD checkpoint, with routers that are not at zero."""
    settings = make_settings(read_config(base), mod_n=2)
    routers = {f"model.layers.{layer}.router.weight": torch.randn(1, 8) for layer in settings.layers}
    write_checkpoint(base.parent / "mod", base, settings, routers, units=UNITS)
    return base.parent / "mod"


@pytest.mark.parametrize("shards", ["5GB", "4KB"])
@pytest.mark.parametrize("loads", ["as transformers does", "as our commands do"])
def test_a_checkpoint_that_was_saved_again_is_the_same_to_every_command(mod, tmp_path, shards, loads):
    model = load_mod_model(mod)
    if loads == "as transformers does":
        model = type(model).from_pretrained(mod)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shards == "5GB")

    facts, again = (inspect_checkpoint(directory, [64]) for directory in (mod, tmp_path))
    assert again["routers"] == facts["routers"]
    assert again["routers"]["built"]
    assert "not built" not in describe_checkpoint(again)
    settings = make_settings(read_config(mod))
    assert identify_routing(tmp_path, settings, "all") == identify_routing(mod, settings, "all")
    assert identify_base(tmp_path)["weights"] == identify_base(mod)["weights"]
    assert read_units(tmp_path) == read_units(mod) == UNITS
    fresh = load_mod_model(mod)
    for router in fresh.router_modules().values():
        router.weight.data.zero_()
    load_routers(fresh, tmp_path)
    for layer, router in load_mod_model(tmp_path).router_modules().items():
        assert torch.equal(router.weight, fresh.router_modules()[layer].weight)


def test_what_is_trained_from_a_checkpoint_that_was_saved_again_has_its_own_routers(mod, tmp_path):
    load_mod_model(mod).save_pretrained(tmp_path / "again")
    settings = make_settings(read_config(mod))
    trained = {f"model.layers.{layer}.router.weight": torch.randn(1, 8) for layer in settings.layers}
    write_checkpoint(tmp_path / "out", tmp_path / "again", settings, trained)
    assert read_units(tmp_path / "out") is None
    model = type(load_mod_model(mod)).from_pretrained(tmp_path / "out")
    for layer, router in model.router_modules().items():
        assert torch.equal(router.weight, trained[f"model.layers.{layer}.router.weight"])


ODD = [
    *({"vocab_size": value} for value in (49152.0, True, "many", None, 0)),
    *({"hidden_size": value} for value in (-16, 8.0, None, 9)),
    *({"num_hidden_layers": value} for value in (0, -1, 3.0, "3", 1)),
    *({"num_attention_heads": value} for value in ("4", 0, 2.5, None, 1513)),
    *({"rms_norm_eps": value} for value in ("1e-5", None)),
    *({"tie_word_embeddings": "true"}, {"attention_bias": "no"}, {"intermediate_size": None}, {"use_cache": "x"}),
    *({"max_position_embeddings": "many"}, {"initializer_range": "x"}, {"num_key_value_heads": 3}, {"head_dim": "x"}),
    *({"rope_parameters": value} for value in ("default", {"rope_type": "mystery", "rope_theta": 1.0}, [1])),
    *({"rope_scaling": {"type": "mystery", "factor": 2}}, {"hidden_act": "silly"}, {"hidden_act": None}),
    *({"dtype": value} for value in ("bf16", 7, "float99")),
    *({"sliding_window": value} for value in ("", [0.4], 1e400, -0.5, 0)),
    *({"layer_types": value} for value in ([0.4] * 3, "full_attention", ["mystery"] * 3)),
    *({"torch_dtype": "half-ish"}, {"eos_token_id": "</s>"}, {"pad_token_id": 10**9}, {"mod": {"layers": "all"}}),
    *({"quantization_config": value} for value in ("yes", {"quant_method": "awq", "bits": 4}, {"load_in_4bit": True})),
    *({"mod": value} for value in (None, "mistral", [], 7)),
    *({"model_type": value} for value in (None, ["llama"], "gpt2", 7)),
]
"""What a `config.json` says that no model can be made of, or none that we know."""


@pytest.mark.parametrize("odd", ODD, ids=json.dumps)
@pytest.mark.parametrize("kind", ["base", "mod"])
def test_a_config_with_an_odd_value_is_one_line(base, mod, tmp_path, kind, odd):
    if kind == "base" and "mod" in odd:
        pytest.skip("a dense config has no such field")
    source = {"base": base, "mod": mod}[kind]
    for path in source.glob("*.safetensors*"):
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | odd))
    with pytest.raises(UserError) as refused:
        load_mod_model(tmp_path)
    assert "\n" not in str(refused.value)
    assert any(
        word in str(refused.value) for word in ("config.json", str(tmp_path), "model type", "one layer", "mod lacks")
    )
    if kind == "mod":  # by its config alone
        with suppress(UserError):  # described without a model: refused, or what it is
            describe_checkpoint(inspect_checkpoint(tmp_path, [64]))


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "", "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "", "bitsandbytes, 8 bits"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "", "compressed-tensors"),
        ({}, "model.layers.0.self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ({}, "model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ({}, "model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ({}, "model.layers.0.mlp.up_proj.weight_scale_inv", "FP8"),
        ({}, "model.layers.0.mlp.up_proj.weight._data", "quanto"),
    ],
)
def test_a_quantized_base_is_named_for_what_it_is(base, tmp_path, config, name, said):
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if name:
        weights = load_file(tmp_path / "base/model.safetensors")
        save_file(weights | {name: torch.zeros(1)}, tmp_path / "base/model.safetensors")
    with pytest.raises(UserError, match=f"a quantized model .*{said}.* name the model that it was made from"):
        check_base_weights(tmp_path / "base", read_config(tmp_path / "base"))


def test_weights_in_bytes_are_named_as_quantized(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(16, 8, dtype=torch.float8_e4m3fn)
    save_file(weights, tmp_path / "base/model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight is F8_E4M3, quantized"):
        load_mod_model(tmp_path / "base")


def test_what_a_config_leaves_out_is_described_by_the_architectures_defaults(mod, tmp_path):
    for path in mod.iterdir():
        shutil.copy(path, tmp_path / path.name)
    config = json.loads((mod / "config.json").read_text())
    del config["num_key_value_heads"], config["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(tmp_path, [64])["savings"] == inspect_checkpoint(mod, [64])["savings"]


WEIGHTS = "model.safetensors.index.json"
DAMAGED = {
    "config.json": (b"{oops", b"[]", b"\xff\xfe", b"[" * 100_000, b"", b"1" * 5000),
    WEIGHTS: (
        b"{oops",
        b"[1]",
        b"{}",
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 3}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ),
    "routers.safetensors": (b"", b"{}", None),
    "base.safetensors": (b"", b"\xff" * 64, None),
}
"""File of a checkpoint -> what it may hold instead; None: the first half of what it was."""


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_ in DAMAGED.items() for content in all_])
def test_a_damaged_file_of_a_checkpoint_is_one_line_that_names_it(mod, tmp_path, name, content):
    for path in mod.iterdir():
        shutil.copy(path, tmp_path / path.name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    asked = [load_mod_model, identify_model, lambda directory: inspect_checkpoint(directory, [64])]
    if name == WEIGHTS:
        asked.append(lambda directory: resolve_base_model(str(directory)))
    for ask in asked:
        with pytest.raises(UserError, match=name) as refused:
            ask(tmp_path)
        assert "\n" not in str(refused.value)


def test_a_weight_that_is_not_where_the_index_has_it_is_one_line(mod, tmp_path):
    for path in mod.iterdir():
        shutil.copy(path, tmp_path / path.name)
    routers = load_file(mod / "routers.safetensors")
    lost = routers.popitem()[0]
    save_file(routers, tmp_path / "routers.safetensors")
    for ask in (load_mod_model, identify_model):
        with pytest.raises(UserError, match=re.escape(lost)):
            ask(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("adapter_config.json", text) for text in ("{", "[]", "{}", '{"peft_type": "ZZZ"}')]
    + [("adapter_model.safetensors", text) for text in ("", "{}", None)],
)
def test_a_damaged_adapter_is_one_line(mod, tmp_path, name, content):
    for path in mod.iterdir():
        shutil.copy(path, tmp_path / path.name)
    model = load_mod_model(mod)
    add_lora(model, rank=2, alpha=4)
    adapter_of(model).save(tmp_path)
    load_mod_model(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name) as refused:
        load_mod_model(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", text) for text in ("{", "[]", "7", '{"added_tokens_decoder": 3}')]
    + [("tokenizer.json", text) for text in ("", "{}", '{"model": {"type": "mystery"}}', "[]")],
)
def test_a_damaged_tokenizer_is_one_line(mod, tmp_path, name, content):
    shutil.copy(mod / "config.json", tmp_path)
    tokenizer(64).save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer could be loaded") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("units", ["many", [1.0], [1.0, None], {"0": 1.0}, True])
def test_units_that_are_no_numbers_of_the_routed_layers_are_one_line(mod, tmp_path, units):
    load_mod_model(mod).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mod_units": units}))
    with pytest.raises(UserError, match="the units of its routers are"):
        read_units(tmp_path)
