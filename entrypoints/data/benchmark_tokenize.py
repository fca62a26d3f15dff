#!/usr/bin/env python3
"""Measure tokenization: rows a second, against the usual way of encoding every prefix of a conversation.

    python entrypoints/data/benchmark_tokenize.py --train_file data/mixed/data.jsonl --max_rows 500

The prefix way encodes a conversation once for its tokens and twice more for each turn that is not the assistant's, up
to it and through it, to count which labels to mask; `datasets.map` does it row by row and `filter` drops the rows that
have no label. Both ways start from the same dataset in memory and end with one, and get the same limit and, where
ours is in the `tags` format, the same text. Times are of the clock; on a busy machine `cpu` says more.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.io.errors import UserError, run_command


def main() -> None:
    """Parse the command line, time both ways, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="file of conversations (data.jsonl)")
    parser.add_argument("--tokenizer", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="base model: folder or name")
    parser.add_argument("--max_seq_length", type=int, default=2048, help="tokens at which rows are cut (2048)")
    parser.add_argument("--max_rows", type=int, default=None, help="measure on the first rows only")
    parser.add_argument("--repeats", type=int, default=3, help="times each way runs; the fastest counts (3)")
    parser.add_argument("--one_thread", action="store_true", help="keep the tokenizer's threads to one in both ways")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats} is not a positive number")
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if arguments.one_thread else "true"

    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer

    from utils.data.messages import load_messages
    from utils.data.tokenization import tokenize_dataset
    from utils.model.base_models import resolve_base_model

    disable_progress_bar()
    dataset = load_messages(arguments.train_file, arguments.max_rows)
    tokenizer = AutoTokenizer.from_pretrained(resolve_base_model(arguments.tokenizer))

    def offsets_way(chat_format: str):
        return tokenize_dataset(dataset, tokenizer, arguments.max_seq_length, chat_format, progress=False)[1]

    def prefix_way() -> None:
        rows = dataset.map(
            lambda row: encode_prefixes(row["messages"], tokenizer, arguments.max_seq_length),
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
        )
        rows.filter(
            lambda row: any(label != -100 for label in row["labels"]), keep_in_memory=True, load_from_cache_file=False
        )

    ways = ["prefixes", "tags"] + ["template"] * bool(tokenizer.chat_template)
    seconds = {clock: dict.fromkeys(ways, float("inf")) for clock in ("clock", "cpu")}
    for _ in range(arguments.repeats):
        for way in ways:
            clock, cpu = time.perf_counter(), time.process_time()
            prefix_way() if way == "prefixes" else offsets_way(way)
            seconds["clock"][way] = min(seconds["clock"][way], time.perf_counter() - clock)
            seconds["cpu"][way] = min(seconds["cpu"][way], time.process_time() - cpu)
    result = {
        "rows": len(dataset),
        "max_seq_length": arguments.max_seq_length,
        "cores": os.cpu_count(),
        "threads": 1 if arguments.one_thread else os.cpu_count(),
        "rows_per_second": {way: round(len(dataset) / taken, 1) for way, taken in seconds["clock"].items()},
        "times_the_prefix_way": {
            clock: {way: round(taken["prefixes"] / taken[way], 2) for way in ways[1:]}
            for clock, taken in seconds.items()
        },
    }
    print(json.dumps(result, indent=2))


def encode_prefixes(messages: list[dict[str, str]], tokenizer, max_seq_length: int) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of one conversation the usual way, which this project does not use."""

    def text_of(turns: list[dict[str, str]]) -> str:
        end = {"assistant": tokenizer.eos_token}
        return "".join(f"<|{m['role']}|>\n{m['content'].strip()}{end.get(m['role'], '')}\n" for m in turns)

    def encode(text: str) -> list[int]:
        return tokenizer(text, max_length=max_seq_length, truncation=True).input_ids

    input_ids = encode(text_of(messages).strip())
    labels = list(input_ids)
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        start = len(encode(text_of(messages[:at]))) if at else 0
        next_role = messages[at + 1]["role"] if at + 1 < len(messages) else None
        prompt = "<|assistant|>\n" if next_role == "assistant" else ""
        end = len(encode(text_of(messages[: at + 1]) + prompt))
        labels[start:end] = [-100] * len(labels[start:end])
        if end >= max_seq_length:
            break
    return {"input_ids": input_ids, "labels": labels}


if __name__ == "__main__":
    run_command(main)
