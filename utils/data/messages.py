"""Read a file of conversations into memory, or say in one line what is wrong with it.

A file has JSON lines, `{"dataset": ..., "id": ..., "messages": [{"role": ..., "content": ...}, ...]}`, as
`reformat_datasets.py` and `mix_datasets.py` write them, or whatever `shapes.py` can read without doubt, as JSON lines,
JSON array or parquet, compressed or not. `dataset` and `id` may be left out: they default to the file's name and the
line's number. Other keys are ignored.

What it does not do: repair. Rows are cleaned where they are converted; here a bad line is an error.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from datasets import Dataset, Features, List, Value, concatenate_datasets

from utils.data.blocks import Fault
from utils.data.readers import read_rows
from utils.data.shapes import FIRST_KEYS, BadRow, conversation_of
from utils.io.errors import UserError

FEATURES = Features(
    {
        "dataset": Value("string"),
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)
_CHUNK_BYTES = 64 << 20
_OTHER_READERS = re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd|PAR1|(?:\xef\xbb\xbf)?[ \t\r\n]*\[")
_KINDS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"ARROW1": "an Arrow file",
    b"SQLite format": "an SQLite database",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"version https://git-lfs": "a Git LFS pointer and not the data (`git lfs pull` fetches it)",
    b"\xff\xfe": "UTF-16 and not UTF-8",
    b"\xfe\xff": "UTF-16 and not UTF-8",
    b"%PDF": "a PDF",
    b"<": "a web page or XML",
}
"""First bytes of a file that is none of ours -> what it is."""


def load_messages(path: str | Path, max_rows: int | None = None) -> Dataset:
    """Read a file of conversations.

    Args:
        path: JSON lines, JSON array or parquet, in UTF-8, plain or packed by gzip or zstandard.
        max_rows: read only this many rows from the start; None reads all.

    Returns:
        Columns `dataset`, `id` (strings) and `messages` (list of role and content), one row for each line that is not
        blank. The texts are held in memory once, as Arrow. The fingerprint follows from the lines read, so that it is
        the same on every machine and changes with the file.

    Raises:
        UserError: the file is missing or empty, or a line is not what it should be; names the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file of conversations in it, such as {path / 'data.jsonl'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with entrypoints/data/mix_datasets.py or check the path")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"{path}: cannot read {max_rows} rows; give a positive number, or none to read all")

    chunks: list[Dataset] = []
    rows: list[dict[str, Any]] = []
    content_hash = hashlib.sha256()
    pending = 0
    for row, content in itertools.islice(_rows(path), max_rows):
        rows.append(row)
        content_hash.update(content + b"\n")
        pending += len(content)
        if pending >= _CHUNK_BYTES:
            chunks.append(Dataset.from_list(rows, features=FEATURES))
            rows, pending = [], 0
    if rows:
        chunks.append(Dataset.from_list(rows, features=FEATURES))
    if not chunks:
        raise UserError(f"{path}: is empty; expected one JSON object with 'messages' a line")
    table = concatenate_datasets(chunks).data
    return Dataset(table, fingerprint=content_hash.hexdigest()[:32])


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the rows, and the bytes that each follows from."""
    with path.open("rb") as file:
        head = file.read(256)
        if not _OTHER_READERS.match(head):
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse_line(path, number, line), line.strip()
            return
    number = 0
    for item in read_rows(path, FIRST_KEYS):
        if isinstance(item, Fault):
            raise UserError(f"{path}: row {number + 1}, {item.where}: {item.detail}")
        for place, value in enumerate(item.rows):
            number += 1
            where = f"row {number}, {item.where(place)}"
            if item.repaired:
                raise UserError(f"{path}: {where}: a text has a lone surrogate, which is no character")
            row = _checked(path, where, number, value)
            yield row, orjson.dumps(row)


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        if number == 1 and (what := _kind_of(path, line)):
            raise UserError(
                f"{path}: is {what}; convert it to JSON lines with 'messages', a JSON array or parquet"
            ) from None
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{path}: {where}: byte {error.start + 1} is not UTF-8") from None
        what = f"not a JSON object on one line ({error.msg} at column {error.colno})"
        raise UserError(f"{path}: {where}: {what}") from None
    except (RecursionError, ValueError):  # a number of thousands of digits
        raise UserError(f"{path}: {where}: not a conversation: nested too deep, or a number too long") from None
    return _checked(path, where, number, row)


def _kind_of(path: Path, line: bytes) -> str | None:
    """Return what a file is that begins with this line, where it is known to be something else than JSON lines."""
    for head, what in _KINDS.items():
        if line.startswith(head):
            return what
    if path.suffix in (".csv", ".tsv"):
        return f"a table with {'tabs' if path.suffix == '.tsv' else 'commas'}"
    return None


def _checked(path: Path, where: str, number: int, row: Any) -> dict[str, Any]:
    """Return a row as one of `FEATURES`, or say what is wrong with it."""
    try:
        messages = conversation_of(row)
    except BadRow as error:
        raise UserError(f"{path}: {where}: {error.detail}") from None
    for turn, message in enumerate(messages, 1):
        content = message["content"]
        if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise UserError(f"{path}: {where}: turn {turn}: the content has a lone surrogate, which is no character")
    stem = re.sub(r"(\.(jsonl|json|parquet|ndjson))?(\.(gz|zst))?$", "", path.name)
    return {
        "dataset": str(row.get("dataset", stem)),
        "id": str(row.get("id", f"{stem}_{number}")),
        "messages": messages,
    }
