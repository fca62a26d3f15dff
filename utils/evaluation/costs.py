"""Arithmetic of a routed model: multiplications and KV memory of each layer, and what skipping saves of them.

A multiplication with its addition counts as two operations. Counted are the matrix products of attention and MLP, and
the language model's head for one token, and what stands in for a skipped branch; norms, rotary embeddings and the
routers themselves (measured at 0.1% of a prefill) are left out. Nothing here is a measurement: that is `benchmark.py`.
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
        mlp: operations of the MLP, or of gate and shared experts.
        experts: operations of the experts that its tokens are assigned to.
        kv_elements: numbers that its cache holds after these tokens.
    """

    queries: float
    keys_and_values: float
    mlp: float
    experts: float
    kv_elements: int

    @property
    def total(self) -> float:
        """Operations of the whole layer."""
        return self.queries + self.keys_and_values + self.mlp + self.experts


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
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    seen = min(length, window or length)
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen  # of a query and a key it may see
    if config.get("kv_lora_rank"):  # DeepSeek-V2: keys and values are unpacked from a small vector, which is cached
        rank, rope, value_dim = config["kv_lora_rank"], config["qk_rope_head_dim"], config["v_head_dim"]
        head_dim = config["qk_nope_head_dim"] + rope
        q_rank = config.get("q_lora_rank")
        query_weights = hidden * q_rank + q_rank * heads * head_dim if q_rank else hidden * heads * head_dim
        key_weights = hidden * (rank + rope) + rank * heads * (head_dim - rope + value_dim)
        kv_size = rank + rope
    else:
        head_dim = value_dim = config.get("head_dim") or hidden // heads
        query_weights = hidden * heads * head_dim
        kv_size = 2 * (config.get("num_key_value_heads") or heads) * head_dim
        key_weights = hidden * kv_size
    mlp, experts = _mlp_weights(config, layer)
    return LayerCost(
        queries=2 * (length * (query_weights + heads * value_dim * hidden) + pairs * heads * (head_dim + value_dim)),
        keys_and_values=2 * length * key_weights,
        mlp=2 * length * mlp,
        experts=2 * length * experts,
        kv_elements=seen * kv_size,
    )


def savings(
    config: dict[str, Any], settings: MoDSettings, length: int, capacity: dict[int, float], dtype: str
) -> dict[str, float]:
    """Return what a prefill of one sequence costs, and what skipping saves of it, less what substitutes cost.

    Args:
        config: a MoD checkpoint's `config.json`.
        settings: its object `mod`.
        length: tokens of the sequence.
        capacity: routed layer -> share of its inputs that is executed.
        dtype: of the keys and values, such as `bfloat16`.

    Returns:
        `flops` and `kv_bytes` of the dense model; `flops_saved` and `kv_bytes_saved` (expected, as numbers);
        `flops_of_substitutes`, which are subtracted from what is saved already.
    """
    costs = [layer_cost(config, length, layer) for layer in range(config["num_hidden_layers"])]
    flops_saved = kv_saved = of_substitutes = 0.0
    for layer in settings.layers:
        cost, skipped = costs[layer], 1 - capacity[layer]
        rank = settings.substitute_rank(layer)
        if rank is not None:  # that of experts runs on all tokens, as of most an assignment is skipped
            inputs = float(skipped > 0) if settings.target == "expert" else skipped
            of_substitutes += inputs * length * 2 * 2 * config["hidden_size"] * rank
        if settings.target in ("attn", "block"):
            flops_saved += skipped * cost.queries
            if settings.level == "sequence":  # token decisions leave keys and values to the tokens that do execute
                flops_saved += skipped * cost.keys_and_values
                kv_saved += skipped * cost.kv_elements * BYTES[dtype]
        if settings.target in ("mlp", "block"):
            flops_saved += skipped * cost.mlp
        if settings.target != "attn":
            flops_saved += skipped * cost.experts
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
