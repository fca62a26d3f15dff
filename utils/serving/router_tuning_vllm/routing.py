"""What a checkpoint's object `mod` says, as far as serving needs it. Knows nothing of vLLM.

The semantics are those of the `configuration_mod.py` that lies in every checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("attn", "mlp", "block", "attn_mlp")
GRANULARITIES = tuple(f"{target}_{level}" for target in TARGETS for level in ("sequence", "token"))
EXECUTIONS = ("skip", "masked")
"""`skip` leaves out what is not kept, where that is known to work; `masked` computes everything and drops it."""

CAPACITY_FIELD, EXECUTION_FIELD = "routing_capacity", "routing_execution"
"""What `--hf-overrides` can set: a capacity that the checkpoint was calibrated for, and one of `EXECUTIONS`."""

KEEPS_ALL = 1e-300
"""A threshold that no score is below: as a float32 it is 0."""

REQUEST_CAPACITY = "capacity"
"""Name of a request's own capacity in its `vllm_xargs`."""


def is_number(value: Any) -> bool:
    """Tell whether a value from JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _between(low: float, high: float, part: float) -> float:
    """Return the threshold `part` of the way from one to another, in logits."""
    a, b = (math.log(threshold / (1 - threshold)) for threshold in (low, high))
    return 1 / (1 + math.exp(-(a + part * (b - a))))


@dataclass(frozen=True)
class Place:
    """One router: the index of its layer, what it gates, its threshold, and the rank of its substitute, if any."""

    layer: int
    branch: str
    threshold: float
    rank: int | None
    shared: bool

    @property
    def name(self) -> str:
        """How it is called in reports: `15`, or `15.attn` and `15.mlp` where a layer has two."""
        return f"{self.layer}.{self.branch}" if self.shared else str(self.layer)

    def module_name(self, what: str) -> str:
        """Return the name of its module in the layer; `what` is `router` or `substitute`."""
        return f"{self.branch}_{what}" if self.shared else what

    @property
    def weights(self) -> list[str]:
        """Names of its weights in a checkpoint."""
        stem = f"model.layers.{self.layer}."
        names = [stem + self.module_name("router") + ".weight"]
        if self.rank is not None:
            names += [stem + self.module_name("substitute") + f".{part}" for part in ("down", "up", "bias")]
        return names


@dataclass(frozen=True)
class Routing:
    """What is routed, and how.

    Args:
        target: what a router gates: `attn`, `mlp`, `block`, or `attn_mlp` (both, apart from each other).
        level: `sequence` (one decision for a request, from its prompt) or `token`.
        places: the routers, in the order of their execution.
        tables: capacity -> a threshold for each router; empty where none were calibrated.
    """

    target: str
    level: str
    places: tuple[Place, ...]
    tables: Mapping[float, tuple[float, ...]]

    @classmethod
    def from_config(cls, mod: Any, num_layers: int, hidden_size: int) -> "Routing":
        """Read the object `mod` of a `config.json`.

        Raises:
            ValueError: it isn't one that can be served; the message says why in one line.
        """
        if not isinstance(mod, dict) or "granularity" not in mod or "layers" not in mod:
            raise ValueError(f"mod is {mod!r}: a routed checkpoint's config.json says there what is routed")
        granularity, layers = mod["granularity"], mod["layers"]
        if granularity == "expert_token":
            raise ValueError("mod.granularity expert_token (routed experts) is not served; generate.py runs it")
        if granularity not in GRANULARITIES:
            raise ValueError(f"mod.granularity {granularity!r} is not served; known are {', '.join(GRANULARITIES)}")
        if not isinstance(layers, list | tuple) or not layers or any(type(i) is not int for i in layers):
            raise ValueError(f"mod.layers {layers!r} must be one or more layer indices")
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(f"mod.layers {list(layers)} must ascend and fit a model of {num_layers} layers")
        target, level = granularity.rsplit("_", 1)
        branches = ("attn", "mlp") if target == "attn_mlp" else (target,)
        routers = [(layer, branch) for layer in layers for branch in branches]
        thresholds = _one_for_each(mod.get("threshold", 0.5), len(routers), "threshold")
        substitute = mod.get("substitute")
        ranks = [None] * len(routers)
        if substitute is not None:
            if not isinstance(substitute, dict) or substitute.get("kind") != "linear":
                raise ValueError(f"mod.substitute {substitute!r}: only the kind linear is served")
            rank = substitute.get("rank")
            ranks = list(rank) if isinstance(rank, list | tuple) else [rank] * len(routers)
            if len(ranks) != len(routers) or any(
                type(each) is not int or not 1 <= each <= hidden_size for each in ranks
            ):
                raise ValueError(
                    f"mod.substitute.rank {rank!r} must be numbers from 1 to the hidden size, {hidden_size}"
                )
        places = tuple(
            Place(layer, branch, threshold, rank, shared=len(branches) > 1)
            for (layer, branch), threshold, rank in zip(routers, thresholds, ranks, strict=True)
        )
        tables = {}
        for entry in mod.get("capacities") or ():
            if (
                not isinstance(entry, dict)
                or set(entry) != {"capacity", "threshold"}
                or not is_number(entry["capacity"])
            ):
                raise ValueError("mod.capacities must be a list of objects with capacity and threshold, or be left out")
            tables[entry["capacity"]] = _one_for_each(entry["threshold"], len(routers), "capacities.threshold")
        return cls(target, level, places, tables)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The checkpoint's own thresholds, in the order of `places`."""
        return tuple(place.threshold for place in self.places)

    def thresholds_at(self, capacity: Any) -> tuple[float, ...]:
        """Return the thresholds by which this share is executed; between two that were calibrated, in logits.

        1 executes everything, whatever was calibrated.

        Raises:
            ValueError: none were calibrated, `capacity` isn't among or between them, or it is between two of which the
                greater does not have the lower thresholds.
        """
        if not is_number(capacity) or not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity {capacity!r} must be a number above 0 and at most 1")
        if capacity == 1.0 and 1.0 not in self.tables:
            return (KEEPS_ALL,) * len(self.places)
        if not self.tables:
            raise ValueError(
                f"capacity {capacity}: the checkpoint was calibrated for none but its own; recalibrate.py gives others"
            )
        known = sorted(self.tables)
        if not known[0] <= capacity <= known[-1]:
            raise ValueError(
                f"capacity {capacity} is outside what the checkpoint was calibrated for, {known[0]} to {known[-1]} "
                f"({', '.join(map(str, known))}); 1 executes everything"
            )
        above = next(each for each in known if each >= capacity)
        if above == capacity:
            return self.tables[above]
        below = known[known.index(above) - 1]
        part = (capacity - below) / (above - below)
        pairs = list(zip(self.tables[below], self.tables[above], strict=True))
        if any(a < b for a, b in pairs):
            raise ValueError(
                f"capacity {capacity}: the thresholds of {below} and {above} fall out of order, so nothing is known "
                "between them; take one of these, or recalibrate.py"
            )
        return tuple(_between(a, b, part) for a, b in pairs)


def _one_for_each(value: Any, routers: int, field: str) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * routers
    if len(values) != routers or any(not is_number(each) or not 0.0 < each < 1.0 for each in values):
        raise ValueError(f"mod.{field} must be numbers between 0 and 1, one for all or for each of {routers} routers")
    return values
