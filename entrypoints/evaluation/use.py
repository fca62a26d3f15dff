#!/usr/bin/env python3
"""Say what MoD checkpoints are in use: how their answers to prompts compare with those of their dense bases.

    python entrypoints/evaluation/use.py path/to/output --show

agreement is the share of the dense model's own greedy answer that the routed one would give too, executed the share of
routed computations in that generation, and foreign by how many nats a token the dense model finds the routed model's
answers less likely than its own; each with its standard error over prompts. The prompts are what stands before the
assistant's turn at the end of a row: by default of the rows of the embedded sample that a training run holds out.
Nothing is random: the rows that are held out do not depend on a run's seed, and answers are greedy.
"""

import argparse
import json
import platform
import sys
import time
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
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="MoD checkpoints")
    parser.add_argument(
        "--capacity", type=float, help="another share to execute that it was calibrated for, or between (its own)"
    )
    parser.add_argument("--prompts", type=Path, help="JSON-lines file with `messages` (held-out rows of the sample)")
    parser.add_argument("--max_prompts", type=int, help="read the first so many prompts (all)")
    parser.add_argument("--max_new_tokens", type=int, default=40, help="length of an answer, at most (40)")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at once; changes no figure (8)")
    parser.add_argument("--chat_format", default="auto", help="how messages become text: auto, template or tags (auto)")
    parser.add_argument("--show", action="store_true", help="print all answers, dense and routed")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(float32, on a GPU bfloat16)")
    parser.add_argument("--output", type=Path, help="JSON file (outputs/use/NAME-TIME.json)")
    arguments = parser.parse_args()
    for name in ("max_prompts", "max_new_tokens", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    return arguments


def main() -> None:
    """Check everything, then answer with one checkpoint after the other, print and write."""
    arguments = parse_arguments()

    import torch
    import transformers
    from tqdm import tqdm

    from utils.data.prompts import encode_prompts
    from utils.evaluation.use import FIGURES, check_prompts, figures_of_use, text_of
    from utils.io.files import write_json
    from utils.model.checkpoint import is_mod, load_mod_model, load_tokenizer, read_config, read_settings

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    prepared = {}
    conversations = read_conversations(arguments.prompts)
    for checkpoint in arguments.checkpoints:
        config = read_config(checkpoint)
        if not is_mod(config):
            raise UserError(f"{checkpoint}: a dense model routes nothing; name a MoD checkpoint")
        settings, tokenizer = read_settings(checkpoint, arguments.capacity), load_tokenizer(checkpoint)
        try:
            prompts = encode_prompts(conversations, tokenizer, arguments.chat_format, arguments.max_prompts)
            check_prompts(prompts, config["max_position_embeddings"], arguments.max_new_tokens)
        except UserError as error:
            raise UserError(f"{arguments.prompts or 'held-out rows of the sample'}: {error}") from None
        prepared[checkpoint] = settings, tokenizer, prompts

    results = {}
    for checkpoint, (settings, tokenizer, prompts) in prepared.items():
        model = load_mod_model(checkpoint, settings, dtype=dtype).to(device).eval()
        with tqdm(total=len(prompts), unit="prompt", desc=checkpoint.resolve().name, disable=None) as bar:
            found = figures_of_use(
                model, tokenizer, prompts, arguments.max_new_tokens, arguments.batch_size, progress=bar.update
            )
        results[str(checkpoint)] = {"target_capacity": settings.target_capacity, **found}
        if arguments.show:
            for answer in found["answers"]:
                print(f"--- {answer['prompt']}\ndense:  {answer['dense']}\nrouted: {answer['routed']}", flush=True)
        del model

    width = max(12, *(len(path.resolve().name) + 2 for path in prepared))
    print(f"{'':<{width}}" + "".join(f"{name:>18}" for name in FIGURES) + f"{'prompts':>10}")
    for checkpoint in prepared:
        use = results[str(checkpoint)]["use"]
        cells = "".join(f"{text_of(use[name]):>18}" for name in FIGURES)
        print(f"{checkpoint.resolve().name:<{width}}{cells}{use['prompts']:>10}")
    output = arguments.output
    if output is None:
        output = ROOT / f"outputs/use/{arguments.checkpoints[0].resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    write_json(
        output,
        {
            "arguments": json.loads(json.dumps(vars(arguments), default=str)),
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "decoding": "greedy",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "checkpoints": results,
        },
    )
    print(output)


def read_conversations(path: Path | None) -> list:
    """Return the messages of a file's rows, or of those that a training on the sample holds out."""
    from utils.data.messages import load_messages
    from utils.data.prompts import load_sample
    from utils.data.splitting import split_for_training
    from utils.pipeline.arguments import DataArguments

    if path is not None:
        return load_messages(path)["messages"][:]
    _, held_out, _ = split_for_training(load_sample(ROOT), seed=0, max_eval_samples=DataArguments.max_eval_samples)
    return held_out["messages"][:]


if __name__ == "__main__":
    run_command(main)
