"""Queries, keys and values of an attention, for chosen tokens: what differs between the architectures.

Attention by heads follows `LlamaAttention.forward` of transformers 5.23, which Mistral, Mixtral, Qwen2 and Qwen2-MoE
share; Qwen3 adds norms over each head, OLMoE norms over all heads together and a bound. Latent attention follows
`DeepseekV2Attention.forward`: what is cached is one latent and one rotary key for all heads, from which keys and values
are expanded. This file travels inside every checkpoint.
"""

from typing import Any

import torch
from torch import nn

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor] | torch.Tensor
"""Cosine and sine, each [1 or batch, tokens, head_dim], or for latent attention one complex tensor."""


def is_latent(attention: nn.Module) -> bool:
    """Tell whether an attention caches latents instead of keys and values."""
    return hasattr(attention, "kv_a_proj_with_mqa")


def keys_and_values(
    attention: nn.Module, normed: torch.Tensor, position_embeddings: PositionEmbeddings, cache: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project all tokens, and put them into the cache, if there is one, behind those that it has.

    Args:
        attention: the layer's attention.
        normed: [batch, tokens, hidden_size].
        position_embeddings: of the new tokens.
        cache: the KV cache, or None.

    Returns:
        Keys and values of all tokens, [batch, key-value heads, past + tokens, head_dim].
    """
    if is_latent(attention):
        latent, rotary = attention.kv_a_proj_with_mqa(normed).split(
            [attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1
        )
        latent, rotary = attention.kv_a_layernorm(latent).unsqueeze(1), rotary.unsqueeze(1)
        rotary = _rotate_complex(rotary, position_embeddings.unsqueeze(1))
        if cache is not None:
            latent, rotary = cache.update(latent, rotary, attention.layer_idx)
        return attention.expand_kv(latent, rotary)
    keys, values = (_heads(attention, name, normed).transpose(1, 2) for name in ("k", "v"))
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    keys = _rotate(keys, cos, sin)
    return (keys, values) if cache is None else cache.update(keys, values, attention.layer_idx)


def queries_of(
    attention: nn.Module, normed: torch.Tensor, chosen: torch.Tensor, position_embeddings: PositionEmbeddings
) -> torch.Tensor:
    """Project chosen tokens.

    Args:
        attention: the layer's attention.
        normed: [batch, tokens, hidden_size].
        chosen: int64 [chosen], indices into the flattened [batch * tokens].
        position_embeddings: of all these tokens.

    Returns:
        [chosen, heads, head_dim].
    """
    tokens = normed.shape[1]
    inputs = normed.reshape(-1, normed.shape[-1]).index_select(0, chosen)
    if is_latent(attention):
        if attention.q_lora_rank is None:
            queries = attention.q_proj(inputs)
        else:
            queries = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(inputs)))
        queries = queries.view(len(chosen), -1, attention.qk_head_dim)
        plain, rotary = queries.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], dim=-1)
        return torch.cat((plain, _rotate_complex(rotary, _at_tokens(position_embeddings, chosen, tokens))), dim=-1)
    queries = _heads(attention, "q", inputs)
    cos, sin = (_at_tokens(table, chosen, tokens) for table in position_embeddings)
    return _rotate(queries, cos, sin)


def cache_no_rows(attention: nn.Module, hidden_states: torch.Tensor, cache: Any) -> None:
    """Let the cache count the tokens of `hidden_states` [batch, tokens, hidden_size], which no row executes."""
    if is_latent(attention):
        heads, widths = 1, (attention.kv_lora_rank, attention.qk_rope_head_dim)
    else:
        heads, widths = attention.config.num_key_value_heads, (attention.head_dim, attention.head_dim)
    nothing = (hidden_states.new_empty(0, heads, hidden_states.shape[1], width) for width in widths)
    cache.update(*nothing, attention.layer_idx)


def _heads(attention: nn.Module, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Project to queries, keys or values (`q`, `k`, `v`), before rotation: [..., heads, head_dim]."""
    projected = getattr(attention, f"{name}_proj")(inputs)
    norm = getattr(attention, f"{name}_norm", None)
    norm_of_all_heads = norm is not None and norm.weight.shape[0] != attention.head_dim
    if norm_of_all_heads:
        projected = norm(projected)
    bound = getattr(attention.config, "clip_qkv", None)
    if bound is not None:
        projected = projected.clamp(-bound, bound)
    projected = projected.view(*inputs.shape[:-1], -1, attention.head_dim)
    return projected if norm is None or norm_of_all_heads else norm(projected)


def _at_tokens(table: torch.Tensor, chosen: torch.Tensor, tokens: int) -> torch.Tensor:
    """Pick a rotary table's rows, [1 or batch, tokens, width], for flat token indices: [chosen, 1, width]."""
    index = chosen if table.shape[0] > 1 else chosen % tokens
    return table.flatten(0, 1).index_select(0, index).unsqueeze(1)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [..., head_dim] as transformers does, in three passes over memory rather than five."""
    half = heads.shape[-1] // 2
    rotated = heads * cos
    rotated[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return rotated


def _rotate_complex(states: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of [..., width] by complex numbers [..., width / 2]."""
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotations).flatten(-2).to(states.dtype)
