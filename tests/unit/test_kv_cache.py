"""The KV cache: decisions of prefill hold, only executed rows are stored, and nothing of it is ever mixed up."""

import copy
from collections import Counter

import pytest
import torch
from model_zoo import (
    ARCHITECTURES,
    LAYERS,
    NUM_LAYERS,
    SEQUENCE_GRANULARITIES,
    add_routers,
    all_pairs,
    make_base,
    make_pair,
    pad,
    random_tokens,
    randomize_routers,
    routable_layers,
    texts,
)
from routing_reference import reference_forward
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache

from utils.model.cache_mod import MoDCache
from utils.model.configuration_mod import EXECUTIONS, GRANULARITIES

LOGITS_BOUND = 5e-5
"""Float32, logits of about 10: a matrix product or a softmax over fewer rows may sum in another order."""

PACKED_GRANULARITIES = ("attn_sequence", "block_sequence", "attn_mlp_sequence")

ALL_BUT_LAST = tuple(range(NUM_LAYERS - 1))

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_pair = pytest.mark.parametrize(("arch", "granularity"), all_pairs())
every_packed_granularity = pytest.mark.parametrize("granularity", PACKED_GRANULARITIES)
every_sequence_granularity = pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)


@torch.no_grad()
def run_cached(model, input_ids, mask, lengths, execution=None, cache=None):
    """Run a text through the model in calls of `lengths` tokens, all with one cache.

    Returns:
        logits [batch, tokens, vocabulary], the cache, and the gates of each call.
    """
    logits, gates, start = [], [], 0
    for length in lengths:
        end = start + length
        output = model(
            input_ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            execution=execution,
        )
        cache, start = output.past_key_values, end
        logits.append(output.logits)
        gates.append(output.router_gates)
    return torch.cat(logits, dim=1), cache, gates


def padded_prompts(side: str, continuation: int):
    """Return input ids and mask of four prompts, padded on `side`, and `continuation` further tokens."""
    if side == "none":
        return random_tokens(4, 9 + continuation), None
    input_ids, mask = pad(texts((9, 4, 7, 2)), side)
    more = random_tokens(4, continuation, seed=20)
    return torch.cat([input_ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)


def kv_bytes(cache) -> list[int]:
    """Bytes of keys and values, layer by layer."""
    return [sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) for layer in cache.layers]


def mixed_model(granularity: str, arch: str = "llama", layers=LAYERS, **fields):
    """Return a routed model whose routers, at random, keep some of the inputs; `fields` are of the base's config."""
    if fields:
        return randomize_routers(add_routers(make_base(arch, **fields), granularity, layers), scale=0.7)
    return randomize_routers(make_pair(arch, granularity, layers)[1], scale=0.7)


@every_pair
@pytest.mark.parametrize(
    "side", ["left", pytest.param("none", marks=pytest.mark.slow), pytest.param("right", marks=pytest.mark.slow)]
)
def test_cached_calls_equal_recomputing_with_the_decisions_of_prefill(arch, granularity, side):
    base, model = make_pair(arch, granularity, layers=routable_layers(arch, granularity))
    randomize_routers(model, scale=0.7)
    input_ids, mask = padded_prompts(side, continuation=5)
    routers = {index: router.weight for index, router in model.router_modules().items()}
    with torch.no_grad():
        expected, _, _ = reference_forward(base, routers, granularity, 0.5, input_ids, mask, prompt_tokens=9)
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    for execution in EXECUTIONS:
        logits, _, _ = run_cached(model, input_ids, mask, (9, 1, 3, 1), execution)
        torch.testing.assert_close(logits[real], expected[real], atol=LOGITS_BOUND, rtol=0)


@every_pair
@pytest.mark.parametrize("attention", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
def test_sparse_equals_dense_with_a_cache_also_at_padding(arch, granularity, attention):
    assert_sparse_equals_dense_with_a_cache(arch, granularity, attention)


@every_granularity
def test_sparse_equals_dense_with_a_cache_in_eager_attention(granularity):
    assert_sparse_equals_dense_with_a_cache("mistral", granularity, "eager")


def assert_sparse_equals_dense_with_a_cache(arch, granularity, attention):
    model = mixed_model(granularity, arch, routable_layers(arch, granularity), attn_implementation=attention)
    shares = []
    for side in ("none", "left", "right"):
        input_ids, mask = padded_prompts(side, continuation=3)
        dense, _, dense_gates = run_cached(model, input_ids, mask, (5, 4, 1, 2), "dense")
        sparse, _, sparse_gates = run_cached(model, input_ids, mask, (5, 4, 1, 2), "sparse")
        assert all(one.equal(other) for one, other in zip(dense_gates, sparse_gates, strict=True))
        torch.testing.assert_close(sparse, dense, atol=LOGITS_BOUND, rtol=0)
        shares.append(dense_gates[0].mean(dtype=torch.float64))
    assert 0.1 < sum(shares) / len(shares) < 0.9


@every_granularity
def test_sparse_equals_dense_over_a_prompt_of_several_blocks_of_queries(granularity):
    """More tokens than the stretch of positions whose kept queries are attended together."""
    model = mixed_model(granularity, "mistral", sliding_window=150, max_position_embeddings=512)
    input_ids, mask = pad(texts((300, 290, 130)), "left")
    for lengths in ((300,), (140, 155, 5)):
        dense, _, _ = run_cached(model, input_ids, mask, lengths, "dense")
        sparse, _, _ = run_cached(model, input_ids, mask, lengths, "sparse")
        torch.testing.assert_close(sparse, dense, atol=2 * LOGITS_BOUND, rtol=0)


@every_granularity
@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6])
def test_one_token_prompts_work_with_the_first_layer_kept_dropped_and_mixed(granularity, threshold):
    _, model = make_pair("llama", granularity, layers=ALL_BUT_LAST, threshold=threshold)
    if threshold == 0.5:
        randomize_routers(model, scale=0.7)
    for batch in (1, 5):
        input_ids = random_tokens(batch, 4, seed=batch)
        dense, dense_cache, _ = run_cached(model, input_ids, None, (1, 1, 2), "dense")
        sparse, sparse_cache, gates = run_cached(model, input_ids, None, (1, 1, 2), "sparse")
        torch.testing.assert_close(sparse, dense, atol=LOGITS_BOUND, rtol=0)
        assert sparse_cache.get_seq_length() == dense_cache.get_seq_length() == 4
        if threshold != 0.5:
            assert gates[0].eq(float(threshold < 0.5)).all()


@every_sequence_granularity
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_decision_of_prefill_holds_whatever_comes_later(granularity, execution):
    model = mixed_model(granularity)
    input_ids = random_tokens(6, 30)
    _, _, gates = run_cached(model, input_ids, None, (5, 1, 20, 4), execution)
    assert all(gate.equal(gates[0]) for gate in gates)
    with torch.no_grad():
        assert not model(input_ids[:, 5:25]).router_gates.equal(gates[0]), "a new decision would have been another"
        assert model(input_ids[:, :5], execution=execution).router_gates.equal(gates[0])


@every_architecture
@every_packed_granularity
def test_a_skipped_row_stores_no_keys_and_values(arch, granularity):
    model = mixed_model(granularity, arch)
    base_cache = model(random_tokens(8, 9), route=False, use_cache=True).past_key_values
    _, cache, gates = run_cached(model, random_tokens(8, 9), None, (7, 1, 1), "sparse")
    rows = dict(zip(model.config.mod_settings.places, gates[0].sum(dim=1).int().tolist(), strict=True))
    kept = {index: rows[(index, "attn") if granularity.startswith("attn_mlp") else index] for index in LAYERS}
    assert any(0 < rows < 8 for rows in kept.values())
    for index, (stored, whole) in enumerate(zip(kv_bytes(cache), kv_bytes(base_cache), strict=True)):
        assert stored * 8 == whole * kept.get(index, 8)


@every_sequence_granularity
def test_a_decode_step_reads_nothing_on_the_host_and_copies_no_more_than_the_base_does(granularity):
    """It appends to the executed rows of each layer, as transformers does to all, and gathers no cached row."""

    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts, self.copied = Counter(), 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            self.counts[name] += 1
            if (
                name in ("cat", "index", "index_select", "clone", "gather")
                and result.dim() == 4
                and result.shape[2] > 1
            ):
                self.copied += result.numel() * result.element_size()
            return result

    model = mixed_model(granularity)
    input_ids = random_tokens(8, 10)
    seen = {}
    for route in (False, True):
        with torch.no_grad():
            cache = model(input_ids[:, :9], route=route, use_cache=True).past_key_values
            with Operators() as seen[route]:
                model(input_ids[:, 9:], route=route, past_key_values=cache)
        assert seen[route].copied == sum(kv_bytes(cache))
    for name in ("nonzero", "_local_scalar_dense", "item", "is_nonzero"):
        assert seen[True].counts[name] == seen[False].counts[name]


@every_sequence_granularity
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_rows_of_a_cache_are_reordered_selected_and_repeated_with_their_decisions(granularity, arch, execution):
    model = mixed_model(granularity, arch)
    input_ids = random_tokens(6, 12)
    operations = {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([3, 3, 0, 5, 1, 1])), [3, 3, 0, 5, 1, 1]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([4, 0])), [4, 0]),
        "select by mask": (lambda cache: cache.batch_select_indices(torch.arange(6) % 2 == 1), [1, 3, 5]),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        "deep copy": (lambda cache: None, [0, 1, 2, 3, 4, 5]),
    }
    _, cache, gates = run_cached(model, input_ids, None, (8, 2), execution)
    rows_kept = gates[0].sum(dim=1)
    assert ((rows_kept > 0) & (rows_kept < 6)).any()
    for operate, rows in operations.values():
        moved = copy.deepcopy(cache)
        operate(moved)
        with torch.no_grad():
            output = model(input_ids[rows, 10:], past_key_values=moved, execution=execution)
            expected, _, _ = run_cached(model, input_ids[rows], None, (8, 2, 2), execution)
        assert output.router_gates.equal(gates[0][:, rows])
        torch.testing.assert_close(output.logits, expected[:, 10:], atol=LOGITS_BOUND, rtol=0)
    assert cache.get_seq_length() == 10


@every_granularity
@pytest.mark.parametrize("arch", ["llama", "mistral"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been_there(granularity, arch, execution):
    model = mixed_model(granularity, arch, ALL_BUT_LAST)
    input_ids = random_tokens(4, 12)
    expected, _, _ = run_cached(model, input_ids, None, (8, 4), execution)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    _, cache, _ = run_cached(
        model, torch.cat([input_ids[:, :8], random_tokens(4, 3)], dim=1), None, (8, 3), execution, cache
    )
    cache.crop(-3)
    with torch.no_grad():
        output = model(input_ids[:, 8:], past_key_values=cache, execution=execution)
    torch.testing.assert_close(output.logits, expected[:, 8:], atol=LOGITS_BOUND, rtol=0)


@every_granularity
@pytest.mark.parametrize("empty", [lambda cache: cache.reset(), lambda cache: cache.crop(-4)])
def test_an_emptied_cache_decides_anew(granularity, empty):
    model = mixed_model(granularity, layers=ALL_BUT_LAST)
    _, cache, _ = run_cached(model, random_tokens(5, 4, seed=30), None, (4,))
    empty(cache)
    input_ids = random_tokens(5, 7)
    logits, _, gates = run_cached(model, input_ids, None, (6, 1), cache=cache)
    expected, _, expected_gates = run_cached(model, input_ids, None, (6, 1))
    assert gates[0].equal(expected_gates[0])
    torch.testing.assert_close(logits, expected, atol=LOGITS_BOUND, rtol=0)


@every_granularity
def test_two_texts_in_turn_on_one_model_do_not_touch_each_other(granularity):
    model = mixed_model(granularity)
    first, second = random_tokens(3, 8, seed=40), random_tokens(5, 8, seed=41)
    alone = [run_cached(model, text, None, (6, 1, 1))[0] for text in (first, second)]
    caches, logits = [None, None], [[], []]
    for start, end in ((0, 6), (6, 7), (7, 8)):
        for which, text in enumerate((first, second)):
            with torch.no_grad():
                output = model(text[:, start:end], past_key_values=caches[which], use_cache=True)
            caches[which] = output.past_key_values
            logits[which].append(output.logits)
    for which in (0, 1):
        assert torch.cat(logits[which], dim=1).equal(alone[which])


@every_granularity
def test_all_growing_caches_do(granularity):
    """One with the model's config, one without, ours, and the one that the inner model makes."""
    model = mixed_model(granularity, "mistral")
    input_ids = random_tokens(4, 12)
    expected, _, _ = run_cached(model, input_ids, None, (9, 1, 2))
    for cache in (DynamicCache(config=model.config), DynamicCache(), MoDCache(model.config)):
        logits, same, _ = run_cached(model, input_ids, None, (9, 1, 2), cache=cache)
        assert same is cache
        torch.testing.assert_close(logits, expected, atol=LOGITS_BOUND, rtol=0)
    with torch.no_grad():
        cache = model.model(input_ids[:, :9], use_cache=True).past_key_values
        hidden_states = model.model(input_ids[:, 9:], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden_states), expected[:, 9:], atol=LOGITS_BOUND, rtol=0)


@every_granularity
@pytest.mark.parametrize(
    "make_cache",
    [
        lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        lambda config: ((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)),) * NUM_LAYERS,
    ],
    ids=["encoder-decoder", "tuple"],
)
def test_another_cache_is_refused_with_the_way_out(granularity, make_cache):
    _, model = make_pair("llama", granularity)
    cache = make_cache(model.config)
    with pytest.raises(ValueError, match=f"can't use a {type(cache).__name__}: pass a DynamicCache"):
        model(random_tokens(1, 4), past_key_values=cache)


@every_sequence_granularity
def test_a_cache_that_was_filled_without_routing_is_refused(granularity):
    _, model = make_pair("llama", granularity)
    cache = model(random_tokens(1, 4), route=False, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"layer 1 of the cache holds tokens but no decision.*empty cache"):
        model(random_tokens(1, 1), past_key_values=cache)


@every_sequence_granularity
def test_a_cache_that_was_filled_with_routing_is_not_continued_without(granularity):
    _, model = make_pair("llama", granularity)
    _, cache, _ = run_cached(model, random_tokens(1, 4), None, (4,))
    with pytest.raises(ValueError, match="filled with routing: go on with route=True"):
        model(random_tokens(1, 1), past_key_values=cache, route=False)


@every_packed_granularity
@pytest.mark.parametrize(("was", "now"), [("dense", "sparse"), ("sparse", "dense")])
def test_a_cache_stays_with_one_execution(granularity, was, now):
    _, model = make_pair("llama", granularity)
    _, cache, _ = run_cached(model, random_tokens(1, 4), None, (4,), was)
    with pytest.raises(ValueError, match=f"filled by {was} execution and can't go on with {now}"):
        model(random_tokens(1, 1), past_key_values=cache, execution=now)


@every_sequence_granularity
def test_a_cache_of_another_number_of_sequences_is_refused(granularity):
    _, model = make_pair("llama", granularity)
    _, cache, _ = run_cached(model, random_tokens(3, 4), None, (4,))
    with pytest.raises(ValueError, match="the cache holds 3 sequences, but the input has 2"):
        model(random_tokens(2, 1), past_key_values=cache)


@every_granularity
def test_training_makes_no_cache_unless_asked_to(granularity):
    _, model = make_pair("llama", granularity)
    input_ids = random_tokens(2, 4)
    assert model.train()(input_ids).past_key_values is None
    assert model(input_ids, use_cache=True).past_key_values.get_seq_length() == 4
    assert model.eval()(input_ids).past_key_values.get_seq_length() == 4
    assert model(input_ids, use_cache=False).past_key_values is None


@every_granularity
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_through_a_cache_are_finite(granularity, execution):
    model = mixed_model(granularity)
    input_ids, mask = padded_prompts("left", continuation=2)
    cache = model(input_ids[:, :9], attention_mask=mask[:, :9], use_cache=True, execution=execution).past_key_values
    output = model(input_ids[:, 9:], attention_mask=mask, past_key_values=cache, execution=execution)
    output.logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients.values())
