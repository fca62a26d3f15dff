"""A KV cache that carries the routing decisions of its sequences beside the keys and values they imply.

A sequence is routed once, at prefill; every later call with that cache follows the decision, whatever its query
length.

A growing cache stores, where attention or the block is routed and execution is sparse, keys and values of the executed
rows only: a layer's tensors are [executed rows, heads, tokens, head_dim], and it shrinks by what is skipped. Dense
execution is the specification and keeps all rows. A static cache has all rows, at fixed addresses and of a fixed
length, whatever is decided, so that one graph serves every decision; a row that skips leaves its place unwritten, or
has there what nothing reads. Either execution can go on with it.

Nothing of a request is anywhere else, so two generations on one model can't meet. This file travels inside every
checkpoint.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .configuration_mod import MoDSettings
from .routing_mod import Decision


class NoCache:
    """Stands where a cache would, and keeps nothing.

    Without a cache and a mask transformers 5.23 reads the position ids back from the device to see whether rows are
    packed, once in every forward of the training; with this it doesn't.
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: nothing is kept."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0: the first query is the first token."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys, which is that of the queries, and the position of the first."""
        return query_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Return the keys and values as they are."""
        return key_states, value_states


class RoutedLayerMixin:
    """Over a cache layer: the decisions of each sequence."""

    # Defaults on the class, as `adapt_cache` takes a plain layer's attributes over without running `__init__`.
    decisions: Mapping[str, Decision] = MappingProxyType({})  # by what they gate: `attn`, `mlp` or `block`

    def hold(self, branch: str, decision: Decision, packs: bool) -> None:
        """Keep the decision that prefill took on a branch.

        `packs` says that attention is given the kept rows only; what a layer then stores is its own affair.
        """
        self.decisions = {**self.decisions, branch: decision.held()}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence i become what sequence `beam_idx[i]` was (beam search)."""
        if not self.decisions:
            super().reorder_cache(beam_idx)
        else:
            self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences `indices`, a bool mask or integers."""
        if not self.decisions:
            super().batch_select_indices(indices)
        else:
            self._select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if not self.decisions:
            super().batch_repeat_interleave(repeats)
        else:
            gates = next(iter(self.decisions.values())).gates
            self._select(torch.arange(len(gates), device=gates.device).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget keys, values and decisions."""
        super().reset()
        self.decisions = {}

    def _select(self, rows: torch.Tensor) -> None:
        stored = self._stored(rows).to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, stored), self.values.index_select(0, stored)
        self.decisions = {branch: decision.select(rows) for branch, decision in self.decisions.items()}

    def _stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Return where keys and values of the sequences `rows` are."""
        return rows


class RoutedGrowingLayerMixin(RoutedLayerMixin):
    """Over a growing cache layer: where packed, only the executed rows."""

    packed_by: str | None = None

    def hold(self, branch: str, decision: Decision, packs: bool) -> None:
        """Keep the decision that prefill took on a branch; `packs` says that the layer stores its kept rows only."""
        super().hold(branch, decision, packs)
        if packs:
            self.packed_by = branch

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, also where not a single row executed them."""
        length = super().get_seq_length()
        # transformers 5.23 takes a tensor without elements for an empty cache; before the first update it is 1D
        if length == 0 and self.is_initialized and self.keys.dim() == 4:
            return self.keys.shape[-2]
        return length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens; a cache without tokens is a new one and has no decisions."""
        super().crop(tokens_to_remove)
        if self.decisions and self.get_seq_length() == 0:
            self.reset()

    def reset(self) -> None:
        """Forget keys, values and decisions."""
        super().reset()
        self.packed_by = None

    def _stored(self, rows: torch.Tensor) -> torch.Tensor:
        packing = self.decisions.get(self.packed_by)
        if packing is None or packing.kept is None:
            return rows
        kept = packing.gates > 0
        rows = rows.to(kept.device)
        slots = kept.cumsum(0) - 1  # full row -> packed row
        return slots[rows][kept[rows]]


class RoutedDynamicLayer(RoutedGrowingLayerMixin, DynamicLayer):
    """A growing layer with decisions."""


class RoutedSlidingWindowLayer(RoutedGrowingLayerMixin, DynamicSlidingWindowLayer):
    """A growing layer that forgets what has left its window, with decisions."""


class RoutedStaticLayerMixin(RoutedLayerMixin):
    """Over a layer of fixed shape: every sequence has its row, and those that skip are not written."""

    def hold(self, branch: str, decision: Decision, packs: bool) -> None:
        """Keep the decision that prefill took on a branch; all rows are stored."""
        super().hold(branch, decision, packs)
        self._look_at_one_sequence()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of all sequences or, [executed rows, ...], of those that execute the attention.

        Returns:
            Keys and values of the same rows, as `StaticLayer.update`.
        """
        attending = self.decisions.get("attn", self.decisions.get("block"))
        rows, tokens = len(key_states), key_states.shape[-2]
        batch = rows if attending is None else len(attending.gates)
        if rows == batch:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            # nothing of a batch's size is allocated for this
            whole = (states.new_empty(()).expand(batch, *states.shape[1:]) for states in (key_states, value_states))
            self.lazy_initialization(*whole)
        if rows == 0:
            self.count(tokens)
            return self.keys[:0], self.values[:0]
        stored = copy.copy(self)
        stored.decisions, stored.cumulative_length = {}, self.cumulative_length.clone()
        stored.keys = self.keys.index_select(0, attending.kept)
        stored.values = self.values.index_select(0, attending.kept)
        seen = stored.update(key_states, value_states, *args, **kwargs)
        self.keys.index_copy_(0, attending.kept, stored.keys)
        self.values.index_copy_(0, attending.kept, stored.values)
        self.count(tokens)
        return seen

    def count(self, tokens: int) -> None:
        """Count tokens that are stored already, or that no row executes."""
        self.cumulative_length.add_(tokens)

    def _select(self, rows: torch.Tensor) -> None:
        super()._select(rows)
        self._look_at_one_sequence()

    def _look_at_one_sequence(self) -> None:
        # found now, as a graph that had to look would wait for the device in each step
        for decision in self.decisions.values():
            if len(decision.gates) == 1 and not torch.compiler.is_compiling():
                _ = decision.executes


class RoutedStaticLayer(RoutedStaticLayerMixin, StaticLayer):
    """A layer of fixed shape, with decisions."""


class RoutedStaticSlidingWindowLayer(RoutedStaticLayerMixin, StaticSlidingWindowLayer):
    """A layer of fixed shape that forgets what has left its window, with decisions."""

    def count(self, tokens: int) -> None:
        """Count tokens that are stored already, or that no row executes."""
        if self.cumulative_length_int + tokens <= self.max_cache_len:
            super().count(tokens)  # beyond that transformers doesn't need it
        self.cumulative_length_int += tokens


_ROUTED_CLASSES = {
    DynamicLayer: RoutedDynamicLayer,
    DynamicSlidingWindowLayer: RoutedSlidingWindowLayer,
    StaticLayer: RoutedStaticLayer,
    StaticSlidingWindowLayer: RoutedStaticSlidingWindowLayer,
}
_KNOWN_CLASSES = {*_ROUTED_CLASSES, *_ROUTED_CLASSES.values()}


class MoDCache(DynamicCache):
    """A `DynamicCache` for one routed model; a plain one is made into the like of it on its first use.

    Args:
        config: the routed model's config.
    """

    def __init__(self, config):
        super().__init__(config=config)
        adapt_cache(self, config.mod_settings, config.num_hidden_layers)


def is_static(cache: Any) -> bool:
    """Tell whether a cache has a fixed shape."""
    return isinstance(cache, StaticCache)


def holds_decisions(cache: Any, settings: MoDSettings) -> bool:
    """Tell whether the sequences of a cache have been decided on."""
    layers, first = getattr(cache, "layers", ()), settings.layers[0]
    return first < len(layers) and bool(getattr(layers[first], "decisions", None))


def adapt_cache(cache: Any, settings: MoDSettings, num_hidden_layers: int) -> None:
    """Let the routed layers of a plain `DynamicCache` or `StaticCache` hold decisions, in place.

    Done at each forward, so it also reaches the caches that `generate` makes and that users pass. An adapted one is
    left as it is.

    Args:
        cache: a cache of any class.
        settings: of the routed model.
        num_hidden_layers: of the routed model.

    Raises:
        ValueError: the cache is of another class, whose rows or lengths can't follow the decisions.
    """
    layers = cache.layers if isinstance(cache, DynamicCache | StaticCache) else None
    if layers is None or not all(type(layer) in _KNOWN_CLASSES for layer in layers):
        raise ValueError(
            f"a routed model can't use a {type(cache).__name__}: pass a DynamicCache, a StaticCache, or none (in "
            "generate, cache_implementation='static' or none), or route=False"
        )
    if settings.level == "token":
        return
    while len(layers) < num_hidden_layers:
        layers.append(cache.layer_class_to_replicate())
    for index in settings.layers:
        layer = layers[index]
        if not isinstance(layer, RoutedLayerMixin):
            routed_class = _ROUTED_CLASSES[type(layer)]
            layers[index] = routed_class.__new__(routed_class)
            layers[index].__dict__.update(layer.__dict__)


def check_cache(cache: Any, settings: MoDSettings, batch: int, tokens: int, sparse: bool) -> None:
    """Raise `ValueError` where an adapted cache can't be continued by this call.

    Args:
        cache: an adapted cache.
        settings: of the routed model.
        batch: number of sequences of the call.
        tokens: number of new tokens of each.
        sparse: whether its execution is sparse.
    """
    if is_static(cache):
        _check_room(cache, batch, tokens)
    if settings.level == "token":
        return
    packed = sparse and settings.branches != ("mlp",)
    for index in settings.layers:
        layer = cache.layers[index]
        if not layer.decisions:
            if layer.get_seq_length() > 0:
                raise ValueError(
                    f"layer {index} of the cache holds tokens but no decision: it was filled without routing; start "
                    "with an empty cache"
                )
            continue
        held = len(next(iter(layer.decisions.values())).gates)
        if held != batch:
            raise ValueError(f"the cache holds {held} sequences, but the input has {batch}")
        if isinstance(layer, RoutedGrowingLayerMixin) and (layer.packed_by is not None) != packed:
            was, now = ("dense", "sparse") if packed else ("sparse", "dense")
            raise ValueError(f"the cache was filled by {was} execution and can't go on with {now}: use one throughout")


def _check_room(cache: StaticCache, batch: int, tokens: int) -> None:
    for layer in cache.layers:
        if not layer.is_sliding and tokens > layer.max_cache_len:
            raise ValueError(
                f"the StaticCache has room for max_cache_len={layer.max_cache_len} tokens, but the input alone has "
                f"{tokens}: make it larger"
            )
        if layer.is_initialized and len(layer.keys) != batch:
            raise ValueError(f"the StaticCache was made for {len(layer.keys)} sequences, but the input has {batch}")


def refuse_decisions(cache: Any) -> None:
    """Raise `ValueError` where a cache that was filled with routing is to be continued without it."""
    if any(getattr(layer, "decisions", None) for layer in getattr(cache, "layers", ())):
        raise ValueError("the cache was filled with routing: go on with route=True, or start with an empty cache")
