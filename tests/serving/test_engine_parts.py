"""Parts of FlashAttention's metadata: which keys each query would see.

Its kernel needs a GPU, its metadata does not.
"""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.serve
BLOCK = 16


def make_metadata(lengths, cached):
    """Return a step's metadata, for requests with so many new tokens after so many cached ones."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    totals = [new + old for new, old in zip(lengths, cached, strict=True)]
    blocks = -(-max(totals) // BLOCK)
    table = torch.randperm(blocks * len(lengths)).view(len(lengths), blocks).int()
    slots = [slot_of(table[row], at) for row in range(len(lengths)) for at in range(cached[row], totals[row])]
    return FlashAttentionMetadata(
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        query_start_loc=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seq_len=max(totals),
        seq_lens=torch.tensor(totals, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots),
        scheduler_metadata=torch.zeros(3),
        max_num_splits=4,
    )


def slot_of(blocks, position):
    return int(blocks[position // BLOCK]) * BLOCK + position % BLOCK


def keys_seen(metadata):
    """Return for each query the slots of the keys that a causal kernel would let it see, its own last."""
    seen, starts = [], metadata.query_start_loc.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        total = int(metadata.seq_lens[row])
        for position in range(total - (end - start), total):
            seen.append([slot_of(metadata.block_table[row], at) for at in range(position + 1)])
    return seen


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_kept_tokens_see_the_keys_that_they_see_in_the_whole_batch(share):
    from router_tuning_vllm.attention import part_of_metadata, takes_apart
    from router_tuning_vllm.batch import Batch, Choice
    from vllm.forward_context import ForwardContext, override_forward_context

    lengths, cached = [1, 40, 1, 7, 33, 1], [30, 0, 5, 12, 0, 64]
    whole = make_metadata(lengths, cached)
    starts = np.array([0, *np.cumsum(lengths)])
    batch = Batch(starts, torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)))
    generator = torch.Generator().manual_seed(0)
    attention = SimpleNamespace(
        layer_name="layer", query_quant=None, attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    )
    context = ForwardContext(no_compile_layers={}, attn_metadata={"layer": whole}, slot_mapping={})
    with override_forward_context(context):
        assert takes_apart(attention)
        for _ in range(20):
            choice = Choice(torch.rand(sum(lengths), generator=generator) < share)
            if choice.count == 0:
                continue
            part = part_of_metadata(attention, batch, choice)
            expected = keys_seen(whole)
            assert keys_seen(part) == [expected[token] for token in choice.tokens.tolist()]
            assert torch.equal(part.slot_mapping, whole.slot_mapping[choice.tokens])
            assert part.num_actual_tokens == choice.count
            assert part.max_query_len == int(part.query_start_loc.diff().max())
            assert part.scheduler_metadata is None
        whole.rswa_window = 128  # a field that nothing is known about
        assert not takes_apart(attention)
