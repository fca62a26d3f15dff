"""Experts that skip: a router with one row for each expert decides about each assignment of a token (Section 3.3).

The model's own gate chooses the experts of a token and weighs them, `y = sum_i G(x)_i * E_i(x) * 1[R_i(x) >= tau]`
over its top-k (Eq. 6-8). Gate and weights are left as they are: what is rejected is not made up for, unless by a
substitute, one for all experts of a layer, which takes the weight of those that a token was refused. Shared experts
always run. The dense form multiplies the weights by the mask, which is the specification; the sparse form computes
executed assignments only. On a CPU it runs expert after expert on its tokens, and leaves the weights of an expert that
has none unread. Elsewhere, and with another implementation of the experts than transformers' default, it hands the
executed assignments to transformers' experts, as tokens with one expert each, so that any implementation computes those
and nothing else. This file travels inside every checkpoint.
"""

from typing import Any

import torch
from torch import nn

from .routing_mod import Decision, Routing, straight_through


def expert_forward(
    layer: nn.Module, hidden_states: torch.Tensor, routing: Routing, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run a decoder layer whose assignments to experts are routed, dense or sparse.

    Args:
        layer: a decoder layer with `MoDDecoderLayerMixin`, whose `mlp` has experts.
        hidden_states: [batch, tokens, hidden_size].
        routing: this forward's routing; the layer's decisions are recorded in it.
        attention_kwargs: what the attention takes besides its hidden states.

    Returns:
        [batch, tokens, hidden_size], in the dtype of `hidden_states`.
    """
    attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **attention_kwargs)
    hidden_states = hidden_states + attention
    normed = layer.post_attention_layernorm(hidden_states)

    block, tokens = layer.mlp, normed.reshape(-1, normed.shape[-1])  # [batch * tokens, hidden_size]
    _, weights, experts = block.gate(tokens)  # each of the last two [batch * tokens, top_k]
    experts_of_tokens = experts.view(*normed.shape[:-1], -1)
    if routing.gate_rule is None:
        decision = decide_assignments(layer, normed, experts_of_tokens)
    else:
        decision = routing.gate_rule(layer.layer_idx, normed, experts_of_tokens)
    routing.decisions[layer.layer_idx] = decision
    if routing.sparse:
        output = run_kept(block.experts, tokens, experts, weights, decision.kept)
    else:
        output = block.experts(tokens, experts, weights * decision.gates.view_as(weights).to(weights.dtype))
    if layer.substitute is not None and not (routing.sparse and decision.kept is None):
        skipped = (weights * (1 - decision.gates.view_as(weights).to(weights.dtype))).sum(dim=-1, keepdim=True)
        output = output + (skipped * layer.substitute(tokens)).to(output.dtype)
    return hidden_states + add_shared_experts(block, tokens, output).view_as(normed)


def decide_assignments(layer: nn.Module, normed: torch.Tensor, experts: torch.Tensor) -> Decision:
    """Decide which assignments are executed: those to experts whose score is at least the threshold.

    Args:
        layer: has `router` and `mod_settings`.
        normed: [batch, tokens, hidden_size], the input of the experts.
        experts: int64 [batch, tokens, top_k], of each token.

    Returns:
        Scores and gates [batch, tokens, top_k].
    """
    scores = torch.sigmoid(layer.router(normed)).gather(-1, experts)
    threshold = layer.mod_settings.threshold_of(layer.layer_idx)
    if isinstance(threshold, tuple):
        threshold = torch.tensor(threshold).to(scores.device, non_blocking=True)[experts]
    return Decision(scores, straight_through(scores, threshold), experts)


def run_kept(
    run_experts: nn.Module,
    tokens: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the executed assignments only.

    Args:
        run_experts: transformers' experts, of any implementation.
        tokens: [tokens, hidden_size].
        experts: int64 [tokens, top_k].
        weights: [tokens, top_k], of the gate.
        kept: int64 [kept] ascending, indices into the flattened assignments; None for all of them.

    Returns:
        [tokens, hidden_size], zero for a token without an executed assignment.
    """
    if kept is None:
        return run_experts(tokens, experts, weights)
    if len(kept) == 0:
        return torch.zeros_like(tokens)
    on_cpu = tokens.is_cpu and run_experts.gate_up_proj.is_cpu  # and not on a disk
    if on_cpu and run_experts.config._experts_implementation == "grouped_mm":
        return _one_by_one(run_experts, tokens, experts, weights, kept)
    top_k = experts.shape[1]
    # weighed afterwards: a gate's weights may be of a higher precision than the experts' outputs
    unweighed = torch.ones(len(kept), 1, dtype=tokens.dtype, device=tokens.device)
    outputs = run_experts(tokens[kept // top_k], experts.flatten()[kept, None], unweighed)
    outputs = outputs * weights.flatten()[kept, None]
    # each assignment has a place of its own: the sum over a token's experts is the same in every run, on a GPU as well
    places = outputs.new_zeros(experts.numel(), tokens.shape[1]).index_copy(0, kept, outputs)
    return places.view(-1, top_k, tokens.shape[1]).sum(dim=1).to(tokens.dtype)


def _one_by_one(
    run_experts: nn.Module, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Run expert after expert; on a CPU a grouped product is no faster, and needs more around it."""
    chosen, order = experts.flatten()[kept].sort(stable=True)
    places = kept[order]
    ends = chosen.bincount(minlength=run_experts.num_experts).cumsum(dim=0)
    rows, outputs = places // experts.shape[1], []
    for expert, of_expert in enumerate(rows.tensor_split(ends[:-1])):
        if len(of_expert) > 0:
            inputs = tokens.index_select(0, of_expert)
            gate, up = nn.functional.linear(inputs, run_experts.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(nn.functional.linear(run_experts.act_fn(gate) * up, run_experts.down_proj[expert]))
    weighed = torch.cat(outputs) * weights.flatten()[places, None]  # in the higher precision of the two
    return weighed.new_zeros(tokens.shape).index_add(0, rows, weighed).to(tokens.dtype)


def add_shared_experts(block: nn.Module, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Add what the experts that every token has make of `tokens` [tokens, hidden_size], in blocks that have some."""
    if hasattr(block, "shared_experts"):  # DeepSeek-V2
        return output + block.shared_experts(tokens)
    if hasattr(block, "shared_expert"):  # Qwen2-MoE
        return output + torch.sigmoid(block.shared_expert_gate(tokens)) * block.shared_expert(tokens)
    return output
