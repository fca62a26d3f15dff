"""How a routed layer is computed: the dense masked form, which is the specification, and the sparse form.

Training runs the dense form: `y = x + M * F(x)` (Eq. 3), so that a dropped input still tells its router what keeping
it would have done. Inference runs the sparse form, which never computes what is dropped (Eq. 5) and gives the same
numbers, with and without a KV cache. Sparse execution gives the router no gradient from the task. Where everything or
nothing is kept, nothing is gathered. This file travels inside every checkpoint.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from .decode_mod import branch_in_a_graph, masked_forward
from .projections_mod import cache_no_rows
from .routing_mod import Decision, Routing, decide, router_inputs
from .token_attention_mod import attend_kept_tokens


def dense_forward(
    layer: torch.nn.Module, hidden_states: torch.Tensor, routing: Routing, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute everything and multiply by the mask (Eq. 3): `h + M F(x) + (1 - M) S(x)`.

    Args:
        layer: a decoder layer with `MoDDecoderLayerMixin`.
        hidden_states: [batch, tokens, hidden_size].
        routing: this forward's routing; the layer's decisions are recorded in it.
        attention_kwargs: what the attention takes besides its hidden states.

    Returns:
        [batch, tokens, hidden_size], in the dtype of `hidden_states`.
    """
    branches, cache = layer.mod_settings.branches, attention_kwargs["past_key_values"]
    if routing.gate_rule is None and not torch.is_grad_enabled():
        return masked_forward(layer, hidden_states, partial(_gate, layer, routing, cache), attention_kwargs)

    def gated(branch: str, normed: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return `M F(x) + (1 - M) S(x)`, `F` being `run`; `F(x)` where the branch has no router."""
        if branch not in branches:
            return run(normed)
        gate, substitute = _gate(layer, routing, cache, branch, normed), layer.substitute_of(branch)
        output = gate * run(normed)
        return output if substitute is None else output + (1 - gate) * substitute(normed)

    residual, normed = hidden_states, layer.input_layernorm(hidden_states)
    if "block" in branches:
        gate, substitute = _gate(layer, routing, cache, "block", normed), layer.substitute_of("block")
        skipped = residual if substitute is None else residual + substitute(normed)
    hidden_states = residual + gated("attn", normed, lambda normed: _attend(layer, normed, attention_kwargs))
    hidden_states = hidden_states + gated("mlp", layer.post_attention_layernorm(hidden_states), layer.mlp)
    if "block" in branches:
        # equals residual + gate * (hidden_states - residual), and is exact for a gate of 1 as well as of 0
        hidden_states = gate * hidden_states + (1 - gate) * skipped
    return hidden_states


def sparse_forward(
    layer: torch.nn.Module, hidden_states: torch.Tensor, routing: Routing, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute kept inputs only (Eq. 5); same arguments and, up to rounding, same result as `dense_forward`.

    Finding what a router keeps moves one small mask to the host, at sequence level only where the cache has no decision
    yet.
    """
    branches = layer.mod_settings.branches
    run = _sparse_sequences if layer.mod_settings.level == "sequence" else _sparse_tokens
    if "block" in branches:
        return run(layer, "block", hidden_states, routing, attention_kwargs)
    if "attn" in branches:
        hidden_states = run(layer, "attn", hidden_states, routing, attention_kwargs)
    else:
        hidden_states = hidden_states + _attend(layer, layer.input_layernorm(hidden_states), attention_kwargs)
    if "mlp" in branches:
        return run(layer, "mlp", hidden_states, routing, attention_kwargs)
    return _add_mlp(layer, hidden_states)


def _sparse_sequences(
    layer: torch.nn.Module, branch: str, hidden_states: torch.Tensor, routing: Routing, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    cache, substitute, norm = attention_kwargs["past_key_values"], layer.substitute_of(branch), _norm(layer, branch)
    decision, normed = _recall(layer, branch, routing, cache), None
    if decision is not None and hidden_states.shape[0] == 1 and torch.compiler.is_compiling():
        return branch_in_a_graph(layer, branch, hidden_states, decision, attention_kwargs)
    if decision is None:
        normed = norm(hidden_states)
        decision = _decide(layer, branch, normed, routing, cache)
    rows = decision.kept
    if rows is None:
        normed = norm(hidden_states) if normed is None else normed
        return _whole_branch(layer, branch, hidden_states, normed, attention_kwargs)
    if len(rows) == 0:
        if branch != "mlp" and cache is not None:
            cache_no_rows(layer.self_attn, hidden_states, cache)
        if substitute is not None:
            hidden_states = hidden_states + substitute(norm(hidden_states) if normed is None else normed)
        return hidden_states

    if substitute is not None:
        if normed is None:
            normed = norm(hidden_states)
        substituted = decision.skipped, substitute(normed[decision.skipped])
    else:
        substituted = None
    picked = hidden_states[rows] if normed is None or branch == "block" else None
    normed = norm(picked) if normed is None else normed[rows]  # [kept, tokens, hidden_size]
    if branch == "mlp":
        return _add_at(hidden_states, (rows, layer.mlp(normed)), substituted)
    attention = _attend(layer, normed, select_rows(attention_kwargs, rows, batch=hidden_states.shape[0]))
    if branch == "attn":
        return _add_at(hidden_states, (rows, attention), substituted)
    kept = _add_mlp(layer, picked + attention)
    return _put_at(hidden_states, (rows, kept), substituted)


def _sparse_tokens(
    layer: torch.nn.Module, branch: str, hidden_states: torch.Tensor, routing: Routing, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    normed, substitute = _norm(layer, branch)(hidden_states), layer.substitute_of(branch)
    decision = _decide(layer, branch, normed, routing, cache=None)
    kept = decision.kept
    if kept is None:
        return _whole_branch(layer, branch, hidden_states, normed, attention_kwargs)

    flat, substituted = hidden_states.flatten(0, 1), None  # [batch * tokens, hidden_size]
    if substitute is not None:
        skipped = decision.skipped
        substituted = skipped, substitute(normed.flatten(0, 1).index_select(0, skipped))
    if branch == "mlp":
        outputs = _mlp(layer, normed.flatten(0, 1).index_select(0, kept)) if len(kept) > 0 else None
        return _add_at(flat, (kept, outputs), substituted).view_as(hidden_states)
    attention = attend_kept_tokens(layer.self_attn, normed, decision, attention_kwargs)  # [kept, hidden_size]
    if branch == "attn":
        return _add_at(flat, (kept, attention), substituted).view_as(hidden_states)
    if attention is not None:
        attention = _add_mlp(layer, flat.index_select(0, kept) + attention)
    return _put_at(flat, (kept, attention), substituted).view_as(hidden_states)


def select_rows(attention_kwargs: dict[str, Any], rows: torch.Tensor, batch: int) -> dict[str, Any]:
    """Return the attention's keywords for the sequences `rows` (int64 [kept]) of a batch.

    Tensors whose first dimension is 1 hold for every row and stay as they are.

    Raises:
        ValueError: the mask is of a kind that can't be taken apart by rows.
    """
    mask = attention_kwargs["attention_mask"]
    if mask is not None and not isinstance(mask, torch.Tensor | BlockMask):
        raise ValueError(f"sparse execution can't select rows of a {type(mask).__name__}: use another attention")

    def pick(tensor: Any) -> Any:
        if tensor is None or tensor.shape[0] != batch:
            return tensor
        selected = tensor[rows]
        if isinstance(tensor, BlockMask):
            selected.mask_mod = _of_rows(tensor.mask_mod, rows)  # torch 2.13 drops it when it takes rows
        return selected

    rotary = attention_kwargs["position_embeddings"]  # latent attention has one tensor, others a pair
    return {
        **attention_kwargs,
        "attention_mask": pick(mask),
        "position_ids": pick(attention_kwargs["position_ids"]),
        "position_embeddings": tuple(map(pick, rotary)) if isinstance(rotary, tuple) else pick(rotary),
    }


def _of_rows(mask_mod: Callable, rows: torch.Tensor) -> Callable:
    def rows_mask_mod(batch, head, query, key):
        return mask_mod(rows[batch], head, query, key)

    return rows_mask_mod


def _recall(layer: torch.nn.Module, branch: str, routing: Routing, cache: Any) -> Decision | None:
    """Return and record the decision that prefill took, None where this call is the prefill."""
    if cache is None or layer.mod_settings.level == "token":
        return None
    decision = cache.layers[layer.layer_idx].decisions.get(branch)
    if decision is not None:
        routing.decisions[layer.place_of(branch)] = decision
    return decision


def _decide(layer: torch.nn.Module, branch: str, normed: torch.Tensor, routing: Routing, cache: Any) -> Decision:
    """Decide on the normed input [batch, tokens, hidden_size], record it and let the cache hold it."""
    settings, place = layer.mod_settings, layer.place_of(branch)
    if routing.gate_rule is None:
        router, room = layer.router_of(branch), routing.room
        if room is not None and room.gates.device == normed.device:
            decision = room.decide(place, router, normed)
        else:
            threshold = settings.threshold_of(place)
            decision = Decision(*decide(router, normed, settings.level, threshold, routing.token_mask))
    else:
        inputs = router_inputs(normed, settings.level, routing.token_mask)
        decision = routing.gate_rule(place, inputs)
    routing.decisions[place] = decision
    if cache is not None and settings.level == "sequence":
        cache.layers[layer.layer_idx].hold(branch, decision, packs=routing.sparse and branch != "mlp")
    return decision


def _gate(layer: torch.nn.Module, routing: Routing, cache: Any, branch: str, normed: torch.Tensor) -> torch.Tensor:
    """Return the gates, [batch, 1 or tokens, 1], in the dtype of the hidden states."""
    decision = _recall(layer, branch, routing, cache) or _decide(layer, branch, normed, routing, cache)
    return decision.gates.reshape(normed.shape[0], -1, 1).to(normed.dtype)


def _norm(layer: torch.nn.Module, branch: str) -> torch.nn.Module:
    return layer.post_attention_layernorm if branch == "mlp" else layer.input_layernorm


def _attend(layer: torch.nn.Module, normed: torch.Tensor, attention_kwargs: dict[str, Any]) -> torch.Tensor:
    return layer.self_attn(hidden_states=normed, **attention_kwargs)[0]


def _add_mlp(layer: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states + _mlp(layer, layer.post_attention_layernorm(hidden_states))


def _mlp(layer: torch.nn.Module, normed: torch.Tensor) -> torch.Tensor:
    """Run the MLP on [batch, tokens, hidden_size] or [tokens, hidden_size]; one with experts takes only the former."""
    return layer.mlp(normed) if normed.dim() == 3 else layer.mlp(normed.unsqueeze(0)).squeeze(0)


def _whole_branch(
    layer: torch.nn.Module,
    branch: str,
    hidden_states: torch.Tensor,
    normed: torch.Tensor,
    attention_kwargs: dict[str, Any],
) -> torch.Tensor:
    """Run the branch on its normed input as if it weren't gated, and add it."""
    if branch == "mlp":
        return hidden_states + layer.mlp(normed)
    hidden_states = hidden_states + _attend(layer, normed, attention_kwargs)
    return _add_mlp(layer, hidden_states) if branch == "block" else hidden_states


Placed = tuple[torch.Tensor, torch.Tensor | None]
"""Indices into a first dimension, and what belongs there; None where there are no indices."""


def _add_at(hidden_states: torch.Tensor, kept: Placed, substituted: Placed | None) -> torch.Tensor:
    """Add to kept inputs what their branch returned, and to the others what their substitute did."""
    index, branch = kept
    if branch is not None:
        # under autocast the branch has a lower precision than the residual stream
        hidden_states = hidden_states.index_add(0, index, branch.to(hidden_states.dtype))
    if substituted is not None:
        index, branch = substituted
        hidden_states = hidden_states.index_add(0, index, branch.to(hidden_states.dtype))
    return hidden_states


def _put_at(hidden_states: torch.Tensor, kept: Placed, substituted: Placed | None) -> torch.Tensor:
    """Replace kept inputs by what the block made of them, and add to the others what their substitute returned."""
    index, output = kept
    if output is not None:
        hidden_states = hidden_states.index_copy(0, index, output.to(hidden_states.dtype))
    return _add_at(hidden_states, (index, None), substituted)
