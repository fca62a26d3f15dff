"""Rows as generation has them: the prompts of tokenized rows, with answers that the dense model writes itself.

What routers execute of a model's own text is what a user gets; the answers of a data set are other text. Thresholds
are calibrated on these rows.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from utils.model.generation import generation_by

from .batches import IGNORE_INDEX

NEW_TOKENS = 16, 24, 32, 40
"""Tokens of an answer, at most, in turn from prompt to prompt: what is executed follows from the length of the answers
too, and a chat has short ones and long ones."""
SHORT_PROMPTS = 24
"""Prompts that the capacity of tokens is calibrated on."""


def short_prompts(
    rows: Sequence[Mapping[str, list[int]]], others: Sequence[Mapping[str, list[int]]], looked_at: int = 256
) -> list[Mapping[str, list[int]]]:
    """Return the rows with the shortest prompts, `SHORT_PROMPTS` at most: those most like what one types in a chat.

    Args:
        rows, others: `input_ids` and `labels`, -100 where unsupervised; of the others the first ones count.
        looked_at: others, at most.
    """
    numbered = [rows[number] for number in range(len(rows))]
    numbered += [others[number] for number in range(min(looked_at, len(others)))]
    with_prompt = [row for row in numbered if _prompt_length(row["labels"])] or numbered
    return sorted(with_prompt, key=lambda row: _prompt_length(row["labels"]))[:SHORT_PROMPTS]


def _prompt_length(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def prompt_share(rows: Sequence[Mapping[str, list[int]]], looked_at: int = 1000) -> float:
    """Return the share of a row's tokens that are its prompt's, the mean over rows; a half where there are none.

    Args:
        rows: `input_ids` and `labels`, -100 where unsupervised.
        looked_at: rows, the first ones, at most.
    """
    labels = [rows[number]["labels"] for number in range(min(looked_at, len(rows)))]
    shares = [each.count(IGNORE_INDEX) / len(each) for each in labels]
    mean = sum(shares) / len(shares) if shares else 0.5
    return mean if 0.0 < mean < 1.0 else 0.5


@torch.no_grad()
def answered(
    model: nn.Module,
    rows: Sequence[Mapping[str, list[int]]],
    ends: Collection[int],
    new_tokens: Sequence[int] = NEW_TOKENS,
    batch_size: int = 32,
    progress: bool = False,
) -> list[dict[str, list[int]]]:
    """Return rows with the same prompts, each followed by the dense model's greedy answer.

    Args:
        model: a routed model.
        rows: `input_ids` and `labels`, -100 where unsupervised; the prompt is what comes before the first label.
        ends: tokens that end an answer.
        new_tokens: length of an answer, at most; one after the other, and again, in the order of what is returned.
        batch_size: rows that are answered at once, alike in length.
        progress: show a bar.

    Returns:
        Rows with `input_ids`, `labels` and `length`, in the order of their prompts' lengths; those without a prompt
        stay as they are, and come first.
    """
    device, training = next(model.parameters()).device, model.training
    prompts, finished = [], []
    for row in rows:
        length = _prompt_length(row["labels"])
        if length:
            prompts.append(list(row["input_ids"][:length]))
        else:
            finished.append({name: list(row[name]) for name in ("input_ids", "labels")})
    prompts.sort(key=len)
    options = {"max_new_tokens": max(new_tokens), "do_sample": False, "pad_token_id": 0}
    if ends:
        options["eos_token_id"] = sorted(ends)
    model.eval()
    try:
        starts = range(0, len(prompts), batch_size)
        for start in tqdm(starts, desc="letting the dense model answer", unit="batch", disable=not progress):
            chosen = prompts[start : start + batch_size]
            width = len(chosen[-1])
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in chosen], device=device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in chosen], device=device)
            with generation_by(model, **options) as config:
                texts = model.generate(ids, attention_mask=mask, generation_config=config, route=False)
            texts = texts[:, width:].tolist()
            for number, (prompt, text) in enumerate(zip(chosen, texts, strict=True), start):
                text = text[: new_tokens[number % len(new_tokens)]]
                end = next((place + 1 for place, token in enumerate(text) if token in ends), len(text))
                finished.append({"input_ids": prompt + text[:end], "labels": [IGNORE_INDEX] * len(prompt) + text[:end]})
    finally:
        model.train(training)
    return [row | {"length": len(row["input_ids"])} for row in finished]
