#!/usr/bin/env python3
"""Let a MoD checkpoint answer a prompt or chat, and show what each of its layers executed.

    python entrypoints/inference/generate.py path/to/output --prompt "Why is the sky blue?" --compare_dense

The answer is streamed. Below it stand, for each routed layer, the share of its decisions that executed (at sequence
level one for the conversation, at token level one for each token) and the KV memory it takes; then tokens per second
and KV bytes of all layers. Without --prompt it is a chat: a line is a turn, an empty one ends it.
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
    default = ROOT / "ckpt/smollm2-135m-mod"
    parser.add_argument("checkpoint", nargs="?", type=Path, default=default, help=f"MoD checkpoint ({default})")
    parser.add_argument(
        "--capacity", type=float, help="another share to execute that it was calibrated for, or between (its own)"
    )
    parser.add_argument("--prompt", help="one question; without it, chat")
    parser.add_argument("--system", help="system message (the chat template's own)")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="length of an answer, at most (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among tokens of this total probability (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--compare_dense", action="store_true", help="let the dense base answer as well")
    parser.add_argument(
        "--cache",
        choices=("dynamic", "static"),
        default="dynamic",
        help="dynamic grows and stores executed rows only; static has a fixed shape: on a GPU steps are one graph, "
        "compiled at the first answer (dynamic)",
    )
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(float32, on a GPU bfloat16)")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {arguments.max_new_tokens} must be at least 1")
    if arguments.temperature < 0:
        parser.error(f"--temperature {arguments.temperature} must not be negative")
    if not 0 < arguments.top_p <= 1:
        parser.error(f"--top_p {arguments.top_p} must be above 0 and at most 1")
    if arguments.prompt == "":
        parser.error("--prompt is empty: there is nothing to answer")
    if arguments.raw and (arguments.prompt is None or arguments.system is not None):
        parser.error("--raw continues a --prompt, and takes no --system")
    return arguments


def main() -> None:
    """Load, then answer once or in turns."""
    arguments = parse_arguments()

    import torch
    import transformers

    from utils.data.chat_format import encode_prompt, ends_of_turn
    from utils.evaluation.generation import describe, generate
    from utils.model.checkpoint import load_mod_model, load_tokenizer, read_config, read_settings
    from utils.model.tokenizer_match import check_positions, stop_tokens

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = choose_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    settings = read_settings(arguments.checkpoint, arguments.capacity)
    model = load_mod_model(arguments.checkpoint, settings, dtype=dtype).to(device).eval()
    tokenizer = load_tokenizer(arguments.checkpoint)
    if not arguments.raw and not tokenizer.chat_template:
        raise UserError(f"{arguments.checkpoint}: its tokenizer has no chat template; give a --prompt with --raw")

    stops = stop_tokens(arguments.checkpoint, tokenizer, ends_of_turn(tokenizer))
    options = {"max_new_tokens": arguments.max_new_tokens, "eos_token_id": stops or None, "do_sample": False}
    options["pad_token_id"] = next(iter(stops), 0)
    options["static"] = arguments.cache == "static"
    config = read_config(arguments.checkpoint)
    if arguments.temperature > 0:
        options |= {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def answer(encoded) -> str:
        """Stream the answer to `encoded` and print what was observed; returns the routed model's text."""
        input_ids = encoded["input_ids"].to(device)
        length = input_ids.shape[1]
        if length == 0:
            raise UserError(f"--prompt {arguments.prompt!r} has no tokens: there is nothing to continue")
        check_positions(
            config,
            length + arguments.max_new_tokens,
            f"a prompt of {length} tokens with --max_new_tokens {arguments.max_new_tokens}",
            "shorten one of them",
        )
        text = ""
        for route in (True, False) if arguments.compare_dense else (True,):
            if arguments.compare_dense:
                print("--- routed" if route else "--- dense")
            torch.manual_seed(arguments.seed)
            generation = generate(model, input_ids, streamer, route=route, **options)
            print(describe(generation), flush=True)
            if route:
                text = tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        return text

    if arguments.raw:
        answer(tokenizer(arguments.prompt, return_tensors="pt"))
        return
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    while True:
        question = arguments.prompt if arguments.prompt is not None else read_turn()
        if not question:
            return
        messages.append({"role": "user", "content": question})
        text = answer(encode_prompt(tokenizer, messages))
        if arguments.prompt is not None:
            return
        messages.append({"role": "assistant", "content": text})


def read_turn() -> str:
    """Return the user's next line; an empty one at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    run_command(main)
