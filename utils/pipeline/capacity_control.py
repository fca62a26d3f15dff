"""How training reaches its target capacity: control by a budget. The hinge is in `losses.py`, the other control in
`regression_control.py`.

Of an input `x` (a sequence's mean, or a token) to layer `l`, the router's logit is centred and scaled, `m_l` and `s_l`
being the mean and the mean standard deviation of that layer's inputs, and gets an intercept:

    z = W_l (x - m_l) / s_l + b_l,    p = sigmoid(z - h)

**Sampled gates.** In training `M` is drawn, 1 with probability `p`, so that combinations of skips are tried whose cost
a derivative at the dense model cannot show. The loss expected over the draw has the gradient
`dE/dz = p (1 - p) (L(M=1) - L(M=0))`; the difference is taken from the derivatives at both ends by the trapezoid rule,
`L(1) - L(0) = (L'(0) + L'(1)) / 2`, each weighed by how often it is drawn, so `dM/dz = (1 - P(M)) / 2` for the drawn
`M` (Liu et al. 2023, "Bridging Discrete and Backpropagation", arXiv 2304.08612).

What is drawn follows from the row's own tokens, the layer, the token's place and the step, and from nothing else: the
same rows train alike however they are cut into micro-batches and processes.

**Price.** The loss is `L + lambda C`, with `C` the mean of `p` over all inputs of all routers, all processes and the
whole accumulation window; where attention and MLP are routed apart, inputs count by what skipping them saves. At a
minimum of `L` under `C = s` a common shift of all logits gains nothing, so `lambda = -(dL/dh) / (dC/dh)`, both averaged
over the past steps. It replaces a weight to be searched for.

**Shift.** An integral controller holds the capacity: `h <- h + g (C - s_t)` after each step. `s_t` falls linearly from
1 to the target `s` over the first share of the steps.

**What counts.** In generation prompts have another share of the tokens than in the rows that are trained on. Tokens are
weighed so that `C` is what generation would execute (`RouterTrainer`).

In a checkpoint the layer's threshold stands for intercept, shift and mean: `W_l x` is at least
`W_l m_l + s_l (h - b_l)` exactly where `z >= h`.

**Experts.** Where they are routed, `W_l` has a row, and `b_l` an intercept, for each expert of the layer; an input is
the assignment of a token to an expert, `z` is that expert's, and the layer's threshold is one for each expert.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.model.checkpoint import whole_parameters
from utils.model.configuration_mod import BRANCHES, Place, layer_of
from utils.model.routing_mod import Decision, MoDRouter

START = 0.95
"""Probability of keeping an input before the first step."""
DESCENT = 0.3
"""Share of the steps in which the target falls from 1."""
GAIN = 4.0
"""Of the controller: change of the shift, in logits, for a capacity off by 1."""
DECAY = 0.8
"""Weight of the past in the averages that the price is made of."""
STATE = ("shift", "price", "pushes", "steps", "weights_of_parts")
FORWARD_INPUTS = ("input_ids", "attention_mask", "token_mask")
INTERCEPT_RATE = 0.3
"""Peak learning rate of the intercepts, which are logits."""


class BudgetControl:
    """Draws the gates of training and steers their capacity to a target.

    Args:
        routers: layer index, or another `Place`, -> router, in the order of the settings' `places`.
        target: capacity to reach, in [0, 1].

    Attributes:
        weights_of_parts: what a token of a prompt and one of an answer count in the capacity.
    """

    def __init__(self, routers: Mapping[Place, MoDRouter], target: float):
        self.routers = dict(routers)
        self.target = target
        self.weights_of_parts = 1.0, 1.0
        self.places = {layer: place for place, layer in enumerate(self.routers)}
        self.means: torch.Tensor | None = None  # [layers, hidden_size]

    @torch.no_grad()
    def begin(
        self,
        moments: Mapping[Place, "RouterMoments"],
        threshold_of: Callable,
        margins: Mapping[Place, float] | None = None,
    ) -> None:
        """Start from the routers and thresholds as they are; routers at zero start by keeping nearly everything.

        Args:
            moments: layer index -> what its router reads.
            threshold_of: layer index -> threshold, of experts one or one for each.
            margins: layer index -> how far above the others a router at zero starts, in logits; None for all alike.
        """
        device = next(iter(self.routers.values())).weight.device
        self.means = torch.stack([moments[layer].mean for layer in self.routers]).to(device)
        self.scales = torch.stack([moments[layer].deviation.mean() for layer in self.routers]).clamp(min=1e-6)
        self.scales = self.scales.to(device)
        margins = dict.fromkeys(self.routers, 0.0) if margins is None else margins
        starts = _around_start([margins[layer] for layer in self.routers]).to(self.scales)
        centres = [router(mean) for router, mean in zip(self.routers.values(), self.means, strict=True)]
        intercepts = torch.stack([start.expand_as(c) for start, c in zip(starts, centres, strict=True)])
        for place, (layer, router) in enumerate(self.routers.items()):
            with whole_parameters([router.weight]):
                trained = bool(router.weight.any())
            if trained:
                cut = torch.tensor(threshold_of(layer), device=device).logit()
                intercepts[place] = (centres[place] - cut) / self.scales[place]
        self._make_state(intercepts)

    def _make_state(self, intercepts: torch.Tensor) -> None:
        self.intercepts = intercepts.detach().clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.intercepts], lr=INTERCEPT_RATE, betas=(0.9, 0.95))
        self.shift = 0.0
        self.price = 1e-6  # not 0: the push of the capacity is read off its own term of the loss
        self.pushes = [0.0, 0.0]  # averages of dL/dh and dC/dh
        self.steps = 0
        self._open_window()

    def _open_window(self) -> None:
        zero = torch.zeros((), device=self.intercepts.device)
        self.probes = [zero.clone().requires_grad_(True) for _ in range(2)]  # h as the loss sees it, and as C does
        self.capacity = zero.clone()

    def centred(self, layer: Place, inputs: torch.Tensor) -> torch.Tensor:
        """Return `z` [...], of experts [..., num_experts], for the router's `inputs` [..., hidden_size] of a layer."""
        place, router = self.places[layer], self.routers[layer]
        return (router(inputs) - router(self.means[place])) / self.scales[place] + self.intercepts[place]

    def settled_rule(self) -> Callable[[Place, torch.Tensor], Decision]:
        """Return the `gate_rule` by which the routers, as they are now, decide without drawing."""

        def decide(layer: Place, inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Decision:
            gates = (of_assigned(self.centred(layer, inputs), experts) >= self.shift).float()
            return Decision(gates, gates, experts)

        return decide

    def rule(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        counts: torch.Tensor | None = None,
    ) -> Callable[[Place, torch.Tensor], Decision]:
        """Return the `gate_rule` of a micro-batch.

        Its decisions hold `scores`, the probabilities `p`, whose mean is `C`, and `gates`, 0 or 1, with the gradient of
        the expected loss.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: the same shape, 1 for real tokens.
            counts: not needed.
        """
        keys = row_keys(input_ids, attention_mask)

        def draw(layer: Place, inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Decision:
            z = of_assigned(self.centred(layer, inputs), experts) - self.shift
            scores = torch.sigmoid(z - self.probes[1])
            z = z - self.probes[0]
            p = torch.sigmoid(z.detach())
            drawn = uniform(keys, self.steps, layer, None if p.dim() == 1 else p.shape[1], experts) < p
            slope = torch.where(drawn, 1 - p, p) / 2
            return Decision(scores, drawn.to(p.dtype) + slope * (z - z.detach()), experts)

        return draw

    def loss(self, capacity: torch.Tensor) -> torch.Tensor:
        """Return a micro-batch's `lambda C`.

        Args:
            capacity: its part of the window's `C`, float32 [], with gradient.
        """
        self.capacity += capacity.detach()
        return self.price * capacity

    def step(self, progress: float, rate: float, accelerator: Any, summed: float = 1.0) -> None:
        """Close an accumulation window: move the intercepts, then the price, then the shift.

        Args:
            progress: share of the training steps that is done, in [0, 1].
            rate: the learning rate's share of its peak.
            accelerator: of the run; averages over all processes.
            summed: not needed.
        """
        pushes = [probe.grad if probe.grad is not None else torch.zeros_like(probe) for probe in self.probes]
        gradient = self.intercepts.grad if self.intercepts.grad is not None else torch.zeros_like(self.intercepts)
        parts = [gradient.flatten(), torch.stack([*pushes, self.capacity])]
        sums = accelerator.reduce(torch.cat(parts), reduction="mean")
        self.intercepts.grad = sums[:-3].view_as(self.intercepts).clone()
        self.optimizer.param_groups[0]["lr"] = INTERCEPT_RATE * rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        of_loss, of_capacity, capacity = sums[-3:].tolist()
        weight = DECAY if self.steps else 0.0
        for place, push in enumerate((of_loss, of_capacity / self.price)):
            self.pushes[place] = weight * self.pushes[place] + (1 - weight) * push
        if self.pushes[1] < 0:
            self.price = max(1e-6, -self.pushes[0] / self.pushes[1])
        self.shift += GAIN * (capacity - self.scheduled(progress))
        self.steps += 1
        self._open_window()

    def scheduled(self, progress: float) -> float:
        """Return `s_t`, the capacity asked for when this share of the steps is done."""
        return 1.0 - (1.0 - self.target) * min(1.0, progress / DESCENT)

    @torch.no_grad()
    def cuts(self) -> dict[Place, tuple[float | list[float], float]]:
        """Return layer index -> the router's logit from which an input is kept, and the logits in one unit of `z`.

        Where experts are routed, the former is a list with one for each.
        """
        return {
            layer: (
                (router(self.means[place]) + self.scales[place] * (self.shift - self.intercepts[place])).tolist(),
                float(self.scales[place]),
            )
            for place, (layer, router) in enumerate(self.routers.items())
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training goes on from, at the end of a window."""
        return {
            "means": self.means,
            "scales": self.scales,
            "intercepts": self.intercepts.detach(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in STATE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        device = next(iter(self.routers.values())).weight.device
        self.means, self.scales = state["means"].to(device), state["scales"].to(device)
        self._make_state(state["intercepts"].to(device))
        self.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(self, name, state[name])


@dataclass
class RouterMoments:
    """What a layer's router reads where everything is kept.

    Args:
        mean, deviation: mean and standard deviation of the inputs, float32 [hidden_size].
    """

    mean: torch.Tensor
    deviation: torch.Tensor


@torch.no_grad()
def router_moments(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[Place, RouterMoments]:
    """Measure what the routers read where everything is kept.

    Args:
        model: a routed model.
        batches: `input_ids`, `attention_mask` and, if not all tokens decide, `token_mask`.
    """
    seen: dict[Place, list[torch.Tensor]] = {layer: [] for layer in model.router_modules()}
    mask = None

    def keep(layer: Place, inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Decision:
        values = inputs.float()[mask] if inputs.dim() == 3 else inputs.float()  # [inputs, hidden_size]
        count = torch.full_like(values[0], len(values))
        seen[layer].append(torch.stack([count, values.sum(dim=0), (values**2).sum(dim=0)]))
        ones = torch.ones(inputs.shape[:-1] if experts is None else experts.shape, device=inputs.device)
        return Decision(ones, ones, experts)

    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool()
            inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch}
            model(**inputs, use_cache=False, logits_to_keep=1, gate_rule=keep)
    finally:
        model.train(training)
    moments = {}
    for layer, sums in seen.items():
        count, total, squares = torch.stack(sums).sum(dim=0)
        mean = total / count
        moments[layer] = RouterMoments(mean, (squares / count - mean**2).clamp(min=0).sqrt())
    return moments


def row_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return a 32-bit number for each row, int64 [batch], that follows from its real tokens alone."""
    places = attention_mask.cumsum(dim=1)
    return _mix((_mix(input_ids + 0x9E3779B1 * places) * attention_mask).sum(dim=1))


def of_assigned(logits: torch.Tensor, experts: torch.Tensor | None) -> torch.Tensor:
    """Return the `logits` [..., num_experts] of the `experts`, int64 [..., top_k]; without experts as they are."""
    return logits if experts is None else logits.gather(-1, experts)


def uniform(
    keys: torch.Tensor, step: int, layer: Place, tokens: int | None, experts: torch.Tensor | None = None
) -> torch.Tensor:
    """Return numbers spread evenly over [0, 1], float32, the same for the same arguments.

    Args:
        keys: of the rows, as `row_keys` returns.
        step: of the training.
        layer: index of the layer, or another place of a router.
        tokens: number of tokens, counted from the row's first place; None for one number for each row.
        experts: int64 [batch, tokens, top_k]; one number for each of them.

    Returns:
        [batch], [batch, tokens] or [batch, tokens, top_k].
    """
    number = layer_of(layer) + 1 + (0 if isinstance(layer, int) else 1_000_000 * (1 + BRANCHES.index(layer[1])))
    keys = _mix(keys + 0x85EBCA6B * (step + 1) + 0xC2B2AE35 * number)
    if tokens is not None:
        keys = _mix(keys[:, None] + 0x27D4EB2F * torch.arange(1, tokens + 1, device=keys.device))
    if experts is not None:
        keys = _mix(keys[..., None] + 0x165667B1 * (experts + 1))
    return ((keys.double() + 0.5) / 2**32).float()


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Hash int64 values to 32 bits: two rounds of multiply and shift, whose low bits an overflow leaves right."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        values = values & 0xFFFFFFFF
        values = (values ^ (values >> shift)) * factor
    values = values & 0xFFFFFFFF
    return values ^ (values >> 16)


def _around_start(margins: list[float]) -> torch.Tensor:
    """Return the margins plus what makes their mean probability `START`, float64 [layers]."""
    margins = torch.tensor(margins, dtype=torch.float64)
    low, high = _logit(START) - margins.max(), _logit(START) - margins.min()
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if torch.sigmoid(margins + middle).mean() > START else (middle, high)
    return margins + middle


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
