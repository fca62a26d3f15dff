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


def split_for_training(
    rows: Dataset, seed: int, max_train_samples: int | None = None, max_eval_samples: int | None = None
) -> tuple[Dataset, Dataset | None, Dataset]:
    """Split a file's rows as a training run does.

    Args:
        rows: with a `messages` column.
        seed: of the run; shuffles what is not held out.
        max_train_samples: rows to train on, at most; None for all.
        max_eval_samples: rows to hold out, at most, and at most one in eight; None where others are held out.

    Returns:
        The rows to train on, the held-out rows (None where none are taken from here), and the rows left over.

    Raises:
        UserError: nothing can be held out without its duplicates being trained on.
    """
    held_out = None
    if max_eval_samples is not None:
        rows, held_out = split_held_out(rows, num_rows=min(max_eval_samples, max(1, len(rows) // 8)), seed=0)
        if not held_out:
            raise UserError(
                f"none of {len(rows)} rows can be held out, as so many have the same messages: give other rows to "
                "evaluate on (eval_file), or more different ones"
            )
    rows = rows.shuffle(seed=seed)
    count = min(max_train_samples or len(rows), len(rows))
    left_over = range(count, len(rows)) if count < len(rows) else []
    return rows.select(range(count)), held_out, rows.select(left_over)


def set_aside(train_set: Dataset, calibration_rows: int) -> tuple[Dataset, Dataset | list]:
    """Return the rows to train on, and up to so many rows, one in eight at most, to calibrate the thresholds on."""
    count = min(calibration_rows, len(train_set) // 8)
    if count == 0:
        return train_set, []
    last = len(train_set) - count
    return train_set.select(range(last)), train_set.select(range(last, len(train_set)))


def without(rows: Dataset, *others: Dataset) -> Dataset:
    """Return the rows whose messages are none of the others'."""
    seen = {_messages_key(messages, 0) for other in others for messages in other["messages"]}
    keys = [_messages_key(messages, 0) for messages in rows["messages"]]
    return rows.select([row for row, key in enumerate(keys) if key not in seen])


def _messages_key(messages: list[dict[str, str]], seed: int) -> bytes:
    turns = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps([seed, turns]).encode()).digest()
