"""Reads the rows of a raw file in order, whatever it is: a JSON array, JSON lines or parquet, by its first bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.data.blocks import MAX_ROW, Block, Fault, Window
from utils.data.json_rows import JsonArray, json_lines
from utils.data.raw_files import CHUNK, RawStream
from utils.io.errors import UserError

_WHITESPACE = b" \t\r\n"


def read_rows(path: Path, fields: tuple[str, ...]) -> Iterator[Block | Fault]:
    """Yield the rows of a file in order, in blocks, with the damage that lies between them.

    Args:
        path: JSON array or JSON lines (plain, gzip or zstandard) or parquet; the content decides which.
        fields: keys of a row, by which rows are found again behind damage in an array.

    Raises:
        UserError: the file as a whole is something else.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        parquet = file.read(4) == b"PAR1"
    if parquet:
        yield from _parquet(path)
        return
    with RawStream(path) as stream:
        window = Window(stream)
        window.grow()
        if window.data.startswith(b"\xef\xbb\xbf"):  # a byte order mark
            window.drop(3)
        is_array = _enter_array(window, path)
        yield from JsonArray(window, fields).rows() if is_array else json_lines(window)


def _enter_array(window: Window, path: Path) -> bool:
    """Go behind the `[` of an array; False where the rows are lines."""
    while not (head := window.data.lstrip(_WHITESPACE)) and not window.ended and len(window.data) < MAX_ROW:
        window.grow()
    start = len(window.data) - len(head)
    if head.startswith(b"["):
        window.drop(start + 1)
        return True
    if head.startswith(b"{") or (head and ".jsonl" in path.name):
        return False
    if faults := window.unreported_fault():
        raise UserError(f"{path}: row 0, {faults[0].where}: {faults[0].detail}")
    if not head:
        raise UserError(f"{path}: row 0, byte 0: the file is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: this is a Git LFS pointer, not the data; run `git lfs pull` in its folder")
    hint = "; it looks like a web page, download it again" if head.startswith(b"<") else ""
    raise UserError(
        f"{path}: row 0, {window.byte(start)}: neither a JSON array, JSON lines nor parquet "
        f"(it begins with {head[:12]!r}){hint}"
    )


def _parquet(path: Path) -> Iterator[Block | Fault]:
    """Yield the rows of a parquet file; their places are row groups, since rows have no bytes of their own."""
    import pyarrow  # costs 0.2 s, and most sets are JSON
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # names in it may not be UTF-8
        raise UserError(f"{path}: row 0, byte {size}: not a whole parquet file ({_one_line(error)})") from None
    total, done = max(1, file.metadata.num_rows), 0
    with file:
        for group in range(file.metadata.num_row_groups):
            left = file.metadata.row_group(group).num_rows
            place = f"row group {group}"
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    left -= batch.num_rows
                    done += batch.num_rows
                    for item in _batch_rows(batch, place):
                        consumed = size * done // total
                        yield item if isinstance(item, Fault) else Block(item, consumed, lambda _, at=place: at)
            except (pyarrow.ArrowException, OSError, ValueError) as error:  # names in it may not be UTF-8
                yield Fault("corrupt", place, f"cannot be decoded: {_one_line(error)}", rows=left)
                done += left


def _batch_rows(batch: Any, place: str) -> Iterator[list[Any] | Fault]:
    try:
        yield batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield Fault("invalid_utf8", place, f"byte 0x{error.object[error.start]:02x} of a text is not UTF-8")


def _one_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]
