"""The routing decision: router, pooling, threshold, straight-through estimator, kept rows.

`R(x) = sigmoid(W x)` (Eq. 1), `M = 1 where R(x) >= threshold, else 0` (Eq. 2), `dM/dR = 1` (Eq. 4). All of it in
float32, whatever the dtype of the model: in bfloat16 a small negative logit would round to "keep". This file travels
inside every checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from .configuration_mod import Place


@dataclass
class Decision:
    """What one router decided.

    Args:
        scores: `R(x)`, float32, [batch] (sequence level), [batch, tokens] (token level) or, for the experts that each
            token is assigned to, [batch, tokens, top_k].
        gates: `M`, same shape and dtype, exactly 0 or 1, with the straight-through gradient in training.
        experts: int64 [batch, tokens, top_k], the experts that the scores are for; None where none are routed.
    """

    scores: torch.Tensor
    gates: torch.Tensor
    experts: torch.Tensor | None = None

    @cached_property
    def gates_on_host(self) -> torch.Tensor:
        """The gates, flattened, on the CPU. Found once: this is the one transfer to the host that skipping costs."""
        return self.gates.detach().cpu().flatten()

    @cached_property
    def kept_on_host(self) -> torch.Tensor:
        """Indices of the kept inputs in the flattened gates, int64 [kept] ascending, on the CPU."""
        return self.gates_on_host.nonzero().squeeze(-1)

    @cached_property
    def executes(self) -> torch.Tensor:
        """Whether the one sequence of a batch is kept, bool [], on the CPU."""
        return self.gates_on_host[0] > 0

    @cached_property
    def kept(self) -> torch.Tensor | None:
        """The same on the device of the gates; None where all inputs are kept."""
        if len(self.kept_on_host) == self.gates.numel():
            return None
        return self.kept_on_host.to(self.gates.device, non_blocking=True)

    @cached_property
    def skipped(self) -> torch.Tensor:
        """Indices of the skipped inputs in the flattened gates, int64 [skipped] ascending, on the gates' device."""
        left = torch.ones(self.gates.numel(), dtype=torch.bool)
        left[self.kept_on_host] = False
        return left.nonzero().squeeze(-1).to(self.gates.device, non_blocking=True)

    def to(self, device: torch.device) -> "Decision":
        """Return the decision on a device: itself where it is there."""
        if self.gates.device == device:
            return self
        experts = None if self.experts is None else self.experts.to(device)
        return Decision(self.scores.to(device), self.gates.to(device), experts)

    def held(self) -> "Decision":
        """Return the decision as a cache holds it: without gradient."""
        return Decision(self.scores.detach(), self.gates.detach()) if self.scores.requires_grad else self

    def select(self, rows: torch.Tensor) -> "Decision":
        """Return the decisions of the sequences `rows` (int64 [selected], repeats allowed), at sequence level."""
        rows = rows.to(self.gates.device)
        selected = Decision(self.scores[rows], self.gates[rows])
        kept = self.__dict__.get("kept", rows)
        if kept is None or len(kept) == 0:
            selected.kept = kept  # all or nothing stays so: no need to look again
        return selected


class Room:
    """Where the routers of one forward decide on tokens, so that nothing has to be stacked afterwards.

    Without gradient alone: results are written to what is there.

    Args:
        thresholds: place -> threshold, of the routers in the order of the settings' `places`.
        inputs: [batch, tokens, ...], of the forward.
    """

    def __init__(self, thresholds: dict[Place, float], inputs: torch.Tensor):
        shape = (2, len(thresholds), *inputs.shape[:2])
        self.scores, self.gates = torch.empty(shape, dtype=torch.float32, device=inputs.device).unbind()
        # a tensor is compared with faster than a number, which has to be made one
        each = torch.tensor(list(thresholds.values()), dtype=torch.float32).unbind()
        of_each = zip(self.scores.unbind(), self.gates.unbind(), each, strict=True)
        self.of_router = dict(zip(thresholds, of_each, strict=True))

    def decide(self, place: Place, router: "MoDRouter", hidden_states: torch.Tensor) -> Decision:
        """Decide as `decide` does, on each token of `hidden_states` [batch, tokens, hidden_size]."""
        scores, gates, threshold = self.of_router[place]
        torch.sigmoid(router(hidden_states), out=scores)
        return Decision(scores, torch.ge(scores, threshold, out=gates))


@dataclass
class Routing:
    """What one forward's layers need to route, and what they decided. Made for each forward, kept by nobody.

    Args:
        token_mask: bool [batch, tokens], True for tokens that count in a sequence's decision; None for all of them.
        sparse: leave out what is not kept, rather than compute it and multiply by zero.
        enabled: False runs the dense base model, as if every input were kept.
        gate_rule: (place of the router, its inputs [batch, hidden_size] or [batch, tokens, hidden_size]) -> decision;
            stands in for router and threshold, in training and calibration. Where experts are routed it is given
            those of each token as well, int64 [batch, tokens, top_k].
        decisions: place -> what the router there decided in this forward, or at the prefill of the cache.
        room: where tokens are decided on, where no gradient is asked for; None for wherever it falls.
        packed: rows may be packed, so attention is to know where tokens are. FlashAttention, where it is told, reads
            that back from the device in every layer to see.
    """

    token_mask: torch.Tensor | None
    sparse: bool
    enabled: bool = True
    gate_rule: Callable[[Place, torch.Tensor], Decision] | None = None
    decisions: dict[Place, Decision] = field(default_factory=dict)
    room: Room | None = None
    packed: bool = False

    def stacked(self, places: tuple[Place, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and gates of the routers, [routers, ...], on the device of the first one."""
        decisions, room = [self.decisions[place] for place in places], self.room
        if room is not None and all(self.decisions[place].gates is room.of_router[place][1] for place in places):
            return room.scores, room.gates
        device = decisions[0].gates.device  # a model may lie on several
        moved = [decision.to(device) for decision in decisions]
        return torch.stack([each.scores for each in moved]), torch.stack([each.gates for each in moved])


class MoDRouter(nn.Module):
    """Score an input: no bias, float32 (Eq. 1). Starts at zero, which keeps everything.

    Not an `nn.Linear`: adapters and quantization that look for these are to leave decisions alone.

    Args:
        hidden_size: of the inputs.
        num_experts: with it one logit for each expert (Section 3.3), without it a single one.
    """

    def __init__(self, hidden_size: int, num_experts: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts or 1, hidden_size, dtype=torch.float32))
        self.num_experts = num_experts

    def _apply(self, fn, recurse: bool = True):
        # `model.to(torch.bfloat16)` and the like move the weight and leave it float32
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == torch.float32 else tensor.to(result.device)

        return super()._apply(keep_float32, recurse)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [...] or [..., num_experts], for `hidden_states` [..., hidden_size]."""
        device = hidden_states.device.type
        if autocasts(device):
            # entering a context costs more time than a decode step's product
            with torch.autocast(device, enabled=False):
                return self._logits(hidden_states)
        return self._logits(hidden_states)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        return logits if self.num_experts else logits.squeeze(-1)


def autocasts(device: str) -> bool:
    """Tell whether autocast is on for a type of device; torch (2.13) can't be asked about `meta`, which has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def mean_over_tokens(hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Average over the real tokens of each sequence, in float32 (Section 3.1, sequence level).

    Args:
        hidden_states: [batch, tokens, hidden_size].
        token_mask: bool [batch, tokens], or None for all tokens.

    Returns:
        float32 [batch, hidden_size]; zero for a row without a real token.
    """
    hidden_states = hidden_states.float()
    if token_mask is None:
        return hidden_states.mean(dim=1)
    token_mask = token_mask.to(hidden_states.device)  # of a model on several devices it is on the first
    weights = token_mask.to(hidden_states.dtype)  # [batch, tokens]
    # `where` and not a product: what stands at a padding position may be anything, infinities too
    total = torch.where(token_mask.unsqueeze(-1), hidden_states, 0.0).sum(dim=1)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1.0)


def straight_through(scores: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Return `M`: 1.0 where `scores >= threshold`, else 0.0, with the gradient of `scores` (Eq. 2 and 4)."""
    if scores.requires_grad:
        return (scores >= threshold).to(scores.dtype) + (scores - scores.detach())
    return torch.ge(scores, threshold, out=torch.empty_like(scores))  # in one kernel


def router_inputs(hidden_states: torch.Tensor, level: str, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Return what a router reads: [batch, hidden_size] for `sequence`, [batch, tokens, hidden_size] for `token`."""
    return mean_over_tokens(hidden_states, token_mask) if level == "sequence" else hidden_states


def decide(
    router: MoDRouter, hidden_states: torch.Tensor, level: str, threshold: float, token_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the inputs of a layer and threshold the scores.

    Args:
        router: the layer's router.
        hidden_states: [batch, tokens, hidden_size], the normed input of what is gated.
        level: `sequence` (one decision for a row, from the mean of its real tokens) or `token`.
        threshold: an input is kept where its score is at least this.
        token_mask: bool [batch, tokens], or None for all tokens.

    Returns:
        scores and gates, float32, each [batch] for `sequence` and [batch, tokens] for `token`.
    """
    scores = torch.sigmoid(router(router_inputs(hidden_states, level, token_mask)))
    return scores, straight_through(scores, threshold)
