#!/usr/bin/env python3
"""Build the MoD checkpoint of a dense base model: the base linked, routers at zero."""

import logging
import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.errors import UserError, run_command

SAMPLE = ROOT / "data/sample/alpaca/alpaca_data.json"
"""Text that shows `--upcycle` which channels matter."""


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--folder_name", required=True, help="name of the checkpoint's folder under --ckpt_root")
    parser.add_argument("--ckpt_root", type=Path, default=ROOT / "ckpt", help="folder that holds the checkpoints")
    parser.add_argument(
        "--base_model", help="local directory or hub name of the dense base; for a folder with a config.json, its own"
    )
    parser.add_argument("--mod_n", type=int, help="number of routed layers; default: the folder's, or half of them")
    parser.add_argument("--granularity", help="what is gated, for what unit; default: the folder's, or attn_sequence")
    parser.add_argument("--threshold", type=float, help="inputs are kept where sigmoid(logit) >= threshold")
    parser.add_argument(
        "--merge_lora", type=Path, help="instead of a base: output directory of a run with --use_lora, to be merged"
    )
    parser.add_argument(
        "--routers", help="hub name or folder of routers that publish.py has made, to be put on their base"
    )
    parser.add_argument("--revision", help="branch, tag or commit of --routers")
    parser.add_argument(
        "--upcycle",
        type=int,
        metavar="N",
        help="make a mixture of N experts of a dense Llama first, untrained and in FOLDER_NAME-base, and route that",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what --upcycle draws: gates, and what experts lack")
    parser.add_argument("--save_base", choices=("link", "copy"), default="link", help="link the base's weights or copy")
    parser.add_argument("--overwrite", action="store_true", help="build again where a checkpoint is already there")
    parser.add_argument(
        "--reuse", action="store_true", help="where a checkpoint of the same base is already there, leave it as it is"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from utils.io.locks import sole_writer

    if not args.folder_name or Path(args.folder_name).name != args.folder_name:
        raise UserError(f"folder_name {args.folder_name!r} must be a plain name, of a folder under {args.ckpt_root}")
    if args.reuse and (args.overwrite or args.upcycle is not None or args.merge_lora is not None):
        raise UserError("reuse excludes overwrite, upcycle and merge_lora, which write a checkpoint anew")
    if args.revision is not None and args.routers is None:
        raise UserError("revision is of --routers, which is not given")
    if args.routers is not None and (args.reuse or args.merge_lora is not None):
        raise UserError("routers excludes reuse and merge_lora")
    output_dir = args.ckpt_root / args.folder_name
    with sole_writer(output_dir, wait=True):
        if args.merge_lora is not None:
            merge(args, output_dir)
        elif args.routers is not None:
            assemble(args, output_dir)
        else:
            build(args, output_dir)
    print(output_dir)


def build(args: Namespace, output_dir: Path) -> None:
    """Write the checkpoint of a base, or find that it is there."""
    import torch

    from utils.data.chat_format import ends_of_turn
    from utils.evaluation.prompts import cut_prompts, read_text
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import INDEX_FILE, build_mod_checkpoint, load_tokenizer, make_settings, read_config
    from utils.model.tokenizer_match import end_generation_at, stop_tokens
    from utils.model.upcycling import mixtral_config, upcycle

    variant = read_config(output_dir) if (output_dir / "config.json").is_file() else None
    base_model = args.base_model or (variant or {}).get("mod", {}).get("base_model")
    if base_model is None:
        known = ", ".join(sorted(path.parent.name for path in args.ckpt_root.glob("*/config.json")))
        raise UserError(f"folder_name {args.folder_name}: a new one needs --base_model (there are: {known or 'none'})")
    there = (output_dir / INDEX_FILE).exists()
    if there and args.reuse:
        if args.base_model is not None:
            refuse_other_base(args.base_model, resolve_base_model(args.base_model), output_dir)
        return
    if there and not args.overwrite:
        raise UserError(f"{output_dir} holds a checkpoint already; use it, or build it again with --overwrite")

    base_dir = resolve_base_model(base_model)
    base = read_config(base_dir)
    if args.upcycle is not None:
        base = mixtral_config(base, args.upcycle)
    for name, ours in (("model_type", "mod_" + base["model_type"]), ("num_hidden_layers", base["num_hidden_layers"])):
        if variant is not None and variant[name] != ours:
            raise UserError(
                f"{base_dir}: not a base for {args.folder_name}, whose config.json has {name} {variant[name]!r} where "
                f"this base makes it {ours!r}; choose another --folder_name"
            )
    # of a local base only the name: the checkpoint travels, its maker's folders don't
    name = Path(base_model).resolve().name if Path(base_model).is_dir() else base_model
    if args.upcycle is not None:
        name += f", upcycled to {args.upcycle} experts"
    settings = make_settings(variant or base, args.mod_n, args.granularity, args.threshold, base_model=name)
    if args.upcycle is not None:
        upcycled = output_dir.with_name(f"{output_dir.name}-base")
        if upcycled.exists() and not args.overwrite:
            raise UserError(f"{upcycled} is there already; build it again with --overwrite")
        shutil.rmtree(upcycled, ignore_errors=True)
        token_ids = load_tokenizer(base_dir)(read_text(SAMPLE), add_special_tokens=False, verbose=False).input_ids
        upcycle(base_dir, upcycled, args.upcycle, cut_prompts(torch.tensor(token_ids), 4, 256), args.seed)
        logging.info("%s: a mixture of %d experts, untrained, in %s", base_model, args.upcycle, upcycled)
        base_dir = upcycled
    tokenizer = load_tokenizer(base_dir)
    stops = stop_tokens(base_dir, tokenizer, ends_of_turn(tokenizer))
    how = build_mod_checkpoint(base_dir, output_dir, settings, copy_base=args.save_base == "copy")
    logging.info("%s: %s of layers %s", base_model, settings.granularity, list(settings.layers))
    logging.info("base weights: %s", how)
    if end_generation_at(output_dir, stops):
        logging.info("generation_config.json: generation ends at %s", tokenizer.convert_ids_to_tokens(stops))


def assemble(args: Namespace, output_dir: Path) -> None:
    """Write the checkpoint of published routers, on their base."""
    from utils.data.chat_format import ends_of_turn
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import load_tokenizer, read_config
    from utils.model.publishing import assemble as put_on_base
    from utils.model.publishing import fetch
    from utils.model.tokenizer_match import end_generation_at, stop_tokens

    for name in ("mod_n", "granularity", "threshold", "upcycle"):
        if getattr(args, name) is not None:
            raise UserError(f"{name} and routers exclude each other: trained routers have their own")
    if output_dir.exists() and not args.overwrite:
        raise UserError(f"{output_dir} is there already; choose another --folder_name, or --overwrite it")
    routers_dir = fetch(args.routers, args.revision)
    base_model = args.base_model or read_config(routers_dir).get("mod", {}).get("base_model")
    if not base_model:
        raise UserError(f"routers {args.routers}: they name no base; give --base_model")
    base_dir = resolve_base_model(base_model)
    tokenizer = load_tokenizer(base_dir)
    stops = stop_tokens(base_dir, tokenizer, ends_of_turn(tokenizer))
    how = put_on_base(routers_dir, base_dir, output_dir, copy_base=args.save_base == "copy")
    logging.info("routers of %s on %s: base weights: %s", args.routers, base_model, how)
    end_generation_at(output_dir, stops)


def refuse_other_base(base_model: str, base_dir: Path, output_dir: Path) -> None:
    """Raise `UserError` where the checkpoint that is there is of another base, whatever the two are called."""
    from utils.model.base_identity import difference_of_bases, identify_model

    differs = difference_of_bases(identify_model(output_dir), identify_model(base_dir))
    if differs:
        raise UserError(
            f"base_model {base_model}: {output_dir} is already built from another base ({differs} differs); choose "
            "another folder_name"
        )


def merge(args: Namespace, output_dir: Path) -> None:
    """Write the checkpoint of a run with LoRA, its adapter merged into the weights."""
    from utils.model.checkpoint import merge_adapter

    for name in ("base_model", "mod_n", "granularity", "threshold", "upcycle"):
        if getattr(args, name) is not None:
            raise UserError(f"{name} and merge_lora exclude each other: what is merged has its own")
    if output_dir.resolve() == args.merge_lora.resolve():
        raise UserError(f"merge_lora {args.merge_lora} can't be merged into itself; choose another --folder_name")
    if output_dir.exists() and not args.overwrite:
        raise UserError(f"{output_dir} is there already; choose another --folder_name, or --overwrite it")
    merge_adapter(args.merge_lora, output_dir)
    logging.info("%s: adapter merged into the weights", args.merge_lora)


if __name__ == "__main__":
    run_command(main)
