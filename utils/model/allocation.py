"""Counting the bytes that tensors take: of a call that runs, or, on the meta device, of one that would not fit here.

On the meta device tensors have shapes and no values. `ShapesAlone` lets programs run on it that look at values now and
then: whatever is asked is answered with ones, so masks are full, inputs are kept, and counts are at their most.
Attention counts as the kernels of a GPU work, which never hold a query's weights for all keys.
"""

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return, and notes when they are released.

    `peak` is the most that there was at a time, beyond what was there before; `now` what is left.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        known = {id(storage) for storage in _storages((args, kwargs))}  # of views and of what is written in place
        for storage in _storages(result):
            if id(storage) not in known:
                known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _release(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def peak_of_shapes(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call's tensors on the meta device take at a time, beyond those that are there."""
    # no mode of torch functions reaches what a backward computes again (torch 2.13)
    with (
        patch.object(functional, "scaled_dot_product_attention", _attend),
        AllocatedBytes() as allocated,
        ShapesAlone(),
    ):
        call()
    return allocated.peak


_plain_attention = functional.scaled_dot_product_attention


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Have attention on the meta device keep what FlashAttention keeps for its backward, and no more."""
    if query.is_meta:
        return _Attention.apply(query, key, value)
    return _plain_attention(query, key, value, *args, **kwargs)


class ShapesAlone(TorchDispatchMode):
    """Answers what a program asks of values on the meta device with ones."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if function is aten.equal.default:
            return True
        if function is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="meta")
        if function is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is aten.index.Tensor:  # a mask picks all
            indices = [_places(index) if _is_mask(index) else [index] for index in args[1]]
            return function(args[0], [place for places in indices for place in places])
        return function(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _places(mask: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty(mask.numel(), dtype=torch.int64, device="meta") for _ in range(mask.dim())]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query[..., : value.shape[-1]])
        log_sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)  # the query's gradient is summed over blocks of keys
        heads = query.shape[1]  # of keys and values each of its queries' heads has its own at first
        grown = [each.new_empty(each.shape[0], heads, *each.shape[2:]) for each in (key, value)]
        shrunk = [torch.empty_like(each) for each in (key, value)]
        del grown
        return sums.to(query.dtype), *shrunk
