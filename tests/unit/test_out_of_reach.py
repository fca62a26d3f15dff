"""What changes all linear layers of a model leaves routers and substitutes as they are."""

import pytest
import torch
from model_zoo import (
    ARCHITECTURES,
    MOE_ARCHITECTURES,
    make_pair,
    random_tokens,
    randomize_routers,
    randomize_substitutes,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from utils.model.configuration_mod import EXPERT_GRANULARITY, GRANULARITIES
from utils.model.routing_mod import MoDRouter
from utils.model.substitute_mod import MoDSubstitute

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
LAYERS = (0, 2, 3)


def routed(granularity, arch="llama"):
    _, model = make_pair(arch, granularity, layers=LAYERS, substitute={"kind": "linear", "rank": 3})
    return randomize_substitutes(randomize_routers(model, scale=0.7))


def ours(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoDRouter | MoDSubstitute)}


def test_routers_and_substitutes_have_no_linear_layer():
    """Which is what peft, torchao, quanto, bitsandbytes and torch's dynamic quantization look for."""
    for module in (MoDRouter(8), MoDRouter(8, num_experts=3), MoDSubstitute(8, 2)):
        assert not any(isinstance(part, nn.Linear) for part in module.modules())


@pytest.mark.parametrize("batch", [1, 3])
@every_granularity
def test_adapters_on_all_linear_layers_leave_decisions_alone_and_train(granularity, batch):
    model, ids = routed(granularity), random_tokens(batch, 9)
    with torch.no_grad():
        expected = model(ids)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trains = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trains) == 2 * 7 * len(model.model.layers)
    assert not any("router" in name or "substitute" in name for name in trains)
    with torch.no_grad():
        output = adapted(ids)
    assert output.router_gates.equal(expected.router_gates)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-4)

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if "router" in name or "substitute" in name:
            assert parameter.equal(weights[name])
    assert merged.eval()(ids).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore::DeprecationWarning:torch")
@every_granularity
def test_dynamic_quantization_leaves_routers_and_substitutes_alone(granularity):
    model, ids = routed(granularity), random_tokens(3, 9)
    with torch.no_grad():
        expected = model(ids)
    before = ours(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    assert not any(type(module) is nn.Linear for module in quantized.modules()), "nothing was quantized"
    assert ours(quantized) == before
    with torch.no_grad():
        output = quantized(ids)
    if not granularity.startswith("mlp"):  # whose input an attention has been added to
        assert output.router_scores[0].equal(expected.router_scores[0])
        assert output.router_gates[0].equal(expected.router_gates[0])


@pytest.mark.parametrize(
    ("arch", "granularity"),
    [(arch, "attn_token") for arch in ARCHITECTURES] + [(arch, EXPERT_GRANULARITY) for arch in MOE_ARCHITECTURES],
)
def test_every_architecture_is_adapted_without_its_routers(arch, granularity):
    _, model = make_pair(arch, granularity, layers=(3, 4))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = [name for name, _ in adapted.named_parameters() if "lora" in name]
    assert adapters
    assert not any("router" in name for name in adapters)
