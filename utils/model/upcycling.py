"""A small mixture of experts made from a dense Llama: something to try expert routing on without a large download.

Each MLP becomes several experts. An expert has the MLP's channels but for some of those that matter least on a given
text, other ones for each expert, so that experts differ and any of them alone is near the dense MLP. A gate drawn at
random chooses among them. Attention, norms and embeddings are the dense model's. The result is an ordinary Mixtral
checkpoint, whose attention is Llama's. It has not been trained since: it shows that things work, and is somewhat worse
than its base.

The idea is that of sparse upcycling (Komatsuzaki et al., ICLR 2023), where experts start as copies and are trained.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from utils.io.errors import UserError
from utils.io.files import atomic_directory, write_json

from .checkpoint import COMPANIONS, read_config

LACKING = 0.125
"""Share of an MLP's channels that an expert lacks, of the twice as many that matter least."""

MULTIPLE = 8
"""Experts lack a multiple of so many channels: grouped matrix products want rows of whole 16 bytes."""

TOP_K = 2
"""Experts of a token, as in Mixtral."""


def upcycle(base_dir: Path, output_dir: Path, num_experts: int, input_ids: torch.Tensor, seed: int = 0) -> None:
    """Write the Mixtral checkpoint of a dense Llama.

    Args:
        base_dir: a dense Llama with safetensors weights and a tokenizer.
        output_dir: made here.
        num_experts: of each layer; each token has two of them.
        input_ids: int64 [rows, tokens], a text that shows which channels matter.
        seed: of the gates and of the choice of channels.

    Raises:
        UserError: as `mixtral_config`.
    """
    config = mixtral_config(read_config(base_dir), num_experts)
    model = LlamaForCausalLM.from_pretrained(base_dir, dtype="auto")
    with atomic_directory(output_dir) as unfinished:
        write_json(unfinished / "config.json", config)
        weights = dict(mixtral_weights(model, num_experts, channel_importance(model, input_ids), seed))
        with redirect_stdout(None):  # it prints the temporary path
            save_torch_state_dict(weights, unfinished)
        for pattern in COMPANIONS:
            for path in base_dir.glob(pattern):
                shutil.copyfile(path, unfinished / path.name)


def mixtral_config(llama: dict[str, Any], num_experts: int) -> dict[str, Any]:
    """Return the `config.json` of the Mixtral with a Llama's attention.

    Raises:
        UserError: there are too few experts, or the base is not a Llama that a Mixtral can hold.
    """
    if num_experts <= TOP_K:
        raise UserError(f"upcycle {num_experts}: a token has {TOP_K} experts, so there must be more than {TOP_K}")
    if llama["model_type"] != "llama" or llama.get("attention_bias") or llama.get("mlp_bias"):
        raise UserError(f"upcycle: only a Llama without biases can be; the base is a {llama['model_type']}")
    resolved = LlamaConfig(**llama).to_dict()  # the defaults of the two architectures differ
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp", "architectures", "model_type", "auto_map")
    return {name: value for name, value in resolved.items() if name not in dropped} | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": resolved["intermediate_size"] - lacking_channels(resolved["intermediate_size"]),
        "num_local_experts": num_experts,
        "num_experts_per_tok": TOP_K,
        "sliding_window": None,
    }


@torch.no_grad()
def mixtral_weights(
    model: torch.nn.Module, num_experts: int, importance: list[torch.Tensor], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and weights as a published Mixtral has them on disk.

    Args:
        model: a dense Llama.
        num_experts: of each layer.
        importance: of each layer's channels, as `channel_importance` returns it.
        seed: of the gates and of the choice of channels.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        if ".mlp." not in name and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield name, weight
    for index, layer in enumerate(model.model.layers):
        prefix, mlp = f"model.layers.{index}.block_sparse_moe", layer.mlp
        yield f"{prefix}.gate.weight", make_gate(layer.post_attention_layernorm.weight, num_experts, generator)
        for expert, channels in enumerate(choose_channels(importance[index], num_experts, generator)):
            yield f"{prefix}.experts.{expert}.w1.weight", mlp.gate_proj.weight[channels]
            yield f"{prefix}.experts.{expert}.w3.weight", mlp.up_proj.weight[channels]
            yield f"{prefix}.experts.{expert}.w2.weight", mlp.down_proj.weight[:, channels].contiguous()


def make_gate(norm: torch.Tensor, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a gate, [num_experts, hidden_size], whose logits are about normal(0, 1) behind a norm's weight."""
    gate = torch.randn(num_experts, len(norm), generator=generator)
    return (gate / norm.float().norm()).to(norm.dtype)


@torch.no_grad()
def channel_importance(model: torch.nn.Module, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """Return how much each channel of each MLP adds to its output over a text, float32 [intermediate_size] by layer.

    A channel adds its activation times its column of `down_proj`: the norm of the former over the tokens times the
    norm of the latter. The norms of the weights alone mislead: channels with small ones may be those that are active.

    Args:
        model: a dense Llama.
        input_ids: int64 [rows, tokens].
    """
    energy = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]

    def add(total: torch.Tensor):
        return lambda module, args: total.add_(args[0].float().flatten(0, 1).pow(2).sum(dim=0))

    down = [layer.mlp.down_proj for layer in model.model.layers]
    handles = [module.register_forward_pre_hook(add(total)) for module, total in zip(down, energy, strict=True)]
    for row in input_ids.split(1):
        model(row, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return [e.sqrt() * module.weight.float().norm(dim=0) for e, module in zip(energy, down, strict=True)]


def choose_channels(importance: torch.Tensor, num_experts: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Choose the channels that each expert keeps, int64 [kept] ascending.

    The less important channels stand in a circle, in random order, and each expert lacks a stretch of it that begins
    where its number says: each of them is lacking in equally many experts.

    Args:
        importance: float [intermediate_size].
        num_experts: of the layer.
        generator: draws the order.
    """
    size = len(importance)
    lacking = lacking_channels(size)
    pool = importance.argsort()[: 2 * lacking]
    circle = pool[torch.randperm(len(pool), generator=generator)]
    chosen = []
    for expert in range(num_experts):
        keep = torch.ones(size, dtype=torch.bool)
        keep[circle.roll(-(expert * len(pool) // num_experts))[:lacking]] = False
        chosen.append(keep.nonzero().squeeze(-1))
    return chosen


def lacking_channels(size: int) -> int:
    """Return how many of an MLP's channels an expert lacks."""
    return math.ceil(size * LACKING / MULTIPLE) * MULTIPLE
