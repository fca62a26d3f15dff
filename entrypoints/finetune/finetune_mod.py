#!/usr/bin/env python3
"""Router-tune a pretrained model: data, model, trainer, checkpoint, and a table of what came of it."""

import logging
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.io.errors import UserError, run_command
from utils.io.launched import die_with_launcher


def main() -> int | None:
    die_with_launcher()
    from transformers import set_seed

    from utils.data.chat_format import ends_of_answers
    from utils.data.splitting import set_aside
    from utils.io.locks import write_alone_until_exit
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import complete_config, load_tokenizer, make_settings, read_config
    from utils.model.lora import holds_adapter
    from utils.model.tokenizer_match import check_positions
    from utils.pipeline.arguments import parse_arguments
    from utils.pipeline.memory import check_memory
    from utils.pipeline.processes import TERMINATED, check_joined, check_started, on_main_process
    from utils.pipeline.run_directory import (
        agree_on_rows,
        agree_on_run,
        check_output_directory,
        checkpoint_to_resume,
        claim_output_directory,
    )
    from utils.pipeline.substitutes import check_enough

    check_started()
    model_args, data_args, training_args = parse_arguments()
    if training_args.n_gpu > 1:
        raise UserError("several GPUs in one process: start with `bash scripts/finetune_mod.sh` or accelerate launch")
    check_joined(training_args)
    main_process = training_args.process_index == 0
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s")

    with training_args.main_process_first(local=False, desc="finding the base model"):
        model_dir = resolve_base_model(model_args.model_name_or_path)
    config = read_config(model_dir)
    if holds_adapter(model_dir):
        raise UserError(
            f"{model_dir} holds a LoRA adapter: merge it first, with build_mod_checkpoint.py --merge_lora {model_dir}"
        )
    settings = make_settings(config, model_args.mod_n, model_args.granularity)
    pooling = training_args.sequence_pooling if settings.level == "sequence" else None
    settings = replace(settings, sequence_pooling=pooling)
    check_substitute(training_args, settings, config)
    settings = choose_capacity(training_args, settings, config, brought_substitute(model_args, training_args))
    training_args.suit_model(config["hidden_size"], settings.granularity)
    if model_args.router_dir and training_args.capacity_control == "regression":
        raise UserError(
            "router_dir: capacity_control regression makes new routers; leave it out or take --capacity_control budget"
        )
    for name in training_args.without_effect():
        logging.warning("%s has no effect with capacity_control %s", name, training_args.capacity_control)
    on_main_process(training_args, lambda: write_alone_until_exit(training_args.output_dir))
    run = agree_on_run(model_args, data_args, training_args, model_dir)
    on_main_process(training_args, lambda: check_output_directory(training_args, run))
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_dir)
    positions = complete_config(config, settings)["max_position_embeddings"]
    train_set, eval_set, prompts = prepare_data(data_args, training_args, tokenizer, positions)
    for name, rows in (("train_file", train_set), ("held-out rows", eval_set)):
        way_out = f"give --max_seq_length {positions} (MAX_SEQ_LENGTH)"
        check_positions(config, max(rows["length"]), f"the longest row of {name}", way_out)
    agree_on_rows(training_args, run, (train_set, eval_set))
    checkpoint = on_main_process(training_args, lambda: checkpoint_to_resume(training_args, run))
    train_set, calibration_set = set_aside(train_set, training_args.calibration_rows)
    if training_args.capacity_control == "regression":
        train_set = at_most(train_set, training_args.regression_rows)
    if training_args.substitute != "none" and settings.substitute is None:
        check_enough(train_set["length"], config["hidden_size"])
    check_memory(training_args, config, settings, max(train_set["length"]))
    model = prepare_model(model_args, training_args, model_dir, settings)
    trainer = make_trainer(model, training_args, tokenizer, train_set, eval_set, run)
    trainer.calibrate_on(calibration_set, ends_of_answers(tokenizer, data_args.chat_format))
    claim_output_directory(training_args, run)
    if checkpoint:
        logging.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.termination.happened:
        logging.info(
            "stopped by SIGTERM after step %d, which is saved: the same command goes on", trainer.state.global_step
        )
        return TERMINATED
    trainer.save_state()
    trainer.finish()

    save(trainer, model_args, model_dir)
    report(trainer, measure(trainer, eval_set, prompts))


def check_substitute(training_args, settings, config):
    """Raise `UserError` for a rank that is out of range, or substitutes other than those that the checkpoint has."""
    rank, size = training_args.substitute_rank, config["hidden_size"]
    if rank is not None and rank > size:
        raise UserError(f"substitute_rank {rank} must lie between 1 and the hidden size, {size}")
    held = settings.substitute
    if held is not None and (training_args.substitute == "none" or rank not in (None, held["rank"])):
        raise UserError(
            f"the checkpoint holds substitutes of rank {held['rank']}: for others, or none, train from the dense base"
        )


def brought_substitute(model_args, training_args):
    """Return kind and rank of the substitutes that the routers of `router_dir` were trained with, None without.

    Routers decide by what a skip costs, and with maps in the place of what is skipped it costs little: those that were
    trained with maps are not for a run without.
    """
    import json

    from utils.model.checkpoint import read_substitutes

    maps, metadata = read_substitutes(model_args.router_dir) if model_args.router_dir else ({}, {})
    if maps and training_args.substitute == "none":
        raise UserError(
            f"router_dir {model_args.router_dir}: its routers were trained with substitutes, which --substitute none "
            "would leave out; take --substitute linear, or other routers"
        )
    if not maps:
        return None
    if "substitute" not in metadata:
        raise UserError(f"router_dir {model_args.router_dir}: its substitutes do not say of which kind they are")
    return json.loads(metadata["substitute"])


def planned_substitute(training_args, settings, hidden_size, brought=None):
    """Return the settings with the substitutes that are going to train, where the checkpoint has none.

    Args:
        brought: kind and rank of those that routers bring along; without a --substitute_rank they are taken.
    """
    from utils.pipeline.substitutes import default_rank

    if training_args.substitute == "none" or settings.substitute is not None:
        return settings
    if brought is not None and training_args.substitute_rank is None:
        return replace(settings, substitute=brought)
    rank = training_args.substitute_rank or default_rank(hidden_size, settings)
    return replace(settings, substitute={"kind": training_args.substitute, "rank": rank})


def choose_capacity(training_args, settings, config, brought):
    """Return the settings with the target; of shares to be skipped, the capacities that come to them."""
    from utils.model.checkpoint import complete_config
    from utils.model.costs import capacity_to_skip

    if training_args.budget_length is not None:
        if training_args.target_skipped is None and not training_args.skipped and len(settings.branches) == 1:
            raise UserError(
                f"budget_length {training_args.budget_length} has no effect on {settings.granularity} without "
                "target_skipped: leave it out, or give --target_skipped or a granularity attn_mlp_*"
            )
        settings = replace(settings, budget_length=training_args.budget_length)
    planned = planned_substitute(training_args, settings, config["hidden_size"], brought)

    def capacity_of_share(name, share):
        try:
            capacity = capacity_to_skip(complete_config(config, settings), planned, share)
        except ValueError as error:
            raise UserError(f"{name} {error}") from None
        logging.info("%s %g is a capacity of %g here", name, share, capacity)
        return capacity

    if training_args.skipped:
        training_args.capacities = [capacity_of_share("skipped", share) for share in training_args.skipped]
    if training_args.target_skipped is not None:
        training_args.target_capacity = capacity_of_share("target_skipped", training_args.target_skipped)
    return replace(settings, target_capacity=training_args.target_capacity)


def prepare_data(data_args, training_args, tokenizer, positions):
    """Return the tokenized training and held-out rows, and held-out prompts that leave `positions` for an answer.

    The first process of a machine makes the rows, the others read them; prompts are for the main process.
    """
    from datasets import load_from_disk

    from utils.io.files import atomic_directory
    from utils.pipeline.processes import from_every_process, on_each_machine

    if training_args.world_size == 1:
        return tokenize_rows(data_args, training_args, tokenizer, positions)
    folder = Path(tempfile.gettempdir()) / f"tokenized-for-{os.getppid()}"  # of the launcher: one for each machine

    prompts: list = []

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        *tokenized, found = tokenize_rows(data_args, training_args, tokenizer, positions)
        prompts.extend(found)
        with atomic_directory(folder) as unfinished:
            for number, rows in enumerate(tokenized):
                rows.save_to_disk(unfinished / str(number))

    try:
        on_each_machine(training_args, write)
        tokenized = [load_from_disk(str(folder / str(number))) for number in range(2)]
        from_every_process(training_args, "read")
    finally:
        if training_args.local_process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return *tokenized, prompts


def tokenize_rows(data_args, training_args, tokenizer, positions):
    """Return the tokenized training and held-out rows of the files, and prompts of the latter."""
    from utils.data.messages import load_messages
    from utils.data.prompts import held_out_prompts
    from utils.data.splitting import split_for_training
    from utils.data.tokenization import tokenize_dataset
    from utils.evaluation.use import longest_prompt

    rows, held_out, _ = split_for_training(
        load_messages(data_args.train_file),
        training_args.seed,
        data_args.max_train_samples,
        None if data_args.eval_file else data_args.max_eval_samples,
    )
    if data_args.eval_file:
        held_out = load_messages(data_args.eval_file, max_rows=data_args.max_eval_samples)
    tokenized = []
    for name, part in (("training", rows), ("held-out", held_out)):
        try:
            dataset, report = tokenize_dataset(
                part,
                tokenizer,
                max_seq_length=data_args.max_seq_length,
                chat_format=data_args.chat_format,
                cache_dir=data_args.tokenized_cache_dir,
                progress=training_args.process_index == 0,
                max_dropped=data_args.max_dropped,
            )
        except UserError as error:
            raise UserError(f"{name} rows: {error}") from None
        logging.info("%s rows: %s", name, report.summary())
        tokenized.append(dataset)
    longest = longest_prompt(positions, data_args.max_seq_length)
    prompts = held_out_prompts(held_out, tokenizer, data_args.chat_format, data_args.max_use_prompts, longest)
    return *tokenized, prompts


def at_most(train_set, count):
    """Return the first `count` of the rows, which were shuffled, and say so where others are left out."""
    if len(train_set) <= count:
        return train_set
    logging.info("the regression learns from %d of %d rows (--regression_rows)", count, len(train_set))
    return train_set.select(range(count))


def prepare_model(model_args, training_args, model_dir, settings):
    """Return the routed model, frozen but for its routers unless its backbone trains too."""
    import torch
    from transformers.trainer_pt_utils import get_model_param_count

    from utils.model.checkpoint import load_mod_model, load_routers, load_substitutes, whole_parameters
    from utils.model.lora import add_lora
    from utils.pipeline.customized_trainer import freeze_backbone

    dtype = model_args.dtype
    if dtype == "auto":
        frozen_on_gpu = training_args.device.type == "cuda" and training_args.router_only
        dtype = "bfloat16" if frozen_on_gpu else "float32"
    model = load_mod_model(
        model_dir, settings, dtype=getattr(torch, dtype), attn_implementation=model_args.attn_implementation
    )
    weights = [router.weight for router in model.router_modules().values()]
    with whole_parameters(weights):
        from_zero = not any(weight.any() for weight in weights)
    if training_args.capacity_control == "regression" and not from_zero:
        raise UserError(
            f"{model_dir} holds trained routers, and capacity_control regression makes new ones: start from one whose "
            "routers are at zero, or take --capacity_control budget"
        )
    start, brought = model_args.router_dir, brought_substitute(model_args, training_args)
    prepare_substitutes(model, training_args, brought)
    if start:
        load_routers(model, start)
        if brought is not None:
            load_substitutes(model, start)
        elif settings.substitute is not None:
            logging.warning("router_dir %s has no substitutes: those of %s stay", start, model_dir)
    if training_args.router_only:
        freeze_backbone(model)
    if training_args.use_lora:
        add_lora(
            model,
            rank=training_args.lora_rank,
            alpha=training_args.lora_alpha,
            dropout=training_args.lora_dropout,
            targets=training_args.lora_target_modules,
            only_routed=training_args.lora_layers == "routed",
        )
    if training_args.substitute_learning_rate == 0.0:
        for substitute in model.substitute_modules().values():
            substitute.requires_grad_(False)
    total, trained = get_model_param_count(model), get_model_param_count(model, trainable_only=True)
    logging.info("%s: routing %s in layers %s", model_dir, settings.granularity, list(settings.layers))
    logging.info("%d of %d parameters train (%.4f%%)", trained, total, 100 * trained / total)
    return model


def prepare_substitutes(model, training_args, brought):
    """Give a model the substitutes that train, float32, of the kind and rank of those `brought` by routers."""
    import torch

    from utils.model.checkpoint import add_substitutes

    settings = model.config.mod_settings
    if training_args.substitute != "none" and settings.substitute is None:
        planned = planned_substitute(training_args, settings, model.config.hidden_size, brought)
        add_substitutes(model, planned.substitute)
    for parameter in (p for substitute in model.substitute_modules().values() for p in substitute.parameters()):
        if not hasattr(parameter, "ds_id"):  # under ZeRO-3 all weights have one dtype
            parameter.data = parameter.data.to(torch.float32)


def make_trainer(model, training_args, tokenizer, train_set, eval_set, run):
    """Return the trainer, with its callbacks."""
    from transformers import ProgressCallback

    from utils.data.collation import SupervisedCollator
    from utils.data.sampling import LengthGroupedSampler
    from utils.pipeline.callbacks import RouterProgressCallback
    from utils.pipeline.customized_trainer import RouterTrainer

    sampler = None
    if training_args.train_sampling_strategy == "group_by_length":
        # by whole optimizer steps: the order is the same for any number of processes and any micro-batch
        sampler = LengthGroupedSampler(train_set["length"][:], training_args.global_batch_size, training_args.seed)
    trainer = RouterTrainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=SupervisedCollator.for_tokenizer(tokenizer),
        processing_class=tokenizer,
        train_sampler=sampler,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RouterProgressCallback)
    trainer.run_identity = run["identity"]
    return trainer


def measure(trainer, eval_set, prompts):
    """Return what came of it, dense and routed, at the target and at the other capacities that were calibrated.

    Held-out loss and capacity are measured on all processes, how fast a forward is and the figures of use on the main
    one.
    """
    from tqdm.auto import tqdm

    from utils.evaluation.forward_speed import forward_speed, middling_batches
    from utils.evaluation.use import figures_of_use
    from utils.pipeline.batches import with_deciding_tokens

    logging.info("measuring held-out loss, forward speed and use")
    model, settings = trainer.model, trainer.model.config.mod_settings
    with trainer.dense():
        dense = trainer.evaluate(metric_key_prefix="dense")
    results = {"held_out": {"dense": dense, "routed": trainer.evaluate(), "rows": len(eval_set)}}
    if trainer.args.use_lora or not trainer.args.router_only:
        results["dense_is"] = "adapted" if trainer.args.use_lora else "trained"
    others = [entry["capacity"] for entry in settings.capacities or () if entry["capacity"] != settings.target_capacity]
    results["capacities"] = {}
    for capacity in others:
        model.set_capacity(capacity)
        results["capacities"][str(capacity)] = {"held_out": trainer.evaluate()}
    model.set_mod_settings(settings)
    if not trainer.is_world_process_zero():
        return results
    # weights in parts on all processes can't be used by one of them
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        logging.warning("weights are in parts: forward speed and figures of use are not measured")
        return results | {"forward_tokens_per_second": None}
    show = not trainer.args.disable_tqdm
    timed = middling_batches(eval_set, trainer.data_collator)
    timed = [with_deciding_tokens(batch, trainer.args.sequence_pooling) for batch in timed]
    speed = forward_speed(model, timed, capacities=others, progress=show)
    at = speed.pop("ratio_at")
    results["forward_tokens_per_second"] = speed
    for capacity in others:
        results["capacities"][str(capacity)]["forward_ratio"] = at[capacity]
    if prompts:
        with tqdm(total=len(prompts), desc="answering prompts", unit="prompt", disable=not show) as bar:
            use = figures_of_use(model, trainer.processing_class, prompts, progress=bar.update, capacities=others)
        for capacity, figures in use.pop("use_at").items():
            results["capacities"][str(capacity)]["use"] = figures
        results |= use
    return results


def save(trainer, model_args, model_dir) -> None:
    """Write the checkpoint, before anything is measured: no measurement can cost a training."""
    from utils.model.checkpoint import write_checkpoint
    from utils.pipeline.processes import on_main_process

    routers, substitutes = trainer.router_state(), trainer.substitute_state()
    adapter = trainer.adapter()
    trained_base = None
    if not trainer.args.router_only:
        trained_base = trainer.accelerator.get_state_dict(trainer.model_wrapped)

    def write() -> str:
        return write_checkpoint(
            trainer.args.output_dir,
            model_dir,
            trainer.model.config.mod_settings,
            routers,
            copy_base=model_args.save_base == "copy",
            trained_base=trained_base,
            adapter=adapter,
            units=trainer.units,
            substitutes=substitutes,
        )

    logging.info("base weights: %s", on_main_process(trainer.args, write))


def report(trainer, results) -> None:
    """Write the results and their plot, print the table and, last, the output directory."""
    from utils.evaluation.plots import pareto_of, save_figure
    from utils.io.files import write_json
    from utils.pipeline.report import quality_and_speed, run_table
    from utils.pipeline.run_directory import RESULTS_FILE

    if not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)
    write_json(output_dir / RESULTS_FILE, results)
    if records := quality_and_speed(results):
        save_figure("pareto", pareto_of(records, "forward", "agreement"), output_dir / "capacities")
    print(run_table(results))
    print(output_dir)


if __name__ == "__main__":
    run_command(main)
