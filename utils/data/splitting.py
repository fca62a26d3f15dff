"""Hold rows out for evaluation, the same ones on every machine.

A row's side follows from its messages and the seed alone (SHA-256), not from its place in the file or a library's
random numbers. Rows with the same messages go to the same side, so the held-out loss is never of a text trained on.
"""

import hashlib
import json

from datasets import Dataset

from utils.io.errors import UserError


def split_held_out(
    dataset: Dataset, num_rows: int | None = None, fraction: float | None = None, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Split `dataset` into what to train on and what to hold out; both keep the order of the file.

    Args:
        dataset: rows with a `messages` column.
        num_rows: how many rows to hold out, at most: fewer where the last ones would part duplicates.
        fraction: instead of `num_rows`, the share of rows to hold out, between 0 and 1 (rounded down to rows).
        seed: another seed holds out other rows.

    Returns:
        The rows to train on and the held-out rows.

    Raises:
        UserError: not exactly one of `num_rows` and `fraction` is given, or it is out of range, or nothing would be
            left to train on.
    """
    if (num_rows is None) == (fraction is None):
        raise UserError("held-out split: give either a number of rows or a fraction")
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"held-out split: the fraction {fraction} is not between 0 and 1")
    wanted = num_rows if num_rows is not None else int(fraction * len(dataset))
    if not 0 <= wanted <= len(dataset):
        raise UserError(f"held-out split: cannot hold out {wanted} of {len(dataset)} rows")

    rows_of: dict[bytes, list[int]] = {}
    for start in range(0, len(dataset), 1000):
        for row, messages in enumerate(dataset[start : start + 1000]["messages"], start):
            rows_of.setdefault(_messages_key(messages, seed), []).append(row)
    held_out: list[int] = []
    for key in sorted(rows_of):
        if len(held_out) + len(rows_of[key]) <= wanted:
            held_out += rows_of[key]
    if len(dataset) and len(held_out) == len(dataset):
        raise UserError(f"held-out split: holding out {wanted} of {len(dataset)} rows leaves none to train on")
    side = set(held_out)
    return dataset.select([row for row in range(len(dataset)) if row not in side]), dataset.select(sorted(held_out))


def _messages_key(messages: list[dict[str, str]], seed: int) -> bytes:
    turns = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps([seed, turns]).encode()).digest()
