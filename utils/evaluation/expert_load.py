"""How the assignments of tokens spread over experts, and how many of them are executed (Figure 8)."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .capacity import CapacityMeter


@torch.inference_mode()
def measure_expert_load(
    model: PreTrainedModel, input_ids: torch.Tensor, progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Count the assignments of a model over a text without padding.

    Args:
        model: routed at `expert_token`.
        input_ids: int64 [rows, tokens]; a row is a forward.
        progress: called after each row.

    Returns:
        `capacity`, and `experts` with lists of numbers by layer: of each expert the tokens `assigned` and `executed`,
        and both over the mean assigned of the layer's experts.
    """
    meter = CapacityMeter(model)
    try:
        for row in input_ids.split(1):
            model(row.to(model.device), use_cache=False, logits_to_keep=1)
            progress()
    finally:
        meter.close()
    counted = meter.read()
    experts = {}
    for layer, tokens in counted["experts"].items():
        mean = sum(tokens["assigned"]) / len(tokens["assigned"])
        over_mean = {f"{name}_to_mean": [count / mean for count in counts] for name, counts in tokens.items()}
        experts[str(layer)] = {"capacity": counted["layers"][layer], **tokens, **over_mean}
    return {"capacity": counted["capacity"], "experts": experts}
