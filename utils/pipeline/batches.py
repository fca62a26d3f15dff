"""What the loss needs to know of a batch, found on the host while the batch is still there.

Which positions have a label decides how much is computed. Asked on the device, each step would wait for the answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORE_INDEX = -100


def deciding_tokens(
    attention_mask: torch.Tensor | None, labels: torch.Tensor, sequence_pooling: str
) -> torch.Tensor | None:
    """Return which tokens have a say in a sequence's decision, bool [batch, tokens], or None for all.

    Args:
        attention_mask: [batch, tokens], or None where there is no padding.
        labels: int64 [batch, tokens].
        sequence_pooling: `all` real tokens, or those of the `prompt`, before the first supervised one; of a row without
            a prompt, which in generation would be one itself, all.
    """
    deciding = None if attention_mask is None else attention_mask.bool()
    if sequence_pooling == "prompt":
        prompt = (labels != IGNORE_INDEX).cumsum(dim=1) == 0
        prompt |= ~prompt[:, :1]
        deciding = prompt if deciding is None else deciding & prompt
    return deciding


def with_deciding_tokens(batch: Mapping[str, torch.Tensor], sequence_pooling: str) -> dict[str, torch.Tensor]:
    """Return a batch of `attention_mask` and `labels`, int64 [batch, tokens], with `token_mask`: `deciding_tokens`'."""
    return {**batch, "token_mask": deciding_tokens(batch["attention_mask"], batch["labels"], sequence_pooling)}


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions (indices into the flattened [batch * tokens]) and the tokens that follow, int64 [supervised].

    Args:
        labels: int64 [batch, tokens].
    """
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns, labels[rows, columns + 1]


@dataclass(frozen=True)
class SupervisedBatches:
    """Wraps a collator and adds where its batches are supervised.

    Args:
        collate: returns `input_ids` and `labels`, int64 [batch, tokens], and, where rows are padded, `attention_mask`.
        every: above 1, `taught` says which positions are each row's first, and every so many-th after it.
        first: above 1, `taught` has each row's first position so many times.
    """

    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    every: int = 1
    first: int = 1

    def __call__(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the batch with `positions`, int64 [supervised], and `targets`, int64 [supervised].

        A position is an index into the flattened [batch * tokens]; the hidden state there predicts its target, the next
        token.

        Raises:
            ValueError: rows are padded on the left: training leaves the attention mask out, since no token attends to
                padding on its right.
        """
        batch = dict(self.collate(features))
        mask = batch.get("attention_mask")
        if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError("the collator pads on the left; training needs padding on the right")
        batch["positions"], batch["targets"] = supervised(batch["labels"])
        if self.every > 1 or self.first > 1:
            rows = batch["positions"] // batch["labels"].shape[1]
            place = torch.arange(len(rows)) - torch.searchsorted(rows, rows)  # within the row
            taught, first = ((place % every == 0).nonzero().squeeze(-1) for every in (self.every, len(rows) + 1))
            batch["taught"] = torch.cat([taught, first.repeat(self.first - 1)])
        return batch
