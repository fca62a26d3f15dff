"""What the vLLM plugin tells from a checkpoint's files alone; it needs no vLLM for that."""

import json
import sys
from pathlib import Path

import pytest

from utils.model.configuration_mod import MoDSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "utils/serving"))

from router_tuning_vllm import VLLM_VERSION, version_problem
from router_tuning_vllm.check import CheckpointProblem, check_checkpoint
from router_tuning_vllm.routing import Routing

TABLES = [{"capacity": 0.25, "threshold": [0.6, 0.8]}, {"capacity": 0.75, "threshold": [0.2, 0.5]}]
MOD = {"granularity": "block_token", "layers": [1, 3], "threshold": [0.4, 0.5], "capacities": TABLES}


def routing(**fields):
    return Routing.from_config(MOD | fields, num_layers=5, hidden_size=16)


@pytest.mark.parametrize("capacity", [0.25, 0.4, 0.5, 0.75])
def test_thresholds_at_a_capacity_are_the_models(capacity):
    assert routing().thresholds_at(capacity) == pytest.approx(MoDSettings(**MOD).at_capacity(capacity).threshold, abs=0)


def test_all_can_be_executed_whatever_was_calibrated():
    everything = MoDSettings(**MOD).at_capacity(1).threshold
    assert routing().thresholds_at(1) == routing(capacities=None).thresholds_at(1.0) == (everything, everything)


def test_between_thresholds_out_of_order_nothing_is_known():
    tables = [TABLES[0], {"capacity": 0.75, "threshold": [0.7, 0.5]}]
    assert routing(capacities=tables).thresholds_at(0.75) == (0.7, 0.5)
    for known in (routing(capacities=tables).thresholds_at, MoDSettings(**MOD | {"capacities": tables}).at_capacity):
        with pytest.raises(ValueError, match="fall out of order"):
            known(0.5)


def test_thresholds_are_the_checkpoints_without_a_capacity():
    assert routing().thresholds == (0.4, 0.5)
    assert routing(threshold=0.5).thresholds == (0.5, 0.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"granularity": "expert_token"}, "expert_token"),
        ({"granularity": "head_token"}, "'head_token' is not served; known are attn_sequence"),
        ({"layers": []}, r"mod.layers \[\]"),
        ({"layers": [3, 1]}, "ascend"),
        ({"layers": [1, 5]}, "fit a model of 5 layers"),
        ({"threshold": [0.5]}, "mod.threshold"),
        ({"threshold": 1.0}, "mod.threshold"),
        ({"substitute": {"kind": "quadratic", "rank": 4}}, "only the kind linear"),
        ({"substitute": {"kind": "linear", "rank": 17}}, "hidden size, 16"),
        ({"substitute": {"kind": "linear", "rank": [4]}}, "mod.substitute.rank"),
        ({"capacities": [{"capacity": 0.5}]}, "mod.capacities"),
    ],
)
def test_a_field_that_can_not_be_served_is_named(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        routing(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("capacity", "words"), [(0.2, "0.25 to 0.75"), (1.5, "at most 1"), (True, "True"), ("x", "x")])
def test_a_capacity_that_can_not_be_served_is_named(capacity, words):
    with pytest.raises(ValueError, match=words):
        routing().thresholds_at(capacity)


def test_a_checkpoint_without_tables_has_its_own_capacity_only():
    with pytest.raises(ValueError, match=r"recalibrate\.py"):
        routing(capacities=None).thresholds_at(0.5)


def test_a_layer_with_two_routers_has_two_places():
    both = routing(granularity="attn_mlp_token", threshold=[0.1, 0.2, 0.3, 0.4], capacities=None)
    assert [place.name for place in both.places] == ["1.attn", "1.mlp", "3.attn", "3.mlp"]
    assert both.places[1].weights == ["model.layers.1.mlp_router.weight"]
    assert both.thresholds == (0.1, 0.2, 0.3, 0.4)


def test_another_version_of_vllm_is_refused_with_the_way_out():
    assert version_problem(VLLM_VERSION) is None
    assert version_problem(f"{VLLM_VERSION}+cpu") is None
    assert f"pip install vllm=={VLLM_VERSION}" in version_problem("0.31.0")


@pytest.fixture
def checkpoint(tmp_path):
    """Files that look like a checkpoint that can be served, with one tensor of one byte."""
    config = {"model_type": "mod_llama", "num_hidden_layers": 5, "hidden_size": 16, "mod": MOD}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [name for place in routing().places for name in place.weights]
    index = {"weight_map": dict.fromkeys(names, "routers.safetensors") | {"lm_head.weight": "base.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("routers.safetensors", "base.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_whole_checkpoint_is_taken(checkpoint):
    assert [place.layer for place in check_checkpoint(checkpoint).places] == [1, 3]


def change(**fields):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change(model_type="llama"), "dense model's"),
        (change(model_type="mod_olmoe"), "mixtures of experts"),
        (change(quantization_config={"quant_method": "gptq"}), "quantized"),
        (change(mod=None), "says there what is routed"),
        (change(mod=MOD | {"substitute": {"kind": "linear", "rank": 2}}), "lacks model.layers.1.substitute.down"),
        (lambda folder: (folder / "adapter_config.json").touch(), "--merge_lora"),
        (lambda folder: (folder / "base.safetensors").unlink(), "names base.safetensors, which is not there"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "only safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_checkpoint_that_can_not_be_served_is_one_line(checkpoint, damage, words):
    damage(checkpoint)
    with pytest.raises(CheckpointProblem, match=words) as error:
        check_checkpoint(checkpoint)
    assert "\n" not in str(error.value)
    assert str(checkpoint) in str(error.value)


def test_a_single_file_without_routers_is_refused_and_a_damaged_one_too(checkpoint):
    (checkpoint / "model.safetensors.index.json").unlink()
    header = json.dumps({"lm_head.weight": {}}).encode()
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointProblem, match=r"lacks model\.layers\.1\.router\.weight"):
        check_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointProblem, match="damaged"):
        check_checkpoint(checkpoint)
