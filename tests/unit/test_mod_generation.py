"""Generation and the calls that a routed model refuses."""

import pytest
import torch
from model_zoo import ARCHITECTURES, SEQUENCE_GRANULARITIES, make_pair, pad, random_tokens, randomize_routers, texts
from transformers import DynamicCache

from utils.model.configuration_mod import GRANULARITIES
from utils.model.execution_mod import SPARSE_GRANULARITIES

every_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@every_architecture
@every_granularity
def test_generation_without_a_cache_is_the_greedy_loop(arch, granularity):
    _, model = make_pair(arch, granularity)
    randomize_routers(model, scale=0.7)
    prompts = texts((6, 3))
    input_ids, mask = pad(prompts, "left")
    generated = model.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False)
    for row, prompt in enumerate(prompts):
        text = prompt
        for _ in range(5):
            with torch.no_grad():
                logits = model(text[None]).logits[0, -1]
            text = torch.cat([text, logits.argmax(keepdim=True)])
        assert generated[row, -5:].tolist() == text[-5:].tolist()


# The three tests from here to `test_an_execution...` go when the KV cache and the rest of the sparse engine are there.
@every_granularity
def test_a_cache_is_refused_as_long_as_it_would_answer_wrongly(granularity):
    _, model = make_pair("llama", granularity)
    input_ids = random_tokens(1, 4)
    for call in (
        lambda: model(input_ids, use_cache=True),
        lambda: model(input_ids, past_key_values=DynamicCache(config=model.config)),
        lambda: model.model(input_ids, use_cache=True),
        lambda: model.generate(input_ids, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="pass use_cache=False"):
            call()


@every_granularity
def test_no_cache_comes_back_where_none_was_asked_for(granularity):
    _, model = make_pair("llama", granularity)
    assert model.config.use_cache, "the default of the base config; it must not be taken for the caller's wish"
    assert model(random_tokens(1, 4)).past_key_values is None


@pytest.mark.parametrize("granularity", sorted(set(GRANULARITIES) - set(SPARSE_GRANULARITIES)))
def test_sparse_execution_is_refused_where_it_does_not_exist(granularity):
    _, model = make_pair("llama", granularity)
    with pytest.raises(ValueError, match=f"'sparse' is not there for {granularity}.*'dense'"):
        model(random_tokens(1, 4), execution="sparse")


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
