#!/usr/bin/env python3
"""Write an HTML page that shows which layers of a MoD checkpoint each token of a text used.

    python entrypoints/evaluation/routing_report.py path/to/output --text notes.txt --output report.html

Each paragraph of the file is an input of its own, or each row of a `.jsonl` file. The page is one file that works
without a network: tokens are shaded by depth, hovering or the arrow keys show the layers of a token, a map shows
layers by inputs, and layers can be left out. The path is printed.
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
    parser.add_argument("checkpoint", type=Path, help="MoD checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="text file, or .jsonl")
    parser.add_argument("--output", type=Path, help="HTML file (outputs/routing_report/NAME-TEXT.html)")
    parser.add_argument(
        "--capacity", type=float, help="another share to execute that it was calibrated for, or between (its own)"
    )
    parser.add_argument("--max_inputs", type=int, default=64, help="read the first so many inputs (64)")
    parser.add_argument("--max_tokens", type=int, default=512, help="and so many tokens of each (512)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="(auto)")
    arguments = parser.parse_args()
    for name in ("max_inputs", "max_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    return arguments


def main() -> None:
    """Load, route, write."""
    arguments = parse_arguments()

    import transformers
    from tqdm import tqdm

    from utils.evaluation.routing_report import read_inputs, render_report, route_inputs
    from utils.io.files import atomic_file
    from utils.model.checkpoint import is_mod, load_mod_model, load_tokenizer, read_config, read_settings

    inputs = read_inputs(arguments.text)
    if not is_mod(read_config(arguments.checkpoint)):
        raise UserError(f"{arguments.checkpoint}: a dense model routes nothing; name a MoD checkpoint")
    settings = read_settings(arguments.checkpoint, arguments.capacity)
    device = choose_device(arguments.device)
    transformers.logging.disable_progress_bar()
    model = load_mod_model(arguments.checkpoint, settings, dtype=arguments.dtype).to(device).eval()
    tokenizer = load_tokenizer(arguments.checkpoint)
    if len(inputs) > arguments.max_inputs:
        print(f"reading {arguments.max_inputs} of {len(inputs)} inputs (--max_inputs)", file=sys.stderr)
        inputs = inputs[: arguments.max_inputs]
    with tqdm(total=len(inputs), unit="input", disable=None) as bar:
        routed = route_inputs(model, tokenizer, inputs, arguments.max_tokens, progress=bar.update)
    name = arguments.checkpoint.resolve().name
    if arguments.capacity is not None:
        name += f"-at-{arguments.capacity:g}"
    output = arguments.output or ROOT / f"outputs/routing_report/{name}-{arguments.text.stem}.html"
    with atomic_file(output) as file:
        file.write(render_report(routed, name))
    print(output)


if __name__ == "__main__":
    run_command(main)
