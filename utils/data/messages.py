"""Read a file of conversations into memory, or say in one line what is wrong with it.

A file has one JSON object a line: `{"dataset": ..., "id": ..., "messages": [{"role": ..., "content": ...}, ...]}`, as
`reformat_datasets.py` and `mix_datasets.py` write them. A line with `prompt` and `completion` strings in place of
`messages` is read as a user's and an assistant's turn, chat marks included, so that both kinds of file are trained on
in the same way. `dataset` and `id` may be left out: they default to the file's name and the line's number. Other keys
are ignored.

What it does not do: repair. Rows are cleaned where they are converted; here a bad line is an error.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from utils.io.errors import UserError

ROLES = ("system", "user", "assistant")
FEATURES = Features(
    {
        "dataset": Value("string"),
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)
_CHUNK_BYTES = 64 << 20


def load_messages(path: str | Path, max_rows: int | None = None) -> Dataset:
    """Read a JSON-lines file of conversations.

    Args:
        path: the file, UTF-8.
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
    pending = read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if max_rows is not None and read == max_rows:
                break
            if not line.strip():
                continue
            rows.append(_parse_line(path, number, line))
            read += 1
            content_hash.update(line.strip() + b"\n")
            pending += len(line)
            if pending >= _CHUNK_BYTES:
                chunks.append(Dataset.from_list(rows, features=FEATURES))
                rows, pending = [], 0
    if rows:
        chunks.append(Dataset.from_list(rows, features=FEATURES))
    if not chunks:
        raise UserError(f"{path}: is empty; expected one JSON object with 'messages' a line")
    table = concatenate_datasets(chunks).data
    return Dataset(table, fingerprint=content_hash.hexdigest()[:32])


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    def fail(what: str) -> UserError:
        return UserError(f"{path}: line {number}: {what}")

    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise fail(f"byte {error.start + 1} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise fail(f"not a JSON object on one line ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise fail("not a conversation: nested too deep") from None
    if not isinstance(row, dict):
        hint = "; a JSON array is converted by entrypoints/data/reformat_datasets.py" if isinstance(row, list) else ""
        raise fail(f"expected a JSON object, not {type(row).__name__}{hint}")
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and "completion" in row:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    else:
        there = ", ".join(map(repr, row)) or "no columns at all"
        raise fail(f"expected a column 'messages', or 'prompt' and 'completion'; there are {there}")
    if not isinstance(messages, list):
        raise fail(f"'messages' is {type(messages).__name__}, not a list of turns")
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise fail(f"turn {turn} is not an object with 'role' and 'content'")
        if message["role"] not in ROLES:
            raise fail(f"turn {turn}: the role {message['role']!r} is not one of {', '.join(ROLES)}")
        content = message["content"]
        if not isinstance(content, str):
            raise fail(f"turn {turn}: the content is {type(content).__name__}, not a string")
        if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise fail(f"turn {turn}: the content has a lone surrogate, which is no character")
    return {
        "dataset": str(row.get("dataset", path.stem)),
        "id": str(row.get("id", f"{path.stem}_{number}")),
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
    }
