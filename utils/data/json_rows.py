"""Reads the rows of a JSON array or of JSON lines in order, a block at a time.

Parsing is the cost, so whole blocks are parsed at once wherever a block is sound: a piece of an array that ends before
the start of a row is a JSON array itself once it stands between brackets, and if it parses, the cut was right. Only
where that fails are rows taken one by one, to find the row and the byte. Damage does not raise: it is yielded as a
`Fault` between the blocks, and reading goes on behind it, so that the caller decides what is an error.

Memory is bounded by `MAX_ROW`, whatever the size of the file.
"""

import re
from collections.abc import Iterator
from typing import Any

import orjson

from utils.data.blocks import MAX_ROW, Block, Fault, Window, parse
from utils.data.raw_files import CHUNK
from utils.data.shapes import BadRow

_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TOKEN = re.compile(_STRING + rb'|[{}\[\]"]', re.DOTALL)
_SCALAR = re.compile(_STRING + rb'|[^\s,\[\]{}"]++', re.DOTALL)
_OPENED = re.compile(rb"\{[ \t\r\n]*\Z")
_COLON = re.compile(rb"[ \t\r\n]*:")
_FIRST_KEY = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"([^"\\]+)"')


def json_lines(window: Window) -> Iterator[Block | Fault]:
    """Yield the rows of JSON lines; blank lines are not rows.

    Args:
        window: at the beginning of the first line.
    """
    while True:
        while (end := window.data.rfind(b"\n") + 1) == 0 and not window.ended and len(window.data) <= MAX_ROW:
            window.grow()
        if end == 0 and not window.ended:
            yield from _skip_long_line(window)
            continue
        if window.ended:
            end = len(window.data)
        lines, at = window.data[:end].split(b"\n"), window.offset
        try:
            rows = [orjson.loads(line) for line in lines if line and not line.isspace()]
        except ValueError:
            yield from _line_by_line(window, lines)
        else:
            if rows:
                yield window.block(rows, lambda number, lines=lines, at=at: _line_place(lines, at, number))
        window.drop(end)
        if window.ended:
            yield from window.unreported_fault()
            return
        window.grow()


def _line_by_line(window: Window, lines: list[bytes]) -> Iterator[Block | Fault]:
    at = window.offset
    for number, line in enumerate(lines):
        if line and not line.isspace():
            try:
                row, repaired = parse(line)
            except BadRow as error:
                if window.ended and number == len(lines) - 1:
                    yield window.end_fault(f"the file ends inside this row ({error.detail})", rows=1)
                else:
                    yield Fault(error.reason, f"byte {at + error.byte}", error.detail)
            else:
                yield window.block([row], lambda _, at=at: f"byte {at}", repaired)
        at += len(line) + 1


def _line_place(lines: list[bytes], at: int, number: int) -> str:
    for line in lines:
        if line and not line.isspace():
            if number == 0:
                break
            number -= 1
        at += len(line) + 1
    return f"byte {at}"


def _skip_long_line(window: Window) -> Iterator[Fault]:
    yield Fault("too_large", window.byte(0), f"a line of more than {MAX_ROW >> 20} MiB")
    while (end := window.data.find(b"\n")) < 0 and not window.ended:
        window.drop(len(window.data))
        window.grow()
    window.drop(end + 1 if end >= 0 else len(window.data))


class JsonArray:
    """Reads the rows of a JSON array.

    Args:
        window: at the first byte behind the array's `[`.
        fields: keys of a row; behind damage the next row is where an object begins with one of them.
    """

    def __init__(self, window: Window, fields: tuple[str, ...]):
        self._window = window
        first = _FIRST_KEY.match(window.data)
        self._key = first[1] if first else fields[0].encode()
        names = b"|".join(re.escape(name) for name in (self._key, *(name.encode() for name in fields)))
        self._row_start = re.compile(rb'\{[ \t\r\n]*"(?:' + names + rb')"[ \t\r\n]*:')
        self._careful_until = 0  # a block up to this byte has failed to parse: its rows are taken one by one
        self._empty = True  # nothing but `[` has been seen
        self._done = False

    def rows(self) -> Iterator[Block | Fault]:
        """Yield all rows in order."""
        window = self._window
        while not self._done:
            if len(window.data) < CHUNK and not window.ended:
                window.grow()
            cut = self._last_row_start() if window.offset >= self._careful_until else 0
            if cut == 0:
                yield from self._one_row()
            elif rows := _whole_rows(window.data[:cut]):
                data, at = window.data[:cut], window.offset
                yield window.block(rows, lambda number, data=data, at=at: f"byte {at + _element_start(data, number)}")
                window.drop(cut)
                self._empty = False
            else:
                self._careful_until = window.offset + cut

    def _last_row_start(self) -> int:
        """Return where the last object that begins with the first row's key starts, 0 if it is not behind a row.

        Unescaped, `{"key":` cannot stand inside a string of sound JSON: its first quote would end the string.
        """
        data, key = self._window.data, b'"' + self._key + b'"'
        at = data.rfind(key)
        while at > 0:
            opened = _OPENED.search(data, max(0, at - 256), at)
            if opened and _COLON.match(data, at + len(key)):
                return opened.start()
            at = data.rfind(key, 0, at)
        return 0

    def _one_row(self) -> Iterator[Block | Fault]:
        """Take one row with the comma behind it, or read on where it is not whole yet."""
        window, data = self._window, self._window.data
        start = _SPACE.match(data).end()
        mark = data[start : start + 1]
        if not mark:
            if window.ended:
                yield from self._end("the file ends before the array is closed", rows=0)
            else:
                window.grow()
        elif mark == b"]":
            if not self._empty:
                yield Fault("malformed", window.byte(start), "a comma before the end of the array", rows=0)
            yield from self._close(start + 1)
        elif mark == b",":
            yield Fault("malformed", window.byte(start), "a comma without a row before it", rows=0)
            window.drop(start + 1)
        elif (end := _value_end(data, start, window.ended)) is None:
            yield from self._unclosed_row(start)
        else:
            try:
                row, repaired = parse(data[start:end])
            except BadRow as error:
                yield Fault(error.reason, window.byte(start + error.byte), error.detail)
                yield from self._resume(start + 1)
                return
            behind = _SPACE.match(data, end).end()
            if behind == len(data) and not window.ended:
                window.grow()
                return
            place = window.byte(start)
            yield window.block([row], lambda _: place, repaired)
            yield from self._separator(behind)
        self._empty = self._empty and not mark

    def _separator(self, position: int) -> Iterator[Fault]:
        mark = self._window.data[position : position + 1]
        if mark == b"]":
            yield from self._close(position + 1)
        elif not mark:
            yield from self._end("the file ends before the array is closed", rows=0)
        else:
            if mark != b",":
                yield Fault("malformed", self._window.byte(position), "no comma after this row", rows=0)
            self._window.drop(position + (mark == b","))

    def _unclosed_row(self, start: int) -> Iterator[Fault]:
        window, data = self._window, self._window.data
        if not window.ended and len(data) - start < MAX_ROW:
            window.grow()
        elif following := self._row_start.search(data, start + 1):
            try:
                parse(data[start : following.start()])
                error = BadRow("malformed", "this row is never closed")
            except BadRow as found:
                error = found
            yield Fault(error.reason, window.byte(start + error.byte), error.detail)
            yield from self._resume(start + 1)
        elif window.ended:
            yield from self._end("the file ends inside this row", rows=1)
        else:
            yield Fault("too_large", window.byte(start), f"a row of more than {MAX_ROW >> 20} MiB")
            yield from self._resume(start + 1)

    def _resume(self, position: int) -> Iterator[Fault]:
        """Go to the next start of a row, from `position` on."""
        window = self._window
        window.drop(position)
        while not (found := self._row_start.search(window.data)):
            if window.ended:
                self._done = True
                yield from window.unreported_fault()
                return
            window.drop(max(0, len(window.data) - 1024))
            window.grow()
        window.drop(found.start())

    def _end(self, detail: str, rows: int) -> Iterator[Fault]:
        self._done = True
        yield self._window.end_fault(detail, rows)

    def _close(self, position: int) -> Iterator[Fault]:
        """Make sure that nothing follows the array."""
        window = self._window
        window.drop(position)
        self._done = True
        while not (stray := window.data.lstrip(b" \t\r\n")) and not window.ended:
            window.drop(len(window.data))
            window.grow()
        if stray:
            place = window.byte(len(window.data) - len(stray))
            yield Fault("malformed", place, "something follows the end of the array", rows=0)
        else:
            yield from window.unreported_fault()


def _whole_rows(data: bytes) -> list[Any] | None:
    """Parse rows that each end with a comma; None unless `data` is exactly that."""
    body = data.rstrip(b" \t\r\n")
    if not body.endswith(b","):
        return None
    try:
        return orjson.loads(b"[" + body[:-1] + b"]")
    except ValueError:
        return None


def _element_start(data: bytes, number: int) -> int:
    """Return where element `number` begins among sound elements that are parted by commas."""
    at = _SPACE.match(data).end()
    for _ in range(number):
        comma = _SPACE.match(data, _value_end(data, at, True)).end()
        at = _SPACE.match(data, comma + 1).end()
    return at


def _value_end(data: bytes, start: int, ended: bool) -> int | None:
    """Return where the JSON value that begins at `start` ends by its brackets and quotes; None if not within `data`."""
    if data[start : start + 1] not in (b"{", b"["):
        scalar = _SCALAR.match(data, start)
        return scalar.end() if scalar and (scalar.end() < len(data) or ended) else None
    depth = 0
    for token in _TOKEN.finditer(data, start):
        mark = data[token.start()]
        if mark in b"{[":
            depth += 1
        elif mark in b"}]":
            depth -= 1
            if depth == 0:
                return token.end()
        elif token.end() - token.start() == 1:
            return None  # a quote that nothing closes
    return None
