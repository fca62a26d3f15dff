"""How the assignments of tokens spread over experts, and how many of them are executed (Figure 8).

Also the static baseline that drops whole experts: those with the least weight in a calibration text, over all routed
layers together (Expert Drop in Table 7).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class ExpertLoad:
    """Sums over a text, each [routed layers, experts].

    Args:
        assigned: int64, tokens that the gate sends to an expert.
        executed: int64, those of them that the router lets through.
        weight: float64, sum of the gate's weights over the assigned tokens.
    """

    assigned: torch.Tensor
    executed: torch.Tensor
    weight: torch.Tensor


@torch.inference_mode()
def measure_expert_load(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    route: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> ExpertLoad:
    """Count the assignments of a model over a text without padding.

    Args:
        model: routed at `expert_token`.
        input_ids: int64 [rows, tokens]; a row is a forward.
        route: False measures the dense base, which executes every assignment.
        progress: called after each row.
    """
    layers, num_experts = model.config.mod_settings.layers, model.config.num_experts
    assignments: list[tuple[torch.Tensor, torch.Tensor]] = []  # of one forward, layer by layer

    def collect(gate, args, output) -> None:
        _, weights, experts = output
        assignments.append((weights.flatten().cpu(), experts.flatten().cpu()))

    decoder = model.get_decoder().layers
    handles = [decoder[index].mlp.gate.register_forward_hook(collect) for index in layers]
    load = ExpertLoad(*(torch.zeros(len(layers), num_experts, dtype=dtype) for dtype in _DTYPES))
    try:
        for row in input_ids.split(1):
            assignments.clear()
            output = model(row.to(model.device), use_cache=False, logits_to_keep=1, route=route)
            for number, (weights, experts) in enumerate(assignments):
                executed = output.router_gates[number].flatten().cpu() > 0 if route else slice(None)
                load.assigned[number] += experts.bincount(minlength=num_experts)
                load.executed[number] += experts[executed].bincount(minlength=num_experts)
                load.weight[number].index_add_(0, experts, weights.double())
            progress()
    finally:
        for handle in handles:
            handle.remove()
    return load


_DTYPES = (torch.int64, torch.int64, torch.float64)


def describe_load(load: ExpertLoad, layers: tuple[int, ...]) -> dict[str, Any]:
    """Return what Figure 8 shows of each layer: its experts' assigned and executed tokens, also over the mean assigned.

    Args:
        load: as measured.
        layers: indices of the routed layers.

    Returns:
        `capacity`, and `experts` with lists of numbers by layer.
    """
    experts = {}
    for number, layer in enumerate(layers):
        assigned, executed = load.assigned[number], load.executed[number]
        mean = assigned.double().mean()  # of an expert
        experts[str(layer)] = {
            "capacity": int(executed.sum()) / int(assigned.sum()),
            "assigned": assigned.tolist(),
            "executed": executed.tolist(),
            "assigned_to_mean": (assigned / mean).tolist(),
            "executed_to_mean": (executed / mean).tolist(),
        }
    return {"capacity": int(load.executed.sum()) / int(load.assigned.sum()), "experts": experts}


def least_important(load: ExpertLoad, share: float) -> torch.Tensor:
    """Choose the experts with the least gate weight over all routed layers together.

    Args:
        load: as measured on a calibration text.
        share: of the experts of all routed layers, in [0, 1).

    Returns:
        bool [routed layers, experts], True for the chosen ones.
    """
    importance = load.weight / load.weight.sum(dim=1, keepdim=True)
    chosen = torch.zeros(importance.numel(), dtype=torch.bool)
    chosen[importance.flatten().argsort(stable=True)[: round(share * importance.numel())]] = True
    return chosen.view_as(importance)


KEEP, DROP = 0.5, 0.75
"""Thresholds that a router at zero, whose score is 0.5, reaches and doesn't reach."""
