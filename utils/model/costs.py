"""Arithmetic of a routed model: parameters, operations and KV memory of each layer, and what skipping saves of them.

A multiplication with its addition counts as two operations. Counted are the matrix products of attention and MLP, and
the language model's head for one token, and what stands in for a skipped branch; norms, biases, rotary embeddings and
the routers themselves (measured at 0.1% of a prefill) are left out. Nothing here is a measurement: that is
`benchmark.py`.

A **capacity** is the share of inputs that is executed; where attention and MLP of a layer have a router each, inputs
count as much as skipping them saves (`capacity_weights`). What is **skipped** is the share of the decoder layers'
parameters that is not computed with for a token, on average; those of substitutes count against it. Of a mixture of
experts the parameters are those that a token meets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .configuration_mod import MoDSettings, Place, layer_of

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""Bytes of a number, by the name of its dtype."""


REPORTED_LENGTHS = (512, 2048)
"""Tokens of the prefills whose operations are reported beside a capacity."""


@dataclass(frozen=True)
class LayerParts:
    """What the parts of one layer count: parameters, or operations.

    Args:
        queries: of what an attention computes for the tokens that execute it: queries and output, as operations scores
            and weighted values too.
        keys_and_values: of its keys and values.
        mlp: of the MLP, or of gate and shared experts.
        experts: of the experts that a token is assigned to.
    """

    queries: float
    keys_and_values: float
    mlp: float
    experts: float

    @property
    def total(self) -> float:
        """The whole layer's."""
        return self.queries + self.keys_and_values + self.mlp + self.experts

    def skipped_by(self, branch: str, level: str) -> float:
        """Return what an input that a router skips leaves out.

        Args:
            branch: what the router gates: `attn`, `mlp`, `block` or `expert`.
            level: `sequence` or `token`; the latter leaves keys and values to the tokens that do execute.
        """
        left_out = 0.0
        if branch in ("attn", "block"):
            left_out += self.queries + (self.keys_and_values if level == "sequence" else 0.0)
        if branch in ("mlp", "block"):
            left_out += self.mlp
        return left_out + (self.experts if branch != "attn" else 0.0)


@dataclass(frozen=True)
class LayerCost(LayerParts):
    """Operations of one layer for one sequence of a length.

    Args:
        kv_elements: numbers that its cache holds after these tokens.
    """

    kv_elements: int


def number_of_experts(config: dict[str, Any]) -> int:
    """Return how many experts a layer with experts has; 0 for a model without."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((config[name] for name in names if config.get(name)), 0)


def layer_cost(config: dict[str, Any], length: int, layer: int = 0) -> LayerCost:
    """Return the cost of a prefill of `length` tokens in one layer of a model.

    Args:
        config: a `config.json`, dense or MoD.
        length: tokens of the sequence; what a sliding window hides is not counted.
        layer: index of the layer; only in mixtures of experts, some of whose layers have none, are they different.
    """
    heads, (head_dim, value_dim), kv_size = config["num_attention_heads"], _head_dims(config), _kv_size(config)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    seen = min(length, window or length)
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen  # of a query and a key it may see
    weights = layer_parameters(config, layer)
    return LayerCost(
        queries=2 * (length * weights.queries + pairs * heads * (head_dim + value_dim)),
        keys_and_values=2 * length * weights.keys_and_values,
        mlp=2 * length * weights.mlp,
        experts=2 * length * weights.experts,
        kv_elements=seen * kv_size,
    )


def layer_parameters(config: dict[str, Any], layer: int = 0) -> LayerParts:
    """Return the parameters that a token meets in one layer of a model; arguments as of `layer_cost`."""
    hidden, heads, (head_dim, value_dim) = config["hidden_size"], config["num_attention_heads"], _head_dims(config)
    if config.get("kv_lora_rank"):  # DeepSeek-V2: keys and values are unpacked from a small vector, which is cached
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        q_rank = config.get("q_lora_rank")
        query_weights = hidden * q_rank + q_rank * heads * head_dim if q_rank else hidden * heads * head_dim
        key_weights = hidden * (rank + rope) + rank * heads * (head_dim - rope + value_dim)
    else:
        query_weights, key_weights = hidden * heads * head_dim, hidden * _kv_size(config)
    return LayerParts(query_weights + heads * value_dim * hidden, key_weights, *_mlp_weights(config, layer))


def _head_dims(config: dict[str, Any]) -> tuple[int, int]:
    """Return the dimensions of a head's queries and values."""
    if config.get("kv_lora_rank"):
        return config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return head_dim, head_dim


def _kv_size(config: dict[str, Any]) -> int:
    """Return how many numbers a cache holds for a token."""
    if config.get("kv_lora_rank"):
        return config["kv_lora_rank"] + config["qk_rope_head_dim"]
    return 2 * (config.get("num_key_value_heads") or config["num_attention_heads"]) * _head_dims(config)[0]


def saved_by_skipping(config: dict[str, Any], settings: MoDSettings, length: int | None = None) -> dict[Place, float]:
    """Return place of a router -> what it saves to skip all its inputs, less what the substitute costs.

    Args:
        config: a `config.json`, with the architecture's defaults for what it leaves out.
        settings: its object `mod`.
        length: count the operations of a prefill of so many tokens; None counts parameters.
    """
    saved = {}
    for place in settings.places:
        layer = layer_of(place)
        parts = layer_parameters(config, layer) if length is None else layer_cost(config, length, layer)
        saved[place] = parts.skipped_by(settings.branch_of(place), settings.level)
        saved[place] -= (1 if length is None else 2 * length) * _substitute_parameters(config, settings, place)
    return saved


def capacity_weights(config: dict[str, Any], settings: MoDSettings) -> dict[Place, float]:
    """Return place of a router -> what its inputs count in a capacity; the sum is 1.

    Where a layer has a single router all count alike, as published; where it has two, by what skipping an input saves:
    parameters, or with `budget_length` operations.
    """
    if len(settings.branches) == 1:
        return dict.fromkeys(settings.places, 1 / len(settings.places))
    saved = saved_by_skipping(config, settings, settings.budget_length)
    total = sum(saved.values())
    return {place: value / total for place, value in saved.items()}


def capacity_of(executed: Mapping[Place, float], weights: Mapping[Place, float]) -> float:
    """Return the capacity of routers that execute these shares of their inputs.

    Args:
        executed: place -> share.
        weights: of `capacity_weights`.
    """
    return sum(weights[place] * share for place, share in executed.items())


def skipped_share(
    config: dict[str, Any], settings: MoDSettings, executed: Mapping[Place, float], length: int | None = None
) -> float:
    """Return the share of the decoder layers' parameters that is not computed with for a token, on average.

    Args:
        config, settings: as of `saved_by_skipping`.
        executed: place -> share of the inputs that is executed.
        length: the share of the layers' operations in a prefill of so many tokens instead.
    """
    skipped = 0.0
    for place, saved in saved_by_skipping(config, settings, length).items():
        skipped += (1 - executed[place]) * saved
        if settings.target == "expert" and 0 < executed[place] < 1:  # its substitute runs on every token
            cost = _substitute_parameters(config, settings, place) * (1 if length is None else 2 * length)
            skipped -= executed[place] * cost
    return skipped / _of_all_layers(config, length)


def capacity_to_skip(config: dict[str, Any], settings: MoDSettings, skipped: float) -> float:
    """Return the capacity at which this share of the decoder layers' parameters is skipped.

    With `budget_length` it is the share of their operations in a prefill of so many tokens. Where layers with a single
    router differ in size, it is exact as far as all execute the same share.

    Args:
        config, settings: as of `saved_by_skipping`.
        skipped: the share, above 0.

    Raises:
        ValueError: the routed layers cannot skip so much; the message names the most that they can.
    """
    length = settings.budget_length
    saved, total = saved_by_skipping(config, settings, length), _of_all_layers(config, length)
    most, constant = sum(saved.values()) / total, 0.0
    if not 0.0 < skipped < most:
        raise ValueError(
            f"{skipped} is out of reach: {settings.granularity} in {len(settings.layers)} of "
            f"{config['num_hidden_layers']} layers can skip more than 0 and less than {_rounded_down(most)} of "
            "the decoder layers; route more layers (mod_n), or more of each (granularity)"
        )
    if settings.target == "expert":  # substitutes run on every token, whatever is skipped
        unit = 1 if length is None else 2 * length
        constant = unit * sum(_substitute_parameters(config, settings, place) for place in settings.places) / total
    return max(1e-4, round(1.0 - (skipped + constant) / (most + constant), 4))


def _rounded_down(share: float) -> float:
    return int(share * 1000) / 1000


def _of_all_layers(config: dict[str, Any], length: int | None) -> float:
    layers = range(config["num_hidden_layers"])
    if length is None:
        return sum(layer_parameters(config, layer).total for layer in layers)
    return sum(layer_cost(config, length, layer).total for layer in layers)


def _substitute_parameters(config: dict[str, Any], settings: MoDSettings, place: Place) -> int:
    """Return the parameters of what a skipped input meets instead of its branch; biases are left out everywhere."""
    return 2 * config["hidden_size"] * (settings.substitute_rank(place) or 0)


def budget(config: dict[str, Any], settings: MoDSettings, executed: Mapping[Place, float]) -> dict[str, float]:
    """Return what is skipped where routers execute these shares of their inputs, as reports have it.

    Args:
        config, settings: as of `saved_by_skipping`.
        executed: place -> share.

    Returns:
        `skipped`, share of the decoder layers' parameters, and for each of `REPORTED_LENGTHS` `flops_saved_512` and the
        like, share of the model's operations in a prefill of so many tokens, the head's for one token included.
    """
    saved = {length: savings(config, settings, length, executed, "float32") for length in REPORTED_LENGTHS}
    return {
        "skipped": skipped_share(config, settings, executed),
        **{f"flops_saved_{length}": cost["flops_saved"] / cost["flops"] for length, cost in saved.items()},
    }


def savings(
    config: dict[str, Any], settings: MoDSettings, length: int, capacity: Mapping[Place, float], dtype: str
) -> dict[str, float]:
    """Return what a prefill of one sequence costs, and what skipping saves of it, less what substitutes cost.

    Args:
        config: a MoD checkpoint's `config.json`.
        settings: its object `mod`.
        length: tokens of the sequence.
        capacity: place of a router -> share of its inputs that is executed.
        dtype: of the keys and values, such as `bfloat16`.

    Returns:
        `flops` and `kv_bytes` of the dense model; `flops_saved` and `kv_bytes_saved` (expected, as numbers);
        `flops_of_substitutes`, which are subtracted from what is saved already.
    """
    costs = [layer_cost(config, length, layer) for layer in range(config["num_hidden_layers"])]
    flops_saved = kv_saved = of_substitutes = 0.0
    for place in settings.places:
        cost, skipped, branch = costs[layer_of(place)], 1 - capacity[place], settings.branch_of(place)
        # that of experts runs on all tokens, as of most an assignment is skipped
        inputs = float(skipped > 0) if branch == "expert" else skipped
        of_substitutes += inputs * length * 2 * _substitute_parameters(config, settings, place)
        flops_saved += skipped * cost.skipped_by(branch, settings.level)
        if branch in ("attn", "block") and settings.level == "sequence":
            kv_saved += skipped * cost.kv_elements * BYTES[dtype]
    return {
        "flops": sum(cost.total for cost in costs) + 2 * config["hidden_size"] * config.get("vocab_size", 0),
        "flops_saved": flops_saved - of_substitutes,
        "flops_of_substitutes": of_substitutes,
        "kv_bytes": float(sum(cost.kv_elements for cost in costs) * BYTES[dtype]),
        "kv_bytes_saved": kv_saved,
    }


def _mlp_weights(config: dict[str, Any], layer: int) -> tuple[int, int]:
    """Return the weights that a token meets in a layer's MLP, gate and shared experts, and in its chosen experts."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    experts = number_of_experts(config)
    plain = layer in (config.get("mlp_only_layers") or ()) or layer < config.get("first_k_dense_replace", 0)
    if not experts or plain or (layer + 1) % (config.get("decoder_sparse_step") or 1):
        return 3 * hidden * width, 0
    expert_width = config.get("moe_intermediate_size") or width
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * expert_width
    return hidden * experts + 3 * hidden * shared, 3 * hidden * config["num_experts_per_tok"] * expert_width
