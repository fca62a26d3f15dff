"""The routing decision: precision, threshold, pooling, and that a text is routed alike wherever it stands."""

import pytest
import torch
from model_zoo import (
    ARCHITECTURES,
    HIDDEN_SIZE,
    LAYERS,
    SEQUENCE_GRANULARITIES,
    TOKEN_GRANULARITIES,
    make_pair,
    mod_config,
    pad,
    randomize_routers,
    texts,
)

from utils.model.configuration_mod import GRANULARITIES
from utils.model.modeling_mod import MoDLlamaForCausalLM
from utils.model.routing_mod import MoDRouter, decide, mean_over_tokens, straight_through

SCORES_BOUND = 2e-5
"""Float32: another batch, or a rotation from another position, rounds otherwise. The scores lie between 0 and 1."""

LOGITS_BOUND = 5e-5

LOW_PRECISION = (torch.bfloat16, torch.float16)

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def router_with(weight: torch.Tensor) -> MoDRouter:
    """Return a router with the weight [hidden_size]."""
    router = MoDRouter(len(weight))
    with torch.no_grad():
        router.weight.copy_(weight)
    return router


def decisions(model, rows, side: str, extra: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run padded texts; for each text its scores and gates [layers] or [layers, tokens], and logits [tokens, ...]."""
    input_ids, mask = pad(rows, side, extra)
    with torch.no_grad():
        output = model(input_ids, mask)
    result = []
    for row in range(len(rows)):
        real = mask[row].bool()
        scores, gates = output.router_scores[:, row], output.router_gates[:, row]
        if scores.dim() == 2:
            scores, gates = scores[:, real], gates[:, real]
        result.append((scores, gates, output.logits[row, real]))
    return result


@every_architecture
@every_granularity
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_text_is_routed_alike_in_any_batch_and_with_any_padding(arch, granularity, side):
    _, model = make_pair(arch, granularity)
    randomize_routers(model, scale=0.7)
    rows = texts((7, 3, 12, 1))
    with torch.no_grad():
        alone = [model(row[None]) for row in rows]
    for extra, batch in ((0, [0, 1, 2, 3]), (1, [3, 0]), (9, [2, 1]), (4, [0])):
        outputs = decisions(model, [rows[index] for index in batch], side, extra)
        for index, (scores, gates, logits) in zip(batch, outputs, strict=True):
            expected = alone[index]
            torch.testing.assert_close(scores, expected.router_scores[:, 0], atol=SCORES_BOUND, rtol=0)
            assert gates.equal(expected.router_gates[:, 0])
            torch.testing.assert_close(logits, expected.logits[0], atol=LOGITS_BOUND, rtol=0)
    every_gate = torch.cat([output.router_gates.flatten() for output in alone])
    assert 0 < every_gate.mean() < 1


@every_granularity
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("garbage", [1e4, 1e30])
def test_what_stands_at_a_padding_position_changes_nothing(granularity, side, garbage):
    _, model = make_pair("mistral", granularity)
    randomize_routers(model, scale=0.7)
    input_ids, mask = pad(texts((7, 3, 12)), side, extra=2)
    real = mask.bool()
    clean = model.get_input_embeddings()(input_ids).detach()
    dirty = torch.where(real.unsqueeze(-1), clean, garbage * torch.randn(clean.shape))
    with torch.no_grad():
        expected = model(inputs_embeds=clean, attention_mask=mask)
        output = model(inputs_embeds=dirty, attention_mask=mask)
    decided = real if granularity.endswith("_token") else slice(None)
    assert output.router_gates[:, decided].equal(expected.router_gates[:, decided])
    torch.testing.assert_close(
        output.router_scores[:, decided], expected.router_scores[:, decided], atol=SCORES_BOUND, rtol=0
    )
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=LOGITS_BOUND, rtol=0)


@every_granularity
def test_a_boolean_mask_says_the_same_as_an_integer_one(granularity):
    _, model = make_pair("llama", granularity)
    randomize_routers(model)
    input_ids, mask = pad(texts((7, 3, 12)), "left")
    with torch.no_grad():
        assert model(input_ids, mask.bool()).router_scores.equal(model(input_ids, mask).router_scores)


@pytest.mark.parametrize("garbage", [1e38, float("inf"), float("-inf"), float("nan")])
def test_the_mean_over_tokens_leaves_out_padding_whatever_it_holds(garbage):
    hidden_states = torch.randn(2, 5, 4)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    expected = torch.stack([hidden_states[0, 2:].mean(dim=0), hidden_states[1, :4].mean(dim=0)])
    hidden_states[~mask] = garbage
    torch.testing.assert_close(mean_over_tokens(hidden_states, mask), expected, atol=1e-6, rtol=0)


def test_the_mean_over_tokens_of_a_row_without_a_real_token_is_zero():
    mean = mean_over_tokens(torch.full((1, 3, 4), float("nan")), torch.zeros(1, 3, dtype=torch.bool))
    assert mean.equal(torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_over_tokens_is_summed_in_float32(dtype, masked):
    """In low precision a sum over 4096 tokens of about one stops growing, or is infinite, long before its end."""
    hidden_states = (20.0 + torch.rand(1, 4096, 8)).to(dtype)
    mask = torch.ones(1, 4096, dtype=torch.bool) if masked else None
    mean = mean_over_tokens(hidden_states, mask)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, hidden_states.double().mean(dim=1).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.5, True), (0.25, True), (0.5 + 2**-20, False), (0.500001, False), (0.499999, True)]
)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_an_input_is_kept_exactly_where_its_score_reaches_the_threshold(threshold, kept, level):
    scores, gates = decide(MoDRouter(4), torch.randn(2, 3, 4), level, threshold, None)
    assert scores.eq(0.5).all()
    assert gates.eq(float(kept)).all()


@pytest.mark.parametrize("logit", [-1e-3, -1e-4, -1e-5, -1e-6])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_small_negative_logit_is_dropped_where_bfloat16_would_round_it_to_keep(logit, level):
    weight = torch.zeros(4)
    weight[0] = logit
    hidden_states = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.bfloat16).expand(1, 3, 4)
    assert torch.sigmoid(torch.tensor(logit, dtype=torch.bfloat16)) >= 0.5, "the case is vacuous"
    for router in (router_with(weight), router_with(weight).to(torch.bfloat16)):
        _, gates = decide(router, hidden_states, level, 0.5, None)
        assert gates.eq(0).all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, gates = decide(router, hidden_states, level, 0.5, None)
        assert gates.eq(0).all()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_gates_are_exactly_zero_or_one(requires_grad):
    scores = torch.rand(1000).requires_grad_(requires_grad)
    gates = straight_through(scores, 0.7)
    assert gates.dtype == torch.float32
    assert gates.equal((scores >= 0.7).float())


def casts():
    """Ways to bring a model to low precision."""
    for dtype in LOW_PRECISION:
        yield pytest.param(lambda model, dtype=dtype: model.to(dtype), id=f"to-{dtype}")
        yield pytest.param(lambda model, dtype=dtype: model.to(dtype=dtype, device="cpu"), id=f"to-device-{dtype}")
    yield pytest.param(lambda model: model.bfloat16(), id="bfloat16()")
    yield pytest.param(lambda model: model.half(), id="half()")
    yield pytest.param(lambda model: model.double(), id="double()")
    yield pytest.param(lambda model: model.half().float().bfloat16(), id="there-and-back")


@pytest.mark.parametrize("cast", list(casts()))
def test_the_routers_stay_float32_and_their_values_whatever_the_model_is_cast_to(cast):
    _, model = make_pair("llama", "attn_sequence")
    randomize_routers(model)
    before = {index: router.weight.clone() for index, router in model.router_modules().items()}
    cast(model)
    assert model.lm_head.weight.dtype != torch.float32
    for index, router in model.router_modules().items():
        assert router.weight.dtype == torch.float32
        assert router.weight.equal(before[index])
        assert isinstance(router.weight, torch.nn.Parameter)
        assert router.weight.requires_grad


def test_a_cast_keeps_the_router_parameter_that_an_optimizer_holds():
    _, model = make_pair("llama", "attn_sequence")
    before = [router.weight for router in model.router_modules().values()]
    model.to(torch.bfloat16)
    assert all(old is new.weight for old, new in zip(before, model.router_modules().values(), strict=True))


def test_a_cast_of_a_router_casts_its_gradient_neither():
    router = router_with(torch.randn(4))
    router(torch.randn(3, 4)).sum().backward()
    before = router.weight.grad.clone()
    router.half()
    assert router.weight.grad.dtype == torch.float32
    assert router.weight.grad.equal(before)


@every_architecture
def test_routers_are_float32_in_a_model_made_in_bfloat16(arch):
    base, _ = make_pair(arch, "attn_sequence")
    model = ARCHITECTURES[arch].model._from_config(mod_config(base, "attn_sequence"), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for router in model.router_modules().values():
        assert router.weight.dtype == torch.float32
        assert router.weight.eq(0).all()


@every_granularity
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast", "float16 autocast"])
def test_scores_are_float32_of_the_normed_input_in_any_precision(granularity, precision):
    """The scores equal those that float64 gives for the same normed input, to float32's rounding."""
    _, model = make_pair("llama", granularity, layers=(2,))
    randomize_routers(model, scale=0.7)
    if "autocast" not in precision:
        model.to(getattr(torch, precision))
    layer, branches = model.model.layers[2], model.config.mod_settings.branches
    norms = [layer.post_attention_layernorm if branch == "mlp" else layer.input_layernorm for branch in branches]
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
    input_ids, mask = pad(texts((7, 3, 12)), "left")
    dtype = torch.float16 if "float16" in precision.split() else torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled="autocast" in precision):
        output = model(input_ids, mask)
    assert output.router_scores.dtype == output.router_gates.dtype == torch.float32
    for branch, inputs, scores in zip(branches, map(torch.Tensor.double, seen), output.router_scores, strict=False):
        if granularity.endswith("_sequence"):
            inputs = torch.stack([row[real.bool()].mean(dim=0) for row, real in zip(inputs, mask, strict=True)])
        expected = torch.sigmoid(inputs @ layer.router_of(branch).weight[0].double())
        torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)


def test_a_router_whose_weight_was_forced_to_bfloat16_still_computes_in_float32():
    """DeepSpeed casts parameters behind the module's back."""
    router = router_with(torch.randn(HIDDEN_SIZE))
    router.weight.data = router.weight.data.to(torch.bfloat16)
    hidden_states = torch.randn(2, 3, HIDDEN_SIZE, dtype=torch.bfloat16)
    logits = router(hidden_states)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (hidden_states.float() @ router.weight[0].float()), atol=1e-5, rtol=0)


def test_a_new_router_is_zero_even_where_the_rest_is_initialised_anew():
    base, _ = make_pair("llama", "attn_sequence")
    model = MoDLlamaForCausalLM(mod_config(base, "attn_sequence"))
    model.init_weights()
    assert list(model.router_modules()) == list(LAYERS)
    assert all(router.weight.eq(0).all() for router in model.router_modules().values())


@pytest.mark.parametrize("granularity", TOKEN_GRANULARITIES)
def test_a_token_is_decided_from_its_past_alone(granularity):
    _, model = make_pair("llama", granularity)
    randomize_routers(model, scale=0.7)
    (text,) = texts((12,))
    with torch.no_grad():
        whole, part = model(text[None]), model(text[None, :7])
    torch.testing.assert_close(whole.router_scores[:, :, :7], part.router_scores, atol=SCORES_BOUND, rtol=0)
    assert whole.router_gates[:, :, :7].equal(part.router_gates)


@pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)
def test_a_sequence_is_decided_from_all_its_tokens(granularity):
    _, model = make_pair("llama", granularity)
    randomize_routers(model, scale=0.7)
    (text,) = texts((12,))
    changed = text.clone()
    changed[-1] = (text[-1] % 250) + 1
    with torch.no_grad():
        difference = model(text[None]).router_scores - model(changed[None]).router_scores
    assert difference.abs().min() > 1e-4
