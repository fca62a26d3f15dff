#!/usr/bin/env python3
"""Give trained routers another capacity: new thresholds, no training.

    python entrypoints/checkpoint/recalibrate.py path/to/output --capacity 0.9 --output_dir outputs/at-0.9

All layers' thresholds are shifted together until rows that were not trained on execute the capacity, which is added to
those that the checkpoint can be set to already, where these were calibrated on text that was read alike. These rows
and the held-out ones follow from the run's own record (`run.json`), so that held-out numbers compare with the run's;
what is given here comes before it.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.io.devices import choose_device
from utils.io.errors import UserError, run_command

FROM_RECORD = {
    "train_file": None,
    "eval_file": None,
    "seed": 42,
    "max_train_samples": None,
    "max_eval_samples": 64,
    "max_seq_length": 2048,
    "chat_format": "auto",
    "sequence_pooling": "all",
    "dtype": "auto",
}
"""What is taken from the run's record unless it is given -> what it is where there is no record."""
HOW_ROWS_ARE_READ = ("max_seq_length", "chat_format", "sequence_pooling")
"""Where one of these is another than the run's, its other capacities were calibrated on other text."""


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="output directory of a run, or of this command")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--capacity", type=float, help="share of inputs to execute")
    target.add_argument(
        "--skipped", type=float, help="instead: share of the decoder layers' parameters not to compute with for a token"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where it goes; must be new or empty")
    parser.add_argument("--rows", type=int, default=64, help="rows to calibrate on, at most (default: 64)")
    parser.add_argument(
        "--calibration_file",
        help="data.jsonl to calibrate on. Default: rows of train_file that the run set aside, then those it left over",
    )
    parser.add_argument("--train_file", help="data.jsonl that the run was trained on (default: the run's)")
    parser.add_argument("--eval_file", help="held-out rows (default: the run's, or taken out of train_file)")
    parser.add_argument("--seed", type=int, help="of the run (default: the run's)")
    parser.add_argument("--max_train_samples", type=int, help="of the run (default: the run's)")
    parser.add_argument("--max_eval_samples", type=int, help="held-out rows, at most (default: the run's)")
    parser.add_argument(
        "--max_use_prompts", type=int, default=16, help="held-out prompts that are answered at the end; 0: none (16)"
    )
    parser.add_argument("--max_seq_length", type=int, help="rows are cut to this many tokens (default: the run's)")
    parser.add_argument("--chat_format", choices=("auto", "template", "tags"), help="(default: the run's)")
    parser.add_argument("--sequence_pooling", choices=("all", "prompt"), help="(default: the run's)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help="of the backbone; auto is bfloat16 on a GPU and float32 on a CPU (default: the run's)",
    )
    return parser.parse_args(argv)


def main() -> None:
    from dataclasses import replace

    import torch

    from utils.data.chat_format import ends_of_answers
    from utils.io.files import atomic_directory, write_json
    from utils.io.locks import write_alone_until_exit
    from utils.model.checkpoint import (
        change_settings,
        complete_config,
        load_mod_model,
        load_tokenizer,
        make_settings,
        read_config,
        read_substitutes,
        read_units,
        router_name,
        write_checkpoint,
    )
    from utils.model.costs import capacity_to_skip
    from utils.model.lora import holds_adapter
    from utils.pipeline.answers import answered
    from utils.pipeline.calibration import (
        calibrate,
        cuts_of,
        fold_table,
        pack_capacities,
        settled_cuts,
    )
    from utils.pipeline.run_directory import installed_versions

    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_alone_until_exit(args.output_dir)
    check(args)
    settings = make_settings(config := read_config(args.checkpoint))
    if args.skipped is not None:
        try:
            args.capacity = capacity_to_skip(complete_config(config, settings), settings, args.skipped)
        except ValueError as error:
            raise UserError(f"skipped {error}") from None
        logging.info("skipped %g is a capacity of %g here", args.skipped, args.capacity)
    if holds_adapter(args.checkpoint):
        raise UserError(
            f"{args.checkpoint} holds a LoRA adapter: merge it first, with build_mod_checkpoint.py --merge_lora"
        )
    record = complete(args, settings)
    pooling = args.sequence_pooling if settings.level == "sequence" else None
    settings = replace(settings, target_capacity=args.capacity, sequence_pooling=pooling)
    tokenizer = load_tokenizer(args.checkpoint)
    rows, held_out, prompts, batches = prepare_rows(args, record, tokenizer)

    device = choose_device()
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(args.dtype, args.dtype)
    model = load_mod_model(args.checkpoint, settings, dtype=getattr(torch, dtype)).to(device).eval()
    rows = answered(model, rows, ends_of_answers(tokenizer, args.chat_format), progress=True)
    calibration = [to_device(batch, device) for batch in batches(rows)]
    try:
        cuts = settled_cuts(model, read_units(args.checkpoint), record.get("capacity_control"))
    except UserError as error:
        raise UserError(f"{args.checkpoint}: {error}") from None
    settled, share = calibrate(model, calibration, cuts, args.capacity, progress=True)
    logging.info("calibrated on %d rows: %.3f of the inputs are executed", len(rows), share)
    # thresholds of other capacities hold for text that is read and decided on as this was
    kept = settings.capacities if args.as_trained and not args.calibration_file else None
    if settings.capacities and not kept:
        held = ", ".join(str(entry["capacity"]) for entry in settings.capacities)
        logging.warning("the capacities %s are left out: they were calibrated on text that was read otherwise", held)
    table = {entry["capacity"]: cuts_of(replace(settings, threshold=entry["threshold"])) for entry in kept or ()}
    thresholds, factors = fold_table(table | {args.capacity: settled})
    units = {layer: scale * factors[layer] for layer, (_, scale) in cuts.items()}
    with torch.no_grad():
        for layer, router in model.router_modules().items():
            router.weight.mul_(factors[layer])
    change_settings(model, threshold=thresholds[args.capacity], capacities=pack_capacities(thresholds))

    results = measure(model, tokenizer, [to_device(batch, device) for batch in held_out], prompts)
    results["recalibration"] = {
        "checkpoint": str(args.checkpoint),
        "capacity": args.capacity,
        "calibration": {"rows": len(rows), "capacity": share, "file": args.calibration_file or args.train_file},
        "record": record,
        "versions": installed_versions(),
    }
    routers = {router_name(layer): router.weight for layer, router in model.router_modules().items()}
    with atomic_directory(args.output_dir) as unfinished:
        write_json(unfinished / "results.json", results)
        substitutes, _ = read_substitutes(args.checkpoint)  # the model's may be rounded to its dtype
        write_checkpoint(
            unfinished, args.checkpoint, model.config.mod_settings, routers, units=units, substitutes=substitutes
        )
    print(args.output_dir)


def measure(model, tokenizer, held_out, prompts) -> dict:
    """Return held-out loss and capacity, and figures of use, named as in a training run's results."""
    from tqdm.auto import tqdm

    from utils.evaluation.use import figures_of_use
    from utils.pipeline.held_out import held_out_results

    results = {"held_out": held_out_results(model, held_out)}
    if prompts:
        with tqdm(total=len(prompts), desc="answering prompts", unit="prompt", disable=None) as bar:
            found = figures_of_use(model, tokenizer, prompts, progress=bar.update)
        results |= {name: found[name] for name in ("use", "answers")}
    return results


def check(args) -> None:
    """Raise `UserError` for what is out of range."""
    if args.capacity is not None and not 0.0 < args.capacity <= 1.0:
        raise UserError(f"capacity {args.capacity} must be above 0 and at most 1")
    for name in ("rows", "max_train_samples", "max_eval_samples", "max_seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if args.max_use_prompts < 0:
        raise UserError(f"max_use_prompts {args.max_use_prompts} must not be negative; 0 measures no use")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise UserError(f"output_dir {args.output_dir} is there already; choose another")


def complete(args, settings) -> dict:
    """Fill in what was not given, and return the record of how the checkpoint was trained, with what was given.

    Args:
        settings: the checkpoint's.
    """
    from utils.pipeline.run_directory import RUN_FILE

    record, where = {}, args.checkpoint / RUN_FILE
    try:
        if where.is_file():
            record = json.loads(where.read_text(encoding="utf-8"))["identity"]
        elif (where := args.checkpoint / "results.json").is_file():
            record = json.loads(where.read_text(encoding="utf-8")).get("recalibration", {}).get("record", {})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where} is damaged") from None
    if not record and not args.calibration_file and args.max_train_samples is None:
        raise UserError(
            f"{args.checkpoint} has no record of what it was trained on: say it with --seed and --max_train_samples, "
            "or give a --calibration_file of other rows"
        )
    given = {name: getattr(args, name) for name in FROM_RECORD if getattr(args, name) is not None}
    own = {"sequence_pooling": settings.sequence_pooling} if settings.sequence_pooling else {}
    record = FROM_RECORD | {"calibration_rows": 0} | own | record
    args.as_trained = all(given.get(name, record[name]) == record[name] for name in HOW_ROWS_ARE_READ)
    record |= given
    if record["train_file"] is None and not (args.calibration_file and record["eval_file"]):
        raise UserError("train_file: give the file that the run was trained on")
    for name in FROM_RECORD:
        setattr(args, name, record[name])
    return record


def prepare_rows(args, record, tokenizer) -> tuple:
    """Return rows to calibrate on, held-out batches, held-out prompts, and what makes batches of rows."""
    from datasets import concatenate_datasets

    from utils.data.collation import SupervisedCollator
    from utils.data.messages import load_messages
    from utils.data.prompts import held_out_prompts
    from utils.data.splitting import set_aside, split_for_training, without
    from utils.data.tokenization import tokenize_dataset
    from utils.evaluation.use import longest_prompt
    from utils.model.checkpoint import complete_config, make_settings, read_config
    from utils.pipeline.answers import short_prompts
    from utils.pipeline.batches import with_deciding_tokens

    collate = SupervisedCollator.for_tokenizer(tokenizer)

    def tokenized(rows):
        return tokenize_dataset(rows, tokenizer, args.max_seq_length, args.chat_format)[0]

    def batches(rows):
        made = []
        for start in range(0, len(rows), 8):
            batch = collate([rows[row] for row in range(start, min(start + 8, len(rows)))])
            made.append(with_deciding_tokens(batch, args.sequence_pooling))
        return made

    train = held_out = left_over = None
    if args.train_file is not None:
        warn_of_another_file(args, record)
        train, held_out, left_over = split_for_training(
            load_messages(args.train_file),
            args.seed,
            args.max_train_samples,
            None if args.eval_file else args.max_eval_samples,
        )
    if args.eval_file:
        held_out = load_messages(args.eval_file, max_rows=args.max_eval_samples)
    elsewhere = [part for part in (train, held_out) if part is not None]
    parts, trained = [], ()
    if args.calibration_file:
        left_over = load_messages(args.calibration_file).shuffle(seed=args.seed)
    elif record["calibration_rows"]:
        trained, aside = set_aside(tokenized(train), record["calibration_rows"])
        parts += [aside.select(range(min(args.rows, len(aside))))] if len(aside) else []
    wanted = args.rows - sum(map(len, parts))
    if wanted and len(left_over):
        left_over = without(left_over, *elsewhere)
        left_over = left_over.select(range(min(wanted, len(left_over))))
        parts += [tokenized(left_over)] if len(left_over) else []
    if not parts:
        where = args.calibration_file or args.train_file
        raise UserError(f"{where}: every row was trained on or is held out; give a --calibration_file of other rows")
    rows = concatenate_datasets(parts)
    rows = rows if args.calibration_file else short_prompts(rows, trained)
    config = read_config(args.checkpoint)
    positions = complete_config(config, make_settings(config))["max_position_embeddings"]
    longest = longest_prompt(positions, args.max_seq_length)
    prompts = held_out_prompts(held_out, tokenizer, args.chat_format, args.max_use_prompts, longest)
    return rows, batches(tokenized(held_out)), prompts, batches


def warn_of_another_file(args, record) -> None:
    """Warn where the training file is not what the run was trained on."""
    import hashlib

    trained_on = record.get("train_file_sha256")
    if trained_on is None or not Path(args.train_file).is_file():
        return
    with open(args.train_file, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != trained_on:
            logging.warning(
                "%s is not the file that the run was trained on: rows trained on cannot be told, and held-out numbers "
                "do not compare with the run's",
                args.train_file,
            )


def to_device(batch, device):
    """Return a batch on a device."""
    return {name: values.to(device) for name, values in batch.items()}


if __name__ == "__main__":
    run_command(main)
