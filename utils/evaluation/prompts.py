"""Real text as prompts of an exact length, so that no cell of a benchmark has padding."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils.io.errors import UserError


def read_text(path: str | Path) -> str:
    """Read a text file, or all strings of a JSON or JSON-lines file, as one text.

    Raises:
        UserError: there is no such file, it is not UTF-8, or not the JSON that its name promises.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return "\n\n".join(_strings(json.loads(text)))
        if path.suffix == ".jsonl":
            return "\n\n".join(string for line in text.splitlines() if line for string in _strings(json.loads(line)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    return text


def cut_prompts(token_ids: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Cut stretches out of one long text, evenly spread over it.

    Args:
        token_ids: int64 [tokens], the whole text.
        batch: number of prompts.
        length: tokens of each.

    Returns:
        int64 [batch, length].

    Raises:
        UserError: the text is shorter than one prompt.
    """
    spare = len(token_ids) - length
    if spare < 0:
        raise UserError(f"the text has {len(token_ids)} tokens, and a prompt needs {length}: give a longer text_file")
    starts = [spare * row // max(1, batch - 1) for row in range(batch)]
    return torch.stack([token_ids[start : start + length] for start in starts])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
