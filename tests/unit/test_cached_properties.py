"""Cached paths over shapes, masks and cuts that nobody thought of: sparse equals dense, however calls are cut."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from model_zoo import ARCHITECTURES, NUM_LAYERS, make_pair, random_tokens, randomize_routers

from utils.model.configuration_mod import GRANULARITIES

LOGITS_BOUND = 5e-5
"""Float32, logits of about 10: a matrix product or a softmax over fewer rows may sum in another order."""

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
bounded = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@dataclass
class Request:
    """A batch of texts, and how it is cut into calls.

    Args:
        arch, attention: of the model.
        input_ids: int64 [batch, tokens].
        mask: int64 [batch, tokens], 1 for real tokens, or None; all are real after the first call.
        calls: tokens of each call.
    """

    arch: str
    attention: str
    input_ids: torch.Tensor
    mask: torch.Tensor | None
    calls: tuple[int, ...]


@st.composite
def requests(draw, sides=("none", "left", "right")) -> Request:
    batch, first = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    calls = (first, *draw(st.lists(st.integers(1, 4), max_size=4)))
    input_ids = random_tokens(batch, sum(calls), seed=draw(st.integers(0, 99)))
    mask = None
    side = draw(st.sampled_from(sides))
    if side != "none":
        mask = torch.ones_like(input_ids)
        for row in range(batch):
            padding = draw(st.integers(0, first - 1))
            start = 0 if side == "left" else first - padding
            mask[row, start : start + padding] = 0
    return Request(
        draw(st.sampled_from(list(ARCHITECTURES))), draw(st.sampled_from(["sdpa", "eager"])), input_ids, mask, calls
    )


@functools.cache
def mixed_model(arch: str, granularity: str, attention: str):
    _, model = make_pair(arch, granularity, layers=tuple(range(NUM_LAYERS - 1)), attention=attention)
    return randomize_routers(model, scale=0.7)


@torch.no_grad()
def run(model, input_ids, mask, calls, execution):
    """Run the calls with one cache; returns logits [batch, tokens, vocabulary] and the gates of each call."""
    logits, gates, cache, start = [], [], None, 0
    for tokens in calls:
        end = start + tokens
        output = model(
            input_ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            execution=execution,
        )
        assume((output.router_scores - 0.5).abs().min() > 1e-5)  # rounding must not be what decides
        cache, start = output.past_key_values, end
        logits.append(output.logits)
        gates.append(output.router_gates)
    return torch.cat(logits, dim=1), gates


@every_granularity
@bounded
@given(request=requests())
def test_sparse_equals_dense_in_every_call_at_every_position(granularity, request):
    model = mixed_model(request.arch, granularity, request.attention)
    dense, dense_gates = run(model, request.input_ids, request.mask, request.calls, "dense")
    sparse, sparse_gates = run(model, request.input_ids, request.mask, request.calls, "sparse")
    assert all(one.equal(other) for one, other in zip(dense_gates, sparse_gates, strict=True))
    torch.testing.assert_close(sparse, dense, atol=LOGITS_BOUND, rtol=0)


@every_granularity
@bounded
@given(request=requests(), execution=st.sampled_from(["dense", "sparse"]))
def test_what_follows_the_first_call_may_be_cut_anyhow(granularity, request, execution):
    model = mixed_model(request.arch, granularity, request.attention)
    first, *rest = request.calls
    one_by_one = (first, *[1] * sum(rest))
    logits, _ = run(model, request.input_ids, request.mask, request.calls, execution)
    expected, _ = run(model, request.input_ids, request.mask, one_by_one, execution)
    torch.testing.assert_close(logits, expected, atol=LOGITS_BOUND, rtol=0)


@every_granularity
@bounded
@given(request=requests(sides=("none", "left")), data=st.data())
def test_a_row_gives_the_same_alone_and_without_its_padding(granularity, request, data):
    # padding on the right would lie between prompt and continuation, and move the continuation's positions
    model = mixed_model(request.arch, granularity, request.attention)
    row = data.draw(st.integers(0, len(request.input_ids) - 1))
    first, *rest = request.calls
    real = torch.ones_like(request.input_ids[row]) if request.mask is None else request.mask[row]
    logits, _ = run(model, request.input_ids, request.mask, request.calls, "sparse")
    calls = (int(real[:first].sum()), *rest)
    alone, _ = run(model, request.input_ids[row : row + 1, real.bool()], None, calls, "sparse")
    torch.testing.assert_close(logits[row, real.bool()], alone[0], atol=4 * LOGITS_BOUND, rtol=0)
