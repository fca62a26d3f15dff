"""The capacity of a batch and the loss that pushes it down to its target (Eq. 9-10).

`L = L_task + lambda * L_MoD`, `L_MoD = ReLU(capacity - target)`. The published form takes the capacity of one layer in
one micro-batch; with a micro-batch of one sequence that is 0 or 1, so every target below 1 gives the same gradient.
Here the hinge acts on each sequence: its capacity is the share of its inputs, over all routed layers, that are
executed. That steers at any batch size, and the same sequences give the same loss however they are cut into
micro-batches, processes and accumulation steps.
"""

import torch


def executed_inputs(gates: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Count what each sequence executes in each layer.

    Args:
        gates: float32 [layers, batch] (one decision for a sequence), [layers, batch, tokens] or, for a token's
            assignments to experts, [layers, batch, tokens, top_k]; each assignment is an input.
        attention_mask: [batch, tokens], 1 for real tokens, or None; padding is no input.

    Returns:
        Executed inputs, float32 [layers, batch], and inputs, float32 [batch]; both carry the gates' gradient.
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


def capacity_hinge(executed: torch.Tensor, inputs: torch.Tensor, target_capacity: float) -> torch.Tensor:
    """Return each sequence's `ReLU(capacity - target)`, float32 [batch] (Eq. 10).

    Args:
        executed: float32 [layers, batch], as `executed_inputs` returns.
        inputs: float32 [batch].
        target_capacity: share of inputs in [0, 1] below which nothing is pushed further.
    """
    capacity = executed.mean(dim=0) / inputs.clamp(min=1.0)  # [batch]
    return torch.relu(capacity - target_capacity)
