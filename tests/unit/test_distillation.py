"""Learning from the dense model: the chunked loss and its gradient against torch's own."""

import pytest
import torch
from model_zoo import LAYERS, make_pair, random_tokens, randomize_routers
from torch import nn

from utils.pipeline import distillation
from utils.pipeline.distillation import DenseTeacher, distillation_loss, distilled_nll


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_chunked_loss_and_gradient_are_those_of_whole_logits(monkeypatch, weight):
    monkeypatch.setattr(distillation, "ROWS_OF_LOGITS", 4)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(11, 6, generator=generator, requires_grad=True)
    teacher, head = torch.randn(11, 6, generator=generator), nn.Linear(6, 13, bias=False)
    targets = torch.randint(0, 13, (11,), generator=generator)
    targets[3] = -100  # does not count

    loss, nll, divergence = distilled_nll(states, teacher, head, targets, weight)
    gradients = torch.autograd.grad(2 * loss, (states, head.weight))
    whole_nll = nn.functional.cross_entropy(head(states), targets, reduction="sum")
    whole_divergence = distillation_loss(head(states), head(teacher).detach(), targets)
    whole = (1 - weight) * whole_nll + weight * whole_divergence
    for value, expected in ((loss, whole), (nll, whole_nll), (divergence, whole_divergence)):
        torch.testing.assert_close(value, expected)
    for value, expected in zip(gradients, torch.autograd.grad(2 * whole, (states, head.weight)), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_teacher_is_the_dense_model(arch, share_prefix):
    base, model = make_pair(arch, "attn_token")
    randomize_routers(model).train()
    teacher = DenseTeacher(model, share_prefix)
    ids, positions = random_tokens(3, 7), torch.tensor([2, 9, 20])
    model(ids, use_cache=False)
    states = teacher.states(ids, positions)
    with torch.no_grad():
        expected = base.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[positions]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    assert len(model.model.layers) > len(LAYERS), "the layers are as they were"
    assert len(model.model.layers) == model.config.num_hidden_layers
