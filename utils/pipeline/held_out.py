"""Loss and capacity on held-out rows of a model that decides by itself, as a training run reports them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from utils.model.configuration_mod import Place, place_name
from utils.model.costs import budget, capacity_of, capacity_weights

from .batches import supervised
from .losses import executed_inputs, next_token_nll

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
"""`input_ids`, `attention_mask` and `labels`, int64 [batch, tokens]; if not all tokens decide, bool `token_mask`."""


def held_out_results(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """Measure a model beside its dense base, and log it.

    Args:
        model: a routed model, in evaluation mode.
        batches: held-out text.

    Returns:
        `dense` (`dense_loss`), `routed` (`eval_loss`, `eval_capacity` and what it saves, `eval_capacity/layer_i`) and
        `rows`: what a training run's `results.json` has under `held_out`.
    """
    dense, _ = loss_and_capacity(model, batches, route=False)
    loss, shares = loss_and_capacity(model, batches)
    config, settings = model.config.to_dict(), model.config.mod_settings
    capacity = capacity_of(shares, capacity_weights(config, settings))
    rows = sum(len(batch["labels"]) for batch in batches)
    logger.info("held-out loss %.4f (dense %.4f), capacity %.4f, on %d rows", loss, dense, capacity, rows)
    routed = {"eval_loss": loss, "eval_capacity": capacity}
    routed |= {f"eval_{name}": value for name, value in budget(config, settings, shares).items()}
    routed |= {f"eval_capacity/layer_{place_name(place)}": share for place, share in shares.items()}
    return {"dense": {"dense_loss": dense}, "routed": routed, "rows": rows}


@torch.no_grad()
def loss_and_capacity(
    model: nn.Module, batches: Iterable[Batch], route: bool = True
) -> tuple[float, dict[Place, float]]:
    """Return the mean loss over supervised tokens and place -> share of inputs executed, as the model decides itself.

    Args:
        model: a routed model, in evaluation mode.
        batches: text.
        route: False runs the dense base, of which there are no shares.
    """
    total = tokens = inputs = 0.0
    head = model.get_output_embeddings()
    ran = torch.zeros(len(model.config.mod_settings.places))
    for batch in batches:
        inputs_of = {name: batch[name] for name in ("input_ids", "attention_mask", "token_mask") if name in batch}
        # logits of the supervised tokens alone, some at a time: those of all would take more than the model
        positions, targets = supervised(batch["labels"])
        output = model(**inputs_of, states_at=positions, use_cache=False, route=route)
        total, tokens = total + float(next_token_nll(output.states, head, targets)), tokens + len(positions)
        if route:
            executed, sizes = executed_inputs(output.router_gates, batch["attention_mask"])
            ran, inputs = ran + executed.sum(dim=1).cpu(), inputs + float(sizes.sum())
    if not route:
        return total / tokens, {}
    return total / tokens, dict(zip(model.config.mod_settings.places, (ran / inputs).tolist(), strict=True))
