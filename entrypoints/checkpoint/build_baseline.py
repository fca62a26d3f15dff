#!/usr/bin/env python3
"""Write a baseline that routing is measured against, as an ordinary MoD checkpoint.

cosine, greedy: static Layer Drop; as many routed layers as the capacity asks for skip everything.
expert_drop: static Expert Drop, for expert_token; the experts with the least of the gate's weight, over all routed
    layers together, are never executed: as many as the capacity asks for, which counts the tokens assigned to them.
random: routers that do not know what they read, at the same capacity.
dlo: routers that predict where a layer leaves the residual stream alike, the label that DLO trains on.
skip_transformer: routers trained by the task's loss with gates that scale the branch.
The last two are ideas of these methods for linear routers on a frozen model (utils/pipeline/trained_baselines.py).
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.io.errors import UserError, run_command

TRAINED = ("dlo", "skip_transformer")
CALIBRATION_ROWS = 64
"""Rows that the thresholds of trained routers are set on, beside those that they are trained on."""


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cosine", "greedy", "expert_drop", "random", *TRAINED))
    parser.add_argument("--model_name_or_path", required=True, help="MoD checkpoint or dense base")
    parser.add_argument("--output_dir", required=True, help="where the checkpoint goes; must be new or empty")
    parser.add_argument("--capacity", type=float, default=0.5, help="share of inputs to execute (default: 0.5)")
    parser.add_argument(
        "--drop_share",
        type=float,
        help="expert_drop: this share of the experts instead (the paper's 0.25), whatever capacity that leaves",
    )
    parser.add_argument("--train_file", required=True, help="data.jsonl whose text the choice is made on")
    parser.add_argument(
        "--rows", type=int, help="rows of it to use, drawn at random (default: 32, of dlo and skip_transformer 256)"
    )
    parser.add_argument("--max_seq_length", type=int, default=256, help="rows are cut to this many tokens")
    parser.add_argument("--mod_n", type=int, help="number of routed layers; default: the checkpoint's")
    parser.add_argument("--granularity", help="default: the checkpoint's")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the model; auto is bfloat16 on a GPU and float32 on a CPU (default: auto)",
    )
    parser.add_argument("--seed", type=int, default=233, help="of the rows and of random routers")
    args = parser.parse_args(argv)
    if args.rows is None:
        args.rows = 256 if args.kind in TRAINED else 32
    return args


def main() -> None:
    import torch

    from utils.data.collation import SupervisedCollator
    from utils.data.messages import load_messages
    from utils.data.splitting import split_for_training
    from utils.data.tokenization import tokenize_dataset
    from utils.io.files import atomic_directory, write_json
    from utils.io.locks import write_alone_until_exit
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import (
        load_mod_model,
        load_tokenizer,
        make_settings,
        read_config,
        router_name,
        set_thresholds,
        write_checkpoint,
    )
    from utils.pipeline.calibration import calibrate, settle
    from utils.pipeline.held_out import held_out_results
    from utils.pipeline.importance import expert_weight, greedy, least_important, most_similar
    from utils.pipeline.trained_baselines import scaled_routers, similarity_routers

    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not 0.0 <= args.capacity <= 1.0:
        raise UserError(f"capacity {args.capacity} must lie between 0 and 1")
    if args.drop_share is not None and not (args.kind == "expert_drop" and 0.0 <= args.drop_share < 1.0):
        raise UserError(f"drop_share {args.drop_share} is for expert_drop, and at least 0 and below 1")
    if args.rows < 1:
        raise UserError(f"rows {args.rows} must be at least 1")
    output_dir = Path(args.output_dir)
    write_alone_until_exit(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} is not empty; choose another")

    model_dir = resolve_base_model(args.model_name_or_path)
    settings = make_settings(
        read_config(model_dir), args.mod_n, args.granularity, threshold=0.5, target_capacity=args.capacity
    )
    kinds = ("expert_drop", "random") if settings.target == "expert" else ("cosine", "greedy", "random", *TRAINED)
    if args.kind not in kinds:
        raise UserError(f"{args.kind} is not for {settings.granularity}, whose baselines are {', '.join(kinds)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(model_dir)
    rows, held_out, others = split_for_training(
        load_messages(args.train_file), args.seed, args.rows, max_eval_samples=64
    )
    collate = SupervisedCollator.for_tokenizer(tokenizer)

    def make_batches(part):
        tokenized, report = tokenize_dataset(part, tokenizer, max_seq_length=args.max_seq_length, max_dropped=0.5)
        logging.info("%s", report.summary())
        starts = range(0, len(tokenized), 8)
        made = [collate([tokenized[row] for row in range(s, min(s + 8, len(tokenized)))]) for s in starts]
        return [{name: values.to(device) for name, values in batch.items()} for batch in made]

    batches, held_out_batches = make_batches(rows), make_batches(held_out)

    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(args.dtype, args.dtype)
    model = load_mod_model(model_dir, settings, dtype=getattr(torch, dtype)).eval()
    routers = model.router_modules()
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for router in routers.values():
            router.weight.zero_()
            if args.kind == "random":
                router.weight.normal_(generator=generator)
    model.to(device)
    units = None
    if args.kind in ("random", *TRAINED):
        calibration = batches
        if args.kind in TRAINED:
            others = others.select(range(min(CALIBRATION_ROWS, len(others))))
            train = similarity_routers if args.kind == "dlo" else scaled_routers
            start = train(model, batches, args.capacity, progress=True)
            calibration = make_batches(others) if len(others) else batches
        else:
            start = spread(model, batches)
        cuts, share = calibrate(model, calibration, start, args.capacity, progress=True)
        units = settle(model, cuts, {layer: scale for layer, (_, scale) in start.items()})
        logging.info("%s routers execute %.3f of the inputs", args.kind, share)
    elif args.kind == "expert_drop":
        weight, tokens = expert_weight(model, batches)
        dropped = least_important(weight, tokens, args.capacity, args.drop_share)
        executed = 1 - float(tokens[dropped].sum() / tokens.sum())
        logging.info("dropped %d of %d experts; capacity %.4f", dropped.sum(), dropped.numel(), executed)
        set_thresholds(model, torch.where(dropped, 0.75, 0.5).tolist())  # routers at zero score one half
    else:
        count = round((1 - args.capacity) * len(routers))
        chosen = most_similar(model, batches, count) if args.kind == "cosine" else greedy(model, batches, count, True)
        logging.info("left out, in this order: %s; capacity %.4f", chosen, 1 - count / len(routers))
        # routers at zero score one half
        set_thresholds(model, [0.75 if layer in chosen else 0.5 for layer in routers])
    results = {"kind": args.kind, "held_out": held_out_results(model, held_out_batches)}
    weights = {router_name(layer): router.weight for layer, router in routers.items()}
    with atomic_directory(output_dir) as unfinished:
        write_json(unfinished / "results.json", results)
        write_checkpoint(unfinished, model_dir, model.config.mod_settings, weights, units=units)
    print(output_dir)


def spread(model, batches):
    """Return layer index -> mean and standard deviation of the router's logits where everything is kept.

    Of experts, whose logits have a mean each, the standard deviation is the mean one.
    """
    from utils.pipeline.capacity_control import router_moments

    moments = router_moments(model, batches)
    routers = model.router_modules()
    return {
        layer: (routers[layer](of.mean).tolist(), float((routers[layer].weight * of.deviation).norm(dim=1).mean()))
        for layer, of in moments.items()
    }


if __name__ == "__main__":
    run_command(main)
