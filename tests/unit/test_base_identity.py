"""A base is what it holds, whatever it is called and however it is stored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from call_options import tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from utils.io.errors import UserError
from utils.model.base_identity import difference_of_bases, identify_model
from utils.model.checkpoint import make_settings, read_config, write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny dense model in a folder of its own."""
    directory = tmp_path_factory.mktemp("a") / "mybase"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer(64).save_pretrained(directory)
    return directory


def linked(base: Path, there: Path) -> Path:
    (there / "a link").symlink_to(base)
    return there / "a link"


def sharded(base: Path, there: Path) -> Path:
    shutil.copytree(base, there / "shards")
    LlamaForCausalLM.from_pretrained(base).save_pretrained(there / "shards", max_shard_size="4KB")
    (there / "shards/model.safetensors").unlink()
    assert len(list((there / "shards").glob("*.safetensors"))) > 1
    return there / "shards"


def routed(base: Path, there: Path) -> Path:
    settings = make_settings(read_config(base))
    routers = {f"model.layers.{layer}.router.weight": torch.ones(1, 8) for layer in settings.layers}
    write_checkpoint(there / "mod", base, settings, routers)
    return there / "mod"


@pytest.mark.parametrize("same", [linked, sharded, routed])
def test_the_same_base_elsewhere_is_the_same(base, tmp_path, same):
    assert difference_of_bases(identify_model(base), identify_model(same(base, tmp_path))) is None


def trained(directory):
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(weights, directory / "model.safetensors")


def configured(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def retokenized(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')


def with_tokenizer_config(**fields):
    def change(directory):
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def with_marks(directory):
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (trained, "model.layers.1.mlp.up_proj.weight of its weights"),
        (configured, "rms_norm_eps of its config"),
        (retokenized, "tokenizer.json of its tokenizer"),
        (with_tokenizer_config(chat_template="{{ 1 }}"), "chat_template of its tokenizer"),
        (with_tokenizer_config(eos_token="<s>"), "eos_token of its tokenizer"),
        (with_marks, "special_tokens_map.json of its tokenizer"),
    ],
)
def test_another_base_of_the_same_name_is_told_by_what_differs(base, tmp_path, change, differs):
    other = tmp_path / base.name
    shutil.copytree(base, other)
    change(other)
    assert difference_of_bases(identify_model(base), identify_model(other)) == differs


@pytest.mark.parametrize("size", [0, 5, 9, 400, -1])
def test_a_file_that_is_cut_short_is_one_line(base, tmp_path, size):
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        identify_model(tmp_path / "base")
