"""The routed model on simulated GPUs: same numbers, no tensor on the wrong device, host synchronisations counted."""

import contextlib
import copy

import pytest
import torch
from model_zoo import (
    LAYERS,
    NUM_LAYERS,
    make_pair,
    pad,
    random_tokens,
    randomize_routers,
    randomize_substitutes,
    texts,
)
from simulated_gpu import DeviceMismatchError, SynchronisedError, place, real, simulated_gpus, split_at
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from utils.model.configuration_mod import ALL_GRANULARITIES, GRANULARITIES

CASES = [("llama", granularity) for granularity in GRANULARITIES] + [("mixtral", "expert_token")]
LINEAR = {"kind": "linear", "rank": 3}
SPLITS = range(1, NUM_LAYERS)


def make_model(arch, granularity, **settings):
    _, model = make_pair(arch, granularity, **settings)
    randomize_routers(model)
    if "substitute" in settings:
        randomize_substitutes(model)
    return model


@torch.no_grad()
def answers(model, device="cpu"):
    """Return logits and gates with padding, what a cache gives, and greedy and beam search."""
    input_ids, mask = (tensor.to(device) for tensor in pad(texts((7, 4, 5)), "left"))
    output = model(input_ids, attention_mask=mask)
    dense = model(input_ids, attention_mask=mask, execution="dense")
    longer = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    step = model(input_ids[:, -1:], attention_mask=longer, past_key_values=output.past_key_values)
    generate = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    found = {
        "logits": output.logits,
        "gates": output.router_gates,
        "dense": dense.logits,
        "step": step.logits,
        "greedy": model.generate(input_ids, **generate),
        "beams": model.generate(input_ids, num_beams=2, **generate),
    }
    return {name: real(tensor) for name, tensor in found.items()}


def assert_same(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("arch", "granularity"), CASES)
def test_one_device_gives_what_the_cpu_gives(arch, granularity):
    model = make_model(arch, granularity, substitute=LINEAR)
    expected = answers(model)
    with simulated_gpus():
        assert_same(answers(place(copy.deepcopy(model)), "cuda:0"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "granularity"), CASES)
def test_a_model_that_is_split_at_any_layer_gives_what_a_whole_one_gives(arch, granularity):
    model = make_model(arch, granularity, substitute=LINEAR)
    expected = answers(model)
    for first in SPLITS:
        with simulated_gpus(2):
            assert_same(answers(split_at(copy.deepcopy(model), first), "cuda:0"), expected)


@torch.no_grad()
@pytest.mark.parametrize(("arch", "granularity"), CASES)
def test_a_model_that_is_split_between_its_routed_layers_decides_as_a_whole_one(arch, granularity):
    model = make_model(arch, granularity)
    input_ids, mask = pad(texts((7, 4, 5)), "left")
    expected = model(input_ids, attention_mask=mask)
    with simulated_gpus(2):
        split_at(model, LAYERS[1])
        output = model(input_ids.to("cuda"), attention_mask=mask.to("cuda"))
        torch.testing.assert_close(real(output.logits), expected.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(real(output.router_gates), expected.router_gates)


@torch.no_grad()
def syncs_of_a_decode_step(granularity, execution, batch=3):
    """Return the synchronisations of a decode step after the first."""
    model = make_model("llama", granularity)
    with simulated_gpus() as events:
        place(model)
        tokens = random_tokens(batch, 8).to("cuda")
        cache = model(tokens[:, :5], execution=execution, use_cache=True).past_key_values
        model(tokens[:, 5:6], past_key_values=cache, execution=execution)
        events.clear()
        model(tokens[:, 6:7], past_key_values=cache, execution=execution)
        return dict(events.syncs)


@pytest.mark.parametrize("granularity", [name for name in GRANULARITIES if name.endswith("sequence")])
def test_a_decode_step_by_sequence_waits_for_nothing(granularity):
    assert syncs_of_a_decode_step(granularity, "sparse") == {}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_masked_decode_step_waits_for_nothing(granularity):
    assert syncs_of_a_decode_step(granularity, "dense") == {}


@pytest.mark.parametrize("granularity", [name for name in GRANULARITIES if name.endswith("token")])
def test_a_sparse_decode_step_by_token_waits_once_for_each_router(granularity):
    syncs = syncs_of_a_decode_step(granularity, "sparse")
    assert sum(syncs.values()) == len(LAYERS) * (2 if granularity.startswith("attn_mlp") else 1)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ALL_GRANULARITIES)
def test_prefill_waits_once_for_each_router(granularity):
    model = make_model("mixtral" if granularity == "expert_token" else "llama", granularity)
    with simulated_gpus() as events:
        place(model)
        tokens = random_tokens(3, 8).to("cuda")
        events.clear()
        model(tokens, use_cache=False)
        of_routing = {what: count for what, count in events.syncs.items() if "routing_mod" in what}
        assert sum(of_routing.values()) == len(model.mod_settings.places)


class TestSimulator:
    """What is simulated is what a device does; without it the tests above could not fail."""

    def test_tensors_of_two_devices_do_not_meet(self):
        with simulated_gpus(2):
            first, second = (torch.ones(3, device=f"cuda:{number}") for number in range(2))
            with pytest.raises(DeviceMismatchError):
                first + second
            with pytest.raises(DeviceMismatchError):
                first + torch.ones(3)
            assert real(first + torch.tensor(1.0)).tolist() == [2.0] * 3
            assert (first + second.to("cuda:0")).device == torch.device("cuda:0")

    @pytest.mark.parametrize(
        "waits",
        [
            lambda x: x.sum().item(),
            lambda x: bool((x > 0).any()),
            lambda x: x.tolist(),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: x.cpu(),
            lambda x: x.masked_select(x > 0),
            lambda x: x[torch.tensor([0])],
            lambda x: torch.tensor([1.0], device=x.device),
            lambda x: torch.ones(3).to(x.device),
        ],
    )
    def test_what_waits_for_the_device_is_counted_and_can_be_refused(self, waits):
        with simulated_gpus() as events:
            x = torch.arange(3.0, device="cuda")
            events.clear()
            waits(x)
            assert events.syncs.total() == 1
            torch.cuda.set_sync_debug_mode("error")
            with pytest.raises(SynchronisedError):
                waits(x)
            x.add_(1).mul(2).cumsum(0).index_select(0, torch.zeros(2, dtype=torch.int64, device="cuda"))

    def test_gradients_are_those_of_the_cpu(self):
        x = torch.randn(4, 3)
        layer = torch.nn.Linear(3, 2)
        layer(x).square().sum().backward()
        expected = layer.weight.grad.clone()
        layer.zero_grad()
        with simulated_gpus() as events:
            place(layer)
            loss = layer(x.to("cuda")).square().sum()
            events.clear()
            loss.backward()
            assert events.syncs.total() == 0
            assert events.kernels.total() > 0
            torch.testing.assert_close(real(layer.weight.grad), expected)

    def test_a_graph_runs_again_on_new_values_and_refuses_to_wait(self):
        with simulated_gpus():
            x, graph = torch.arange(3.0, device="cuda"), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = (x * 2).cumsum(0)
                y[1:].add_(1)
            x.fill_(1.0)
            graph.replay()
            assert real(y).tolist() == [2.0, 5.0, 7.0]
            with pytest.raises(SynchronisedError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                x.sum().item()

    def test_memory_is_counted_until_it_is_released(self):
        with simulated_gpus():
            kept = torch.zeros(1000, device="cuda")
            assert torch.cuda.memory_allocated() == 4000
            (kept * 2).sum()
            assert torch.cuda.memory_allocated() == 4000
            assert torch.cuda.max_memory_allocated() >= 8000
            view = kept.view(10, 100)
            assert torch.cuda.memory_allocated() == 4000
            del kept, view
            assert torch.cuda.memory_allocated() == 0

    def test_what_was_simulated_is_gone_afterwards(self):
        with contextlib.suppress(ZeroDivisionError), simulated_gpus():
            assert torch.cuda.is_available()
            raise ZeroDivisionError
        assert not torch.cuda.is_available() or torch.version.cuda


@torch.no_grad()
@pytest.mark.parametrize("execution", ["dense", "sparse"])
@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_routed_layers_tell_attention_positions_only_where_rows_may_be_packed(granularity, execution):
    """FlashAttention reads positions back from the device, in every layer, to see whether rows are packed."""
    told = {}

    def attend(module, query, key, value, attention_mask, **kwargs):
        told[module.layer_idx] = kwargs.get("position_ids")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("tells", attend)
    AttentionMaskInterface.register("tells", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = make_model("llama", granularity)
    model.config._attn_implementation = "tells"
    tokens, positions = random_tokens(1, 6), torch.arange(6)[None]
    cache = model(tokens, execution=execution, use_cache=True, position_ids=positions).past_key_values
    model(tokens[:, :1], past_key_values=cache, position_ids=torch.tensor([[6]]), execution=execution)
    model(tokens, execution=execution, use_cache=False)
    assert all(told[layer] is None for layer in LAYERS if layer in told)
    assert any(layer in told for layer in LAYERS)
    if granularity.endswith("token"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), execution=execution, use_cache=False)
        assert all(told[layer] is not None for layer in LAYERS)
