"""Routers of other methods learn what those methods have them learn."""

import pytest
import torch
from model_zoo import LAYERS, make_pair, pad, texts

from utils.pipeline.calibration import settle
from utils.pipeline.importance import watching_similarity
from utils.pipeline.trained_baselines import scaled_routers, similarity_routers


def batches(count=8):
    made = []
    for number in range(count):
        ids, mask = pad(texts((40, 33, 25, 37), seed=10 * number), "right")
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def decide_by(model, cuts):
    settle(model, {layer: cut for layer, (cut, _) in cuts.items()}, {layer: unit for layer, (_, unit) in cuts.items()})


@torch.no_grad()
def similarities_and_gates(model, batch):
    seen = {}
    with watching_similarity(model, lambda layer, cosines: seen.__setitem__(layer, cosines)):
        gates = model(**batch, execution="dense").router_gates
    cosines = torch.stack([seen[layer] for layer in LAYERS])
    return cosines, gates


@pytest.mark.parametrize("granularity", ["mlp_token", "attn_token", "mlp_sequence"])
def test_routers_by_similarity_skip_where_the_branch_changes_least(granularity):
    _, model = make_pair("llama", granularity)
    # a branch whose part differs between inputs in a way that can be told from them
    with torch.no_grad():
        for layer in LAYERS:
            model.model.layers[layer].mlp.down_proj.weight.mul_(0.3)
    decide_by(model, similarity_routers(model, batches(), 0.6))
    (batch,) = batches(1)
    cosines, gates = similarities_and_gates(model, batch)
    if gates.dim() == 2:
        weights = batch["attention_mask"] / batch["attention_mask"].sum(dim=1, keepdim=True)
        cosines, kept = (cosines * weights).sum(dim=-1), gates.bool()
    else:
        cosines, kept = (values[:, batch["attention_mask"].bool()] for values in (cosines, gates.bool()))
    assert 0.3 < kept.float().mean() < 0.9
    assert cosines[~kept].mean() > cosines[kept].mean() + 0.3 * cosines.std()


def test_scaled_gates_spare_the_layer_that_matters_and_reach_the_capacity():
    """The inputs of a layer whose branch does nothing lose their score first."""
    _, model = make_pair("llama", "mlp_token")
    idle = LAYERS[1]
    torch.nn.init.zeros_(model.model.layers[idle].mlp.down_proj.weight)
    decide_by(model, scaled_routers(model, batches(), 2 / 3, epochs=6))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    (batch,) = batches(1)
    _, gates = similarities_and_gates(model, batch)
    shares = dict(zip(LAYERS, gates[:, batch["attention_mask"].bool()].mean(dim=1).tolist(), strict=True))
    assert shares[idle] < min(share for layer, share in shares.items() if layer != idle)
