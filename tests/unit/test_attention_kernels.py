"""Kernels that want other masks than eager and SDPA: FlashAttention, by a stand-in with its rules, and flex."""

import pytest
import torch
from model_zoo import NUM_LAYERS, add_routers, make_base, pad, random_tokens, randomize_routers, texts
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from utils.model.configuration_mod import EXECUTIONS, GRANULARITIES

LOGITS_BOUND = 5e-5

every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def flash_stand_in(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    """Attend as FlashAttention does: causal from the lower right, a 2D mask or none, no empty tensor."""
    if 0 in query.shape:
        raise ValueError("FlashAttention does not support inputs with dim=0")
    assert attention_mask is None or attention_mask.shape == (query.shape[0], key.shape[2])
    queries, keys = query.shape[2], key.shape[2]
    behind = (torch.arange(queries)[:, None] + keys - queries) - torch.arange(keys)  # [queries, keys]
    seen = (behind >= 0) & (behind < (sliding_window or keys + 1))
    seen = seen if attention_mask is None else seen & attention_mask[:, None, None].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output.transpose(1, 2), None


# transformers looks for a package where a name has "flash" in it
AttentionInterface.register("padding_mask_kernel", flash_stand_in)
AttentionMaskInterface.register("padding_mask_kernel", flash_attention_mask)


@torch.no_grad()
def assert_sparse_equals_dense(model):
    """Compare prefill, several tokens and a single one with a cache, without a mask and padded on the left."""
    input_ids, mask = pad(texts((9, 4, 7, 2)), "left")
    more = random_tokens(4, 4, seed=20)
    input_ids, mask = torch.cat([input_ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)
    for attention_mask in (None, mask):
        logits = {execution: [] for execution in EXECUTIONS}
        for execution in EXECUTIONS:
            cache = None
            for start, end in ((0, 9), (9, 12), (12, 13)):
                output = model(
                    input_ids[:, start:end],
                    attention_mask=None if attention_mask is None else attention_mask[:, :end],
                    past_key_values=cache,
                    use_cache=True,
                    execution=execution,
                )
                cache = output.past_key_values
                logits[execution].append(output.logits)
        dense, sparse = (torch.cat(logits[execution], dim=1) for execution in EXECUTIONS)
        real = torch.ones_like(mask, dtype=torch.bool) if attention_mask is None else mask.bool()
        real = real[:, : dense.shape[1]]
        torch.testing.assert_close(sparse[real], dense[real], atol=LOGITS_BOUND, rtol=0)


@every_granularity
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
def test_sparse_equals_dense_with_the_masks_of_flash_attention(arch, granularity):
    base = make_base(arch, attn_implementation="padding_mask_kernel")
    assert_sparse_equals_dense(randomize_routers(add_routers(base, granularity, range(NUM_LAYERS - 1)), scale=0.7))


def test_the_stand_in_is_attention():
    base = make_base("mistral", attn_implementation="padding_mask_kernel")
    input_ids, mask = pad(texts((9, 4)), "left")
    with torch.no_grad():
        logits = base(input_ids, mask).logits
        base.set_attn_implementation("sdpa")
        torch.testing.assert_close(logits[mask.bool()], base(input_ids, mask).logits[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.slow
@every_granularity
@pytest.mark.parametrize("arch", ["llama", "mistral"])
@pytest.mark.filterwarnings("ignore::UserWarning:torch.nn.attention")
def test_sparse_equals_dense_with_flex_attention(arch, granularity):
    # torch 2.13 can't compile flex attention for a CPU with changing shapes; the form that isn't compiled takes masks
    # and rows in the same way. Flex wants at least 16 numbers in a head.
    base = make_base(arch, attn_implementation="flex_attention", hidden_size=64)
    model = randomize_routers(add_routers(base, granularity, range(NUM_LAYERS - 1)), scale=0.7)
    with torch.compiler.set_stance("force_eager"):
        assert_sparse_equals_dense(model)
