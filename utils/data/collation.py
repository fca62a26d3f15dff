"""Put tokenized rows into one batch: right padding, no packing.

Rows are never packed: a decision at sequence level is taken on the mean of one sequence, which must be all there is in
the row. To waste little on padding, let the trainer group rows by their `length` column instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils.data.tokenization import IGNORE_INDEX
from utils.io.errors import UserError


@dataclass(frozen=True)
class SupervisedCollator:
    """Collate rows of `input_ids` and `labels` for causal language modelling.

    Args:
        pad_token_id: the token that fills `input_ids`; it is masked, so any valid one will do.
        pad_to_multiple_of: make the sequence length a multiple of this (tensor cores like 8).
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of: {self.pad_to_multiple_of} is not a positive number")

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None
    ) -> "SupervisedCollator":
        """Return a collator that pads with the tokenizer's pad token, or its end token where it has none.

        The tokenizer is not changed: a pad token added to the vocabulary would need a new row of embeddings.

        Raises:
            UserError: the tokenizer has neither.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has neither a pad_token nor an eos_token")
        return cls(pad, pad_to_multiple_of)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad B rows to the length S of the longest.

        Args:
            features: rows with `input_ids` and `labels`, each a sequence of integers; other columns are ignored.

        Returns:
            `input_ids` [B, S], `attention_mask` [B, S] (1 for tokens, 0 for padding) and `labels` [B, S] (-100 for
            padding), all int64.
        """
        longest = max(len(feature["input_ids"]) for feature in features)
        multiple = self.pad_to_multiple_of or 1
        shape = (len(features), -(-longest // multiple) * multiple)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for row, feature in enumerate(features):
            length = len(feature["input_ids"])
            input_ids[row, :length] = feature["input_ids"]
            attention_mask[row, :length] = 1
            labels[row, :length] = feature["labels"]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in batch.items()}
