"""Tiny random models for the model tests: a base of each architecture, and the routed model with its weights.

The weights are large (standard deviation 0.2, norms and biases random as well), so that dropping a branch, reading the
wrong norm or attending to one token too many moves the logits by far more than rounding does.
"""

import copy
import functools
import json
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from utils.model.configuration_mod import (
    ALL_GRANULARITIES,
    GRANULARITIES,
    MoDConfigMixin,
    MoDDeepseekV2Config,
    MoDLlamaConfig,
    MoDMistralConfig,
    MoDMixtralConfig,
    MoDOlmoeConfig,
    MoDQwen2Config,
    MoDQwen2MoeConfig,
    MoDQwen3Config,
)
from utils.model.modeling_mod import (
    MoDLlamaForCausalLM,
    MoDMistralForCausalLM,
    MoDQwen2ForCausalLM,
    MoDQwen3ForCausalLM,
)
from utils.model.modeling_moe_mod import (
    MoDDeepseekV2ForCausalLM,
    MoDMixtralForCausalLM,
    MoDOlmoeForCausalLM,
    MoDQwen2MoeForCausalLM,
)

NUM_LAYERS = 6
VOCAB_SIZE = 256
HIDDEN_SIZE = 32
LAYERS = (1, 3, 4)
"""Routed layers of a default pair: not contiguous, a routed layer after a routed one, neither first nor last."""

SLIDING_WINDOW = 5
"""Smaller than every sequence of the tests, where a window is used at all."""


@dataclass(frozen=True)
class Architecture:
    """What differs between the architectures.

    Args:
        base_config, base_model, config, model: the classes.
        fields: fields of the base config that only this architecture sets.
    """

    base_config: type
    base_model: type
    config: type
    model: type
    fields: dict


MIXED_LAYER_TYPES = ["full_attention", "sliding_attention"] * (NUM_LAYERS // 2)

ARCHITECTURES = {
    "llama": Architecture(LlamaConfig, LlamaForCausalLM, MoDLlamaConfig, MoDLlamaForCausalLM, {}),
    "mistral": Architecture(
        MistralConfig, MistralForCausalLM, MoDMistralConfig, MoDMistralForCausalLM, {"sliding_window": SLIDING_WINDOW}
    ),
    "qwen2": Architecture(
        Qwen2Config,
        Qwen2ForCausalLM,
        MoDQwen2Config,
        MoDQwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "layer_types": MIXED_LAYER_TYPES},
    ),
    "qwen3": Architecture(
        Qwen3Config,
        Qwen3ForCausalLM,
        MoDQwen3Config,
        MoDQwen3ForCausalLM,
        {
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": MIXED_LAYER_TYPES[::-1],
            "head_dim": 16,  # not hidden size / heads, as in the released Qwen3 models
            "tie_word_embeddings": True,
        },
    ),
}

NUM_EXPERTS = 6

MOE_ARCHITECTURES = {
    "olmoe": Architecture(
        OlmoeConfig,
        OlmoeForCausalLM,
        MoDOlmoeConfig,
        MoDOlmoeForCausalLM,
        {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 3, "clip_qkv": 1.0},
    ),
    "qwen2_moe": Architecture(
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        MoDQwen2MoeConfig,
        MoDQwen2MoeForCausalLM,
        {
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [2],
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": MIXED_LAYER_TYPES,
        },
    ),
    "mixtral": Architecture(
        MixtralConfig,
        MixtralForCausalLM,
        MoDMixtralConfig,
        MoDMixtralForCausalLM,
        {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "sliding_window": SLIDING_WINDOW},
    ),
    "deepseek_v2": Architecture(
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        MoDDeepseekV2Config,
        MoDDeepseekV2ForCausalLM,
        {
            "n_routed_experts": NUM_EXPERTS,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "num_key_value_heads": 4,
            "kv_lora_rank": 12,
            "q_lora_rank": 20,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
        },
    ),
}
"""Mixtures of experts: with and without shared experts, layers without experts, norms and bounds of attention."""

ALL_ARCHITECTURES = ARCHITECTURES | MOE_ARCHITECTURES

SEQUENCE_GRANULARITIES = tuple(name for name in GRANULARITIES if name.endswith("_sequence"))
TOKEN_GRANULARITIES = tuple(name for name in GRANULARITIES if name.endswith("_token"))


def all_pairs() -> list:
    """Return every architecture with every granularity that it can be routed at, as cases of a test."""
    dense = [
        # what is new in these is the same for all of them
        pytest.param(arch, granularity, marks=[pytest.mark.slow] * (arch != "llama" and "attn_mlp" in granularity))
        for arch in ARCHITECTURES
        for granularity in GRANULARITIES
    ]
    moe = [(arch, granularity) for arch in MOE_ARCHITECTURES for granularity in ALL_GRANULARITIES]
    # with experts these take the same paths as those that are left
    in_slow = ("mlp_sequence", "mlp_token", "block_sequence", "attn_mlp_sequence", "attn_mlp_token")
    return dense + [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] in in_slow)) for pair in moe]


def routable_layers(arch: str, granularity: str) -> tuple[int, ...]:
    """Return all layers but the last that can be routed so: for experts, those that have some."""
    without = {"qwen2_moe": (2,), "deepseek_v2": (0,)}.get(arch, ()) if granularity == "expert_token" else ()
    return tuple(index for index in range(NUM_LAYERS - 1) if index not in without)


def make_base(arch: str, seed: int = 0, **fields) -> PreTrainedModel:
    """Return a random base model in float32 and evaluation mode; `fields` override those of its config."""
    architecture = ALL_ARCHITECTURES[arch]
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(seed)
    model = architecture.base_model(architecture.base_config(**(values | architecture.fields | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # the norms' weights start at one, the biases at zero
                low = -0.5 if "bias" in name else 0.5
                parameter.uniform_(low, low + 1.0)
    return model.eval()


def mod_config(base: PreTrainedModel, granularity: str, layers=LAYERS, **settings) -> MoDConfigMixin:
    """Return the config of the routed model over `base`; `settings` are further fields of `mod`."""
    fields = {
        name: value for name, value in base.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    mod = {"granularity": granularity, "layers": list(layers), **settings}
    config = ALL_ARCHITECTURES[base.config.model_type].config(**fields, mod=mod)
    config._attn_implementation = base.config._attn_implementation
    return config


def add_routers(base: PreTrainedModel, granularity: str, layers=LAYERS, **settings) -> PreTrainedModel:
    """Return the routed model with the base's weights and routers at zero, in evaluation mode, in float32."""
    model = ALL_ARCHITECTURES[base.config.model_type].model(mod_config(base, granularity, layers, **settings))
    problems = model.load_state_dict(base.state_dict(), strict=False)
    assert not problems.unexpected_keys
    apart = ("attn_", "mlp_") if granularity.startswith("attn_mlp") else ("",)
    places = [f"model.layers.{index}.{branch}" for index in layers for branch in apart]
    added = {f"{place}router.weight" for place in places}
    if "substitute" in settings:
        added |= {f"{place}substitute.{name}" for place in places for name in ("down", "up", "bias")}
    assert set(problems.missing_keys) == added
    return model.eval()


def make_pair(arch: str, granularity: str, layers=LAYERS, seed: int = 0, attention: str = "sdpa", **settings):
    """Return a random base model and the routed model with its weights and routers (and substitutes) at zero."""
    made = _make_pair_once(arch, granularity, tuple(layers), seed, attention, json.dumps(settings, sort_keys=True))
    return copy.deepcopy(made)  # several times faster than making them


@functools.cache
def _make_pair_once(arch, granularity, layers, seed, attention, settings):
    base = make_base(arch, seed, attn_implementation=attention)
    return base, add_routers(base, granularity, layers, **json.loads(settings))


def randomize_routers(model: PreTrainedModel, seed: int = 1, scale: float = 0.5) -> PreTrainedModel:
    """Fill the routers with normal(0, `scale`) in place: some inputs are kept, some dropped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in model.router_modules().values():
            router.weight.copy_(scale * torch.randn(router.weight.shape, generator=generator))
    return model


def randomize_substitutes(model: PreTrainedModel, seed: int = 5, scale: float = 0.3) -> PreTrainedModel:
    """Fill the substitutes with normal(0, `scale`) in place: what is skipped returns something of the branch's size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for substitute in model.substitute_modules().values():
            for parameter in substitute.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def random_tokens(batch: int, tokens: int, seed: int = 2) -> torch.Tensor:
    """Return int64 [batch, tokens], without the padding token 0."""
    return torch.randint(1, VOCAB_SIZE, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def pad(texts: list[torch.Tensor], side: str, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad texts, int64 [tokens_i], to the longest plus `extra` on the `side` left, right, or both.

    Returns:
        input ids and attention mask, each int64 [texts, tokens].
    """
    width = max(len(text) for text in texts) + extra
    input_ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, text in enumerate(texts):
        free = width - len(text)
        start = {"left": free, "right": 0, "both": free // 2}[side]
        input_ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return input_ids, mask


def texts(lengths: tuple[int, ...], seed: int = 3) -> list[torch.Tensor]:
    """Return one random text, int64 [length], for each length."""
    return [random_tokens(1, length, seed=seed + row)[0] for row, length in enumerate(lengths)]
