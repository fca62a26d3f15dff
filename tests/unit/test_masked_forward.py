"""The dense masked forward, which is the specification: what it equals, and for which inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import (
    ARCHITECTURES,
    LAYERS,
    NUM_LAYERS,
    add_routers,
    all_pairs,
    make_base,
    make_pair,
    pad,
    random_tokens,
    randomize_routers,
    texts,
)
from routing_reference import reference_forward

from utils.model.configuration_mod import EXECUTIONS, GRANULARITIES, routed_layers

LOGITS_BOUND = 5e-5
"""Float32 rounding between two orders of summation, for logits whose standard deviation is about 1."""

SCORES_BOUND = 2e-5

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_pair = pytest.mark.parametrize(("arch", "granularity"), all_pairs())


def padded_batches() -> dict[str, dict[str, torch.Tensor]]:
    """Name -> keywords of a forward: without a mask, and with padding on either side."""
    rows = texts((8, 3, 10))
    batches = {"no mask": {"input_ids": random_tokens(3, 9)}}
    for side in ("left", "right"):
        input_ids, mask = pad(rows, side, extra=2)
        batches[side] = {"input_ids": input_ids, "attention_mask": mask}
    return batches


def assert_follows_contract(base, model, granularity: str, threshold: float | tuple, **inputs) -> torch.Tensor:
    """Compare each execution with the reference; returns the gates of the real tokens or sequences, flat."""
    routers = {index: router.weight for index, router in model.router_modules().items()}
    mask = inputs.get("attention_mask")
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    decided = real if granularity.endswith("_token") else torch.ones(len(real), dtype=torch.bool)
    with torch.no_grad():
        logits, scores, gates = reference_forward(base, routers, granularity, threshold, inputs["input_ids"], mask)
    scores, gates = (torch.stack([of[index][decided] for index in routers]) for of in (scores, gates))
    for execution in EXECUTIONS:
        with torch.no_grad():
            output = model(**inputs, execution=execution)
        torch.testing.assert_close(output.router_scores[:, decided], scores, atol=SCORES_BOUND, rtol=0)
        assert output.router_gates[:, decided].equal(gates)
        torch.testing.assert_close(output.logits[real], logits[real], atol=LOGITS_BOUND, rtol=0)
    return gates.flatten()


@every_pair
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_routers_at_zero_give_exactly_the_base_model_in_float32(arch, granularity, attention):
    base, model = make_pair(arch, granularity, attention=attention)
    for inputs in padded_batches().values():
        with torch.no_grad():
            expected = base(**inputs, use_cache=False).logits
            for execution in EXECUTIONS:
                output = model(**inputs, execution=execution)
                assert output.router_gates.eq(1).all()
                assert (output.logits - expected).abs().max() == 0


@every_pair
def test_routers_at_zero_give_exactly_the_base_model_in_bfloat16(arch, granularity):
    base, model = make_pair(arch, granularity)
    base, model = base.to(torch.bfloat16), model.to(torch.bfloat16)
    for inputs in padded_batches().values():
        with torch.no_grad():
            expected = base(**inputs, use_cache=False).logits
            for execution in EXECUTIONS:
                logits = model(**inputs, execution=execution).logits
                assert logits.dtype == torch.bfloat16
                assert (logits - expected).abs().max() == 0


@every_pair
def test_routers_at_zero_give_exactly_the_base_model_and_its_gradient_in_training(arch, granularity):
    base, model = make_pair(arch, granularity)
    base.train(), model.train()
    input_ids = random_tokens(2, 8)
    expected = base(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss = model(input_ids=input_ids, labels=input_ids).loss
    assert loss == expected
    expected.backward()
    loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


@every_pair
def test_route_false_gives_exactly_the_base_model_whatever_the_routers(arch, granularity):
    base, model = make_pair(arch, granularity)
    randomize_routers(model)
    for inputs in padded_batches().values():
        with torch.no_grad():
            output = model(**inputs, route=False, use_cache=False)
            assert (output.logits - base(**inputs, use_cache=False).logits).abs().max() == 0
            assert (model(**inputs).logits - output.logits).abs().max() > 0.01
        assert "router_gates" not in output


@every_granularity
def test_route_false_caches_as_the_base_model_does(granularity):
    base, model = make_pair("llama", granularity)
    randomize_routers(model)
    input_ids = random_tokens(2, 7)
    expected = base.generate(input_ids, max_new_tokens=4, do_sample=False)
    assert model.generate(input_ids, max_new_tokens=4, do_sample=False, route=False).equal(expected)


@every_pair
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, (0.4, 0.5, 0.6)])
def test_the_forward_equals_an_independent_reference(arch, granularity, threshold):
    if isinstance(threshold, tuple) and granularity.startswith("attn_mlp"):
        threshold += (0.6, 0.5, 0.4)
    base, model = make_pair(arch, granularity, threshold=threshold)
    randomize_routers(model, scale=0.7)
    gates = []
    for inputs in padded_batches().values():
        gates.append(assert_follows_contract(base, model, granularity, threshold, **inputs))
    assert 0.05 < torch.cat(gates).mean() < 0.95, "the case is vacuous: everything is kept, or everything dropped"


@every_granularity
def test_the_reference_holds_where_every_layer_but_the_last_is_routed(granularity):
    base, model = make_pair("qwen3", granularity, layers=routed_layers(NUM_LAYERS, NUM_LAYERS))
    randomize_routers(model, scale=0.7)
    inputs = padded_batches()["left"]
    assert_follows_contract(base, model, granularity, 0.5, **inputs)


@pytest.fixture(scope="module")
def bases():
    return {arch: make_base(arch, seed=5) for arch in ARCHITECTURES}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_reference_holds_for_any_shape_mask_layers_and_threshold(bases, data):
    arch = data.draw(st.sampled_from(sorted(ARCHITECTURES)), "arch")
    granularity = data.draw(st.sampled_from(GRANULARITIES), "granularity")
    threshold = data.draw(st.sampled_from([0.2, 0.4, 0.5, 0.6, 0.8]), "threshold")
    layers = sorted(data.draw(st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1), "layers"))
    batch, tokens = data.draw(st.integers(1, 4), "batch"), data.draw(st.integers(1, 9), "tokens")
    row = st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any)
    mask = data.draw(st.none() | st.lists(row, min_size=batch, max_size=batch), "mask")
    seed = data.draw(st.integers(0, 1000), "seed")

    model = randomize_routers(add_routers(bases[arch], granularity, layers, threshold=threshold), seed, scale=0.7)
    inputs = {"input_ids": random_tokens(batch, tokens, seed)}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask, dtype=torch.int64)
    assert_follows_contract(bases[arch], model, granularity, threshold, **inputs)


@every_granularity
def test_all_inputs_dropped_leaves_the_other_branches_alone(granularity):
    """With the threshold above one half, routers at zero drop everything: the base model without those branches."""
    base, model = make_pair("llama", granularity, threshold=0.6)
    for index in LAYERS:
        layer = base.model.layers[index]
        for name, branch in (("attn", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            if name in granularity or "block" in granularity:
                torch.nn.init.zeros_(branch.weight)
    input_ids = random_tokens(2, 9)
    with torch.no_grad():
        output = model(input_ids)
        expected = base(input_ids, use_cache=False).logits
    assert output.router_gates.eq(0).all()
    torch.testing.assert_close(output.logits, expected, atol=LOGITS_BOUND, rtol=0)


@every_granularity
def test_the_output_has_scores_and_exact_gates_for_each_routed_layer(granularity):
    _, model = make_pair("llama", granularity)
    randomize_routers(model)
    for training in (False, True):
        output = model.train(training)(random_tokens(3, 7))
        routers = len(LAYERS) * (2 if granularity.startswith("attn_mlp") else 1)
        shape = (routers, 3) if granularity.endswith("_sequence") else (routers, 3, 7)
        assert output.router_scores.shape == output.router_gates.shape == shape
        assert output.router_scores.dtype == output.router_gates.dtype == torch.float32
        assert output.router_gates.equal((output.router_scores >= 0.5).float())


@every_architecture
def test_hidden_states_are_those_of_the_base_model_where_everything_is_kept(arch):
    base, model = make_pair(arch, "attn_sequence")
    input_ids = random_tokens(2, 6)
    with torch.no_grad():
        expected = base(input_ids, output_hidden_states=True, use_cache=False).hidden_states
        hidden_states = model(input_ids, output_hidden_states=True).hidden_states
    assert len(hidden_states) == len(expected) == NUM_LAYERS + 1
    assert all(ours.equal(theirs) for ours, theirs in zip(hidden_states, expected, strict=True))


def test_a_tuple_comes_back_where_return_dict_is_false():
    _, model = make_pair("llama", "attn_sequence")
    input_ids = random_tokens(2, 6)
    with torch.no_grad():
        logits, scores, gates = model(input_ids, return_dict=False, use_cache=False)
        output = model(input_ids, use_cache=False)
    assert logits.equal(output.logits)
    assert scores.equal(output.router_scores)
    assert gates.equal(output.router_gates)


@every_granularity
def test_a_forward_leaves_nothing_of_itself_on_the_model(granularity):
    """Two forwards in turn do not see each other, and no module keeps a tensor that is not a weight or a buffer."""
    _, model = make_pair("llama", granularity)
    randomize_routers(model)
    first, second = random_tokens(2, 6, seed=10), random_tokens(3, 8, seed=11)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        alone = model(first).logits
        model(second)
        again = model(first).logits
    assert again.equal(alone)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for module in model.modules():
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())
