#!/usr/bin/env python3
"""Time a router-tuning step and its memory, beside the straightforward way and the sum of its parts.

    python entrypoints/finetune/benchmark_step.py ckpt/smollm2-135m-mod --train_file data/reformatted/alpaca/data.jsonl

For each batch size and length the rows that fill it best are taken, and measured in turn:

    ours             the trainer's step with the hinge: forward and backward, without teacher and optimizer
    default recipe   the trainer's step by the default recipe: with capacity control and dense teacher
    straightforward  the same losses with gradients from the embeddings on, and logits of every token
    forward          hidden states alone, without gradient
    suffix           forward, losses and backward from the input of the first routed layer on; what it takes beyond its
                     forward alone, added to `forward`, is the sum of the step's parts

Seconds are of the wall clock, medians over interleaved repeats. Memory is the peak of the tensors' bytes beyond what
was there before. Nothing is timed unless the two ways give the same loss and the same gradients.
"""

import argparse
import json
import logging
import platform
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.devices import choose_device
from utils.io.errors import UserError, run_command


def cell(text: str) -> tuple[int, int]:
    """Read `BATCHxLENGTH`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form BATCHxLENGTH, such as 4x256")
    return int(match[1]), int(match[2])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="MoD checkpoint")
    parser.add_argument("--train_file", required=True, help="data.jsonl that the rows are taken from")
    parser.add_argument(
        "--grid", type=cell, nargs="+", default=[(4, 256), (8, 256)], metavar="BATCHxLENGTH", help="(4x256 8x256)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the backbone (bfloat16 on a GPU)")
    parser.add_argument("--distillation_every", type=int, default=1, help="of the default recipe's step (1)")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats of everything (5)")
    parser.add_argument("--threads", type=int, help="threads of a CPU (torch's default)")
    parser.add_argument("--output", type=Path, help="JSON file (outputs/benchmark/step-NAME-TIME.json)")
    arguments = parser.parse_args()
    for name in ("repeats", "threads", "distillation_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    return arguments


def main() -> None:
    """Load, check, measure, print and write."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch
    import transformers
    from tqdm import tqdm

    from utils.data.collation import SupervisedCollator
    from utils.data.messages import load_messages
    from utils.data.tokenization import tokenize_dataset
    from utils.evaluation.timing import peak_memory
    from utils.io.files import dated_name, write_json
    from utils.model.checkpoint import load_mod_model, load_tokenizer
    from utils.pipeline.batches import SupervisedBatches
    from utils.pipeline.customized_trainer import freeze_backbone
    from utils.pipeline.step_benchmark import StepBenchmark, StepsDifferError

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_gpu = choose_device() == "cuda"
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    tokenizer = load_tokenizer(arguments.checkpoint)
    model = load_mod_model(arguments.checkpoint, dtype=getattr(torch, dtype))
    freeze_backbone(model.to("cuda" if on_gpu else "cpu"))
    collate = SupervisedBatches(SupervisedCollator.for_tokenizer(tokenizer), arguments.distillation_every)

    cells = []
    for rows, length in arguments.grid:
        messages = load_messages(arguments.train_file, max_rows=max(512, rows))
        dataset, _ = tokenize_dataset(messages, tokenizer, max_seq_length=length, progress=False)
        if len(dataset) < rows:
            raise UserError(f"train_file {arguments.train_file} has {len(dataset)} rows, fewer than {rows}")
        longest = sorted(dataset, key=lambda row: -row["length"])[:rows]
        benchmark = StepBenchmark(model, collate(longest))
        try:
            benchmark.check()
        except StepsDifferError as error:
            raise UserError(f"not timed, as the two ways differ: {error}") from None
        with tqdm(total=arguments.repeats + 1, desc=f"{rows}x{length}", unit="repeat", disable=None) as bar:
            measured = benchmark.measure(arguments.repeats, peak_memory, bar.update)
        cells.append({"rows": rows, "length": length, **measured})
        print(benchmark.table(cells[-1]), flush=True)

    output = arguments.output
    if output is None:
        name = arguments.checkpoint.resolve().name
        output = ROOT / "outputs/benchmark" / dated_name(f"step-{name}", ".json")
    result = {
        "arguments": json.loads(json.dumps(vars(arguments), default=str)),
        "routing": model.config.mod_settings.to_dict(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cells": cells,
    }
    write_json(output, result)
    print(output)


if __name__ == "__main__":
    run_command(main)
