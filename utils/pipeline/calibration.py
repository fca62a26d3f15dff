"""Set the thresholds of trained routers so that a target share of the inputs of unseen text is executed.

All layers' logits are counted in units in which they compare, `u = (W_l x - cut_l) / scale_l`, and the same shift `d`
is added to every cut: an input is kept where `u >= d`. What a layer skips changes what later layers read, so the share
is measured by running the model with the shift, and the shift found by a few such runs.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.io.errors import UserError
from utils.model.checkpoint import set_thresholds
from utils.model.configuration_mod import MoDSettings, Place
from utils.model.costs import capacity_weights
from utils.model.routing_mod import Decision

from .capacity_control import FORWARD_INPUTS, of_assigned

Cut = float | list[float]
"""The logit from which a router's inputs are kept; where experts are routed, one for each expert."""

logger = logging.getLogger(__name__)

JUMP = 0.01
"""How far from the target a common shift of all layers may end."""

LARGEST_CUT = 4.0
"""Logits of routers are scaled so that no cut is farther from 0: far out a float32 sigmoid tells no two apart."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    cuts: Mapping[Place, tuple[Cut, float]],
    target: float,
    tolerance: float = 0.004,
    runs: int = 5,
    progress: bool = False,
    execution: str | None = None,
) -> tuple[dict[Place, Cut], float]:
    """Find cuts that keep a share `target` of the inputs; of tokens, the mean over rows of each row's share.

    Inputs count as in any capacity (`capacity_weights`).

    Args:
        model: a routed model.
        batches: `input_ids`, `attention_mask` and, if not all tokens decide, `token_mask`; not trained on.
        cuts: place -> the logit from which an input is kept now, and what one unit of `u` is in logits, in the order of
            the settings' `places`.
        target: share of inputs, in [0, 1].
        tolerance: stop when the measured share is this near.
        runs: forwards over all batches, at most.
        progress: show a bar.
        execution: of the model, where another than its own in evaluation is to be taken.

    Returns:
        Place -> the new cut, and the share that is executed by the run nearest to the target.
    """
    layers = list(cuts)
    training = model.training
    model.eval()
    weights, best = None, (math.inf, dict.fromkeys(layers, 0.0), 0.0)
    below, above = -math.inf, math.inf  # shifts that keep too much, too little
    bar = tqdm(total=runs, desc="calibrating thresholds", disable=not progress)

    def measure(shifts: Mapping[Place, float]) -> tuple[torch.Tensor, float]:
        """Return all `u` with these shifts, and the share that they keep."""
        nonlocal weights, best
        shifted = {layer: (_moved(cut, shifts[layer] * scale), scale) for layer, (cut, scale) in cuts.items()}
        values = logits_of_routers(model, batches, shifted, lambda u: (u >= 0).to(u.dtype), execution)
        if weights is None:
            weights = weights_of_inputs(model, batches, len(values))
        share = _kept(values, weights)
        best = min(best, (abs(share - target), dict(shifts), share), key=lambda found: found[0])
        bar.update()
        return values, share

    try:
        shift = 0.0
        for _ in range(runs):
            values, share = measure(dict.fromkeys(layers, shift))
            if abs(share - target) <= tolerance:
                break
            if share > target:
                below = max(below, shift)
            else:
                above = min(above, shift)
            shift += weighted_quantile(values, 1 - target, weights)
            if not below < shift < above:  # skipping moved the logits: bisect
                shift = (below + above) / 2 if math.isfinite(below + above) else shift
        if best[0] > JUMP and math.isfinite(below + above):
            # what one layer executes makes the next execute: between two shifts the share jumps. Let the one hold for
            # the first layers, the other for the rest
            first, last = 0, len(layers)
            while last - first > 1 and best[0] > tolerance:
                middle = (first + last) // 2
                _, share = measure({layer: below if n < middle else above for n, layer in enumerate(layers)})
                first, last = (first, middle) if share > target else (middle, last)
    finally:
        bar.close()
        model.train(training)
    _, shifts, share = best
    return {layer: _moved(cut, shifts[layer] * scale) for layer, (cut, scale) in cuts.items()}, share


def _moved(cut: Cut, by: float) -> Cut:
    return [each + by for each in cut] if isinstance(cut, list) else cut + by


@torch.no_grad()
def logits_of_routers(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    cuts: Mapping[Place, tuple[Cut, float]],
    gates_of: Callable[[torch.Tensor], torch.Tensor],
    execution: str | None = None,
) -> torch.Tensor:
    """Return `u` of all inputs of all layers, float [inputs].

    Args:
        model, batches, cuts: as of `calibrate`.
        gates_of: the gates that it makes of a layer's `u`.
        execution: of the model; sparse execution takes any gate above 0 for 1.
    """
    seen: list[torch.Tensor] = []
    mask = None
    routers = model.router_modules()

    def rule(layer: Place, inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Decision:
        cut, scale = cuts[layer]
        values = of_assigned((routers[layer](inputs) - torch.tensor(cut, device=inputs.device)) / scale, experts)
        seen.append(values if values.dim() == 1 else values[mask].flatten())
        gates = gates_of(values)
        return Decision(gates, gates, experts)

    for batch in batches:
        mask = batch["attention_mask"].bool()
        inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch}
        model(**inputs, use_cache=False, logits_to_keep=1, gate_rule=rule, execution=execution)
    return torch.cat(seen)


def weights_of_inputs(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], count: int
) -> torch.Tensor | None:
    """Return how much each of the `count` inputs that `logits_of_routers` returns counts, float [count], mean 1.

    Of tokens each row's count as much as another row's: a capacity is what a request executes, on average. Routers
    differ as `capacity_weights` says. None, all alike, for sequences with one router in a layer.
    """
    settings, parts = model.config.mod_settings, []
    if settings.level == "sequence" and len(settings.branches) == 1:
        return None
    of_routers = torch.tensor(list(capacity_weights(model.config.to_dict(), settings).values()))
    for batch in batches:
        mask = batch["attention_mask"].bool()
        of_inputs = mask.new_ones(len(mask), dtype=torch.float32)
        if settings.level == "token":
            of_inputs = (1.0 / mask.sum(dim=1, keepdim=True)).expand_as(mask)[mask]
        parts.append(torch.outer(of_routers.to(of_inputs), of_inputs).flatten())
    weights = torch.cat(parts)
    weights = weights.repeat_interleave(count // len(weights))  # experts that a token is assigned to
    return weights / weights.mean()


def _kept(values: torch.Tensor, weights: torch.Tensor | None) -> float:
    kept = (values >= 0).double()
    return float(kept.mean() if weights is None else (kept * weights).mean())


def weighted_quantile(values: torch.Tensor, share: float, weights: torch.Tensor | None = None) -> float:
    """Return a value with `share` of the values (of their weights) below it, half-way between two neighbours."""
    ordered, order = values.sort()
    if weights is None:
        place = min(max(round(share * len(ordered)), 0), len(ordered))
    else:
        below = weights[order].double().cumsum(dim=0) / weights.double().sum()
        place = int((below <= share + 1e-9).sum())
    if place == 0:
        return float(ordered[0]) - 1.0
    if place == len(ordered):
        return float(ordered[-1]) + 1.0
    return float(ordered[place - 1] + ordered[place]) / 2


def calibrate_table(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    cuts: Mapping[Place, tuple[Cut, float]],
    capacities: Sequence[float],
    **options: Any,
) -> dict[float, dict[Place, Cut]]:
    """Return capacity -> place -> cut, each found as `calibrate` does.

    Args:
        model, batches, cuts: as of `calibrate`.
        capacities: shares of the inputs.
        options: further arguments of `calibrate`.
    """
    rows, table = sum(len(batch["input_ids"]) for batch in batches), {}
    for capacity in capacities:
        table[capacity], share = calibrate(model, batches, cuts, capacity, **options)
        logger.info("capacity %.3g, calibrated on %d rows: %.3f of the inputs are executed", capacity, rows, share)
    return table


def pack_capacities(table: Mapping[float, list[Cut]]) -> list[dict[str, Any]]:
    """Return thresholds by capacity as `MoDSettings` takes them."""
    return [{"capacity": capacity, "threshold": table[capacity]} for capacity in sorted(table)]


def fold_table(
    table: Mapping[float, Mapping[Place, Cut]],
) -> tuple[dict[float, list[Cut]], dict[Place, float]]:
    """Turn the cuts of several capacities into thresholds, as `fold` does those of one; the factors hold for all."""
    layers = list(next(iter(table.values())))
    farthest = {layer: max(_farthest(cuts[layer]) for cuts in table.values()) for layer in layers}
    factors = {layer: min(1.0, LARGEST_CUT / max(distance, 1e-9)) for layer, distance in farthest.items()}
    thresholds = {
        capacity: [
            (torch.tensor(cuts[layer], dtype=torch.float64) * factors[layer]).sigmoid().tolist() for layer in layers
        ]
        for capacity, cuts in table.items()
    }
    return thresholds, factors


def fold(cuts: Mapping[Place, Cut]) -> tuple[list[Cut], dict[Place, float]]:
    """Turn cuts into thresholds.

    Args:
        cuts: place -> the logit from which an input is kept, in the order of the settings' `places`.

    Returns:
        The thresholds in that order, and place -> the factor by which the router is to be multiplied with them: below 1
        where the cut lies far out. What is kept stays the same.
    """
    table, factors = fold_table({0.0: cuts})
    return table[0.0], factors


def cuts_of(settings: MoDSettings) -> dict[Place, Cut]:
    """Return place -> the logit from which an input is kept, of the thresholds in the settings."""
    thresholds = {place: settings.threshold_of(place) for place in settings.places}
    return {place: torch.tensor(value, dtype=torch.float64).logit().tolist() for place, value in thresholds.items()}


def _farthest(cut: Cut) -> float:
    return float(torch.tensor(cut).abs().max())


@torch.no_grad()
def settle(model: nn.Module, cuts: Mapping[Place, Cut], scales: Mapping[Place, float]) -> dict[Place, float]:
    """Let a model decide by these cuts: set its thresholds, and with them its routers where a cut lies far out.

    Args:
        model: a routed model whose weights are whole.
        cuts: place -> the logit from which an input is kept, in the order of the settings' `places`.
        scales: place -> one unit of `u` in logits.

    Returns:
        Place -> one unit of `u` in the logits of the routers as they are now.
    """
    thresholds, factors = fold(cuts)
    for layer, router in model.router_modules().items():
        router.weight.mul_(factors[layer])
    set_thresholds(model, thresholds)
    return {layer: scales[layer] * factor for layer, factor in factors.items()}


def settled_cuts(
    model: nn.Module, units: Mapping[Place, float] | None, control: str | None = None
) -> dict[Place, tuple[Cut, float]]:
    """Return the cuts that a model decides by and their units, as `calibrate` takes them.

    Args:
        model: a routed model.
        units: place -> one unit of `u` in logits, as its checkpoint has them; None where it has none.
        control: the capacity control that it was trained with, where that is known.

    Raises:
        UserError: the routers are at zero, or in which units they compare cannot be known.
    """
    settings = model.config.mod_settings
    if not any(router.weight.any() for router in model.router_modules().values()):
        raise UserError("its routers are at zero: whatever the thresholds, they keep or skip everything")
    cuts = cuts_of(settings)
    if units is None:
        scaled = any(_farthest(cut) > LARGEST_CUT - 1e-6 for cut in cuts.values())
        if scaled or control not in ("regression", "hinge"):
            why = "routers were scaled" if scaled else f"it was trained with capacity_control {control or 'unknown'}"
            raise UserError(
                f"it has no `units` that tell how its layers' logits compare, and {why}, so they need not be 1: train "
                "it again"
            )
        logger.info("no `units` in its router file: taking 1 for all layers, as capacity_control %s has", control)
        units = dict.fromkeys(settings.places, 1.0)
    return {layer: (cut, units[layer]) for layer, cut in cuts.items()}
