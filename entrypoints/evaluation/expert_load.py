#!/usr/bin/env python3
"""Count, for each expert, the tokens that are assigned to it and those that it executes (Figure 8 of the paper).

    python entrypoints/evaluation/expert_load.py path/to/output --output load.json

The JSON has, for each routed layer and expert, numbers of tokens, and the same over the mean assigned of the layer;
`plot.py experts` draws it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.devices import choose_device
from utils.io.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="MoD checkpoint of granularity expert_token")
    parser.add_argument(
        "--text_file", type=Path, default=ROOT / "data/sample/alpaca/alpaca_data.json", help="text, JSON or JSON lines"
    )
    parser.add_argument("--rows", type=int, default=16, help="stretches of the text (16)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (256)")
    parser.add_argument("--output", type=Path, help="JSON file (expert_load.json in the checkpoint)")
    arguments = parser.parse_args()
    for name in ("rows", "length"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    return arguments


def main() -> None:
    """Load, count, write and print."""
    arguments = parse_arguments()

    import torch
    from tqdm import tqdm

    from utils.evaluation.expert_load import measure_expert_load
    from utils.evaluation.prompts import cut_prompts, read_text
    from utils.io.files import write_json
    from utils.model.checkpoint import load_mod_model, load_tokenizer, make_settings, read_config
    from utils.model.configuration_mod import EXPERT_GRANULARITY

    granularity = make_settings(read_config(arguments.checkpoint)).granularity
    if granularity != EXPERT_GRANULARITY:
        raise UserError(f"{arguments.checkpoint}: routes {granularity}, not {EXPERT_GRANULARITY}")
    token_ids = load_tokenizer(arguments.checkpoint)(
        read_text(arguments.text_file), add_special_tokens=False, verbose=False
    ).input_ids
    input_ids = cut_prompts(torch.tensor(token_ids), arguments.rows, arguments.length)
    device = choose_device()
    model = load_mod_model(arguments.checkpoint, dtype="auto").to(device).eval()
    with tqdm(total=len(input_ids), unit="row", disable=None) as bar:
        load = measure_expert_load(model, input_ids, progress=bar.update)
    output = arguments.output or arguments.checkpoint / "expert_load.json"
    write_json(output, {"text_file": str(arguments.text_file), "tokens": input_ids.numel(), **load})
    for layer, experts in load["experts"].items():
        assigned = experts["assigned_to_mean"]
        print(f"layer {layer:>3}: executed {experts['capacity']:.2f}, load {min(assigned):.2f} to {max(assigned):.2f}")
    print(f"executed {load['capacity']:.3f} of all assignments")
    print(output)


if __name__ == "__main__":
    run_command(main)
