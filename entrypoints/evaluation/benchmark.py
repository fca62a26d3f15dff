#!/usr/bin/env python3
"""Measure speed and memory of a MoD checkpoint beside its dense base, an oracle and random routing.

    python entrypoints/evaluation/benchmark.py ckpt/smollm2-135m-mod --grid 1x512 8x128 --threads 1

First sparse execution is checked against the dense specification; nothing is timed unless that passes. Then, for each
batch size and prompt length, prefill and decode are timed for these models on the same weights:

    dense        the base model of transformers
    all_kept     routers that keep everything: what routing costs
    tuned        the checkpoint as it is
    random       random decisions with the same share executed
    share_alone  the base model whose routed branches run on as many inputs as that, without router, gather and mask
    all_skipped  routers that skip everything
    unreplaced   the same without substitutes, where the checkpoint has some
    oracle       the base model without the routed branches: what skipping can cost at best

The clock is the process's own processor time on a CPU, CUDA events on a GPU. Ratios are medians over interleaved
repeats with a 95% interval. `saved` is the share reached of the time that skipping should save by arithmetic, which is
the oracle's saving times the share skipped; `of alone` is the share reached of what `share_alone` saves, which is what
this machine makes of that arithmetic (it reads a layer's weights for four rows as for eight). Neither oracle nor
`share_alone` has substitutes: what these take is missing from what is saved. KV memory is the sum
over the cache's tensors after prefill; peak memory is what the prefill's tensors take at most, beyond the weights.
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
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form BATCHxLENGTH, such as 8x128")
    return int(match[1]), int(match[2])


def share(text: str) -> float:
    """Read a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "ckpt/smollm2-135m-mod"
    parser.add_argument("checkpoint", nargs="?", type=Path, default=default, help=f"MoD checkpoint ({default})")
    parser.add_argument(
        "--grid",
        type=cell,
        nargs="+",
        default=[(1, 128), (1, 512), (8, 128)],
        metavar="BATCHxLENGTH",
        help="batch sizes and prompt lengths to measure (1x128 1x512 8x128)",
    )
    parser.add_argument(
        "--decode_tokens", type=int, default=64, help="tokens to decode after each prompt; 0: none (64)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats of everything (5)")
    parser.add_argument(
        "--capacity", type=float, help="another share to execute that it was calibrated for, or between (its own)"
    )
    parser.add_argument("--random_share", type=share, help="share that random routing executes (the tuned one)")
    parser.add_argument("--granularity", help="route untrained routers at another granularity (the checkpoint's)")
    parser.add_argument("--mod_n", type=int, help="route another number of layers, untrained (the checkpoint's)")
    parser.add_argument(
        "--text_file", type=Path, default=ROOT / "data/sample/alpaca/alpaca_data.json", help="text of the prompts"
    )
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(float32, on a GPU bfloat16)")
    parser.add_argument("--attn_implementation", default="sdpa", help="transformers' attention (sdpa)")
    parser.add_argument("--threads", type=int, help="threads of a CPU (torch's default)")
    parser.add_argument("--output", type=Path, help="JSON file (outputs/benchmark/NAME-TIME.json)")
    arguments = parser.parse_args()
    for name, least in (("repeats", 1), ("decode_tokens", 0), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} must be at least {least}")
    if arguments.capacity is not None and (arguments.granularity or arguments.mod_n):
        parser.error("--capacity sets trained routers, and --granularity and --mod_n choose untrained ones")
    return arguments


def main() -> None:
    """Load, check, measure, print and write."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch
    import transformers
    from tqdm import tqdm

    from utils.evaluation.benchmark import CheckFailedError, check_columns, measure_cell, table
    from utils.evaluation.columns import make_columns
    from utils.evaluation.prompts import cut_prompts, read_text
    from utils.io.files import dated_name, write_json
    from utils.model.checkpoint import load_mod_model, load_tokenizer, make_settings, read_config, read_settings

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(choose_device(arguments.device))
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))

    if arguments.capacity is not None:
        settings = read_settings(arguments.checkpoint, arguments.capacity)
    else:
        settings = make_settings(read_config(arguments.checkpoint), arguments.mod_n, arguments.granularity)
    tokenizer = load_tokenizer(arguments.checkpoint)
    text = read_text(arguments.text_file)
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    for _, length in arguments.grid:
        cut_prompts(token_ids, 1, length + arguments.decode_tokens)  # refuse now rather than after half of the grid
    model = load_mod_model(
        arguments.checkpoint, settings, dtype=dtype, attn_implementation=arguments.attn_implementation
    ).to(device)

    random_share = arguments.random_share
    if random_share is None:
        batch, length = max(arguments.grid)
        with torch.inference_mode():
            gates = model(cut_prompts(token_ids, batch, length).to(device), logits_to_keep=1).router_gates
        random_share = float(gates.double().mean())
    columns = make_columns(model, random_share)
    try:
        difference = check_columns(columns, token_ids)
    except CheckFailedError as error:
        raise UserError(f"not timed, as sparse execution failed its check: {error}") from None
    logging.info("%s of layers %s, %s on %s", settings.granularity, list(settings.layers), dtype, device)
    logging.info("sparse equals dense: logits differ by at most %.1e of the largest", difference)

    cells = []
    with tqdm(total=len(arguments.grid) * (arguments.repeats + 1), unit="repeat", disable=None) as bar:
        for batch, length in arguments.grid:
            bar.set_description(f"{batch}x{length}")
            cells.append(
                measure_cell(
                    columns, token_ids, batch, length, arguments.decode_tokens, arguments.repeats, progress=bar.update
                )
            )
            bar.clear()
            print(table(cells[-1]), flush=True)

    output = arguments.output
    if output is None:
        output = ROOT / "outputs/benchmark" / dated_name(arguments.checkpoint.resolve().name, ".json")
    result = {
        "arguments": json.loads(json.dumps(vars(arguments), default=str)),
        "routing": settings.to_dict(),
        "random_share": random_share,
        "dtype": str(dtype).removeprefix("torch."),
        "clock": "CUDA events" if device.type == "cuda" else "process CPU time",
        "check": {"largest_relative_difference_of_logits": difference},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
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
