"""Attention for some requests of a batch, or from some of its tokens.

An attention backend's metadata says which tokens are whose. Where it is known how to take it apart, nothing of what is
left out is computed; `takes_apart` says where.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from .batch import Batch, Choice

_COMMON = {
    *("num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len"),
    *("seq_lens", "block_table", "slot_mapping", "causal"),
}
_REBUILT = {
    "CPU_ATTN": {"scheduler_metadata"},
    "FLASH_ATTN": {"scheduler_metadata", "max_num_splits"},
}
"""Backend -> fields of its metadata that are made anew for a part. All others but the common ones have to be unset."""

VERIFIED = {"CPU_ATTN"}
"""Backends that the tests run against. Parts of another's metadata are compared with the whole before they are used."""


def takes_apart(attention: Attention) -> bool:
    """Tell whether parts of this step's metadata can be made for a layer's attention."""
    name = attention.attn_backend.get_name()
    metadata = get_forward_context().attn_metadata[attention.layer_name]
    if name not in _REBUILT or attention.query_quant is not None or metadata.causal is not True:
        return False
    known = _COMMON | _REBUILT[name]
    return all(each.name in known or _is_unset(getattr(metadata, each.name)) for each in fields(metadata))


def _is_unset(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value == 0)


def part_of_metadata(attention: Attention, batch: Batch, choice: Choice) -> Any:
    """Return the metadata of the kept tokens of a batch, as if there were no others.

    A causal kernel takes a request's queries to be its last tokens, without gaps: each run of kept tokens becomes a
    request of its own, with the keys and values up to its last token. Where whole requests are kept, they are the runs.

    Args:
        attention: the layer's.
        choice: with at least one token kept.
    """
    metadata = get_forward_context().attn_metadata[attention.layer_name]
    device = metadata.query_start_loc.device
    tokens = np.flatnonzero(choice.host)
    requests = batch.request_of_token_on_host[tokens]
    begins = np.flatnonzero(np.append(True, (np.diff(tokens) != 1) | (np.diff(requests) != 0)))
    starts = np.append(begins, len(tokens)).astype(np.int32)
    lasts, rows = tokens[starts[1:] - 1], requests[begins]
    after = batch.starts[rows + 1] - 1 - lasts  # tokens of the request that come later
    rows = torch.from_numpy(rows).to(device, non_blocking=True)
    seq_lens = metadata.seq_lens[rows]
    seq_lens = seq_lens - torch.from_numpy(after.astype(np.int32)).to(device, non_blocking=True)
    query_start_loc = torch.from_numpy(starts).to(device, non_blocking=True)
    rebuilt: dict[str, Any] = {"scheduler_metadata": None}
    if attention.attn_backend.get_name() == "CPU_ATTN":
        rebuilt["scheduler_metadata"] = _cpu_schedule(attention, query_start_loc, seq_lens)
    else:
        rebuilt["max_num_splits"] = 0
    return replace(
        metadata,
        num_actual_tokens=len(tokens),
        max_query_len=int(np.diff(starts).max()),
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=metadata.block_table[rows],
        slot_mapping=metadata.slot_mapping[choice.tokens],
        **rebuilt,
    )


def _cpu_schedule(attention: Attention, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Return how the CPU's kernel spreads its work, for a part of the batch."""
    from vllm import _custom_ops as ops
    from vllm import envs

    impl = attention.impl
    return ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_dim=impl.head_size,
        seq_lens=seq_lens,
        dtype=attention.dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=impl.sliding_window,
        isa=attention.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=impl.kv_cache_dtype,
    )


class SplitProjection(UnquantizedLinearMethod):
    """The fused projection of queries, keys and values, as two: queries are needed of fewer tokens than the rest.

    Args:
        query_size: rows of the weight that make queries.
    """

    def __init__(self, query_size: int):
        super().__init__()
        self.query_size = query_size

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take the loaded weight apart; on a CPU each part is packed for its kernel."""
        sizes = [self.query_size, layer.weight.shape[0] - self.query_size]
        biases = (None, None) if layer.bias is None else layer.bias.data.split(sizes)
        self.parts = []
        for weight, bias in zip(layer.weight.data.split(sizes), biases, strict=True):
            part = nn.Module()
            part.weight = nn.Parameter(weight.clone() if current_platform.is_cpu() else weight, requires_grad=False)
            super().process_weights_after_loading(part)
            self.parts.append((part, bias))
        if current_platform.is_cpu():
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return queries, [tokens, query_size]."""
        part, bias = self.parts[0]
        return super().apply(part, x, bias)

    def keys_and_values(self, x: torch.Tensor) -> torch.Tensor:
        """Return keys and values side by side, [tokens, rest]."""
        part, bias = self.parts[1]
        return super().apply(part, x, bias)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return all, as the fused projection does."""
        return torch.cat((self.queries(x), self.keys_and_values(x)), dim=-1)


def _rotated(self_attn: nn.Module, positions: torch.Tensor, heads: torch.Tensor, what: str) -> torch.Tensor:
    """Norm queries or keys (`what` is `q` or `k`), [tokens, size], where the architecture does, and rotate them."""
    norm = getattr(self_attn, f"{what}_norm", None)
    if norm is not None:
        heads = norm(heads.view(len(heads), -1, self_attn.head_dim)).view(heads.shape)
    heads = self_attn.rotary_emb(positions, heads.contiguous(), None)[0]
    if what == "q" and getattr(self_attn, "do_llama_4_scaling", False):
        heads = (heads * self_attn._get_llama_4_attn_scale(positions)).to(heads.dtype)
    return heads


def attend_from(
    self_attn: nn.Module, positions: torch.Tensor, normed: torch.Tensor, batch: Batch, choice: Choice
) -> torch.Tensor | None:
    """Put keys and values of all tokens into the cache, but attend from the chosen ones only.

    Args:
        positions: int64 [tokens].
        normed: [tokens, hidden_size].

    Returns:
        [chosen, hidden_size], None where none is chosen.
    """
    attention, projection = self_attn.attn, self_attn.qkv_proj.quant_method
    keys, values = projection.keys_and_values(normed).split(self_attn.kv_size, dim=-1)
    keys = _rotated(self_attn, positions, keys, "k").view(len(normed), -1, attention.head_size)
    values = values.reshape(len(normed), -1, attention.head_size)
    context = get_forward_context()
    slots, metadata = (each[attention.layer_name] for each in (context.slot_mapping, context.attn_metadata))
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)
    if choice.count == 0:
        return None
    if choice.count < len(normed):
        positions, normed = positions[choice.tokens], normed[choice.tokens]
        metadata = part_of_metadata(attention, batch, choice)
    queries = _rotated(self_attn, positions, projection.queries(normed), "q")
    return _attend(self_attn, queries, keys, values, metadata)


def _attend(self_attn: nn.Module, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, metadata: Any):
    """Return attention's output for queries [tokens, size], [tokens, hidden_size]; what it reads is in the cache."""
    attention = self_attn.attn
    queries = queries.view(len(queries), -1, attention.head_size)
    output = torch.empty_like(queries)
    attention.impl.forward(attention, queries, keys, values, attention.kv_cache, metadata, output=output)
    return self_attn.o_proj(output.view(len(queries), -1))[0]


def attend_in(
    self_attn: nn.Module, positions: torch.Tensor, normed: torch.Tensor, batch: Batch, choice: Choice
) -> torch.Tensor | None:
    """Attend in the requests that are kept, as if there were no others; nothing of these goes into the cache.

    Args and returns as `attend_from`; all tokens of a request are kept, or none.
    """
    if choice.count == 0:
        return None
    if choice.count == len(normed):
        return self_attn(positions, normed)
    attention = self_attn.attn
    metadata = part_of_metadata(attention, batch, choice)
    qkv, _ = self_attn.qkv_proj(normed[choice.tokens])
    queries, keys, values = qkv.split([self_attn.q_size, self_attn.kv_size, self_attn.kv_size], dim=-1)
    positions = positions[choice.tokens]
    queries = _rotated(self_attn, positions, queries, "q")
    keys = _rotated(self_attn, positions, keys, "k").view(choice.count, -1, attention.head_size)
    values = values.reshape(choice.count, -1, attention.head_size)
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, metadata.slot_mapping)
    return _attend(self_attn, queries, keys, values, metadata)
