"""Turns one raw dataset into `data.jsonl` and counts what became of its rows.

Rows keep their order, and the number in a row's id is its number in the raw file, so that an id leads back to where it
came from whatever was dropped. The file appears under its name only once it is whole.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from utils.data.blocks import Fault
from utils.data.formats import SOURCES, Dropped
from utils.data.readers import read_rows
from utils.data.shapes import BadRow
from utils.io.errors import UserError
from utils.io.files import atomic_file

_EXAMPLES = 20


@dataclass
class SetReport:
    """What became of the rows of one dataset: `read == written + sum(dropped) + sum(faults)`.

    Args:
        read: rows in the raw files, damaged ones included.
        written: rows in `data.jsonl`.
        dropped: sound rows that the method leaves out, by reason.
        faults: rows that were not what the format promises, by reason; only with `on_error="skip"`.
        damage: faults between the rows, by reason, such as an end that is missing.
        repaired: rows in which a lone surrogate became U+FFFD.
        examples: the first faults, with file, row and place.
    """

    read: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    repaired: int = 0
    examples: list[str] = field(default_factory=list)


def reformat_set(
    name: str,
    files: Sequence[Path],
    target: Path,
    on_error: str = "stop",
    tell: Callable[[int, int], None] = lambda read, consumed: None,
) -> SetReport:
    """Write the rows of a dataset as `{"dataset", "id", "messages"}` lines.

    Args:
        name: the dataset, a key of `SOURCES`.
        files: its raw files, in the order of their rows.
        target: the `data.jsonl` to write; it is replaced only when everything has been read.
        on_error: `stop` raises at the first fault, `skip` leaves the row out and counts it.
        tell: called now and then with the rows and the bytes on disk that have been read.

    Returns:
        The counts.

    Raises:
        UserError: a fault, with file, row and byte; `target` is then as it was.
    """
    source, report = SOURCES[name], SetReport()

    def count_fault(reason: str, place: str, detail: str, rows: int) -> None:
        message = f"{place}: {detail}"
        if on_error == "stop":
            raise UserError(f"{message}; --on_error skip leaves out what is damaged and counts it")
        (report.faults if rows else report.damage)[reason] += max(rows, 1)
        if len(report.examples) < _EXAMPLES:
            report.examples.append(message)

    with atomic_file(target, "wb") as out:
        finished = 0
        for path in files:
            for item in read_rows(path, source.fields):
                if isinstance(item, Fault):
                    count_fault(item.reason, f"{path}: row {report.read}, {item.where}", item.detail, item.rows)
                    report.read += item.rows
                    continue
                lines = []
                for row_number, row in enumerate(item.rows, start=report.read):
                    try:
                        messages = source.convert(row)
                    except Dropped as drop:
                        report.dropped[drop.reason] += 1
                        continue
                    except BadRow as error:
                        place = f"{path}: row {row_number}, {item.where(row_number - report.read)}"
                        count_fault(error.reason, place, error.detail, rows=1)
                        continue
                    line = {"dataset": source.dataset, "id": f"{source.dataset}_{row_number}", "messages": messages}
                    lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
                out.write(b"".join(lines))
                report.read += len(item.rows)
                report.written += len(lines)
                report.repaired += item.repaired
                tell(report.read, finished + item.consumed)
            finished += path.stat().st_size
    return report
