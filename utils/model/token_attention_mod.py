"""Attention in which every token has keys and values, but only kept tokens have queries and outputs.

This is what a token-level decision leaves of attention and block (Section 3.1): a dropped token is still attended to,
but it asks nothing. Projections run on exactly the kept tokens. On a CPU, eager attention and SDPA over several tokens
then see the kept queries alone, sequence by sequence. All else (one new token, a GPU's kernels, FlashAttention, flex)
sees all queries, with zeros where a token was dropped: that needs no other mask, no copy of the cached keys and
values, and one call. This file travels inside every checkpoint.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .cache_mod import is_static
from .projections_mod import keys_and_values, queries_of
from .routing_mod import Decision

STRETCH = 128
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
    paged = kwargs.get("cache") is not None
    mask, cache = kwargs.pop("attention_mask"), kwargs.pop("past_key_values")
    position_embeddings = kwargs.pop("position_embeddings")
    if paged and len(kept) == 0:
        # in continuous batching it is the attention function that stores keys and values: ask for one output
        attend_kept_tokens(attention, normed, _keeping_first(decision), attention_kwargs)
        return None
    if len(kept) == 0 and cache is None:
        return None
    keys, values = keys_and_values(attention, normed, position_embeddings, cache)
    if len(kept) == 0:
        return None

    batch, tokens, _ = normed.shape
    static = is_static(cache)
    if static and mask is None:
        # the prompt alone: what stands behind it was never written
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
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

    if not paged and tokens > 1 and implementation in ("eager", "sdpa") and queries.device.type == "cpu":
        kernel, length = partial(_sdpa, dropout=options["dropout"], scaling=options["scaling"]), STRETCH
        if implementation == "eager":
            # it lets a query that sees nothing (padding on the left) average over all keys: leave none out
            kernel, length = attend, tokens
        if static and mask is not None:
            length = tokens  # where the new keys stand isn't known here
        outputs = [
            kernel(queries[None, run], keys[row, None, :, :seen], values[row, None, :, :seen], run_mask)
            for row, run, seen, run_mask in _query_runs(kept, batch, tokens, keys.shape[2] - tokens, length, mask)
        ]
        outputs = torch.cat(outputs, dim=1)[0]  # [kept, heads * head_dim]
    else:
        padded = queries.new_zeros(batch * tokens, *queries.shape[1:]).index_copy(0, kept, queries)
        padded = padded.view(batch, tokens, *queries.shape[1:])
        outputs = attend(padded, keys, values, mask, **kwargs).flatten(0, 1)[kept]
    return attention.o_proj(outputs)


def _keeping_first(decision: Decision) -> Decision:
    gates = torch.zeros_like(decision.gates)
    gates[0, 0] = 1.0
    return Decision(decision.scores, gates)


def _query_runs(
    kept: torch.Tensor, batch: int, tokens: int, past: int, length: int, mask: torch.Tensor | None
) -> Iterator[tuple[int, slice, int, torch.Tensor]]:
    """Cut the kept tokens into runs of one sequence and one stretch of positions, without a gather.

    Args:
        kept: int64 [kept] on the CPU, ascending indices into the flattened [batch * tokens].
        batch, tokens: numbers of sequences and of new tokens, which are the last ones of the keys.
        past: number of keys before them.
        length: positions of a stretch.
        mask: [1 or batch, 1, tokens, past + tokens], bool or additive; None for causal.

    Yields:
        sequence, slice of the kept tokens, number of keys that they can see, and their mask [1, 1, queries, keys].
    """
    stretches = [(row, start) for row in range(batch) for start in range(0, tokens, length)]
    edges = torch.tensor([row * tokens + start for row, start in stretches] + [batch * tokens])
    edges = [int(edge) for edge in torch.searchsorted(kept, edges)]
    for (row, start), first, last in zip(stretches, edges, edges[1:], strict=False):
        if first == last:
            continue
        positions = kept[first:last] - row * tokens
        seen = past + min(start + length, tokens)
        if mask is None:
            run_mask = (torch.arange(seen) <= past + positions[:, None])[None, None]
        else:
            run_mask = mask[row if len(mask) > 1 else 0, None, :, :, :seen].index_select(2, positions)
        yield row, slice(first, last), seen, run_mask


def _sdpa(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    """Run torch's SDPA, [1, queries, heads, head_dim] -> [1, queries, heads * head_dim].

    Under a mask transformers' `sdpa_attention_forward` copies keys and values once for each head that shares them.
    """
    output = nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).flatten(2)
