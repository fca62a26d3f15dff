"""Generation and the calls that a routed model refuses."""

import pytest
import torch
from model_zoo import (
    ARCHITECTURES,
    LAYERS,
    NUM_LAYERS,
    SEQUENCE_GRANULARITIES,
    make_pair,
    pad,
    random_tokens,
    randomize_routers,
    texts,
)

from utils.model.configuration_mod import EXECUTIONS, GRANULARITIES

ALL_BUT_LAST = tuple(range(NUM_LAYERS - 1))

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@every_architecture
@every_granularity
def test_generation_without_a_cache_is_the_greedy_loop_with_one(arch, granularity):
    _, model = make_pair(arch, granularity)
    randomize_routers(model, scale=0.7)
    prompts = texts((6, 3))
    input_ids, mask = pad(prompts, "left")
    generated = model.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False)
    for row, prompt in enumerate(prompts):
        assert generated[row, -5:].tolist() == continuation_by_forwards(model, prompt, 5)


@every_granularity
def test_an_unknown_execution_is_refused_with_the_near_one(granularity):
    _, model = make_pair("llama", granularity)
    with pytest.raises(ValueError, match="execution 'spares' is not one of dense, sparse; did you mean 'sparse'"):
        model(random_tokens(1, 4), execution="spares")


@pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)
def test_a_sequence_decision_does_not_guess_the_padding_from_a_4d_mask(granularity):
    _, model = make_pair("llama", granularity)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"2D attention_mask"):
        model(random_tokens(1, 4), attention_mask=mask)


@pytest.mark.parametrize("granularity", [name for name in GRANULARITIES if name.endswith("_token")])
def test_a_token_decision_needs_no_padding_and_takes_a_4d_mask(granularity):
    _, model = make_pair("llama", granularity)
    randomize_routers(model)
    input_ids = random_tokens(2, 4)
    mask = torch.zeros(2, 1, 4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), torch.finfo().min)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids, attention_mask=mask).logits, model(input_ids).logits, atol=5e-5, rtol=0
        )


def continuation_by_forwards(model, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """Continue one prompt, int64 [tokens], greedily by plain dense forwards with a cache."""
    cache, fresh, result = None, prompt[None], []
    for _ in range(new_tokens):
        with torch.no_grad():
            output = model(fresh, past_key_values=cache, use_cache=True, execution="dense")
        cache, fresh = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        result.append(fresh.item())
    return result


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "sampling several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "stop at a token": {"eos_token_id": list(range(1, 40)), "pad_token_id": 0},
}


@every_architecture
@every_granularity
@pytest.mark.parametrize("mode", [pytest.param(m, marks=() if m in ("beams",) else pytest.mark.slow) for m in MODES])
def test_sparse_generates_what_dense_generates(arch, granularity, mode):
    _, model = make_pair(arch, granularity, layers=ALL_BUT_LAST)
    randomize_routers(model, scale=0.7)
    input_ids, mask = pad(texts((9, 4, 7)), "left")
    generated = {}
    for execution in EXECUTIONS:
        torch.manual_seed(4)
        generated[execution] = model.generate(
            input_ids, attention_mask=mask, max_new_tokens=8, execution=execution, **MODES[mode]
        )
    assert generated["sparse"].equal(generated["dense"])


@every_architecture
@every_granularity
def test_a_row_of_generate_is_the_greedy_loop_of_its_prompt_alone(arch, granularity):
    """Neither the other rows nor the padding change what is decided and generated."""
    _, model = make_pair(arch, granularity, layers=ALL_BUT_LAST)
    randomize_routers(model, scale=0.7)
    prompts = texts((7, 1, 4))
    input_ids, mask = pad(prompts, "left", extra=2)
    generated = model.generate(input_ids, attention_mask=mask, max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        assert generated[row, -6:].tolist() == continuation_by_forwards(model, prompt, 6)


@every_granularity
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_assisted_decoding_generates_what_plain_decoding_generates(arch, granularity):
    """Drafts stand behind the prompt at prefill; they have no say in the decisions, and wrong ones leave no trace."""
    base, model = make_pair(arch, granularity, layers=ALL_BUT_LAST)
    randomize_routers(model, scale=0.7)
    helps = (
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "execution": "dense"},
        {"assistant_model": base},
        {"assistant_model": model},
    )
    for seed in range(2):
        prompt = random_tokens(1, 4, seed).repeat(1, 3)
        plain = model.generate(prompt, max_new_tokens=10)
        for assistance in helps:
            assert model.generate(prompt, max_new_tokens=10, **assistance).equal(plain)


@pytest.mark.parametrize("granularity", SEQUENCE_GRANULARITIES)
def test_drafts_have_no_say_in_a_decision_but_asking_for_the_last_logits_changes_nothing(granularity):
    _, model = make_pair("llama", granularity)
    randomize_routers(model, scale=0.7)
    input_ids, mask = pad(texts((9, 4, 12, 7)), "left")
    drafts = random_tokens(4, 3, seed=9)
    drafted = torch.cat([input_ids, drafts], dim=1)
    drafted_mask = torch.cat([mask, torch.ones_like(drafts)], dim=1)
    with torch.no_grad():
        alone = model(input_ids, mask)
        whole = model(drafted, drafted_mask)
        verified = model(drafted, drafted_mask, logits_to_keep=4, drafted=True)
        last = model(drafted, drafted_mask, logits_to_keep=4)
        without_mask = model(drafted, logits_to_keep=4, drafted=True)
        alone_without_mask = model(input_ids)
    torch.testing.assert_close(verified.router_scores, alone.router_scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(without_mask.router_scores, alone_without_mask.router_scores, atol=1e-5, rtol=0)
    assert last.router_scores.equal(whole.router_scores)
    assert not whole.router_scores.allclose(alone.router_scores, atol=1e-2)


def held_by(cache) -> list:
    """Return the decisions that a cache holds, layer by layer."""
    return [decision for layer in cache.layers for decision in getattr(layer, "decisions", {}).values()]


@every_granularity
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_a_second_turn_goes_on_from_the_cache_of_the_first(arch, granularity):
    _, model = make_pair(arch, granularity, layers=ALL_BUT_LAST)
    randomize_routers(model, scale=0.7)
    generated = {}
    for execution in EXECUTIONS:
        first = model.generate(random_tokens(3, 6), max_new_tokens=4, execution=execution, return_dict_in_generate=True)
        gates = [decision.gates for decision in held_by(first.past_key_values)]
        again = torch.cat([first.sequences, random_tokens(3, 5, seed=8)], dim=1)
        cache = first.past_key_values
        generated[execution] = model.generate(again, max_new_tokens=4, execution=execution, past_key_values=cache)
        assert cache.get_seq_length() == 6 + 4 + 5 + 4 - 1
        for decision, gate in zip(held_by(cache), gates, strict=True):
            assert decision.gates.equal(gate)
    assert generated["sparse"].equal(generated["dense"])


@every_granularity
def test_attention_maps_are_refused_where_they_are_not_computed(granularity):
    base, model = make_pair("llama", granularity, attention="eager")
    input_ids = random_tokens(2, 5)
    with pytest.raises(ValueError, match="no attention map for what it skips: pass execution='dense'"):
        model(input_ids, output_attentions=True)
    with torch.no_grad():
        maps = model(input_ids, output_attentions=True, execution="dense").attentions
        expected = base(input_ids, output_attentions=True).attentions
    assert len(maps) == len(expected)
    torch.testing.assert_close(maps[-1], expected[-1])


@every_granularity
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_hidden_states_of_all_layers_come_back(granularity, execution):
    _, model = make_pair("llama", granularity, threshold=0.6)
    with torch.no_grad():
        hidden_states = model(random_tokens(2, 5), output_hidden_states=True, execution=execution).hidden_states
    assert len(hidden_states) == NUM_LAYERS + 1
    if granularity.startswith("block"):
        assert hidden_states[LAYERS[0]].equal(hidden_states[LAYERS[0] + 1]), "dropped everywhere"
