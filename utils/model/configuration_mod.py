"""The `mod` settings of a checkpoint and one config class for each architecture.

A dynamic-depth (MoD) checkpoint has its base's `config.json` plus one object `mod`, which says which layers have a
router, what the router gates, and where its threshold lies. This file travels inside every checkpoint.
"""

import difflib
from dataclasses import dataclass, fields
from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

TARGETS = ("attn", "mlp", "block")
LEVELS = ("sequence", "token")
GRANULARITIES = tuple(f"{target}_{level}" for target in TARGETS for level in LEVELS)
"""What a router gates, and for what unit it decides (Table 2)."""

EXECUTIONS = ("dense", "sparse")
"""`dense` computes everything and multiplies by the mask; `sparse` leaves out what the mask drops."""


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` naming `value`, the nearest allowed one and all allowed ones, if `value` is not allowed."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}{hint}")


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
        granularity: one of `GRANULARITIES`.
        layers: indices of the routed layers, ascending.
        threshold: an input is kept where `sigmoid(router_logit) >= threshold` (Eq. 2); one number for all layers, or
            one for each routed layer, in the order of `layers`.
        target_capacity: share of inputs in [0, 1] that the routers were trained to execute; None where not trained.
        base_model: name of the dense model that the checkpoint was made from; for the reader only.
    """

    granularity: str
    layers: tuple[int, ...]
    threshold: float | tuple[float, ...] = 0.5
    target_capacity: float | None = None
    base_model: str | None = None

    def __post_init__(self):
        check_choice("granularity", self.granularity, GRANULARITIES)
        layers = tuple(self.layers) if isinstance(self.layers, list | tuple) else ()
        if not layers or any(type(i) is not int or i < 0 for i in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"mod.layers {self.layers} must be one or more ascending layer indices")
        object.__setattr__(self, "layers", layers)
        several = isinstance(self.threshold, list | tuple)
        if several:
            object.__setattr__(self, "threshold", tuple(self.threshold))
            if len(self.threshold) != len(layers):
                raise ValueError(f"mod.threshold has {len(self.threshold)} numbers for {len(layers)} routed layers")
        for threshold in self.threshold if several else (self.threshold,):
            if not _is_number(threshold) or not 0.0 < threshold < 1.0:
                raise ValueError(f"mod.threshold {threshold!r} must be a number between 0 and 1")
        capacity = self.target_capacity
        if capacity is not None and (not _is_number(capacity) or not 0.0 <= capacity <= 1.0):
            raise ValueError(f"target_capacity {capacity!r} must be a number between 0 and 1, or be left out")

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
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def threshold_of(self, layer: int) -> float:
        """Return the threshold of the routed layer with this index."""
        if isinstance(self.threshold, tuple):
            return self.threshold[self.layers.index(layer)]
        return self.threshold

    @property
    def target(self) -> str:
        """What is gated: `attn`, `mlp` or `block`."""
        return self.granularity.rsplit("_", 1)[0]

    @property
    def level(self) -> str:
        """What one decision is for: a whole `sequence` or a single `token`."""
        return self.granularity.rsplit("_", 1)[1]


class MoDConfigMixin:
    """Adds the checked object `mod` to an architecture's config class."""

    keys_to_ignore_at_inference = ["past_key_values", "router_scores", "router_gates"]

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mod is not None and self.mod_settings.layers[-1] >= self.num_hidden_layers:
            raise ValueError(f"mod.layers {self.mod['layers']} do not fit a model of {self.num_hidden_layers} layers")

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
