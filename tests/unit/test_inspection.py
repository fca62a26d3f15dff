"""What `describe` says is what the files hold, and its arithmetic is what a real forward counts."""

import json
import runpy
import sys
from dataclasses import replace

import model_zoo
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from utils.evaluation.inspection import describe_checkpoint, inspect_checkpoint
from utils.evaluation.kv_memory import kv_bytes_by_layer
from utils.io.errors import UserError
from utils.model.checkpoint import build_mod_checkpoint, make_settings, read_config, write_checkpoint
from utils.model.configuration_mod import GRANULARITIES, MoDSettings
from utils.model.costs import layer_cost, savings


@torch.inference_mode()
def counted_flops(model, input_ids) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_saved_operations_are_those_that_a_forward_leaves_out(granularity):
    length = 24
    input_ids = model_zoo.random_tokens(1, length)
    base, kept = model_zoo.make_pair("llama", granularity, attention="eager")
    _, skipped = model_zoo.make_pair("llama", granularity, attention="eager", threshold=0.75)
    config = base.config.to_dict()
    settings = MoDSettings(granularity, model_zoo.LAYERS)
    expected = savings(config, settings, length, dict.fromkeys(settings.places, 0.0), "float32")
    # eager attention multiplies with what the causal mask hides too
    hidden_pairs = length * length - length * (length + 1) / 2
    hidden = 2 * 2 * hidden_pairs * model_zoo.HIDDEN_SIZE
    dense = counted_flops(base, input_ids)
    assert dense == pytest.approx(expected["flops"] + model_zoo.NUM_LAYERS * hidden, rel=0.01)  # and rotary embeddings
    routers = len(settings.places) * 2 * model_zoo.HIDDEN_SIZE * (1 if settings.level == "sequence" else length)
    assert counted_flops(kept, input_ids) == dense + routers
    saved = expected["flops_saved"] + (0 if settings.target == "mlp" else len(settings.layers) * hidden)
    assert dense + routers - counted_flops(skipped, input_ids) == saved


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_saved_operations_are_less_by_what_a_forward_runs_instead(granularity):
    length, ranks = 24, (4, 8, 2)
    if granularity.startswith("attn_mlp"):
        ranks += (3, 5, 1)
    substitute = {"kind": "linear", "rank": ranks}
    input_ids = model_zoo.random_tokens(1, length)
    _, bare = model_zoo.make_pair("llama", granularity, attention="eager", threshold=0.75)
    _, skipped = model_zoo.make_pair("llama", granularity, attention="eager", threshold=0.75, substitute=substitute)
    settings = MoDSettings(granularity, model_zoo.LAYERS, substitute=substitute)
    config, nothing = bare.config.to_dict(), dict.fromkeys(settings.places, 0.0)
    without, found = (
        savings(config, each, length, nothing, "float32") for each in (replace(settings, substitute=None), settings)
    )
    cost = 2 * 2 * model_zoo.HIDDEN_SIZE * sum(ranks) * length
    assert counted_flops(skipped, input_ids) - counted_flops(bare, input_ids) == cost
    assert without["flops_of_substitutes"] == 0
    assert found["flops_of_substitutes"] == cost
    assert found["flops_saved"] == without["flops_saved"] - cost
    half = savings(config, settings, length, dict.fromkeys(settings.places, 0.5), "float32")
    assert half["flops_saved"] == found["flops_saved"] / 2


def test_the_substitute_of_experts_runs_on_every_token():
    settings = MoDSettings("expert_token", (3,), substitute={"kind": "linear", "rank": 2})
    config = model_zoo.make_base("olmoe").config.to_dict()
    costs = [savings(config, settings, 24, {3: kept}, "float32")["flops_of_substitutes"] for kept in (0.0, 0.5, 1.0)]
    assert costs == [2 * 2 * model_zoo.HIDDEN_SIZE * 2 * 24, 2 * 2 * model_zoo.HIDDEN_SIZE * 2 * 24, 0]


@pytest.mark.parametrize("arch", ["olmoe", "qwen2_moe", "mixtral", "deepseek_v2"])
def test_operations_of_a_mixture_of_experts_are_those_of_a_forward(arch):
    length = 24
    base = model_zoo.make_base(arch, attn_implementation="eager")
    base.set_experts_implementation("eager")
    config = base.config.to_dict()
    settings = MoDSettings("expert_token", (3,))
    expected = savings(config | {"sliding_window": None}, settings, length, {3: 0.0}, "float32")
    one = layer_cost(config, length, 3)
    assert expected["flops_saved"] == one.experts > 0
    # eager attention multiplies with what the causal mask hides too
    hidden_pairs = length * (length - 1) / 2
    pairs = length * (length + 1) / 2
    plain = layer_cost(config | {"sliding_window": None}, length, 0)
    shorter = layer_cost(config | {"sliding_window": None}, 1, 0)
    per_pair = (plain.queries - length * shorter.queries) / (pairs - length)
    total = expected["flops"] + config["num_hidden_layers"] * hidden_pairs * per_pair
    assert counted_flops(base, model_zoo.random_tokens(1, length)) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("arch", model_zoo.ALL_ARCHITECTURES)
def test_kv_memory_is_that_of_a_cache(arch):
    base = model_zoo.make_base(arch)
    length = model_zoo.SLIDING_WINDOW - 1
    with torch.inference_mode():
        cache = base(model_zoo.random_tokens(1, length), use_cache=True).past_key_values
    config = base.config.to_dict()
    costs = [layer_cost(config, length, layer) for layer in range(model_zoo.NUM_LAYERS)]
    assert kv_bytes_by_layer(cache) == [4 * cost.kv_elements for cost in costs]


def test_kv_memory_of_the_papers_case(repository):
    """Llama-3-8B, 2048 tokens, batch 64, half of 16 layers skipped: 0.5 GiB a layer, 4 GiB in all."""
    facts = inspect_checkpoint(repository / "ckpt/llama3-8b-instruct-mod", [2048], batch=64, capacity=0.5)
    cost = facts["savings"]["lengths"][2048]
    assert cost["kv_bytes"] == 16 * 2**30
    assert cost["kv_bytes_saved"] == 4 * 2**30
    assert not facts["routers"]["built"]
    assert facts["routers"]["parameters"] == 16 * 4096
    assert "4.0 GiB" in describe_checkpoint(facts)


def test_a_sliding_window_bounds_what_is_seen_and_stored():
    config = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    whole, windowed = (layer_cost(config | {"sliding_window": window}, 100) for window in (None, 10))
    assert windowed.kv_elements == 10 * 2 * 8
    assert whole.kv_elements == 100 * 2 * 8
    # the first ten tokens see 55 pairs, each later one ten
    assert whole.queries - windowed.queries == 2 * 2 * (100 * 101 / 2 - (55 + 90 * 10)) * 8


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny checkpoint with the report of a training run."""
    base = model_zoo.make_base("llama")
    base.save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "base")
    settings = make_settings(read_config(tmp_path / "base"), mod_n=2, granularity="block_sequence")
    build_mod_checkpoint(tmp_path / "base", tmp_path / "mod", replace(settings, target_capacity=0.75))
    routed = {"eval_loss": 2.0, "eval_capacity": 0.6, "eval_capacity/layer_3": 0.2, "eval_capacity/layer_4": 1.0}
    report = {"held_out": {"rows": 64, "dense": {"dense_loss": 1.9}, "routed": routed}}
    (tmp_path / "mod/results.json").write_text(json.dumps(report))
    return tmp_path / "mod"


def test_a_built_checkpoint(checkpoint):
    facts = inspect_checkpoint(checkpoint, [16])
    assert facts["granularity"] == "block_sequence"
    assert facts["threshold"] == {3: 0.5, 4: 0.5}
    assert facts["trained"]["layers"] == {3: 0.2, 4: 1.0}
    assert facts["savings"]["capacity_from"] == "measured on held-out rows of the training run"
    assert facts["routers"]["parameters"] == 2 * model_zoo.HIDDEN_SIZE
    weights = sum(parameter.numel() for parameter in model_zoo.make_base("llama").parameters())
    assert facts["routers"]["share"] == 64 / (weights + 64)
    one_layer = layer_cost(read_config(checkpoint), 16)
    assert facts["savings"]["lengths"][16]["flops_saved"] == pytest.approx(0.8 * one_layer.total)
    text = describe_checkpoint(facts)
    assert "0.600 measured on 64 held-out rows" in text
    assert facts["substitute"] is facts["capacities"] is None
    assert "substitute   none" in text
    assert "target       0.75, what training aimed at" in text
    assert "capacities   no others" in text
    (checkpoint / "results.json").unlink()
    facts = inspect_checkpoint(checkpoint, [16])
    assert facts["savings"]["capacity"] == 0.75
    assert facts["savings"]["capacity_from"] == "what training aimed at"


def test_substitutes_and_what_it_was_calibrated_for(checkpoint, tmp_path):
    table = [{"capacity": capacity, "threshold": [threshold] * 2} for capacity, threshold in ((0.5, 0.6), (0.75, 0.4))]
    settings = replace(
        make_settings(read_config(checkpoint)),
        **{"substitute": {"kind": "linear", "rank": [2, 4]}, "capacities": table, "sequence_pooling": "prompt"},
    )
    size = model_zoo.HIDDEN_SIZE
    substitutes = {
        f"model.layers.{layer}.substitute.{name}": torch.ones(shape)
        for layer, rank in ((3, 2), (4, 4))
        for name, shape in (("down", (rank, size)), ("up", (size, rank)), ("bias", (size,)))
    }
    routers = {f"model.layers.{layer}.router.weight": torch.ones(1, size) for layer in (3, 4)}
    write_checkpoint(tmp_path / "with", checkpoint, settings, routers, substitutes=substitutes)
    facts = inspect_checkpoint(tmp_path / "with", [16])
    file_size = 4 * size * (2 * (2 + 4) + 2)
    total = file_size + 4 * sum(p.numel() for p in model_zoo.make_base("llama").parameters()) + 4 * 2 * size
    expected = {"kind": "linear", "ranks": {3: 2, 4: 4}, "bytes": file_size, "share": file_size / total}
    assert facts["substitute"] == expected
    saved = (tmp_path / "with/substitutes.safetensors").stat().st_size
    assert saved == pytest.approx(file_size, abs=1000), "its header has names"
    assert facts["capacities"] == [0.5, 0.75]
    text = describe_checkpoint(facts)
    assert f"linear, ranks 2 to 4, {file_size / 1024:.1f} KiB, {file_size / total:.2%} of the checkpoint's" in text
    assert "target       0.75, what it was calibrated for" in text
    assert "capacities   0.5 0.75 and between, what it was calibrated for; a sequence is decided on its prompt" in text
    assert "at capacity 0.750 (what it was calibrated for), batch 1, less what the substitutes cost" in text
    cost = facts["savings"]["lengths"][16]
    assert cost["flops_of_substitutes"] == pytest.approx(0.25 * 16 * 2 * 2 * size * (2 + 4))
    (tmp_path / "with/model.safetensors.index.json").unlink()
    not_built = inspect_checkpoint(tmp_path / "with", [16])["substitute"]
    assert (not_built["bytes"], not_built["share"]) == (file_size, None)


def test_figures_of_use_are_shown_where_the_run_has_them(checkpoint):
    assert inspect_checkpoint(checkpoint, [16])["trained"]["use"] is None
    path = checkpoint / "results.json"
    use = {name: {"mean": mean, "stderr": 0.0125} for name, mean in (("agreement", 0.9), ("executed", 0.5))}
    use |= {"foreign": {"mean": 0.25, "stderr": None}, "prompts": 39, "max_new_tokens": 40}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use": use}))
    facts = inspect_checkpoint(checkpoint, [16])
    assert facts["trained"]["use"] == use
    figures = "agreement 0.900 ± 0.013, executed 0.500 ± 0.013, foreign 0.250, measured in generation on 39 prompts"
    assert f"use          {figures}" in describe_checkpoint(facts)
    at = {"held_out": {"eval_capacity": 0.912, "eval_loss": 1.95}, "use": use}
    others = {"capacities": {"0.9": at, "0.8": {"held_out": at["held_out"]}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | others))
    text = describe_checkpoint(inspect_checkpoint(checkpoint, [16]))
    assert "set to 0.9: 0.912 on held-out rows, 0.500 in generation, measured; loss 1.9500" in text
    assert "set to 0.8: 0.912 on held-out rows, measured; loss 1.9500" in text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use": {"agreement": 1}}))
    with pytest.raises(UserError, match="not the report of a training run"):
        inspect_checkpoint(checkpoint, [16])


def test_what_is_no_checkpoint_is_refused_in_one_line(checkpoint, tmp_path, repository, monkeypatch, capsys):
    with pytest.raises(UserError, match="a dense llama model"):
        inspect_checkpoint(tmp_path / "base", [16])
    (checkpoint / "results.json").write_text("{}")
    with pytest.raises(UserError, match="not the report of a training run"):
        inspect_checkpoint(checkpoint, [16])
    monkeypatch.setattr(sys, "argv", ["describe.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as exit_code:
        runpy.run_path(str(repository / "entrypoints/evaluation/describe.py"), run_name="__main__")
    assert exit_code.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such model directory\n"


def test_the_command_prints_text_and_json(checkpoint, repository, monkeypatch, capsys):
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["describe.py", str(checkpoint), "--lengths", "16", *extra])
        with pytest.raises(SystemExit) as exit_code:
            runpy.run_path(str(repository / "entrypoints/evaluation/describe.py"), run_name="__main__")
        assert exit_code.value.code == 0
    text, _, written = capsys.readouterr().out.partition("{")
    assert "granularity  block_sequence" in text
    assert json.loads("{" + written)["layers"] == [3, 4]
