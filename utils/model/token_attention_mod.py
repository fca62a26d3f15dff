"""Attention in which every token has keys and values, but only kept tokens have queries and outputs.

This is what a token-level decision leaves of attention and block (Section 3.1): a dropped token is still attended to,
but it asks nothing. Projections run on exactly the kept tokens. The kernels then see either the kept queries alone,
gathered with their rows of the mask (eager and SDPA over several tokens), or all of them with zeros where a token was
dropped, which needs no other mask and no copy of the cached keys and values (one new token, FlashAttention, flex).
This file travels inside every checkpoint.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .projections_mod import keys_and_values, queries_of
from .routing_mod import Decision

QUERY_BLOCK = 128
"""Positions whose kept queries are attended together: later keys are left out, as a causal kernel would."""


def attend_kept_tokens(
    attention: nn.Module, normed: torch.Tensor, decision: Decision, attention_kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """Attend from the kept tokens to all tokens, and put the keys and values of all tokens into the cache.

    Args:
        attention: the layer's attention.
        normed: [batch, tokens, hidden_size].
        decision: for each token, with some dropped.
        attention_kwargs: what the attention takes besides its hidden states.

    Returns:
        [kept, hidden_size] in the order of `decision.kept`, or None where nothing is kept.
    """
    kept = decision.kept
    kwargs = dict(attention_kwargs)
    mask, cache = kwargs.pop("attention_mask"), kwargs.pop("past_key_values")
    position_embeddings = kwargs.pop("position_embeddings")
    if len(kept) == 0 and cache is None:
        return None
    keys, values = keys_and_values(attention, normed, position_embeddings, cache)
    if len(kept) == 0:
        return None

    batch, tokens, _ = normed.shape
    queries = queries_of(attention, normed, kept, position_embeddings)  # [kept, heads, head_dim]

    implementation = attention.config._attn_implementation
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    options = {
        "dropout": attention.attention_dropout if attention.training else 0.0,
        "scaling": attention.scaling,
        # Qwen has a window of its own for each layer, Mistral one in its config, Llama none
        "sliding_window": getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    }

    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, **kwargs) -> torch.Tensor:
        """[batch, queries, heads, head_dim] -> [batch, queries, heads * head_dim]."""
        output, _ = interface(attention, queries.transpose(1, 2), keys, values, mask, **options, **kwargs)
        return output.reshape(*queries.shape[:2], -1)

    if tokens > 1 and implementation in ("eager", "sdpa"):
        # Eager attention lets a query that sees nothing (padding on the left) average over all keys: leave none out.
        length = QUERY_BLOCK if implementation == "sdpa" else tokens
        blocks = query_blocks(decision.kept_on_host, batch, tokens, length)
        grouped = partial(grouped_attention, dropout=options["dropout"], scaling=options["scaling"])
        kernel = grouped if implementation == "sdpa" else attend
        outputs = _attend_gathered(kernel, queries, blocks, tokens, keys, values, mask)
    else:
        padded = queries.new_zeros(batch * tokens, *queries.shape[1:]).index_copy(0, kept, queries)
        padded = padded.view(batch, tokens, *queries.shape[1:])
        outputs = attend(padded, keys, values, mask, **kwargs).flatten(0, 1)[kept]
    return attention.o_proj(outputs)


@dataclass
class QueryBlock:
    """The kept queries of one stretch of positions, arranged as a batch.

    Args:
        end: first position after the stretch.
        first: the first of the kept tokens that lie in it.
        chosen: int64 [chosen], which of the kept tokens lie in it.
        picked: int64 [batch, width], the kept token that each slot holds.
        positions: int64 [batch, width], its position.
        slots: int64 [chosen], the chosen tokens' indices into the flattened [batch * width].
    """

    end: int
    first: int
    chosen: torch.Tensor
    picked: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


def query_blocks(kept: torch.Tensor, batch: int, tokens: int, length: int) -> Iterator[QueryBlock]:
    """Arrange kept tokens by position, `length` positions at a time.

    Args:
        kept: int64 [kept] on the CPU, ascending indices into the flattened [batch * tokens].
        batch, tokens: numbers of sequences and of new tokens.
        length: positions of one block.

    Yields:
        the blocks that hold a kept token. Where rows keep unequal numbers of tokens, a spare slot repeats the first
        token of its block, and nobody reads its output.
    """
    rows, positions = kept // tokens, kept % tokens
    for start in range(0, tokens, length):
        end = min(start + length, tokens)
        chosen = ((positions >= start) & (positions < end)).nonzero().squeeze(-1)
        if len(chosen) == 0:
            continue
        counts = rows[chosen].bincount(minlength=batch)
        width = int(counts.max())
        first = counts.cumsum(0) - counts  # [batch], where each row's tokens begin in `chosen`
        slots = torch.arange(len(chosen)) + (torch.arange(batch) * width - first)[rows[chosen]]
        picked = chosen[:1].repeat(batch * width).index_copy(0, slots, chosen).view(batch, width)
        yield QueryBlock(end, int(chosen[0]), chosen, picked, positions[picked], slots)


def _attend_gathered(
    attend: Callable,
    queries: torch.Tensor,
    blocks: Iterator[QueryBlock],
    tokens: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attend from gathered queries, one stretch of positions after the other.

    Args:
        attend: the kernel, from queries [batch, width, heads, head_dim].
        queries: [kept, heads, head_dim].
        blocks: their arrangement.
        tokens: number of new tokens; they are the last ones of the keys.
        keys: [batch, key-value heads, past + tokens, head_dim].
        values: the same shape.
        mask: [1 or batch, 1, tokens, past + tokens], bool or additive; None for causal without a past.

    Returns:
        [kept, heads * head_dim].
    """
    batch, device = keys.shape[0], keys.device
    past = keys.shape[2] - tokens
    outputs = None
    for block in blocks:
        chosen, picked, positions, slots = (
            index.to(device, non_blocking=True) for index in (block.chosen, block.picked, block.positions, block.slots)
        )
        visible = past + block.end
        if mask is None:
            block_mask = torch.arange(visible, device=device) <= past + positions[:, None, :, None]
        else:
            rows = torch.arange(batch, device=device)[:, None]
            block_mask = mask.expand(batch, -1, -1, -1)[rows, :, positions, :visible].transpose(1, 2)
        # one sequence's tokens of a stretch follow each other: no gather
        block_queries = queries[None, block.first : block.first + picked.shape[1]] if batch == 1 else queries[picked]
        attended = attend(block_queries, keys[:, :, :visible], values[:, :, :visible], block_mask)
        if outputs is None:  # under autocast the kernel's dtype isn't that of the queries
            outputs = attended.new_empty(len(queries), attended.shape[-1])
        if batch == 1:
            outputs[block.first : block.first + picked.shape[1]] = attended[0]
        else:
            outputs[chosen] = attended.flatten(0, 1)[slots]
    return outputs


def grouped_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    """Run torch's SDPA with the heads that share keys laid out as further queries, so that no key is copied.

    Under a mask, transformers' `sdpa_attention_forward` repeats keys and values once for each head.

    Args:
        queries: [batch, queries, heads, head_dim].
        keys: [batch, key-value heads, keys, head_dim].
        values: the same shape.
        mask: [1 or batch, 1, queries, keys], bool or additive.
        dropout: probability of dropping an attention weight.
        scaling: factor of the products.

    Returns:
        [batch, queries, heads * head_dim].
    """
    batch, width, heads, head_dim = queries.shape
    groups = heads // keys.shape[1]
    packed = queries.transpose(1, 2).reshape(batch, keys.shape[1], groups * width, head_dim)
    mask = mask.repeat(1, 1, groups, 1)
    output = nn.functional.scaled_dot_product_attention(
        packed, keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.view(batch, heads, width, -1).transpose(1, 2).reshape(batch, width, -1)
