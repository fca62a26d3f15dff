#!/usr/bin/env python3
"""Write a baseline that routing is measured against, as an ordinary MoD checkpoint.

cosine, greedy: static Layer Drop; as many routed layers as the capacity asks for skip everything. Where attention and
    MLP are routed apart, either of a layer may go, chosen by what it costs for what it saves.
expert_drop: static Expert Drop, for expert_token; the experts with the least of the gate's weight, over all routed
    layers together, are never executed: as many as the capacity asks for, which counts the tokens assigned to them.
random: routers that do not know what they read, at the same capacity.
dlo: routers that predict where a layer leaves the residual stream alike, the label that DLO trains on.
skip_transformer: routers trained by the task's loss with gates that scale the branch.
The last two are ideas of these methods for linear routers on a frozen model (utils/pipeline/trained_baselines.py).
The thresholds of the last three are calibrated as those of a training run are: on short prompts that the dense model
answers.

With --substitute linear the others return a linear map of its input for what they skip, fitted in closed form to rows
of the training file; greedy chooses with the maps in place. results.json has held-out loss, forward speed and figures
of use, as a training run's has.
"""

import argparse
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.io.devices import choose_device
from utils.io.errors import UserError, run_command

TRAINED = ("dlo", "skip_transformer")
CALIBRATION_ROWS = 64
"""Rows whose prompts thresholds are set on, beside those that routers are made on, at most."""
FIT_ROWS = 1000
"""Rows that substitutes are fitted on, at most, beside those that the choice is made on."""


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cosine", "greedy", "expert_drop", "random", *TRAINED))
    parser.add_argument("--model_name_or_path", required=True, help="MoD checkpoint or dense base")
    parser.add_argument("--output_dir", required=True, help="where the checkpoint goes; must be new or empty")
    parser.add_argument("--capacity", type=float, help="share of inputs to execute (default: 0.5)")
    parser.add_argument(
        "--skipped", type=float, help="instead: share of the decoder layers' parameters not to compute with for a token"
    )
    parser.add_argument(
        "--drop_share",
        type=float,
        help="expert_drop: this share of the experts instead (the paper's 0.25), whatever capacity that leaves",
    )
    parser.add_argument("--train_file", required=True, help="data.jsonl whose text the choice is made on")
    parser.add_argument(
        "--rows", type=int, help="rows of it to use, drawn at random (default: 32, of dlo and skip_transformer 256)"
    )
    parser.add_argument(
        "--substitute",
        choices=("none", "linear"),
        default="none",
        help="what a skipped branch returns: linear, a low-rank linear map of its input, fitted to the branch (none)",
    )
    parser.add_argument(
        "--substitute_rank",
        type=int,
        help="rank of these maps, from 1 to the hidden size (the hidden size over 12 for attention, over 9 for MLP and "
        "experts, over 8 for blocks)",
    )
    parser.add_argument(
        "--max_use_prompts", type=int, default=16, help="held-out prompts that are answered at the end; 0: none (16)"
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
    from dataclasses import replace

    import torch
    from datasets import concatenate_datasets

    from utils.data.chat_format import ends_of_answers
    from utils.data.collation import SupervisedCollator
    from utils.data.messages import load_messages
    from utils.data.prompts import held_out_prompts
    from utils.data.splitting import split_for_training
    from utils.data.tokenization import tokenize_dataset
    from utils.evaluation.forward_speed import middling_batches
    from utils.evaluation.use import longest_prompt
    from utils.io.files import atomic_directory, write_json
    from utils.io.locks import write_alone_until_exit
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import (
        complete_config,
        load_mod_model,
        load_tokenizer,
        make_settings,
        read_config,
        router_name,
        substitute_parameters,
        write_checkpoint,
    )
    from utils.pipeline.answers import answered, short_prompts
    from utils.pipeline.batches import with_deciding_tokens
    from utils.pipeline.substitutes import check_enough, rows_to_fit

    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_arguments(args)
    output_dir = Path(args.output_dir)
    write_alone_until_exit(output_dir)

    model_dir = resolve_base_model(args.model_name_or_path)
    config = read_config(model_dir)
    (config.get("mod") or {}).pop("capacities", None)  # of routers that are made anew
    settings = make_settings(config, args.mod_n, args.granularity, threshold=0.5)
    pooling = (settings.sequence_pooling or "prompt") if settings.level == "sequence" else None
    settings = replace(settings, sequence_pooling=pooling)
    kinds = ("expert_drop", "random") if settings.target == "expert" else ("cosine", "greedy", "random", *TRAINED)
    if args.kind not in kinds:
        raise UserError(f"{args.kind} is not for {settings.granularity}, whose baselines are {', '.join(kinds)}")
    size = config["hidden_size"]
    if args.substitute_rank is not None and not 1 <= args.substitute_rank <= size:
        raise UserError(f"substitute_rank {args.substitute_rank} must lie between 1 and the hidden size, {size}")
    if args.skipped is not None:
        args.capacity = capacity_for(args, config, settings)
    settings = replace(settings, target_capacity=args.capacity)
    device = choose_device()
    tokenizer = load_tokenizer(model_dir)
    rows, held_out, others = split_for_training(
        load_messages(args.train_file), args.seed, args.rows, max_eval_samples=64
    )
    collate = SupervisedCollator.for_tokenizer(tokenizer)

    def tokenize(part):
        tokenized, report = tokenize_dataset(part, tokenizer, max_seq_length=args.max_seq_length, max_dropped=0.5)
        logging.info("%s", report.summary())
        return tokenized

    def make_batches(tokenized):
        starts = range(0, len(tokenized), 8)
        made = [collate([tokenized[row] for row in range(s, min(s + 8, len(tokenized)))]) for s in starts]
        made = [with_deciding_tokens(batch, pooling or "all") for batch in made]
        return [{name: values.to(device) for name, values in batch.items()} for batch in made]

    chosen_on, held_out_rows = tokenize(rows), tokenize(held_out)
    to_fit = []
    if args.substitute == "linear":
        more = others.select(range(min(FIT_ROWS, len(others))))
        to_fit = concatenate_datasets([chosen_on, tokenize(more)]) if len(more) else chosen_on
        check_enough(to_fit["length"], size)
        to_fit = to_fit.select(range(rows_to_fit(to_fit["length"], size)))
    longest = longest_prompt(complete_config(config, settings)["max_position_embeddings"], args.max_seq_length)
    prompts = held_out_prompts(held_out, tokenizer, "auto", args.max_use_prompts, longest)

    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(args.dtype, args.dtype)
    model = load_mod_model(model_dir, settings, dtype=getattr(torch, dtype)).eval().to(device)
    give_substitutes(model, args, make_batches(to_fit))
    calibrated_on = []
    if args.kind in ("random", *TRAINED):
        aside = others.select(range(min(CALIBRATION_ROWS, len(others))))
        calibrated_on = short_prompts(tokenize(aside) if len(aside) else [], chosen_on)
        calibrated_on = answered(model, calibrated_on, ends_of_answers(tokenizer, "auto"), progress=True)
    units = set_routers(model, args, make_batches(chosen_on), make_batches(calibrated_on))
    weights = {router_name(layer): router.weight for layer, router in model.router_modules().items()}
    timed = [with_deciding_tokens(batch, pooling or "all") for batch in middling_batches(held_out_rows, collate)]
    problem = None
    with atomic_directory(output_dir) as unfinished:
        write_checkpoint(
            unfinished,
            model_dir,
            model.config.mod_settings,
            weights,
            units=units,
            substitutes=substitute_parameters(model),
        )
        try:
            results = measure(model, tokenizer, timed, make_batches(held_out_rows), prompts)
            write_json(unfinished / "results.json", {"kind": args.kind, **results})
        except UserError as error:  # what was made is kept all the same
            problem = error
    if problem is not None:
        raise problem
    print(output_dir)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `UserError` for a value that is out of range whatever the model is."""
    if args.skipped is not None and (args.capacity is not None or args.drop_share is not None):
        raise UserError(f"skipped {args.skipped}: --capacity and --drop_share say how much as well; give one of them")
    if args.capacity is None:
        args.capacity = 0.5
    if not 0.0 < args.capacity <= 1.0:
        raise UserError(f"capacity {args.capacity} must be above 0 and at most 1")
    if args.drop_share is not None and not (args.kind == "expert_drop" and 0.0 <= args.drop_share < 1.0):
        raise UserError(f"drop_share {args.drop_share} is for expert_drop, and at least 0 and below 1")
    if args.rows < 1:
        raise UserError(f"rows {args.rows} must be at least 1")
    if args.max_use_prompts < 0:
        raise UserError(f"max_use_prompts {args.max_use_prompts} must not be negative; 0 measures no use")
    if args.substitute != "none" and args.kind in TRAINED:
        raise UserError(f"substitute {args.substitute} is not for {args.kind}, whose method has none; leave it out")
    if args.substitute_rank is not None and args.substitute == "none":
        raise UserError("substitute_rank needs --substitute linear")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} is not empty; choose another")


def capacity_for(args: argparse.Namespace, config: dict, settings) -> float:
    """Return the capacity at which the share that was asked for is skipped, with the substitutes that will be there."""
    from utils.model.checkpoint import complete_config
    from utils.model.costs import capacity_to_skip
    from utils.pipeline.substitutes import default_rank

    substitute = None
    if args.substitute != "none":
        rank = args.substitute_rank or default_rank(config["hidden_size"], settings)
        substitute = {"kind": args.substitute, "rank": rank}
    try:
        capacity = capacity_to_skip(
            complete_config(config, settings), replace(settings, substitute=substitute), args.skipped
        )
    except ValueError as error:
        raise UserError(f"skipped {error}") from None
    logging.info("skipped %g is a capacity of %g here", args.skipped, capacity)
    return capacity


def give_substitutes(model, args: argparse.Namespace, batches) -> None:
    """Let what is skipped return what was asked for, fitted to `batches`, whatever the checkpoint had."""
    import torch

    from utils.model.checkpoint import add_substitutes, remove_substitutes
    from utils.pipeline.substitutes import default_rank, fit

    if model.substitute_modules():
        remove_substitutes(model)
    if args.substitute == "none":
        return
    rank = args.substitute_rank or default_rank(model.config.hidden_size, model.config.mod_settings)
    add_substitutes(model, {"kind": args.substitute, "rank": rank})
    fitted = fit(model, batches, progress=True)
    with torch.no_grad():
        for layer, substitute in model.substitute_modules().items():
            for name, parameter in substitute.named_parameters():
                parameter.copy_(fitted[layer][name])


def set_routers(model, args: argparse.Namespace, batches, calibrated_on) -> dict | None:
    """Give a model the routers and thresholds of the baseline that was asked for.

    Returns:
        The units that the routers compare in, as `save_routers` takes them.
    """
    import torch

    from utils.model.checkpoint import set_thresholds
    from utils.model.configuration_mod import place_name
    from utils.model.costs import capacity_weights
    from utils.pipeline.calibration import calibrate, settle
    from utils.pipeline.importance import expert_weight, greedy, least_important, most_similar
    from utils.pipeline.trained_baselines import scaled_routers, similarity_routers

    routers = model.router_modules()
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for router in routers.values():
            router.weight.zero_()
            if args.kind == "random":
                router.weight.copy_(torch.empty(router.weight.shape).normal_(generator=generator))
    if args.kind in ("random", *TRAINED):
        if args.kind in TRAINED:
            train = similarity_routers if args.kind == "dlo" else scaled_routers
            start = train(model, batches, args.capacity, progress=True)
        else:
            start = spread(model, batches)
        cuts, share = calibrate(model, calibrated_on, start, args.capacity, progress=True)
        logging.info("%s routers execute %.3f of the inputs", args.kind, share)
        return settle(model, cuts, {layer: scale for layer, (_, scale) in start.items()})
    if args.kind == "expert_drop":
        weight, tokens = expert_weight(model, batches)
        dropped = least_important(weight, tokens, args.capacity, args.drop_share)
        executed = 1 - float(tokens[dropped].sum() / tokens.sum())
        logging.info("dropped %d of %d experts; capacity %.4f", dropped.sum(), dropped.numel(), executed)
        set_thresholds(model, torch.where(dropped, 0.75, 0.5).tolist())  # routers at zero score one half
        return None
    leave_out = most_similar if args.kind == "cosine" else partial(greedy, progress=True)
    chosen = leave_out(model, batches, args.capacity)
    weights = capacity_weights(model.config.to_dict(), model.config.mod_settings)
    capacity = 1 - sum(weights[place] for place in chosen)
    logging.info("left out, in this order: %s; capacity %.4f", " ".join(map(place_name, chosen)), capacity)
    # routers at zero score one half
    set_thresholds(model, [0.75 if place in chosen else 0.5 for place in routers])
    return None


def measure(model, tokenizer, timed, batches, prompts) -> dict:
    """Return held-out loss and capacity, forward speed and figures of use, named as in a training run's results."""
    from tqdm.auto import tqdm

    from utils.evaluation.forward_speed import forward_speed
    from utils.evaluation.use import figures_of_use
    from utils.pipeline.held_out import held_out_results

    results = {"held_out": held_out_results(model, batches)}
    speed = forward_speed(model, timed, progress=True)
    results["forward_tokens_per_second"] = {name: speed[name] for name in ("dense", "routed", "ratio")}
    if prompts:
        with tqdm(total=len(prompts), desc="answering prompts", unit="prompt", disable=None) as bar:
            found = figures_of_use(model, tokenizer, prompts, progress=bar.update)
        results |= {name: found[name] for name in ("use", "answers")}
    return results


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
