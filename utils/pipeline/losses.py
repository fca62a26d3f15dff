"""The task's loss, and the capacity of a batch with the loss that pushes it down to its target (Eq. 9-10).

The task's loss computes logits only where there are labels, some rows at a time, and takes its gradient with respect to
the hidden states on the way: no [tokens, vocabulary] is ever held or computed twice.

`L = L_task + lambda * L_MoD`, `L_MoD = ReLU(capacity - target)`. The published form takes the capacity of one layer in
one micro-batch (`layer`); with a micro-batch of one sequence that is 0 or 1 at sequence level, so every target below 1
gives the same gradient. With `global` the hinge acts on each sequence: its capacity is the share of its inputs, over
all routed layers, that are executed. That steers at any batch size, and the same sequences give the same loss however
they are cut into micro-batches, processes and accumulation steps. Other controls are in `capacity_control.py` and
`regression_control.py`.
"""

import torch

from utils.model.routing_mod import autocasts

ROWS_OF_LOGITS = 256
"""Rows of logits that are computed at once: enough for a fast product, 50 MB at SmolLM2's vocabulary in float32."""


def next_token_nll(states: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the negative log-likelihoods of `targets`, float32 [].

    As `cross_entropy(head(states).float(), targets, reduction="sum")`, in the memory of `ROWS_OF_LOGITS` rows. torch's
    own `linear_cross_entropy` (2.13) adds up in the dtype of the states.

    Args:
        states: [positions, hidden_size], the last hidden states that predict the targets.
        head: the language model's output embeddings, without bias; may be tied to the input's. Frozen, it costs no
            weight gradient.
        targets: int64 [positions]; -100 does not count.
    """
    weight, device = head.weight, states.device.type
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
    return _NextTokenNLL.apply(states, weight, targets)


class _NextTokenNLL(torch.autograd.Function):
    """Takes the gradient in the forward, while a chunk's logits are there; the backward only scales it."""

    @staticmethod
    def forward(ctx, states, weight, targets):
        wants_states, wants_weight, _ = ctx.needs_input_grad
        nll = torch.zeros((), dtype=torch.float32, device=states.device)
        states_grad = torch.empty_like(states) if wants_states else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, len(states), ROWS_OF_LOGITS):
            rows = slice(start, start + ROWS_OF_LOGITS)
            counted = targets[rows] != -100
            index = targets[rows].clamp(min=0).unsqueeze(-1)  # [rows, 1]
            logits = torch.nn.functional.linear(states[rows], weight).float()  # [rows, vocabulary]
            log_total = logits.logsumexp(dim=-1, keepdim=True)
            nll += torch.where(counted, (log_total - logits.gather(-1, index)).squeeze(-1), 0.0).sum()
            if not (wants_states or wants_weight):
                continue
            # softmax less one-hot, in place; an infinite total makes the row of what does not count zero
            counted = counted.unsqueeze(-1)
            gradient = logits.sub_(torch.where(counted, log_total, torch.inf)).exp_()
            gradient = gradient.scatter_add_(-1, index, -counted.to(gradient.dtype)).to(weight.dtype)
            if wants_states:
                torch.mm(gradient, weight, out=states_grad[rows])
            if wants_weight:
                weight_grad += gradient.T @ states[rows]
        ctx.save_for_backward(states_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return nll

    @staticmethod
    def backward(ctx, grad_output):
        return *(None if grad is None else grad * grad_output for grad in ctx.saved_tensors), None


def executed_inputs(gates: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Count what each sequence executes in each layer.

    Args:
        gates: float32 [routers, batch] (one decision for a sequence), [routers, batch, tokens] or, for a token's
            assignments to experts, [routers, batch, tokens, top_k]; each assignment is an input.
        attention_mask: [batch, tokens], 1 for real tokens, or None; padding is no input.

    Returns:
        Executed inputs, float32 [routers, batch], and inputs, float32 [batch]; both carry the gates' gradient.
    """
    if gates.dim() == 2:
        return gates, torch.ones_like(gates[0])
    each = 1.0
    if gates.dim() == 4:
        each, gates = float(gates.shape[-1]), gates.sum(dim=-1)
    if attention_mask is None:
        return gates.sum(dim=-1), torch.full_like(gates[0, :, 0], each * gates.shape[-1])
    mask = attention_mask.to(gates.dtype)
    return (gates * mask).sum(dim=-1), each * mask.sum(dim=-1)


def over_routers(executed: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of `executed` [routers, batch] over all routers, weighed by `weights` [routers] of sum 1."""
    return executed.mean(dim=0) if weights is None else weights.to(executed) @ executed


def capacity_hinge(
    executed: torch.Tensor,
    inputs: torch.Tensor,
    target_capacity: float,
    scope: str = "global",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each sequence's share of `L_MoD`, float32 [batch] (Eq. 10); their mean is `L_MoD`.

    Args:
        executed: float32 [routers, batch], as `executed_inputs` returns.
        inputs: float32 [batch].
        target_capacity: share of inputs in [0, 1] below which nothing is pushed further.
        scope: `global`: `ReLU(capacity - target)` of each sequence over all layers. `layer`, as published: of each
            layer over all inputs of the micro-batch, averaged over the layers; the same for each sequence.
        weights: float32 [routers], what inputs count in a capacity, sum 1; None for all alike. Not for `layer`, where
            each router has its own.
    """
    if scope == "layer":
        capacity = executed.sum(dim=1) / inputs.sum().clamp(min=1.0)  # [layers]
        return torch.relu(capacity - target_capacity).mean().expand(len(inputs))
    capacity = over_routers(executed, weights) / inputs.clamp(min=1.0)  # [batch]
    return torch.relu(capacity - target_capacity)
