#!/usr/bin/env python3
"""Build the static baseline of expert routing: a MoD checkpoint in which some experts are never executed.

    python entrypoints/checkpoint/drop_experts.py ckpt/smollm2-moe-mod outputs/expert-drop --share 0.25

Dropped are the experts with the least weight of the gate in a calibration text, relative to their layer's, over all
routed layers together (Expert Drop, Table 7 of the paper). Routers stay at zero, and a dropped expert has a threshold
that zero doesn't reach.
"""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="dense mixture of experts, or a MoD checkpoint of one")
    parser.add_argument("output_dir", type=Path, help="made here")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts of all routed layers (0.25)")
    parser.add_argument("--mod_n", type=int, help="number of routed layers (the checkpoint's, or half of them)")
    parser.add_argument(
        "--text_file", type=Path, default=ROOT / "data/sample/alpaca/alpaca_data.json", help="calibration text"
    )
    parser.add_argument("--rows", type=int, default=16, help="stretches of the text (16)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (256)")
    arguments = parser.parse_args()
    for name in ("rows", "length"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if not 0 <= arguments.share < 1:
        parser.error(f"--share {arguments.share} must be at least 0 and below 1")
    return arguments


def main() -> None:
    """Load, calibrate, and write the checkpoint."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch
    from tqdm import tqdm

    from utils.evaluation.expert_load import DROP, KEEP, least_important, measure_expert_load
    from utils.evaluation.prompts import cut_prompts, read_text
    from utils.model.checkpoint import (
        load_mod_model,
        load_tokenizer,
        make_settings,
        read_config,
        router_name,
        write_checkpoint,
    )
    from utils.model.configuration_mod import EXPERT_GRANULARITY

    if arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
        raise UserError(f"{arguments.output_dir} is there already; choose another")
    settings = make_settings(read_config(arguments.checkpoint), arguments.mod_n, EXPERT_GRANULARITY)
    tokenizer = load_tokenizer(arguments.checkpoint)
    text = read_text(arguments.text_file)
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    input_ids = cut_prompts(token_ids, arguments.rows, arguments.length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_mod_model(arguments.checkpoint, settings, dtype="auto").to(device).eval()
    with tqdm(total=len(input_ids), unit="row", disable=None) as bar:
        load = measure_expert_load(model, input_ids, route=False, progress=bar.update)

    dropped = least_important(load, arguments.share)
    threshold = torch.where(dropped, DROP, KEEP).tolist()
    settings = replace(settings, threshold=threshold, target_capacity=None)
    routers = {router_name(index): torch.zeros_like(r.weight) for index, r in model.router_modules().items()}
    how = write_checkpoint(arguments.output_dir, arguments.checkpoint, settings, routers)
    executed = 1 - int(load.assigned[dropped].sum()) / int(load.assigned.sum())
    logging.info("dropped %d of %d experts; base weights: %s", dropped.sum(), dropped.numel(), how)
    logging.info("%.3f of the calibration text's assignments are executed", executed)
    print(arguments.output_dir)


if __name__ == "__main__":
    run_command(main)
