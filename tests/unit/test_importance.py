"""Static Layer Drop finds the layers that matter least."""

import pytest
import torch
from model_zoo import HIDDEN_SIZE, LAYERS, make_pair, random_tokens

from utils.model.costs import capacity_weights
from utils.pipeline.importance import (
    branch_similarity,
    expert_weight,
    greedy,
    least_important,
    loss_without,
    most_similar,
)


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
    assert most_similar(model, batches(), 2 / 3) == [LAYERS[1]]


def test_greedy_takes_the_layer_whose_loss_is_lowest_at_each_step():
    _, model = make_pair("llama", "attn_sequence")
    first, second = greedy(model, batches(), 1 / 3)
    alone = {layer: loss_without(model, batches(), {layer}) for layer in LAYERS}
    assert alone[first] == min(alone.values())
    others = [layer for layer in LAYERS if layer != first]
    assert second == min(others, key=lambda layer: loss_without(model, batches(), {first, layer}))


def test_greedy_weighs_a_branch_by_what_it_saves():
    _, model = make_pair("llama", "attn_mlp_token")
    weights = capacity_weights(model.config.to_dict(), model.config.mod_settings)
    chosen = greedy(model, batches(), 0.5)
    dense = loss_without(model, batches(), ())
    alone = {place: loss_without(model, batches(), {place}) - dense for place in weights}
    assert chosen[0] == min(weights, key=lambda place: alone[place] / weights[place])
    assert 1 - sum(weights[place] for place in chosen) == pytest.approx(0.5, abs=max(weights.values()))


def test_a_layer_that_is_left_out_is_what_stands_in_for_it():
    _, model = make_pair("llama", "mlp_token", substitute={"kind": "linear", "rank": HIDDEN_SIZE})
    linear = model.model.layers[LAYERS[1]].mlp = torch.nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
    whole, nothing = (loss_without(model, batches(), dropped) for dropped in ((), {LAYERS[1]}))
    substitute = model.substitute_modules()[LAYERS[1]]
    with torch.no_grad():
        for parameter, value in ((substitute.down, linear.weight), (substitute.bias, linear.bias)):
            parameter.copy_(value)
        substitute.up.copy_(torch.eye(HIDDEN_SIZE))
    assert loss_without(model, batches(), {LAYERS[1]}) == pytest.approx(whole, rel=1e-6)
    assert nothing != pytest.approx(whole, rel=1e-4)


def test_leaving_out_nothing_is_the_dense_loss_over_supervised_tokens():
    _, model = make_pair("llama", "attn_sequence")
    (batch,) = batches()
    with torch.no_grad():
        assert loss_without(model, [batch], ()) == pytest.approx(float(model(**batch, route=False).loss), rel=1e-6)


def test_the_weight_of_experts_is_that_of_real_tokens():
    _, model = make_pair("mixtral", "expert_token")
    (batch,) = batches()
    weight, tokens = expert_weight(model, [batch])
    padded = batch["attention_mask"] == 0
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(padded, 3)}
    assert expert_weight(model, [other])[0].allclose(weight, atol=1e-6)
    real = int(batch["attention_mask"].sum())
    assert tokens.sum(dim=1).tolist() == [real * model.config.num_experts_per_tok] * len(LAYERS)
    assert weight.sum(dim=1).tolist() == pytest.approx([real] * len(LAYERS), rel=1e-5)  # a token's sum to 1


def test_as_many_experts_go_as_the_capacity_of_assignments_asks_for():
    weight = torch.tensor([[5.0, 1.0, 4.0], [3.0, 3.0, 4.0]], dtype=torch.float64)
    tokens = torch.tensor([[40.0, 20.0, 40.0], [40.0, 20.0, 40.0]], dtype=torch.float64)
    assert least_important(weight, tokens, 0.9).tolist() == [[False, True, False], [False, False, False]]
    assert least_important(weight, tokens, 0.72).tolist() == [[False, True, False], [True, False, False]]
    assert not least_important(weight, tokens, 1.0).any()
    assert least_important(weight, tokens, 1.0, share=0.5).sum() == 3
