"""A router and its substitute, and what it decides for a batch.

The semantics are those of the checkpoint's own `routing_mod.py` and `substitute_mod.py`.
"""

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from .batch import Batch, Choice, Routed
from .routing import Place


class Router(nn.Module):
    """A router's weight, float32 [1, hidden_size], whatever the model's dtype."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [inputs], for `inputs` [inputs, hidden_size]."""
        return nn.functional.linear(inputs.float(), self.weight).squeeze(-1)


class Substitute(nn.Module):
    """What a skipped branch returns, `S(x) = U D x + b`, in the model's dtype."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        for name, shape in {"down": (rank, hidden_size), "up": (hidden_size, rank), "bias": (hidden_size,)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """Return [inputs, hidden_size] for a branch's normed input, [inputs, hidden_size]."""
        return nn.functional.linear(nn.functional.linear(normed, self.down), self.up, self.bias)


class Gate:
    """One router at work. Not a module: its parts are modules of the layer, by their names in a checkpoint.

    Args:
        place: the router's.
        number: of the router, in the order of execution.
        router, substitute: the modules.
        routed: what all routed layers share.
    """

    def __init__(self, place: Place, number: int, router: Router, substitute: Substitute | None, routed: Routed):
        self.branch, self.number, self.routed = place.branch, number, routed
        self.router, self.substitute = router, substitute
        self.threshold = routed.thresholds[number]
        self.several_ranks = get_tensor_model_parallel_world_size() > 1

    def choose(self, normed: torch.Tensor, batch: Batch) -> Choice:
        """Decide for [tokens, hidden_size], the normed inputs of what is gated, and count."""
        if batch.decided is None:
            choice = Choice(self._decide(normed, batch, batch.request_of_token))
        elif batch.fresh:
            self._decide_for_prompts(normed, batch)
            choice = Choice(batch.decided[self.number][batch.request_of_token])
        else:
            kept = batch.decided[self.number][batch.request_of_token]
            choice = Choice(kept, batch.decided_on_host[self.number])
        masked = self.routed.execution == "masked" and choice.kept.device.type != "cpu"
        self.routed.count(self.number, batch.tokens, choice.kept.sum() if masked else choice.count)
        return choice

    def _decide(self, inputs: torch.Tensor, batch: Batch, requests: torch.Tensor) -> torch.Tensor:
        """Return bool [inputs] for [inputs, hidden_size]; `requests` is whose they are, int64 [inputs]."""
        logits = self.router(inputs)
        threshold = self.threshold if batch.thresholds is None else batch.thresholds[self.number][requests]
        kept = torch.sigmoid(logits) >= threshold
        if self.several_ranks:
            # each rank rounds the sums of its own hidden states: one decides for all
            kept = get_tp_group().broadcast(kept.to(torch.uint8), src=0).bool()
        if self.routed.recorder is not None:
            self.routed.recorder(self.number, batch, logits, kept)
        return kept

    def _decide_for_prompts(self, normed: torch.Tensor, batch: Batch) -> None:
        """Decide for the requests that start in this step, on the mean over their prompts, and remember it."""
        means = torch.stack(
            [
                normed[batch.starts[row] : batch.starts[row] + prompt].float().mean(dim=0)
                for row, prompt in batch.fresh.items()
            ]
        )
        requests = torch.tensor(list(batch.fresh), device=normed.device)
        kept = self._decide(means, batch, requests)
        batch.decided[self.number, requests] = kept
        batch.remember(self.number, requests, kept)

    def merge(self, choice: Choice, branch: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Return `M F(x) + (1 - M) S(x)`, [tokens, hidden_size], from `F(x)` of all tokens."""
        other = 0.0 if self.substitute is None else self.substitute(normed)
        return torch.where(choice.kept.unsqueeze(-1), branch, other)

    def place(self, choice: Choice, branch: torch.Tensor | None, normed: torch.Tensor) -> torch.Tensor:
        """Return the same from `F(x)` of the kept tokens only, [kept, hidden_size]; None where there are none."""
        result = torch.empty_like(normed) if self.substitute is not None else torch.zeros_like(normed)
        if branch is not None:
            result.index_copy_(0, choice.tokens, branch)
        if self.substitute is not None:
            result.index_copy_(0, choice.skipped, self.substitute(normed[choice.skipped]))
        return result
