"""The `mod` settings of a checkpoint and one config class for each architecture.

A dynamic-depth (MoD) checkpoint has its base's `config.json` plus one object `mod`, which says which layers have a
router, what the router gates, and where its threshold lies. This file travels inside every checkpoint.
"""

import difflib
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from transformers import (
    DeepseekV2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

TARGETS = ("attn", "mlp", "block", "attn_mlp")
LEVELS = ("sequence", "token")
GRANULARITIES = tuple(f"{target}_{level}" for target in TARGETS for level in LEVELS)
"""What routers gate, and for what unit they decide (Table 2), in any decoder; `attn_mlp` has two in a layer."""

EXPERT_GRANULARITY = "expert_token"
"""Gates the assignments of tokens to experts, in mixture-of-experts models (Section 3.3)."""

ALL_GRANULARITIES = (*GRANULARITIES, EXPERT_GRANULARITY)

BRANCHES = ("attn", "mlp")
"""What a layer's two routers gate where attention and MLP are routed apart."""

Place = int | tuple[int, str]
"""Where a router is: the index of its layer; where a layer has two, that and which of `BRANCHES` it gates."""

SUBSTITUTES = ("linear",)
"""What can stand in for a skipped branch: a low-rank linear map of its normed input (`substitute_mod.py`)."""

SEQUENCE_POOLINGS = ("prompt", "all")
"""Whose mean decides for a sequence: the prompt's tokens, which are what generation sees, or all, as published."""

EXECUTIONS = ("dense", "sparse")
"""`dense` computes everything and multiplies by the mask; `sparse` leaves out what the mask drops."""


KEEPS_ALL = 1e-300
"""A threshold that no score is below: as a float32 it is 0."""


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` naming `value`, the nearest allowed one and all allowed ones, if `value` is not allowed."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}{hint}")


def layer_of(place: Place) -> int:
    """Return the index of the layer that a router is in."""
    return place if isinstance(place, int) else place[0]


def place_name(place: Place) -> str:
    """Return how a router is called in reports: `15`, or `15.attn` and `15.mlp` where a layer has two."""
    return str(place) if isinstance(place, int) else f"{place[0]}.{place[1]}"


def report_key(place: Place) -> int | str:
    """Return what a report has a router's figures under: the layer's index, or the name of one of its two routers."""
    return place if isinstance(place, int) else place_name(place)


def module_name(place: Place, what: str) -> str:
    """Return the name of a layer's module: `router`, or `attn_router` and `mlp_router` where a layer has two.

    Args:
        what: `router` or `substitute`.
    """
    return what if isinstance(place, int) else f"{place[1]}_{what}"


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _pairs(one: Any, other: Any) -> list[tuple[Any, Any]] | None:
    """Return thresholds side by side, where one number may stand for many; None for two numbers."""
    many = max((len(each) for each in (one, other) if isinstance(each, tuple)), default=None)
    if many is None:
        return None
    return list(zip(*(each if isinstance(each, tuple) else (each,) * many for each in (one, other)), strict=True))


def _nowhere_below(one: Any, other: Any) -> bool:
    """Tell whether none of the one's thresholds is below the other's."""
    pairs = _pairs(one, other)
    return one >= other if pairs is None else all(_nowhere_below(*pair) for pair in pairs)


def _between(low: Any, high: Any, part: float) -> Any:
    """Return thresholds between two, `part` of the way, in logits."""
    pairs = _pairs(low, high)
    if pairs is not None:
        return tuple(_between(*pair, part) for pair in pairs)
    a, b = (math.log(threshold / (1 - threshold)) for threshold in (low, high))
    return 1 / (1 + math.exp(-(a + part * (b - a))))


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_lists(each) for name, each in value.items()}
    return [_as_lists(each) for each in value] if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def routed_layers(num_hidden_layers: int, mod_n: int) -> list[int]:
    """Return the indices of the routed layers: the `mod_n` deepest ones but for the very last (Section 3.2).

    Layer i is routed where `num_hidden_layers - mod_n - 1 <= i < num_hidden_layers - 1`; `num_hidden_layers - 1` and
    `num_hidden_layers` both route all but the last.

    Raises:
        ValueError: `mod_n` is outside 1 .. `num_hidden_layers`, or the model has a single layer.
    """
    if num_hidden_layers < 2:
        raise ValueError("a model of one layer has no layer to route: the last one never is")
    if not 1 <= mod_n <= num_hidden_layers:
        raise ValueError(f"mod_n {mod_n} is out of range: it runs from 1 to {num_hidden_layers}, the number of layers")
    return list(range(max(0, num_hidden_layers - mod_n - 1), num_hidden_layers - 1))


@dataclass(frozen=True)
class MoDSettings:
    """Say what is routed, and how; the object `mod` in `config.json`.

    Args:
        granularity: one of `ALL_GRANULARITIES`.
        layers: indices of the routed layers, ascending.
        threshold: an input is kept where `sigmoid(router_logit) >= threshold` (Eq. 2); one number for all routers, or
            one for each, in the order of `places`. Where experts are routed a layer's may be a list with one for each
            expert.
        target_capacity: share of inputs in [0, 1] that the routers were trained to execute; None where not trained.
        base_model: name of the dense model that the checkpoint was made from; for the reader only.
        substitute: what a skipped branch returns instead of nothing, `{"kind": "linear", "rank": 64}`, the rank one
            number or one for each router; None for nothing, as published.
        capacities: what else the routers can execute, `{"capacity": 0.75, "threshold": [...]}` for each capacity that
            they were calibrated for, ascending; None where they weren't. `at_capacity` chooses.
        sequence_pooling: one of `SEQUENCE_POOLINGS`, what a sequence's routers and thresholds were trained and
            calibrated on; None where not trained, and for tokens. The model itself pools what it is given.
        budget_length: where a layer has two routers, what a capacity counts an input for: the operations that skipping
            it saves in a prefill of so many tokens; None for the parameters that it saves.
    """

    granularity: str
    layers: tuple[int, ...]
    threshold: float | tuple[float | tuple[float, ...], ...] = 0.5
    target_capacity: float | None = None
    base_model: str | None = None
    substitute: dict[str, Any] | None = None
    capacities: tuple[dict[str, Any], ...] | None = None
    sequence_pooling: str | None = None
    budget_length: int | None = None

    def __post_init__(self):
        check_choice("granularity", self.granularity, ALL_GRANULARITIES)
        layers = tuple(self.layers) if isinstance(self.layers, list | tuple) else ()
        if not layers or any(type(i) is not int or i < 0 for i in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"mod.layers {self.layers} must be one or more ascending layer indices")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "threshold", _as_tuples(self.threshold))
        self._check_count("threshold", self.threshold)
        for each in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            of_experts = isinstance(each, tuple) and self.granularity == EXPERT_GRANULARITY
            for threshold in each if of_experts else (each,):
                if not _is_number(threshold) or not 0.0 < threshold < 1.0:
                    raise ValueError(f"mod.threshold {threshold!r} must be a number between 0 and 1")
        capacity = self.target_capacity
        if capacity is not None and (not _is_number(capacity) or not 0.0 <= capacity <= 1.0):
            raise ValueError(f"target_capacity {capacity!r} must be a number between 0 and 1, or be left out")
        self._check_substitute()
        if self.capacities is not None:
            self._check_capacities()
        if self.sequence_pooling is not None:
            check_choice("mod.sequence_pooling", self.sequence_pooling, SEQUENCE_POOLINGS)
        if self.budget_length is not None and (type(self.budget_length) is not int or self.budget_length < 1):
            raise ValueError(f"mod.budget_length {self.budget_length!r} must be a number of tokens, or be left out")

    def _check_count(self, name: str, values: Any) -> None:
        """Raise `ValueError` where a tuple does not have one value for each router."""
        if isinstance(values, tuple) and len(values) != len(self.places):
            routers = f"{len(self.layers)} routed layers"
            if len(self.branches) > 1:
                routers = f"the {len(self.places)} routers of {routers}"
            raise ValueError(f"mod.{name} has {len(values)} numbers for {routers}")

    def _check_capacities(self) -> None:
        entries = tuple(self.capacities) if isinstance(self.capacities, list | tuple) else ()
        if not all(isinstance(entry, dict) and set(entry) == {"capacity", "threshold"} for entry in entries):
            raise ValueError("mod.capacities must be a list of objects with capacity and threshold, or be left out")
        entries = tuple({**entry, "threshold": _as_tuples(entry["threshold"])} for entry in entries)
        shares = [entry["capacity"] for entry in entries]
        if not entries or not all(map(_is_number, shares)) or shares != sorted(set(shares)):
            raise ValueError(f"mod.capacities {shares} must be one or more ascending numbers")
        for entry in entries:  # each is a checkpoint's own setting
            replace(self, threshold=entry["threshold"], target_capacity=entry["capacity"], capacities=None)
        object.__setattr__(self, "capacities", entries)

    def at_capacity(self, capacity: float) -> "MoDSettings":
        """Return the settings by which this share of the inputs is executed.

        Between two capacities that were calibrated, thresholds lie between theirs, in logits. 1 executes everything,
        whatever was calibrated.

        Raises:
            ValueError: it was calibrated for none, `capacity` lies outside those that it was calibrated for, or between
                two of which the greater does not have the lower thresholds.
        """
        if not _is_number(capacity) or not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity {capacity!r} must be a number above 0 and at most 1")
        shares = [entry["capacity"] for entry in self.capacities or ()]
        if capacity == 1.0 and 1.0 not in shares:
            return replace(self, threshold=KEEPS_ALL, target_capacity=capacity)
        if self.capacities is None:
            raise ValueError(
                f"capacity {capacity}: the routers were calibrated for none but their own; recalibrate.py gives others"
            )
        if not shares[0] <= capacity <= shares[-1]:
            raise ValueError(
                f"capacity {capacity} is outside what the routers were calibrated for, {shares[0]} to {shares[-1]} "
                f"({', '.join(map(str, shares))}); 1 executes everything"
            )
        above = next(place for place, share in enumerate(shares) if share >= capacity)
        below = above if shares[above] == capacity else above - 1
        part = (capacity - shares[below]) / (shares[above] - shares[below]) if above != below else 0.0
        low, high = (self.capacities[place]["threshold"] for place in (below, above))
        if above != below and not _nowhere_below(low, high):
            raise ValueError(
                f"capacity {capacity}: the thresholds of {shares[below]} and {shares[above]} fall out of order, so "
                "nothing is known between them; take one of these, or recalibrate.py"
            )
        threshold = low if above == below else _between(low, high, part)
        return replace(self, threshold=threshold, target_capacity=capacity)

    def _check_substitute(self) -> None:
        substitute = self.substitute
        if substitute is None:
            return
        if not isinstance(substitute, dict) or set(substitute) != {"kind", "rank"}:
            raise ValueError(f"mod.substitute {substitute!r} must have the fields kind and rank, or be left out")
        check_choice("mod.substitute.kind", substitute["kind"], SUBSTITUTES)
        rank = _as_tuples(substitute["rank"])
        ranks = rank if isinstance(rank, tuple) else (rank,)
        self._check_count("substitute.rank", rank)
        for each in ranks:
            if type(each) is not int or each < 1:
                raise ValueError(f"mod.substitute.rank {each!r} must be a whole number from 1 to the hidden size")
        object.__setattr__(self, "substitute", {"kind": substitute["kind"], "rank": rank})

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> "MoDSettings":
        """Read the object `mod` of a `config.json`; raises `ValueError` where it is missing or has unknown fields."""
        if values is None:
            raise ValueError("the config has no object `mod`: this is not a MoD checkpoint")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"mod has unknown fields {unknown}; known are {sorted(known)}")
        missing = [name for name in ("granularity", "layers") if name not in values]
        if missing:
            raise ValueError(f"mod lacks {' and '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into `config.json`."""
        values = {field.name: _as_lists(getattr(self, field.name)) for field in fields(self)}
        for name in ("substitute", "capacities", "sequence_pooling", "budget_length"):
            if values[name] is None:
                del values[name]
        return values

    def threshold_of(self, place: Place) -> float | tuple[float, ...]:
        """Return the threshold of the router there; of experts, it may be one for each."""
        if isinstance(self.threshold, tuple):
            return self.threshold[self.places.index(place)]
        return self.threshold

    def check_size(self, hidden_size: int) -> None:
        """Raise `ValueError` where a substitute's rank is above the model's hidden size."""
        for place in self.places:
            rank = self.substitute_rank(place)
            if rank is not None and rank > hidden_size:
                raise ValueError(f"substitute rank {rank} must lie between 1 and the hidden size, {hidden_size}")

    def substitute_rank(self, place: Place) -> int | None:
        """Return the rank of the substitute of the router there; None where there is none."""
        if self.substitute is None:
            return None
        rank = self.substitute["rank"]
        return rank[self.places.index(place)] if isinstance(rank, tuple) else rank

    @cached_property
    def target(self) -> str:
        """What is gated: `attn`, `mlp`, `block`, `attn_mlp` (both, apart from each other) or `expert`."""
        return self.granularity.rsplit("_", 1)[0]

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """What each router of a layer gates, in the order of their execution."""
        return BRANCHES if self.target == "attn_mlp" else (self.target,)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where the routers are, in the order of their execution; that of thresholds, ranks, scores and gates."""
        return tuple(self.place_of(layer, branch) for layer in self.layers for branch in self.branches)

    def place_of(self, layer: int, branch: str) -> Place:
        """Return where the router is that gates this one of `branches` in a routed layer."""
        return (layer, branch) if len(self.branches) > 1 else layer

    def branch_of(self, place: Place) -> str:
        """Return what the router there gates: `attn`, `mlp`, `block` or `expert`."""
        return self.target if isinstance(place, int) else place[1]

    @cached_property
    def level(self) -> str:
        """What one decision is for: a whole `sequence` or a single `token`."""
        return self.granularity.rsplit("_", 1)[1]


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as `1 to 4, 7`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


class MoDConfigMixin:
    """Adds the checked object `mod` to an architecture's config class."""

    keys_to_ignore_at_inference = ["past_key_values", "router_scores", "router_gates"]

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mod is None:
            return
        settings = self.mod_settings
        if settings.layers[-1] >= self.num_hidden_layers:
            raise ValueError(f"mod.layers {self.mod['layers']} do not fit a model of {self.num_hidden_layers} layers")
        if settings.granularity == EXPERT_GRANULARITY:
            self._check_experts(settings)
        settings.check_size(self.hidden_size)

    def _check_experts(self, settings: MoDSettings) -> None:
        """Raise `ValueError` where a layer that is to have routers for its experts has no experts."""
        experts, depth = set(self.expert_layers), self.num_hidden_layers
        if not experts:
            raise ValueError(
                f"granularity {EXPERT_GRANULARITY} needs a mixture-of-experts model, and {self.model_type} is none; "
                f"use one of {', '.join(GRANULARITIES)}"
            )
        without = [layer for layer in settings.layers if layer not in experts]
        if without:
            working = [n for n in range(1, depth + 1) if set(routed_layers(depth, n)) <= experts]
            way_out = f"mod_n may be {_ranges(working)}" if working else "no mod_n avoids them: set mod.layers"
            raise ValueError(
                f"granularity {EXPERT_GRANULARITY}: layers {without} of {list(settings.layers)} have no experts; "
                f"{way_out}"
            )
        for layer in settings.layers:
            threshold = settings.threshold_of(layer)
            if isinstance(threshold, tuple) and len(threshold) != self.num_experts:
                raise ValueError(
                    f"mod.threshold has {len(threshold)} numbers for the {self.num_experts} experts of layer {layer}"
                )

    @property
    def expert_layers(self) -> list[int]:
        """Indices of the layers with experts."""
        return []

    @property
    def mod_settings(self) -> MoDSettings:
        """The object `mod`, checked."""
        return MoDSettings.from_dict(self.mod)


class MoDLlamaConfig(MoDConfigMixin, LlamaConfig):
    """Llama with routers."""

    model_type = "mod_llama"
    mod: dict | None = None


class MoDMistralConfig(MoDConfigMixin, MistralConfig):
    """Mistral with routers."""

    model_type = "mod_mistral"
    mod: dict | None = None


class MoDQwen2Config(MoDConfigMixin, Qwen2Config):
    """Qwen2 and Qwen2.5 with routers."""

    model_type = "mod_qwen2"
    mod: dict | None = None


class MoDQwen3Config(MoDConfigMixin, Qwen3Config):
    """Qwen3 with routers."""

    model_type = "mod_qwen3"
    mod: dict | None = None


class MoDMoEConfigMixin(MoDConfigMixin):
    """For architectures with experts; `num_experts` is their number in each layer that has them."""

    keys_to_ignore_at_inference = [
        *MoDConfigMixin.keys_to_ignore_at_inference,
        *("router_experts", "router_logits", "aux_loss"),
    ]

    @property
    def expert_layers(self) -> list[int]:
        """Indices of the layers with experts: all of them."""
        return list(range(self.num_hidden_layers))


class MoDOlmoeConfig(MoDMoEConfigMixin, OlmoeConfig):
    """OLMoE with routers."""

    model_type = "mod_olmoe"
    mod: dict | None = None


class MoDQwen2MoeConfig(MoDMoEConfigMixin, Qwen2MoeConfig):
    """Qwen1.5-MoE and Qwen2-MoE with routers."""

    model_type = "mod_qwen2_moe"
    mod: dict | None = None

    @property
    def expert_layers(self) -> list[int]:
        """Indices of the layers with experts, as `Qwen2MoeDecoderLayer` chooses them."""
        step, plain = self.decoder_sparse_step, self.mlp_only_layers
        return [i for i in range(self.num_hidden_layers) if i not in plain and self.num_experts and (i + 1) % step == 0]


class MoDMixtralConfig(MoDMoEConfigMixin, MixtralConfig):
    """Mixtral with routers."""

    model_type = "mod_mixtral"
    mod: dict | None = None


class MoDDeepseekV2Config(MoDMoEConfigMixin, DeepseekV2Config):
    """DeepSeek-V2 with routers."""

    model_type = "mod_deepseek_v2"
    mod: dict | None = None

    @property
    def expert_layers(self) -> list[int]:
        """Indices of the layers with experts: all after the first dense ones."""
        return list(range(self.first_k_dense_replace, self.num_hidden_layers))
