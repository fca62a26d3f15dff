"""Turn conversations into prompts for a model to answer: what stands before the assistant's turn at the end.

A prompt is rendered and encoded as in training, up to where the assistant begins to write.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from utils.io.errors import UserError

from .chat_format import Message, RefusedConversationError, make_chat_format
from .formats import SOURCES
from .messages import load_messages
from .raw_files import find_raw_files
from .reformat import reformat_set

logger = logging.getLogger(__name__)

NO_QUESTION = "no user's turn to answer at the end"
TOO_LONG = "longer than max_tokens"


def encode_prompts(
    conversations: Iterable[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    chat_format: str = "auto",
    max_prompts: int | None = None,
    max_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Encode the prompts of conversations, in order.

    Args:
        conversations: of each its messages; an assistant's turn at the end is cut off.
        tokenizer: not changed.
        chat_format: `template`, `tags` or `auto`, as in training.
        max_prompts: take the first so many; None for all.
        max_tokens: leave out longer ones; None for none.

    Returns:
        Of each `text`, the user's last turn; `input_ids`, a list of integers; `end_token`, the id of the chat's mark at
        the end of an answer. What is left out is logged with its reason.

    Raises:
        UserError: the tokenizer cannot serve the format, or nothing is left; says why.
    """
    chat = make_chat_format(chat_format, tokenizer)
    end_token = tokenizer.convert_tokens_to_ids(chat.end_mark)
    prompts, left_out = [], Counter()
    for messages in conversations:
        if len(prompts) == max_prompts:
            break
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        before = messages[:-1] if answered else messages
        if not before or before[-1]["role"] != "user":
            left_out[NO_QUESTION] += 1
            continue
        try:
            text = chat.render_prompt(before)
        except RefusedConversationError as error:
            left_out[str(error)] += 1
            continue
        input_ids = tokenizer(text, add_special_tokens=chat.add_special_tokens, verbose=False).input_ids
        if max_tokens is not None and len(input_ids) > max_tokens:
            left_out[TOO_LONG] += 1
            continue
        prompts.append({"text": before[-1]["content"], "input_ids": input_ids, "end_token": end_token})
    reasons = "; ".join(f"{count} left out: {reason}" for reason, count in sorted(left_out.items()))
    if not prompts:
        raise UserError(f"no prompts: {reasons or 'there are no rows'}")
    if left_out:
        logger.warning("%d prompts; %s", len(prompts), reasons)
    return prompts


def held_out_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, chat_format: str, max_prompts: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Return prompts of held-out rows, to measure use on; none, with a warning, where there are none.

    Args:
        rows: with `messages`.
        tokenizer, chat_format, max_tokens: as of `encode_prompts`.
        max_prompts: the first so many; 0 for none.
    """
    if not max_prompts:
        return []
    try:
        return encode_prompts(rows["messages"], tokenizer, chat_format, max_prompts, max_tokens)
    except UserError as error:
        logger.warning("figures of use are not measured: %s", error)
        return []


def load_sample(repository: Path) -> Dataset:
    """Return the rows of the repository's embedded sample, as `scripts/finetune_mod.sh` trains on them.

    Raises:
        UserError: the sample is not there.
    """
    folder = repository / "data/sample/alpaca"
    files = find_raw_files(folder, SOURCES["alpaca"].file)
    if not files:
        raise UserError(f"{folder}: the embedded sample is not there; name a file of conversations instead")
    with TemporaryDirectory() as made:
        target = Path(made, "data.jsonl")
        reformat_set("alpaca", files, target)
        return load_messages(target)
