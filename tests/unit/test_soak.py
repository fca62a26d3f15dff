"""Two thousand decode steps of requests that come and go: right to the end, and no memory but the caches."""

import gc
import random

import pytest
import torch
from model_zoo import NUM_LAYERS, make_pair, random_tokens, randomize_routers

from utils.evaluation.kv_memory import kv_bytes_by_layer
from utils.model.configuration_mod import GRANULARITIES

STEPS = 2000


def bytes_of_tensors() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.slow
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_two_thousand_steps_of_mixed_requests_stay_right_and_leave_nothing_behind(granularity):
    _, model = make_pair("mistral", granularity, layers=tuple(range(NUM_LAYERS - 1)))
    randomize_routers(model, scale=0.7)
    choice = random.Random(0)

    @torch.no_grad()
    def start(seed: int) -> dict:
        batch, prompt, total = choice.randint(1, 4), choice.randint(1, 20), choice.randint(30, 100)
        input_ids = random_tokens(batch, total, seed=seed)
        cache = model(input_ids[:, :prompt], use_cache=True).past_key_values
        return {"input_ids": input_ids, "prompt": prompt, "at": prompt, "cache": cache}

    @torch.no_grad()
    def in_two_calls(request: dict) -> torch.Tensor:
        """The last logits, all tokens after the prompt in one call."""
        ids, prompt = request["input_ids"], request["prompt"]
        cache = model(ids[:, :prompt], use_cache=True).past_key_values
        return model(ids[:, prompt:], past_key_values=cache).logits[:, -1]

    requests = [start(seed) for seed in range(4)]
    rest, finished = [], 0
    for step in range(STEPS):
        slot = choice.randrange(len(requests))
        request = requests[slot]
        at = request["at"]
        with torch.no_grad():
            output = model(request["input_ids"][:, at : at + 1], past_key_values=request["cache"])
        request["at"] += 1
        if request["at"] == request["input_ids"].shape[1]:
            torch.testing.assert_close(output.logits[:, -1], in_two_calls(request), atol=5e-5, rtol=0)
            requests[slot] = start(seed=100 + step)
            finished += 1
        del output, request
        if step % 200 == 199:
            live = sum(sum(kv_bytes_by_layer(r["cache"])) + r["input_ids"].nbytes for r in requests)
            decisions = {
                tensor.data_ptr(): tensor.nbytes
                for r in requests
                for layer in r["cache"].layers
                for decision in getattr(layer, "decisions", {}).values()
                for tensor in (decision.scores, decision.gates)
            }
            rest.append(bytes_of_tensors() - live - sum(decisions.values()))
    assert finished > 20
    # what is left are the weights and, of each live request, a few bytes of indices
    assert max(rest) - min(rest) < 20_000, rest
