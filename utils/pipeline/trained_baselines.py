"""Other ways to learn routers, to compare with (Table 3).

Each takes the idea that another method trains its routers by, and nothing else of it: the model stays frozen, and the
router is linear and decides 0 or 1.

**Similarity labels**, the idea of DLO (Tan et al. 2024, arXiv 2407.11030): an input is to be skipped where the residual
stream before and after the branch is alike. In the dense model the `1 - capacity` of the inputs of all routed layers
with the highest cosine similarity are labelled 0, the others 1; a ridge regression of the label on what the router
reads makes the router. DLO trains its routers by gradient steps, together with the model and with layers that it adds;
each layer has a sparsity of its own, which is annealed.

**Scaled gates**, the idea of Skip Transformers (2024, openreview.net/forum?id=gdMJlwTcSQ): in training the branch is
multiplied by the router's score, `y = x + p F(x)`, `p = sigmoid(z)`, so that the task's loss reaches the router without
a straight-through estimator. `z` is centred and scaled as in `capacity_control.py`; a hinge pushes the mean score to
the capacity. Afterwards the score decides by a threshold, and what is kept is multiplied by 1: a checkpoint cannot
carry the scale. Skip Transformers fine-tune the model too, with penalties and an initialisation of their own.
"""

from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.model.routing_mod import Decision

from .batches import supervised
from .capacity_control import FORWARD_INPUTS, INTERCEPT_RATE, BudgetControl, router_moments
from .held_out import Batch
from .importance import watching_similarity
from .losses import capacity_hinge, executed_inputs, next_token_nll

RIDGE = 0.1
"""Strength of the ridge, in units of the mean variance of a router's inputs."""
SCALED_HINGE = 1.0
"""Weight of the hinge beside the task's loss where gates are scaled."""


@torch.no_grad()
def similarity_routers(
    model: nn.Module, batches: Sequence[Batch], capacity: float, progress: bool = False
) -> dict[int, tuple[float, float]]:
    """Give a model routers that predict similarity labels.

    Args:
        model: a routed model, in evaluation mode; its routers' weights are replaced.
        batches: text.
        capacity: share of the inputs that are labelled to be kept, in [0, 1].
        progress: show a bar.

    Returns:
        Layer index -> cut and unit, as `calibrate` takes them.
    """
    with tqdm(total=2 * len(batches), desc="similarity labels", disable=not progress) as bar:
        similarities = torch.cat([cosines for _, _, cosines in _layer_inputs(model, batches, bar)])
        place = round(capacity * len(similarities))
        ordered = similarities.sort().values
        bound = ordered[place - 1] if place else ordered[0] - 1.0  # kept up to here
        sums = dict.fromkeys(model.router_modules(), 0.0)
        for layer, inputs, cosines in _layer_inputs(model, batches, bar):
            # a 1 for the means, then the inputs, then the label
            label = (cosines <= bound).to(inputs)[:, None]
            rows = torch.cat([torch.ones_like(label), inputs, label], dim=1)
            sums[layer] = sums[layer] + (rows.T @ rows).double()
    cuts = {}
    for layer, router in model.router_modules().items():
        moments = sums[layer] / sums[layer][0, 0]  # [hidden_size + 2, hidden_size + 2]
        mean = moments[0, 1:]
        covariance = moments[1:, 1:] - torch.outer(mean, mean)
        of_inputs = covariance[:-1, :-1]
        ridge = RIDGE * of_inputs.diagonal().mean() + 1e-12
        weight = torch.linalg.solve(of_inputs + ridge * torch.eye(len(of_inputs)).to(of_inputs), covariance[:-1, -1])
        router.weight.copy_(weight[None])
        cuts[layer] = 0.5 - float(mean[-1] - weight @ mean[:-1]), 1.0
    return cuts


def _layer_inputs(model: nn.Module, batches: Sequence[Batch], bar: tqdm):
    """Yield for each batch and layer what the router reads, [inputs, hidden_size], and the cosines, [inputs]."""
    read: dict[int, torch.Tensor] = {}
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    mask = None

    def keep(layer: int, inputs: torch.Tensor) -> Decision:
        read[layer] = inputs.float()
        ones = torch.ones(inputs.shape[:-1], device=inputs.device)
        return Decision(ones, ones)

    def see(layer: int, cosines: torch.Tensor) -> None:
        if read[layer].dim() == 3:
            seen.append((layer, read[layer][mask], cosines[mask]))
        else:
            means = torch.where(mask, cosines, 0.0).sum(dim=1) / mask.sum(dim=1)
            seen.append((layer, read[layer], means))

    with watching_similarity(model, see):
        for batch in batches:
            mask = batch["attention_mask"].bool()
            inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch}
            model(**inputs, use_cache=False, logits_to_keep=1, gate_rule=keep, execution="dense")
            yield from seen
            seen.clear()
            bar.update()


def scaled_routers(
    model: nn.Module, batches: Sequence[Batch], capacity: float, epochs: int = 1, progress: bool = False
) -> dict[int, tuple[float, float]]:
    """Train a model's routers by gates that scale the branch.

    Args:
        model: a routed model; its routers' weights are replaced.
        batches: text, one optimizer step each.
        capacity: mean score that the hinge pushes to, in [0, 1].
        epochs: passes over the batches.
        progress: show a bar.

    Returns:
        Layer index -> cut and unit, as `calibrate` takes them.
    """
    model.requires_grad_(False)
    control = BudgetControl(model.router_modules(), capacity)
    control.begin(router_moments(model, batches[:4]), lambda layer: 0.5)
    weights = [router.weight.requires_grad_(True) for router in control.routers.values()]
    groups = [{"params": weights, "lr": 1.5 / weights[0].shape[1]}, {"params": [control.intercepts]}]
    optimizer = torch.optim.Adam(groups, lr=INTERCEPT_RATE, betas=(0.9, 0.95))

    def scale(layer: int, inputs: torch.Tensor) -> Decision:
        p = torch.sigmoid(control.centred(layer, inputs))
        return Decision(p, p)

    model.train()
    try:
        for batch in tqdm([*batches] * epochs, desc="training scaled gates", disable=not progress):
            positions, targets = supervised(batch["labels"])
            inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch}
            outputs = model(**inputs, states_at=positions, use_cache=False, gate_rule=scale)
            loss = next_token_nll(outputs.states, model.get_output_embeddings(), targets) / len(targets)
            executed, sizes = executed_inputs(outputs.router_scores, batch["attention_mask"])
            hinge = capacity_hinge(executed.sum(dim=1, keepdim=True), sizes.sum(dim=0, keepdim=True), capacity).sum()
            optimizer.zero_grad()
            (loss + SCALED_HINGE * hinge).backward()
            optimizer.step()
    finally:
        model.eval()
        model.requires_grad_(False)
    return control.cuts()
