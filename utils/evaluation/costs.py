"""Arithmetic of a routed model: multiplications and KV memory of each layer, and what skipping saves of them.

A multiplication with its addition counts as two operations. Counted are the matrix products of attention and MLP, and
the language model's head for one token; norms, rotary embeddings and the routers themselves (measured at 0.1% of a
prefill) are left out. Nothing here is a measurement: that is `benchmark.py`.
"""

from dataclasses import dataclass
from typing import Any

from utils.model.configuration_mod import MoDSettings

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""Bytes of a number, by the name of its dtype."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one sequence of a length.

    Args:
        queries: operations of what an attention computes for the tokens that execute it: queries, scores, weighted
            values and output.
        keys_and_values: operations of its keys and values.
        mlp: operations of the MLP; of a layer of experts, those that a token is sent to.
        kv_elements: numbers that its cache holds after these tokens.
    """

    queries: float
    keys_and_values: float
    mlp: float
    kv_elements: int

    @property
    def total(self) -> float:
        """Operations of the whole layer."""
        return self.queries + self.keys_and_values + self.mlp


def layer_cost(config: dict[str, Any], length: int) -> LayerCost:
    """Return the cost of a prefill of `length` tokens in one layer of a model.

    Args:
        config: a `config.json`, dense or MoD.
        length: tokens of the sequence; what a sliding window hides is not counted.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_size = (config.get("num_key_value_heads") or heads) * head_dim
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    seen = min(length, window or length)
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen  # of a query and a key it may see
    width, matrices = config["intermediate_size"], 3
    experts = config.get("num_experts_per_tok")
    if experts:
        width = experts * (config.get("moe_intermediate_size") or width) + (
            config.get("shared_expert_intermediate_size") or 0
        )
    return LayerCost(
        queries=2 * (2 * length * hidden * heads * head_dim + 2 * pairs * heads * head_dim),
        keys_and_values=2 * length * 2 * hidden * kv_size,
        mlp=2 * length * matrices * hidden * width,
        kv_elements=2 * seen * kv_size,
    )


def savings(
    config: dict[str, Any], settings: MoDSettings, length: int, capacity: dict[int, float], dtype: str
) -> dict[str, float]:
    """Return what a prefill of one sequence costs, and what skipping saves of it.

    Args:
        config: a MoD checkpoint's `config.json`.
        settings: its object `mod`.
        length: tokens of the sequence.
        capacity: routed layer -> share of its inputs that is executed.
        dtype: of the keys and values, such as `bfloat16`.

    Returns:
        `flops` and `kv_bytes` of the dense model, `flops_saved` and `kv_bytes_saved` (expected, as numbers).
    """
    cost = layer_cost(config, length)
    depth, vocabulary = config["num_hidden_layers"], config.get("vocab_size", 0)
    skipped = sum(1 - capacity[layer] for layer in settings.layers)
    branch, kept_in_cache = 0.0, 0.0
    if settings.target in ("attn", "block"):
        branch += cost.queries
        if settings.level == "sequence":  # token decisions leave keys and values to the tokens that do execute
            branch += cost.keys_and_values
            kept_in_cache = cost.kv_elements * BYTES[dtype]
    if settings.target != "attn":  # `mlp`, `block`, and `expert`, whose capacity counts assignments
        branch += cost.mlp
    return {
        "flops": depth * cost.total + 2 * config["hidden_size"] * vocabulary,
        "flops_saved": skipped * branch,
        "kv_bytes": float(depth * cost.kv_elements * BYTES[dtype]),
        "kv_bytes_saved": skipped * kept_in_cache,
    }
