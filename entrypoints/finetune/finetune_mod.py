#!/usr/bin/env python3
"""Router-tune a pretrained model: data, model, trainer, checkpoint, and a table of what came of it."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.io.errors import UserError, run_command


def main() -> None:
    from utils.pipeline.arguments import parse_arguments

    model_args, data_args, training_args = parse_arguments()
    if training_args.n_gpu > 1:
        raise UserError("several GPUs in one process: start with `bash scripts/finetune_mod.sh` or accelerate launch")

    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers import ProgressCallback, set_seed

    from utils.data.collation import SupervisedCollator
    from utils.data.messages import load_messages
    from utils.data.sampling import LengthGroupedSampler
    from utils.data.splitting import split_held_out
    from utils.data.tokenization import tokenize_dataset
    from utils.evaluation.forward_speed import forward_speed
    from utils.io.files import write_json
    from utils.model.base_models import resolve_base_model
    from utils.model.checkpoint import (
        load_mod_model,
        load_routers,
        load_tokenizer,
        make_settings,
        read_config,
        write_checkpoint,
    )
    from utils.pipeline.callbacks import RouterProgressCallback
    from utils.pipeline.customized_trainer import RouterTrainer, freeze_backbone
    from utils.pipeline.report import run_table
    from utils.pipeline.run_directory import RUN_FILE, checkpoint_to_resume, describe_run

    main_process = training_args.process_index == 0
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s")
    disable_progress_bar()

    with training_args.main_process_first(local=False, desc="finding the base model"):
        model_dir = resolve_base_model(model_args.model_name_or_path)
    config = read_config(model_dir)
    settings = make_settings(
        config, model_args.mod_n, model_args.granularity, target_capacity=training_args.target_capacity
    )
    if training_args.learning_rate is None:
        training_args.learning_rate = 0.5 / config["hidden_size"]
    run = describe_run(model_args, data_args, training_args)
    checkpoint = checkpoint_to_resume(training_args, run)
    set_seed(training_args.seed)

    # data
    tokenizer = load_tokenizer(model_dir)
    rows = load_messages(data_args.train_file)
    if data_args.eval_file:
        held_out = load_messages(data_args.eval_file, max_rows=data_args.max_eval_samples)
    else:
        rows, held_out = split_held_out(rows, num_rows=min(data_args.max_eval_samples, len(rows) // 8), seed=0)
    rows = rows.shuffle(seed=training_args.seed)
    if data_args.max_train_samples:
        rows = rows.select(range(min(data_args.max_train_samples, len(rows))))
    tokenize = {
        "tokenizer": tokenizer,
        "max_seq_length": data_args.max_seq_length,
        "chat_format": data_args.chat_format,
        "cache_dir": data_args.tokenized_cache_dir,
        "progress": main_process,
    }
    train_set, train_report = tokenize_dataset(rows, **tokenize)
    eval_set, eval_report = tokenize_dataset(held_out, **tokenize)
    logging.info("training rows: %s", train_report.summary())
    logging.info("held-out rows: %s", eval_report.summary())
    collator = SupervisedCollator.for_tokenizer(tokenizer)

    # model
    dtype = model_args.dtype
    if dtype == "auto":
        frozen_on_gpu = training_args.device.type == "cuda" and training_args.router_only
        dtype = "bfloat16" if frozen_on_gpu else "float32"
    model = load_mod_model(
        model_dir, settings, dtype=getattr(torch, dtype), attn_implementation=model_args.attn_implementation
    )
    if model_args.router_dir:
        load_routers(model, model_args.router_dir)
    if training_args.router_only:
        freeze_backbone(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logging.info(
        "%s: routing %s in layers %s; %d of %d parameters train (%.4f%%)",
        model_dir,
        settings.granularity,
        list(settings.layers),
        trainable,
        model.num_parameters(),
        100 * trainable / model.num_parameters(),
    )

    # train
    sampler = None
    if training_args.train_sampling_strategy == "group_by_length":
        # by whole optimizer steps: the order is the same for any number of processes and any micro-batch
        sampler = LengthGroupedSampler(train_set["length"][:], training_args.global_batch_size, training_args.seed)
    trainer = RouterTrainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collator,
        processing_class=tokenizer,
        train_sampler=sampler,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RouterProgressCallback)
    if main_process:
        write_json(Path(training_args.output_dir) / RUN_FILE, run)
    if checkpoint:
        logging.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()

    # measure
    logging.info("measuring held-out loss and forward speed")
    with trainer.dense():
        dense = trainer.evaluate(metric_key_prefix="dense")
    routed = trainer.evaluate()
    routers = trainer.router_state()
    trained_base = None
    if not training_args.router_only:
        trained_base = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not main_process:
        return
    longest = sorted(eval_set, key=lambda row: row["length"])[-4:]
    speed = forward_speed(trainer.accelerator.unwrap_model(model), [collator(longest)])

    # save
    how = write_checkpoint(
        training_args.output_dir,
        model_dir,
        settings,
        routers,
        copy_base=model_args.save_base == "copy",
        trained_base=trained_base,
    )
    results = {"held_out": {"dense": dense, "routed": routed}, "forward_tokens_per_second": speed}
    write_json(Path(training_args.output_dir) / "results.json", results)
    logging.info("base weights: %s", how)
    print(run_table(dense, routed, speed, eval_report.rows_kept, eval_report.supervised_tokens))
    print(training_args.output_dir)


if __name__ == "__main__":
    run_command(main)
