"""How a routed layer is computed: the dense masked form, which is the specification, and the sparse form.

Training runs the dense form: `y = x + M * F(x)` (Eq. 3), so that a dropped input still tells its router what keeping
it would have done. Inference runs the sparse form, which never computes what is dropped (Eq. 5) and gives the same
numbers. Here the sparse form covers decisions for whole sequences without a KV cache; token level and the cache build
on it. This file travels inside every checkpoint.
"""

from typing import Any

import torch

from .configuration_mod import MoDSettings
from .routing_mod import Routing

SPARSE_GRANULARITIES = ("attn_sequence", "mlp_sequence", "block_sequence")
"""Granularities for which `sparse_forward` exists; the others run dense."""


def dense_forward(
    layer: torch.nn.Module, hidden_states: torch.Tensor, routing: Routing, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute everything and multiply by the mask (Eq. 3).

    Args:
        layer: a decoder layer with `MoDDecoderLayerMixin`.
        hidden_states: [batch, tokens, hidden_size].
        routing: this forward's routing; the layer's scores and gates are recorded in it.
        attention_kwargs: what the attention takes besides its hidden states.

    Returns:
        [batch, tokens, hidden_size], in the dtype of `hidden_states`.
    """
    target = layer.mod_settings.target
    residual = hidden_states
    normed = layer.input_layernorm(hidden_states)
    if target != "mlp":
        gate = _broadcast(layer.route(normed, routing), hidden_states)
    attention, _ = layer.self_attn(hidden_states=normed, **attention_kwargs)
    hidden_states = residual + (gate * attention if target == "attn" else attention)

    normed = layer.post_attention_layernorm(hidden_states)
    if target == "mlp":
        gate = _broadcast(layer.route(normed, routing), hidden_states)
    mlp = layer.mlp(normed)
    hidden_states = hidden_states + (gate * mlp if target == "mlp" else mlp)
    if target == "block":
        # equals residual + gate * (hidden_states - residual), and is exact for a gate of 1 as well as of 0
        hidden_states = gate * hidden_states + (1 - gate) * residual
    return hidden_states


def sparse_forward(
    layer: torch.nn.Module, hidden_states: torch.Tensor, routing: Routing, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute the kept sequences only (Eq. 5); same arguments and, up to rounding, same result as `dense_forward`.

    The rows are gathered only where some are kept and some are not. Finding them moves one small mask to the host.
    """
    target = layer.mod_settings.target
    if target == "mlp":
        attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + attention
        normed = layer.post_attention_layernorm(hidden_states)
        rows = _kept_rows(layer.route(normed, routing))
        if rows is None:
            return hidden_states + layer.mlp(normed)
        return _add_rows(hidden_states, rows, lambda: layer.mlp(normed[rows]))

    normed = layer.input_layernorm(hidden_states)
    rows = _kept_rows(layer.route(normed, routing))
    if rows is None:
        attention, _ = layer.self_attn(hidden_states=normed, **attention_kwargs)
        hidden_states = hidden_states + attention
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))

    row_kwargs = select_rows(attention_kwargs, rows, batch=hidden_states.shape[0])
    if target == "attn":
        hidden_states = _add_rows(
            hidden_states, rows, lambda: layer.self_attn(hidden_states=normed[rows], **row_kwargs)[0]
        )
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))

    if len(rows) == 0:
        return hidden_states
    kept = hidden_states[rows] + layer.self_attn(hidden_states=normed[rows], **row_kwargs)[0]
    kept = kept + layer.mlp(layer.post_attention_layernorm(kept))
    return hidden_states.index_copy(0, rows, kept.to(hidden_states.dtype))


def select_rows(attention_kwargs: dict[str, Any], rows: torch.Tensor, batch: int) -> dict[str, Any]:
    """Return the attention's keywords for the sequences `rows` (int64 [kept]) of a batch.

    Tensors whose first dimension is 1 hold for every row and stay as they are.

    Raises:
        ValueError: the mask is of a kind that can't be taken apart by rows (a flex-attention block mask).
    """

    def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor[rows] if tensor is not None and batch > 1 and tensor.shape[0] == batch else tensor

    mask = attention_kwargs["attention_mask"]
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(f"sparse execution can't select rows of a {type(mask).__name__}; load with another attention")
    return {
        **attention_kwargs,
        "attention_mask": pick(mask),
        "position_ids": pick(attention_kwargs["position_ids"]),
        "position_embeddings": tuple(pick(tensor) for tensor in attention_kwargs["position_embeddings"]),
    }


def default_execution(settings: MoDSettings, training: bool) -> str:
    """Return `dense` in training and where there is no sparse form, `sparse` otherwise."""
    return "sparse" if not training and settings.granularity in SPARSE_GRANULARITIES else "dense"


def _broadcast(gates: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """[batch] or [batch, tokens] float32 -> [batch, 1 or tokens, 1] in the dtype of the hidden states."""
    return gates.reshape(gates.shape[0], -1, 1).to(hidden_states.dtype)


def _kept_rows(gates: torch.Tensor) -> torch.Tensor | None:
    """Return the indices of the kept sequences, int64 [kept], or None where all are kept."""
    rows = gates.nonzero().squeeze(-1)
    return None if len(rows) == len(gates) else rows


def _add_rows(hidden_states: torch.Tensor, rows: torch.Tensor, branch) -> torch.Tensor:
    """Add the branch's output, [kept, tokens, hidden_size], to the sequences `rows`; no call where there are none."""
    if len(rows) == 0:
        return hidden_states
    return hidden_states.index_add(0, rows, branch().to(hidden_states.dtype))
