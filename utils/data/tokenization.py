"""Turn conversations into `input_ids` and `labels` in which only the assistant's tokens are supervised.

Each conversation is rendered once (`chat_format.py`) and encoded once; the labels come from the character offsets of
its tokens. The usual way, encoding every prefix of the conversation to count its tokens, costs a time quadratic in the
turns and is wrong wherever a tokenizer merges across the cut.

A token is supervised if it starts within an assistant's turn. One that starts in the white space before a turn and
reaches into its text (SentencePiece joins a space with the word after it) is supervised as well: it is the turn's first
token. One that starts in other fixed text is not, nor is white space that the template puts around an answer.

Rows without a supervised token are dropped and counted by reason, rows longer than the limit are cut at its end.
Results are kept in a cache folder under a name that follows from all that they depend on.
"""

import copy
import hashlib
import json
import logging
import math
import os
import tempfile
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import transformers
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import EncodingFast

from utils.data.chat_format import Message, RefusedConversationError, make_chat_format
from utils.io.errors import UserError
from utils.io.files import atomic_file, write_json

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})
# Part of the cache's key: raise it whenever the same input would give other tokens or labels.
_CODE_VERSION = 1
_BATCH_ROWS = 512

NO_ASSISTANT = "no assistant's turn"
CUT_AWAY = "no supervised token within max_seq_length"


@dataclass
class TokenizationReport:
    """What became of the rows.

    Attributes:
        rows_read, rows_kept: number of rows.
        dropped: number of dropped rows for each reason.
        truncated: kept rows that were longer than `max_seq_length`.
        tokens, supervised_tokens: totals over the kept rows.
        chat_format: `template` or `tags`, whichever was used.
    """

    chat_format: str
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def summary(self) -> str:
        """Return the report as one line."""
        dropped = "".join(f"; dropped {count}: {reason}" for reason, count in sorted(self.dropped.items()))
        return (
            f"{self.rows_kept} of {self.rows_read} rows, {self.tokens} tokens ({self.supervised_tokens} supervised), "
            f"{self.truncated} rows truncated, chat format {self.chat_format!r}{dropped}"
        )

    def check(self, max_dropped: float) -> None:
        """Warn where a tenth of the rows was dropped; raises `UserError` where it is more than `max_dropped`."""
        lost = self.rows_read - self.rows_kept
        share = lost / max(1, self.rows_read)
        if share < 0.1:
            return
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(self.dropped.items()))
        message = f"{lost} of {self.rows_read} rows can't be trained on ({reasons})"
        if share > max_dropped:
            raise UserError(
                f"{message}; take --chat_format tags, another template or a larger --max_seq_length, or go on without "
                f"them with --max_dropped {math.ceil(100 * share) / 100:g}"
            )
        logger.warning("%s", message)


@dataclass
class EncodedBatch:
    """The kept rows of a batch and what became of the others; arrays are int32, one for each row."""

    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    truncated: int
    dropped: Counter[str]


class ConversationEncoder:
    """Encode batches of conversations.

    Args:
        tokenizer: a fast tokenizer; its settings are not changed.
        max_seq_length: rows are cut to this many tokens.
        chat_format: `template`, `tags` or `auto` (the template where the tokenizer has one).

    Raises:
        UserError: the tokenizer gives no character offsets, or cannot serve the format, or the length is not positive.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, chat_format: str = "auto") -> None:
        if max_seq_length < 1:
            raise UserError(f"max_seq_length: {max_seq_length} is not a positive number")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer: it gives no character offsets, and the labels come "
                "from them; use a checkpoint that has a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.chat_format = make_chat_format(chat_format, tokenizer)
        # A copy, for truncation and padding are state of the tokenizer that whoever called it last has set.
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        self._check_offsets()

    def encode(self, conversations: Iterable[Sequence[Message]]) -> EncodedBatch:
        """Render, encode and label a batch of conversations; the kept rows stay in order."""
        chats, dropped = [], Counter()
        for messages in conversations:
            if not any(message["role"] == "assistant" for message in messages):
                dropped[NO_ASSISTANT] += 1
                continue
            try:
                chats.append(self.chat_format.render(messages))
            except RefusedConversationError as error:
                dropped[str(error)] += 1
        batch = EncodedBatch([], [], 0, dropped)
        if not chats:
            return batch
        add_special_tokens = self.chat_format.add_special_tokens
        encodings = self.backend.encode_batch([chat.text for chat in chats], add_special_tokens=add_special_tokens)
        for chat, encoding in zip(chats, encodings, strict=True):
            input_ids = np.array(encoding.ids[: self.max_seq_length], dtype=np.int32)
            labels = np.full_like(input_ids, IGNORE_INDEX)
            for start, end in supervised_tokens(encoding, chat.text, chat.spans):
                labels[start:end] = input_ids[start:end]
            if (labels == IGNORE_INDEX).all():
                dropped[CUT_AWAY] += 1
                continue
            batch.input_ids.append(input_ids)
            batch.labels.append(labels)
            batch.truncated += len(encoding) > self.max_seq_length
        return batch

    def _check_offsets(self) -> None:
        """Refuse tokenizers whose offsets leave characters out (older Llama-3 files give every token a width of 0)."""
        text = "One two, three: 4."
        covered = np.zeros(len(text), dtype=bool)
        for start, end in self.backend.encode(text, add_special_tokens=False).offsets:
            covered[start:end] = True
        if not all(covered[at] or character.isspace() for at, character in enumerate(text)):
            raise UserError(
                f"the character offsets of the tokenizer {self.tokenizer.name_or_path!r} leave out parts of the text; "
                "update `tokenizers` or the checkpoint's tokenizer.json"
            )


def supervised_tokens(encoding: EncodingFast, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return which tokens belong to each of the spans.

    Tokens are in the order of the text, so the first and the last of a span are found by bisection; asking for the
    offsets of all of them would take longer than encoding.

    Args:
        encoding: the encoded text.
        text: the rendered conversation.
        spans: (start, end) of the assistant's turns in characters, in order.

    Returns:
        (first, last + 1) in tokens for each span that has any.
    """
    # The marks that the tokenizer adds at either end are not in the text.
    first, last = 0, len(encoding)
    while first < last and encoding.token_to_chars(first) is None:
        first += 1
    while first < last and encoding.token_to_chars(last - 1) is None:
        last -= 1

    def starts_from(position: int, token: int) -> bool:
        # Some tokenizers trim the space off a token's offsets (" word" -> "word"): a token really starts where the
        # one before it ended. Tokens that share a character (the bytes of an emoji) start at that character.
        start = encoding.token_to_chars(token)[0]
        return start >= position and (token == first or encoding.token_to_chars(token - 1)[1] >= position)

    ranges = []
    for start, end in spans:
        space_before = start
        while space_before > 0 and text[space_before - 1].isspace():
            space_before -= 1
        first_text = start
        while first_text < end and text[first_text].isspace():
            first_text += 1

        def within(token: int, start=start, space_before=space_before, first_text=first_text) -> bool:
            if starts_from(start, token):
                return True
            return encoding.token_to_chars(token)[1] > first_text and starts_from(space_before, token)

        begin = bisect_left(range(last), True, lo=first, key=within)
        stop = bisect_left(range(last), True, lo=begin, key=lambda token, end=end: starts_from(end, token))
        if begin < stop:
            ranges.append((begin, stop))
    return ranges


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    chat_format: str = "auto",
    cache_dir: str | Path | None = None,
    num_proc: int = 1,
    progress: bool = True,
    max_dropped: float = 1.0,
) -> tuple[Dataset, TokenizationReport]:
    """Tokenize a dataset of conversations.

    One process already encodes on all cores (the tokenizers' own threads); more processes help where the Python part
    is what is left. With more than one, each runs a single thread.

    Args:
        dataset: rows with a `messages` column, as `load_messages` gives them.
        tokenizer: a fast tokenizer.
        max_seq_length: rows are cut to this many tokens.
        chat_format: `template`, `tags` or `auto` (the template where the tokenizer has one).
        cache_dir: folder to keep the result in and take it from the next time; None keeps it in memory only.
        num_proc: number of processes.
        progress: show a progress bar.
        max_dropped: share of the rows that may be dropped; at a tenth it is warned of.

    Returns:
        Columns `input_ids`, `labels` (lists of int32; -100 where not supervised) and `length`, and the report.

    Raises:
        UserError: a bad argument, or a tokenizer that cannot serve the format, or too many rows are dropped.
    """
    if "messages" not in dataset.column_names:
        raise UserError(f"expected a column 'messages'; there are {', '.join(map(repr, dataset.column_names))}")
    if num_proc < 1:
        raise UserError(f"num_proc: {num_proc} is not a positive number")
    encoder = ConversationEncoder(tokenizer, max_seq_length, chat_format)
    if cache_dir is None:
        with tempfile.TemporaryDirectory(prefix="tokenized-") as folder:
            path = Path(folder) / "rows.arrow"
            report = _write_rows(dataset, encoder, path, num_proc, progress)
            report.check(max_dropped)
            return Dataset.from_file(str(path), in_memory=True), report

    path = Path(cache_dir) / f"tokenized-{_cache_key(dataset, encoder)}.arrow"
    cached = _read_cache(path)
    if cached is not None:
        logger.info("Tokenized rows from the cache %s", path)
        cached[1].check(max_dropped)
        return cached
    report = _write_rows(dataset, encoder, path, num_proc, progress)
    # The report is written last and carries the hash of the rows: a cache without it, or with another, is not used.
    write_json(path.with_suffix(".json"), {"sha256": _file_hash(path), "report": asdict(report)})
    report.check(max_dropped)
    return Dataset.from_file(str(path)), report


def _write_rows(
    dataset: Dataset, encoder: ConversationEncoder, path: Path, num_proc: int, progress: bool
) -> TokenizationReport:
    report = TokenizationReport(chat_format=encoder.chat_format.name)
    dropped: Counter[str] = Counter()
    bar = tqdm(total=len(dataset), desc="Tokenize", unit="row", disable=not progress)
    with atomic_file(path, "wb") as file, bar:
        writer = ArrowWriter(stream=file, features=FEATURES)
        for rows, batch in _encode_all(dataset, encoder, num_proc):
            lengths = [len(ids) for ids in batch.input_ids]
            if lengths:
                writer.write_batch({"input_ids": batch.input_ids, "labels": batch.labels, "length": lengths})
            report.rows_read += rows
            report.rows_kept += len(lengths)
            report.tokens += sum(lengths)
            report.supervised_tokens += sum(int((labels != IGNORE_INDEX).sum()) for labels in batch.labels)
            report.truncated += batch.truncated
            dropped += batch.dropped
            bar.update(rows)
        report.dropped = dict(dropped)
        if not report.rows_kept:
            raise UserError(f"no row is left to train on: {report.summary()}")
        writer.finalize(close_stream=False)
    return report


def _encode_all(dataset: Dataset, encoder: ConversationEncoder, num_proc: int) -> Iterator[tuple[int, EncodedBatch]]:
    """Yield the number of rows read and the encoded batch, in order."""
    starts = range(0, len(dataset), _BATCH_ROWS)

    def conversations(start: int) -> list[list[Message]]:
        return dataset[start : start + _BATCH_ROWS]["messages"]

    if num_proc == 1 or len(starts) == 1:
        for start in starts:
            batch = conversations(start)
            yield len(batch), encoder.encode(batch)
        return
    settings = (encoder.tokenizer, encoder.max_seq_length, encoder.chat_format.name)
    workers = min(num_proc, len(starts))
    # Spawned, not forked: the tokenizers' threads and torch's may hold locks. The executor, unlike a Pool, says so
    # when a worker is killed. At most two batches a worker are under way, so the texts are never copied as a whole.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, settings) as pool:
        under_way: deque[tuple[int, Future[EncodedBatch]]] = deque()
        try:
            for start in starts:
                batch = conversations(start)
                under_way.append((len(batch), pool.submit(_encode_in_worker, batch)))
                if len(under_way) >= 2 * workers:
                    rows, future = under_way.popleft()
                    yield rows, future.result()
            while under_way:
                rows, future = under_way.popleft()
                yield rows, future.result()
        except BrokenProcessPool as error:
            # the pool ends only when its sender does, which may still write to workers that are gone (Python 3.11.2;
            # github.com/python/cpython/issues/94777): without a reader it gives up
            pool._call_queue._reader.close()
            raise UserError(
                f"one of the {workers} tokenization processes was killed, most likely for want of memory; "
                "use a smaller num_proc"
            ) from error


# A worker's own encoder: sent once, not with each batch.
_worker_encoder: ConversationEncoder | None = None


def _start_worker(tokenizer: PreTrainedTokenizerBase, max_seq_length: int, chat_format: str) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = ConversationEncoder(tokenizer, max_seq_length, chat_format)


def _encode_in_worker(conversations: list[list[Message]]) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder.encode(conversations)


def _cache_key(dataset: Dataset, encoder: ConversationEncoder) -> str:
    """Return a hash of all that the result depends on: the texts, the tokenizer, the settings and this code."""
    tokenizer = encoder.tokenizer
    settings = [
        _CODE_VERSION,
        transformers.__version__,
        encoder.backend.to_str(),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        encoder.chat_format.name,
        encoder.max_seq_length,
    ]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for start in range(0, len(dataset), 1000):
        key.update(json.dumps(dataset[start : start + 1000]["messages"]).encode())
    return key.hexdigest()[:32]


def _read_cache(path: Path) -> tuple[Dataset, TokenizationReport] | None:
    """Return what is in the cache, or None where there is nothing or it is damaged, which is said."""
    record = path.with_suffix(".json")
    if not record.exists():
        return None
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
        if value["sha256"] != _file_hash(path):
            raise ValueError("its content is not what was written")
        report = TokenizationReport(**value["report"])
        rows = Dataset.from_file(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The cache of tokenized rows %s is damaged (%s); tokenizing again", path, error)
        return None
    return rows, report


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
