#!/usr/bin/env python3
"""Write a dense base of a real shape with random weights, in shards as the hub has them, to rehearse with.

    python entrypoints/checkpoint/make_random_base.py --like ckpt/llama3-8b-instruct-mod --output_dir outputs/random-8b

Layers are made and written one after the other, so a model of 16 GB takes no more memory than a shard.
"""

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--like", type=Path, default=ROOT / "ckpt/llama3-8b-instruct-mod", help="folder whose config.json has the shape"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where it goes; must be new")
    parser.add_argument("--layers", type=int, help="another number of layers (the shape's)")
    parser.add_argument(
        "--tokenizer", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="model whose tokenizer it gets"
    )
    parser.add_argument("--shard_gb", type=float, default=5.0, help="size of a file, at most (5)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    import torch
    from safetensors.torch import save_file

    from utils.io.files import atomic_directory, write_json
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import make_settings, meta_model, read_config, router_name

    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.output_dir.exists():
        raise UserError(f"output_dir {args.output_dir} is there already; choose another")
    if args.layers is not None and args.layers < 2:
        raise UserError(f"layers {args.layers} must be at least 2: the last one is never routed")
    if not args.shard_gb > 0:
        raise UserError(f"shard_gb {args.shard_gb} must be above 0")
    config = read_config(args.like)
    for name in ("mod", "auto_map"):
        config.pop(name, None)
    config["model_type"] = config["model_type"].removeprefix("mod_")
    config["architectures"] = [name.removeprefix("MoD") for name in config.get("architectures") or []]
    config["dtype"] = "bfloat16"
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    model = meta_model(config, make_settings(config))
    added = {router_name(place) for place in model.router_modules()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in added}
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    free = shutil.disk_usage(
        next(p for p in [args.output_dir.resolve(), *args.output_dir.resolve().parents] if p.exists())
    )
    size = 2 * sum(shape.numel() for shape in shapes.values())
    if free.free < 1.05 * size:
        raise UserError(
            f"output_dir {args.output_dir}: {size / 1e9:.1f} GB are needed and {free.free / 1e9:.1f} GB free"
        )

    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held and held + 2 * shape.numel() > args.shard_gb * 1e9:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * shape.numel()
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer_dir = resolve_base_model(args.tokenizer)
    with atomic_directory(args.output_dir) as unfinished:
        places = {}
        for number, names in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: random_weight(name, shapes[name], config, generator) for name in names}
            save_file(tensors, unfinished / file_name, {"format": "pt"})
            places |= dict.fromkeys(names, file_name)
            logging.info("%s: %d weights", file_name, len(names))
        write_json(
            unfinished / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places}
        )
        vocabulary = json.loads((tokenizer_dir / "config.json").read_text())["vocab_size"]
        if vocabulary > config["vocab_size"]:
            raise UserError(f"tokenizer {args.tokenizer}: has {vocabulary} tokens, the shape {config['vocab_size']}")
        write_json(unfinished / "config.json", config)
        for path in tokenizer_dir.glob("*token*"):
            shutil.copyfile(path, unfinished / path.name)
        for path in tokenizer_dir.glob("chat_template*"):
            shutil.copyfile(path, unfinished / path.name)
    print(args.output_dir)


def random_weight(name, shape, config, generator):
    """Return a bfloat16 weight: norms are one, biases zero, matrices normal, and small where they add to the stream."""
    import torch

    if len(shape) == 1:
        return torch.full(shape, float("norm" in name), dtype=torch.bfloat16)
    scale = config.get("initializer_range", 0.02)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale /= (2 * config["num_hidden_layers"]) ** 0.5
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=scale, generator=generator)


if __name__ == "__main__":
    run_command(main)
