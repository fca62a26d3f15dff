"""What readers hand on: blocks of parsed rows, and the damage between them; and the parsing of a single row.

`Window` is the part of a file that is in memory. A reader moves it over the file and never looks back.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from utils.data.raw_files import CHUNK, RawStream, StreamFault
from utils.data.shapes import BadRow

MAX_ROW = 64 << 20  # bytes; the longest rows of the known sets are below 1 MiB


@dataclass(slots=True)
class Block:
    """Rows that follow one another.

    Args:
        rows: the parsed rows; they may be any JSON value.
        consumed: bytes of the file on disk read so far.
        where: from the position of a row in the block to where it lies in the file, for a person.
        repaired: how many of the rows held a lone surrogate, now U+FFFD.
    """

    rows: list[Any]
    consumed: int
    where: Callable[[int], str]
    repaired: int = 0


@dataclass(slots=True)
class Fault:
    """Damage in a file.

    Args:
        reason: the name under which the report counts it.
        where: the place, for a person.
        detail: what is wrong, for a person.
        rows: rows of the file that are lost by it; 0 for damage between the rows.
    """

    reason: str
    where: str
    detail: str
    rows: int = 1


class Window:
    """The part of a stream that is in memory: `data`, of which the first byte is byte `offset` of the content."""

    def __init__(self, stream: RawStream):
        self.stream = stream
        self.data = b""
        self.offset = 0
        self.ended = False
        self._fault: StreamFault | None = None

    def grow(self) -> None:
        """Read on: a chunk, or as much again as is there, so that a long row is not searched over and over."""
        try:
            more = self.stream.read(max(CHUNK, len(self.data)))
        except StreamFault as fault:
            self._fault, more = fault, b""
        self.data += more
        self.ended = not more

    def drop(self, count: int) -> None:
        """Forget the first `count` bytes."""
        self.data = self.data[count:]
        self.offset += count

    def byte(self, position: int) -> str:
        """Return the place of `data[position]` in the content of the file, for a person."""
        return f"byte {self.offset + position}"

    def block(self, rows: list[Any], where: Callable[[int], str], repaired: bool = False) -> Block:
        """Return rows of this window as a block."""
        return Block(rows, self.stream.consumed, where, int(repaired))

    def end_fault(self, detail: str, rows: int) -> Fault:
        """Return the fault of a file that ends too early: damage of its compression, or else `detail`."""
        fault, self._fault = self._fault or StreamFault("truncated", detail), None
        return Fault(fault.reason, self.byte(len(self.data)), fault.detail, rows)

    def unreported_fault(self) -> list[Fault]:
        """Return the damage of the compression behind the last row, if there is any and nobody has reported it."""
        return [self.end_fault("", rows=0)] if self._fault else []


def parse(text: bytes) -> tuple[Any, bool]:
    """Parse one JSON value, with what orjson refuses but Python's json takes: lone surrogates, NaN.

    Args:
        text: UTF-8 bytes.

    Returns:
        The value, and whether lone surrogates in it had to be replaced by U+FFFD (they have no UTF-8 form).

    Raises:
        BadRow: it is not JSON (`malformed`) or not UTF-8 (`invalid_utf8`); `byte` says where in `text`.
    """
    try:
        return orjson.loads(text), False
    except ValueError:
        pass
    try:
        string = text.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = text[error.start]
        raise BadRow("invalid_utf8", f"byte 0x{byte:02x} is not UTF-8 here", error.start) from None
    try:
        return _without_surrogates(json.loads(string))
    except json.JSONDecodeError as error:
        raise BadRow("malformed", f"not JSON: {error.msg}", len(string[: error.pos].encode())) from None
    except (RecursionError, ValueError) as error:
        raise BadRow("malformed", f"not usable JSON: {error}") from None


def _without_surrogates(value: Any) -> tuple[Any, bool]:
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
        return value, False
    if type(value) is list:
        items = [_without_surrogates(item) for item in value]
        return [item for item, _ in items], any(found for _, found in items)
    if type(value) is dict:
        pairs = [(_without_surrogates(key), _without_surrogates(item)) for key, item in value.items()]
        return {key: item for (key, _), (item, _) in pairs}, any(one or other for (_, one), (_, other) in pairs)
    return value, False
