"""The decode step that one graph can hold, and the choice between it and the compact path.

Leaving out what is skipped needs shapes that depend on the decisions, so the host has to know them: at prefill and on a
CPU that is worth it. A decode step on a GPU is short, and waiting for the device costs more than it saves; and a graph
is of one shape. There every branch runs and the gate chooses (`masked_forward`), for all decisions alike. One sequence
in a row is the exception: its decisions are known since prefill, so what is skipped is not launched, and in a graph
stands under `torch.cond` whose predicate lies on the host. This file travels inside every checkpoint.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.utils import logging

from .cache_mod import holds_decisions, is_static
from .configuration_mod import MoDSettings
from .projections_mod import cache_no_rows
from .routing_mod import Decision

logger = logging.get_logger(__name__)


def choose_execution(settings: MoDSettings, inputs: torch.Tensor, cache: Any, training: bool) -> str:
    """Choose how a forward is executed where the caller doesn't say.

    Args:
        settings: of the routed model.
        inputs: the new tokens or their embeddings, [batch, tokens, ...].
        cache: the KV cache, or None.
        training: whether the model is in training mode.

    Returns:
        `dense` or `sparse`:
        - `dense` in training;
        - what a growing cache was filled by, where that decides what it stores;
        - `sparse` for one sequence whose decision a static cache holds;
        - `dense` under `torch.compile`;
        - `dense` for a decode step by token, or by sequence with a static cache, unless it is on a CPU;
        - `sparse` otherwise: prefill, and all else on a CPU.
    """
    if training:
        return "dense"
    compiling, static, by_token = torch.compiler.is_compiling(), is_static(cache), settings.level == "token"
    decided = not by_token and cache is not None and holds_decisions(cache, settings)
    if decided and not static and settings.branches != ("mlp",):
        return "dense" if cache.layers[settings.layers[0]].packed_by is None else "sparse"
    if decided and static and inputs.shape[0] == 1 and not (compiling and _has_windows(cache, settings)):
        return "sparse"
    if compiling:
        return "dense"
    steps = "dense" if (by_token or static) and inputs.device.type != "cpu" else "sparse"
    if inputs.shape[1] == 1:
        return steps
    if static and inputs.shape[0] == 1 and not by_token:
        steps = "sparse"
    logger.info_once(f"execution on {inputs.device.type}: sparse; {steps} for steps of one token")
    return "sparse"


def _has_windows(cache: Any, settings: MoDSettings) -> bool:
    # transformers 5.23 counts their tokens by an int on the layer, which a branch of `torch.cond` may not change
    return any(cache.layers[index].is_sliding for index in settings.layers)


def masked_forward(
    layer: torch.nn.Module,
    hidden_states: torch.Tensor,
    gate: Callable[[str, torch.Tensor], torch.Tensor],
    attention_kwargs: dict[str, Any],
) -> torch.Tensor:
    """Compute what `dense_forward` does, for gates of exactly 0 or 1 and without gradient, in fewer passes.

    Args:
        layer: a decoder layer with `MoDDecoderLayerMixin`.
        hidden_states: [batch, tokens, hidden_size].
        gate: (branch, its normed input) -> gates, [batch, 1 or tokens, 1] in its dtype.
        attention_kwargs: what the attention takes besides its hidden states.

    Returns:
        [batch, tokens, hidden_size], in the dtype of `hidden_states`.
    """
    settings, branches = layer.mod_settings, layer.mod_settings.branches
    normed = layer.input_layernorm(hidden_states)
    if branches == ("mlp",):
        hidden_states = hidden_states + layer.self_attn(hidden_states=normed, **attention_kwargs)[0]
    else:
        gates = gate(branches[0], normed)
        if settings.level == "sequence":
            attention_kwargs = attend_to_nothing(attention_kwargs, gates)
        attention = layer.self_attn(hidden_states=normed, **attention_kwargs)[0]
        hidden_states = _add_gated(hidden_states, gates, attention, normed, layer.substitute_of(branches[0]))

    normed = layer.post_attention_layernorm(hidden_states)
    if "mlp" in branches:
        gates, mlp = gate("mlp", normed), layer.mlp(normed)
        return _add_gated(hidden_states, gates, mlp, normed, layer.substitute_of("mlp"))
    if branches == ("attn",):
        return hidden_states + layer.mlp(normed)
    # what stands in for a block has been added above, for attention and MLP together
    return torch.addcmul(hidden_states, gates, layer.mlp(normed))


def _add_gated(
    hidden_states: torch.Tensor,
    gates: torch.Tensor,
    branch: torch.Tensor,
    normed: torch.Tensor,
    substitute: torch.nn.Module | None,
) -> torch.Tensor:
    """Return `h + M F(x) + (1 - M) S(x)`."""
    if substitute is None:
        return torch.addcmul(hidden_states, gates, branch)
    # at weights of 0 and 1 `lerp` returns one of the two as it is
    return hidden_states + torch.lerp(substitute(normed), branch.to(normed.dtype), gates)


def attend_to_nothing(attention_kwargs: dict[str, Any], gates: torch.Tensor) -> dict[str, Any]:
    """Leave sequences that skip no keys to look at, for kernels that take lengths and so read none.

    Args:
        attention_kwargs: of the attention; `attention_mask` as its kernel takes it.
        gates: [batch, 1, 1], 0 or 1.

    Returns:
        The keywords, with a mask that has no blocks of keys for these sequences (flex), or one key (FlashAttention, by
        its 2D mask: it takes an empty tensor amiss). Other kernels read all keys anyway, and get their mask as it is.
    """
    mask = attention_kwargs["attention_mask"]
    if isinstance(mask, BlockMask):
        kept = gates.to(mask.kv_num_blocks.dtype)  # [batch, 1, 1], over heads and blocks of queries
        blocks = {name: getattr(mask, name) for name in ("kv_num_blocks", "full_kv_num_blocks")}
        shorter = {name: None if number is None else number * kept for name, number in blocks.items()}
        mask = BlockMask.from_kv_blocks(
            shorter["kv_num_blocks"],
            mask.kv_indices.expand(*shorter["kv_num_blocks"].shape, -1),
            shorter["full_kv_num_blocks"],
            mask.full_kv_indices.expand(*shorter["full_kv_num_blocks"].shape, -1),
            BLOCK_SIZE=mask.BLOCK_SIZE,
            mask_mod=mask.mask_mod,
            seq_lengths=mask.seq_lengths,
            compute_q_blocks=False,
        )
    elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
        last = torch.arange(mask.shape[1], device=mask.device) == mask.shape[1] - 1
        mask = mask * ((gates[:, 0] > 0) | last).to(mask.dtype)
    else:
        return attention_kwargs
    return {**attention_kwargs, "attention_mask": mask}


def branch_in_a_graph(
    layer: torch.nn.Module, branch: str, hidden_states: torch.Tensor, decision: Decision, attention_kwargs: dict
) -> torch.Tensor:
    """Run a branch whose decision for the one sequence is known, in a graph that holds both cases.

    Args:
        layer: a decoder layer with `MoDDecoderLayerMixin`.
        branch: which of the settings' `branches`.
        hidden_states: [1, tokens, hidden_size].
        decision: of prefill.
        attention_kwargs: what the attention takes besides its hidden states.

    Returns:
        [1, tokens, hidden_size], with what the branch or its substitute adds.
    """
    substitute = layer.substitute_of(branch)

    def execute(hidden_states: torch.Tensor) -> torch.Tensor:
        if branch != "mlp":
            normed = layer.input_layernorm(hidden_states)
            hidden_states = hidden_states + layer.self_attn(hidden_states=normed, **attention_kwargs)[0]
        if branch == "attn":
            return hidden_states
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))

    def skip(hidden_states: torch.Tensor) -> torch.Tensor:
        if branch != "mlp":
            cache_no_rows(layer.self_attn, hidden_states, attention_kwargs["past_key_values"])
        if substitute is None:
            return hidden_states.clone()
        norm = layer.post_attention_layernorm if branch == "mlp" else layer.input_layernorm
        return hidden_states + substitute(norm(hidden_states))

    return torch.cond(decision.executes, execute, skip, (hidden_states,))
