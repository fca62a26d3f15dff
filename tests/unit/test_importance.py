"""Static Layer Drop finds the layers that matter least."""

import pytest
import torch
from model_zoo import LAYERS, make_pair, random_tokens

from utils.pipeline.importance import branch_similarity, greedy, loss_without, most_similar


def batches():
    ids = random_tokens(4, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}]


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "block_sequence"])
def test_a_layer_that_does_nothing_goes_first(granularity):
    _, model = make_pair("llama", granularity)
    layer = model.model.layers[LAYERS[1]]
    for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(branch.weight)
    similarity = branch_similarity(model, batches())
    assert similarity[LAYERS[1]] == pytest.approx(1.0, abs=1e-6)
    assert all(value < 0.9999 for index, value in similarity.items() if index != LAYERS[1])
    assert most_similar(model, batches(), 1) == [LAYERS[1]]


def test_greedy_takes_the_layer_whose_loss_is_lowest_at_each_step():
    _, model = make_pair("llama", "attn_sequence")
    first, second = greedy(model, batches(), 2)
    alone = {layer: loss_without(model, batches(), {layer}) for layer in LAYERS}
    assert alone[first] == min(alone.values())
    others = [layer for layer in LAYERS if layer != first]
    assert second == min(others, key=lambda layer: loss_without(model, batches(), {first, layer}))


def test_leaving_out_nothing_is_the_dense_loss_over_supervised_tokens():
    _, model = make_pair("llama", "attn_sequence")
    (batch,) = batches()
    with torch.no_grad():
        assert loss_without(model, [batch], ()) == pytest.approx(float(model(**batch, route=False).loss), rel=1e-6)
