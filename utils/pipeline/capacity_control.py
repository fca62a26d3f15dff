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

**Price.** The loss is `L + lambda C`, with `C` the mean of `p` over all inputs of all routed layers, all processes and
the whole accumulation window. At a minimum of `L` under `C = s` a common shift of all logits gains nothing, so
`lambda = -(dL/dh) / (dC/dh)`, both averaged over the past steps. It replaces a weight to be searched for.

**Shift.** An integral controller holds the capacity: `h <- h + g (C - s_t)` after each step. `s_t` falls linearly from
1 to the target `s` over the first share of the steps.

**Parts of a conversation.** The loss is of answers, and with one capacity for all tokens deep layers learn to skip
nearly all of the prompt and nothing else: how much is executed would then follow from how long prompts are, and nothing
would be saved in decode. So tokens have a capacity, a price and a shift in each of three parts: what all conversations
begin with (a chat template's system message), the rest of the prompt, and answers. The first two have the same target;
that of answers lies `PARTING s (1 - s)` above it, and together they make `s` (`targets_of_parts`). A router has one
threshold for all: the shifts `h_k` become `h(x) = sum_k h_k f_lk(x)`, `f_l` being a linear guess at the token's part, a
ridge regression made before the first step. In a checkpoint it is a part of the router's weight.

In a checkpoint the layer's threshold stands for intercept, shift and mean: `W_l x` is at least
`W_l m_l + s_l (h - b_l)` exactly where `z >= h`.

**Experts.** Where they are routed, `W_l` has a row, and `b_l` an intercept, for each expert of the layer; an input is
the assignment of a token to an expert, `z` is that expert's, and the layer's threshold is one for each expert.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.model.checkpoint import whole_parameters
from utils.model.routing_mod import Decision, MoDRouter

START = 0.95
"""Probability of keeping an input before the first step."""
DESCENT = 0.3
"""Share of the steps in which the target falls from 1."""
GAIN = 4.0
"""Of the controller: change of the shift, in logits, for a capacity off by 1."""
DECAY = 0.8
"""Weight of the past in the averages that the price is made of."""
PARTING = 2.0
"""How far apart the capacities of prompts and answers are: 0.5 where the target is 0.5. With more the quality is
better, and what is executed follows more from the prompt's length (`configs/reproduce/RESULTS.md`)."""
TELL_RIDGE = 1e-2
"""Of the guess at which part a token is in, in units of the inputs' mean variance."""
PARTS = ("beginning", "prompt", "answer")
"""Of a conversation: what all have at their beginning, the rest of the prompt, what the assistant writes."""
STATE = ("targets", "shifts", "prices", "pushes", "steps")
FORWARD_INPUTS = ("input_ids", "attention_mask", "token_mask")
INTERCEPT_RATE = 0.3
"""Peak learning rate of the intercepts, which are logits."""


class BudgetControl:
    """Draws the gates of training and steers their capacity to a target.

    Args:
        routers: layer index -> router, ascending.
        targets: capacities to reach, in [0, 1]: for tokens one for each of `PARTS`, for sequences one.
    """

    def __init__(self, routers: Mapping[int, MoDRouter], *targets: float):
        self.routers = dict(routers)
        self.targets = list(targets)
        self.parts = len(targets)
        self.places = {layer: place for place, layer in enumerate(self.routers)}
        self.means: torch.Tensor | None = None  # [layers, hidden_size]

    @torch.no_grad()
    def begin(
        self,
        moments: Mapping[int, "RouterMoments"],
        threshold_of: Callable,
        margins: Mapping[int, float] | None = None,
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
        self.tells = torch.stack([moments[layer].tell for layer in self.routers]).to(device)
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
        self.shifts = [0.0] * self.parts
        self.prices = [1e-6] * self.parts  # not 0: the push of the capacity is read off its own term of the loss
        self.pushes = [[0.0, 0.0] for _ in range(self.parts)]  # averages of dL/dh and dC/dh
        self.steps = 0
        self._open_window()

    def _open_window(self) -> None:
        zeros = torch.zeros(self.parts, device=self.intercepts.device)
        self.probes = [zeros.clone().requires_grad_(True) for _ in range(2)]  # h as the loss sees it, and as C does
        self.capacity = zeros.clone()

    def centred(self, layer: int, inputs: torch.Tensor) -> torch.Tensor:
        """Return `z` [...], of experts [..., num_experts], for the router's `inputs` [..., hidden_size] of a layer."""
        place, router = self.places[layer], self.routers[layer]
        return (router(inputs) - router(self.means[place])) / self.scales[place] + self.intercepts[place]

    def offset(self, layer: int, inputs: torch.Tensor) -> torch.Tensor | float:
        """Return `h` of the inputs, [batch, tokens] where there are parts, of experts [batch, tokens, 1]."""
        if self.parts == 1:
            return self.shifts[0]
        told = guess_parts(self.tells[self.places[layer]], inputs) @ torch.tensor(self.shifts, device=inputs.device)
        return told if self.routers[layer].num_experts is None else told.unsqueeze(-1)

    def settled_rule(self) -> Callable[[int, torch.Tensor], Decision]:
        """Return the `gate_rule` by which the routers, as they are now, decide without drawing."""

        def decide(layer: int, inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Decision:
            gates = (of_assigned(self.centred(layer, inputs), experts) >= self.offset(layer, inputs)).float()
            return Decision(gates, gates, experts)

        return decide

    def rule(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        counts: torch.Tensor | None = None,
        parts: torch.Tensor | None = None,
    ) -> Callable[[int, torch.Tensor], Decision]:
        """Return the `gate_rule` of a micro-batch.

        Its decisions hold `scores`, the probabilities `p`, whose mean is `C`, and `gates`, 0 or 1, with the gradient of
        the expected loss.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: the same shape, 1 for real tokens.
            counts: not needed.
            parts: int64 [batch, tokens], each token's place in `PARTS`; needed where there are parts.
        """
        keys = row_keys(input_ids, attention_mask)

        def probed(probe: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            if self.parts == 1:
                return probe[0]
            of_part = probe[parts]
            return of_part if of_part.dim() == like.dim() else of_part.unsqueeze(-1)

        def draw(layer: int, inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Decision:
            z = of_assigned(self.centred(layer, inputs), experts) - self.offset(layer, inputs)
            scores = torch.sigmoid(z - probed(self.probes[1], z))
            z = z - probed(self.probes[0], z)
            p = torch.sigmoid(z.detach())
            drawn = uniform(keys, self.steps, layer, None if p.dim() == 1 else p.shape[1], experts) < p
            slope = torch.where(drawn, 1 - p, p) / 2
            return Decision(scores, drawn.to(p.dtype) + slope * (z - z.detach()), experts)

        return draw

    def loss(self, capacity: torch.Tensor) -> torch.Tensor:
        """Return a micro-batch's `lambda C`, summed over the parts.

        Args:
            capacity: its share of the window's `C`, float32 [parts], with gradient.
        """
        self.capacity += capacity.detach()
        return sum(price * of_part for price, of_part in zip(self.prices, capacity.unbind(), strict=True))

    def step(
        self, progress: float, rate: float, accelerator: Any, summed: float = 1.0, there: Sequence[bool] | None = None
    ) -> None:
        """Close an accumulation window: move the intercepts, then prices and shifts.

        Args:
            progress: share of the training steps that is done, in [0, 1].
            rate: the learning rate's share of its peak.
            accelerator: of the run; averages over all processes.
            summed: not needed.
            there: of each part, whether the window had any input; None for all True.
        """
        pushes = [probe.grad if probe.grad is not None else torch.zeros_like(probe) for probe in self.probes]
        gradient = self.intercepts.grad if self.intercepts.grad is not None else torch.zeros_like(self.intercepts)
        sums = accelerator.reduce(torch.cat([gradient.flatten(), *pushes, self.capacity]), reduction="mean")
        measured = sums[len(gradient.flatten()) :].view(3, self.parts)
        self.intercepts.grad = sums[: -measured.numel()].view_as(self.intercepts).clone()
        self.optimizer.param_groups[0]["lr"] = INTERCEPT_RATE * rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        weight = DECAY if self.steps else 0.0
        for part, (of_loss, of_capacity, capacity) in enumerate(measured.T.tolist()):
            if there is not None and not there[part]:
                continue
            averages = self.pushes[part]
            for place, push in enumerate((of_loss, of_capacity / self.prices[part])):
                averages[place] = weight * averages[place] + (1 - weight) * push
            if averages[1] < 0:
                self.prices[part] = max(1e-6, -averages[0] / averages[1])
            self.shifts[part] += GAIN * (capacity - self.scheduled(progress, part))
        self.steps += 1
        self._open_window()

    def scheduled(self, progress: float, part: int = 0) -> float:
        """Return `s_t`, the capacity asked for in a part when this share of the steps is done."""
        return 1.0 - (1.0 - self.targets[part]) * min(1.0, progress / DESCENT)

    @torch.no_grad()
    def settle(
        self, weights: Mapping[int, torch.Tensor]
    ) -> tuple[dict[int, torch.Tensor], dict[int, tuple[float | list[float], float]]]:
        """Return what a checkpoint decides by, so that it decides as `settled_rule` does.

        Args:
            weights: layer index -> the router's weight, float32 [1 or num_experts, hidden_size], whole.

        Returns:
            Layer index -> the weight with what the parts differ by, and layer index -> the logit from which an input is
            kept, where experts are routed one for each, and the logits in one unit of `z`.
        """
        settled, cuts = {}, {}
        for place, (layer, weight) in enumerate(weights.items()):
            mean, scale = self.means[place].to(weight), self.scales[place].to(weight)
            cut = weight @ mean - scale * self.intercepts[place].to(weight)
            if self.parts == 1:
                settled[layer], cut = weight, cut + scale * self.shifts[0]
            else:
                settled[layer], cut = tilted(weight, cut, [float(scale) * h for h in self.shifts], self.tells[place])
            cut = cut.tolist()
            cuts[layer] = (cut if self.routers[layer].num_experts else cut[0], float(scale))
        return settled, cuts

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training goes on from, at the end of a window."""
        return {
            "means": self.means,
            "scales": self.scales,
            "tells": self.tells,
            "intercepts": self.intercepts.detach(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in STATE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        device = next(iter(self.routers.values())).weight.device
        self.means, self.scales, self.tells = (state[name].to(device) for name in ("means", "scales", "tells"))
        self._make_state(state["intercepts"].to(device))
        self.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(self, name, state[name])


def targets_of_parts(target: float, prompt_share: float) -> tuple[float, ...]:
    """Return the capacities of the `PARTS` that make `target` together.

    Args:
        target: in (0, 1].
        prompt_share: share of the tokens that are a prompt's, in (0, 1).
    """
    apart = PARTING * target * (1 - target)
    answers = min(1.0, target + prompt_share * apart)
    prompts = max(0.0, (target - (1 - prompt_share) * answers) / prompt_share)
    return prompts, prompts, answers


@dataclass
class RouterMoments:
    """What a layer's router reads where everything is kept.

    Args:
        mean, deviation: mean and standard deviation of the inputs, float32 [hidden_size].
        tell: `f(x) = tell[:, :-1] x + tell[:, -1]` guesses how much a token is of each part, in all 1, float32
            [parts, hidden_size + 1]; zero where not asked for.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    tell: torch.Tensor


def guess_parts(tell: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return `f`, float32 [..., parts], of router inputs [..., hidden_size]; `tell` as of `RouterMoments`."""
    return inputs.float() @ tell[:, :-1].T + tell[:, -1]


def tilted(
    weight: torch.Tensor, cut: torch.Tensor, shifts: Sequence[float], tell: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and cut by which `weight x >= cut + sum_k shifts_k f_k(x)` is decided as `weight x >= cut`.

    Args:
        weight: float [rows, hidden_size].
        cut: float [rows].
        shifts: in logits, of each part.
        tell: as of `RouterMoments`.
    """
    tilt = torch.tensor(shifts).to(weight) @ tell.to(weight)  # [hidden_size + 1]
    return weight - tilt[:-1], cut + tilt[-1]


@torch.no_grad()
def router_moments(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], parts: bool = False
) -> dict[int, RouterMoments]:
    """Measure what the routers read where everything is kept.

    Args:
        model: a routed model.
        batches: `input_ids`, `attention_mask` and, if not all tokens decide, `token_mask`.
        parts: learn to tell the parts apart too; batches then have `parts`, int64 [batch, tokens].
    """
    sums: dict[int, torch.Tensor] = {}
    products: dict[int, torch.Tensor] = {}
    mask = of_parts = None

    def keep(layer: int, inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Decision:
        values = inputs.float()[mask] if inputs.dim() == 3 else inputs.float()  # [inputs, hidden_size]
        count = torch.full_like(values[0], len(values))
        sums[layer] = sums.get(layer, 0.0) + torch.stack([count, values.sum(dim=0), (values**2).sum(dim=0)])
        if parts:
            one_hot = nn.functional.one_hot(of_parts[mask], len(PARTS))
            columns = torch.cat([values, one_hot.float()], dim=1)
            products[layer] = products.get(layer, 0.0) + columns.T @ columns
        ones = torch.ones(inputs.shape[:-1] if experts is None else experts.shape, device=inputs.device)
        return Decision(ones, ones, experts)

    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask, of_parts = batch["attention_mask"].bool(), batch.get("parts")
            inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch}
            model(**inputs, use_cache=False, logits_to_keep=1, gate_rule=keep)
    finally:
        model.train(training)
    moments = {}
    for layer, (count, total, squares) in sums.items():
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        guess = torch.zeros(len(PARTS), len(mean) + 1, device=mean.device)
        if parts:
            guess = _tell(products[layer].double() / count[0], mean.double()).float()
        moments[layer] = RouterMoments(mean, deviation, guess)
    return moments


def _tell(products: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression of the last columns on the others, float64, from the means of their products."""
    size = len(mean)
    shares = products[size:, size:].diagonal()  # of the ones in the last columns, which are 0 or 1
    covariance = products[:size, :size] - torch.outer(mean, mean)
    ridge = TELL_RIDGE * covariance.diagonal().mean() + 1e-12
    crossed = products[:size, size:] - torch.outer(mean, shares)
    weights = torch.linalg.solve(covariance + ridge * torch.eye(size).to(covariance), crossed).T
    return torch.cat([weights, (shares - weights @ mean)[:, None]], dim=1)


def row_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return a 32-bit number for each row, int64 [batch], that follows from its real tokens alone."""
    places = attention_mask.cumsum(dim=1)
    return _mix((_mix(input_ids + 0x9E3779B1 * places) * attention_mask).sum(dim=1))


def of_assigned(logits: torch.Tensor, experts: torch.Tensor | None) -> torch.Tensor:
    """Return the `logits` [..., num_experts] of the `experts`, int64 [..., top_k]; without experts as they are."""
    return logits if experts is None else logits.gather(-1, experts)


def uniform(
    keys: torch.Tensor, step: int, layer: int, tokens: int | None, experts: torch.Tensor | None = None
) -> torch.Tensor:
    """Return numbers spread evenly over [0, 1], float32, the same for the same arguments.

    Args:
        keys: of the rows, as `row_keys` returns.
        step: of the training.
        layer: index of the layer.
        tokens: number of tokens, counted from the row's first place; None for one number for each row.
        experts: int64 [batch, tokens, top_k]; one number for each of them.

    Returns:
        [batch], [batch, tokens] or [batch, tokens, top_k].
    """
    keys = _mix(keys + 0x85EBCA6B * (step + 1) + 0xC2B2AE35 * (layer + 1))
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
