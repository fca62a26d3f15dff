"""Every way in which transformers calls or generates with a model: right with routing, or refused beforehand."""

import inspect
import re

import pytest
import torch
from call_options import FORWARD, GENERATE, PAGED, Option
from model_zoo import (
    ARCHITECTURES,
    MOE_ARCHITECTURES,
    SEQUENCE_GRANULARITIES,
    TOKEN_GRANULARITIES,
    make_pair,
    random_tokens,
    randomize_routers,
    texts,
)
from rounding import rounding
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

from utils.model.configuration_mod import EXPERT_GRANULARITY, GRANULARITIES

FAST = ("block_sequence", "attn_token")
some_granularities = pytest.mark.parametrize(
    "granularity", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in GRANULARITIES]
)
PLAIN = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def routed(granularity, arch="llama", **options):
    _, model = make_pair(arch, granularity, layers=(1, 2, 3, 4), **options)
    return randomize_routers(model, scale=0.7)


def state_of(model):
    """All that a call might leave behind: configs, modes, attributes, weights."""
    # transformers' own: at the first call that needs it, and how long the longest static cache was
    lazy = {"_output_capturing_hooks_installed", "_previous_max_cache_length"}
    attributes = {name: (set(vars(module)) - lazy, module.training) for name, module in model.named_modules()}
    weights = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    return model.config.to_dict(), model.generation_config.to_dict(), attributes, weights


def refuses(model, call, message):
    """Tell that a call is refused before the first layer runs, and that the model is then what it was."""
    before, ran = state_of(model), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(True))
    try:
        with pytest.raises(ValueError, match=re.escape(message)) as refusal:
            call()
    finally:
        handle.remove()
    assert "\n" not in str(refusal.value)
    assert not ran, "it was refused after something was computed"
    assert state_of(model) == before


def generation(model, option: Option, execution="sparse"):
    """Return a function that generates; what it needs is there already."""
    keywords = PLAIN | {"execution": execution} | option.make(model)
    prompt = {} if {"inputs", "inputs_embeds"} & set(keywords) else {"inputs": random_tokens(option.batch, 9, seed=11)}
    if "generation_config" in keywords:
        del keywords["max_new_tokens"]

    def generate():
        torch.manual_seed(4)
        generated = model.generate(**prompt, **keywords)
        return generated if isinstance(generated, torch.Tensor) else generated.sequences

    return generate


def base_forwards():
    architectures = (ARCHITECTURES | MOE_ARCHITECTURES).values()
    return [architecture.base_model.forward for architecture in architectures]


def parameters_of(function):
    return set(inspect.signature(function).parameters) - {"self", "kwargs"}


class TestTheTable:
    def test_it_has_every_option_of_generate(self):
        there = {name.partition(",")[0] for name in GENERATE}
        known = set(vars(GenerationConfig())) - {"transformers_version"}
        fields = {name for name in known if not name.startswith("_")}
        # transformers takes these two out of the keywords without naming them in a signature
        wanted = fields | parameters_of(GenerationMixin.generate) | {"tokenizer", "assistant_tokenizer"}
        assert wanted - there == set()
        ours = {"token_mask", "states_at"}
        of_forward = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
        assert there - wanted == ours | of_forward

    def test_it_has_every_keyword_of_forward(self):
        there = {name.partition(",")[0] for name in FORWARD}
        wanted = set(TransformersKwargs.__annotations__) | set(FlashAttentionKwargs.__annotations__) | {"return_dict"}
        for forward in [*base_forwards(), type(routed("attn_token")).forward]:
            wanted |= parameters_of(forward)
        assert wanted == there

    def test_it_has_every_keyword_of_continuous_batching(self):
        assert set(PagedAttentionArgs.__annotations__) - {n.partition(",")[0] for n in FORWARD} == PAGED


@some_granularities
@pytest.mark.parametrize("name", list(GENERATE))
def test_an_option_of_generate_is_right_or_refused(name, granularity):
    option, model = GENERATE[name], routed(granularity, attention="eager" if "attentions" in name else "sdpa")
    if model.mod_settings.level in option.refused:
        for execution in ("sparse", "dense"):
            refuses(model, generation(model, option, execution), option.message)
        return
    if option.refused_sparse:
        refuses(model, generation(model, option), option.message)
        return
    before = state_of(model)
    generated = generation(model, option)()
    assert state_of(model) == before
    assert generated.equal(generation(model, option, "dense")())
    if option.plain:
        assert generated.equal(generation(model, Option({}, batch=option.batch))())


@some_granularities
@pytest.mark.parametrize("name", list(FORWARD))
def test_a_keyword_of_forward_is_right_or_refused(name, granularity):
    option, model = FORWARD[name], routed(granularity)

    def forward(execution):
        keywords = {"input_ids": random_tokens(2, 9, seed=11), "execution": execution} | option.make(model)
        with torch.no_grad():
            return model(**keywords)

    if model.mod_settings.level in option.refused:
        for execution in ("sparse", "dense"):
            refuses(model, lambda execution=execution: forward(execution), option.message)
        return
    if option.refused_sparse:
        refuses(model, lambda: forward("sparse"), option.message)
        return
    before = state_of(model)
    sparse, dense = forward("sparse"), forward("dense")
    assert state_of(model) == before
    real = option.make(model).get("attention_mask")
    real = real.bool() if real is not None and real.dim() == 2 else slice(None)
    for field in ("logits", "states", "loss"):
        if getattr(dense, field) is not None:
            one, other = (getattr(output, field) for output in (sparse, dense))
            one, other = (one[real], other[real]) if field == "logits" else (one, other)
            torch.testing.assert_close(one, other, rtol=0, atol=rounding(other, terms=4000))
    assert sparse.router_gates.equal(dense.router_gates)


@pytest.mark.parametrize("granularity", TOKEN_GRANULARITIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_texts_packed_in_one_row_are_each_as_if_alone(granularity, attention, execution):
    model, parts = routed(granularity, "mistral", attention=attention), texts((7, 4, 9))
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    with torch.no_grad():
        row = model(torch.cat(parts)[None], position_ids=positions, use_cache=False, execution=execution)
        alone = [model(part[None], execution=execution) for part in parts]
    expected = torch.cat([output.logits for output in alone], dim=1)
    torch.testing.assert_close(row.logits, expected, rtol=0, atol=rounding(expected, terms=4000))
    assert row.router_gates.equal(torch.cat([output.router_gates for output in alone], dim=2))


def continuous(model, prompts):
    config = GenerationConfig(**PLAIN, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # as it is, it takes most of the memory
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize(
    ("arch", "granularity"),
    [
        *[("llama", granularity) for granularity in TOKEN_GRANULARITIES],
        pytest.param("qwen3", "attn_token", marks=pytest.mark.slow),
        pytest.param("olmoe", EXPERT_GRANULARITY, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_continuous_batching_generates_what_generate_does(arch, granularity, attention):
    model = routed(granularity, arch, attention=attention)
    prompts = [text.tolist() for text in texts((9, 14, 5))]
    before = state_of(model)
    found = continuous(model, prompts)
    assert state_of(model) == before
    for prompt, tokens in zip(prompts, found, strict=True):
        assert tokens == model.generate(torch.tensor([prompt]), **PLAIN)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_continuous_batching_stores_keys_where_a_layer_keeps_nothing(granularity):
    model = routed(granularity, threshold=(0.999999, 0.5, 0.5, 0.5))
    prompts = [text.tolist() for text in texts((9, 4))]
    for prompt, tokens in zip(prompts, continuous(model, prompts), strict=True):
        assert tokens == model.generate(torch.tensor([prompt]), **PLAIN)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)
def test_continuous_batching_is_refused_for_sequences(granularity):
    model = routed(granularity)
    prompts = random_tokens(2, 5)
    refuses(model, lambda: continuous(model, prompts.tolist()), "a sequence is decided on its whole prompt at once")
    paged = {"cache_implementation": "paged", "max_new_tokens": 3}
    refuses(model, lambda: model.generate(prompts, **paged), "cache_implementation='paged'")
    refuses(model, lambda: model(prompts, cache=object(), use_cache=False), "continuous batching mixes them")


def test_without_routing_nothing_is_refused_and_the_base_generates():
    base, model = make_pair("llama", "block_sequence")
    randomize_routers(model)
    prompt = random_tokens(2, 9)
    for options in ({"prefill_chunk_size": 4}, {"cache_implementation": "static", "disable_compile": True}):
        expected = base.generate(prompt, **PLAIN, **options)
        assert model.generate(prompt, **PLAIN, **options, route=False).equal(expected)


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token"])
def test_tokens_or_their_embeddings_are_needed_and_not_both(granularity):
    model, ids = routed(granularity), random_tokens(1, 4)
    for keywords in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(1, 4, 32)}):
        refuses(model, lambda keywords=keywords: model(**keywords), "either input_ids or inputs_embeds")
