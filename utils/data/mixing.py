"""Mixes reformatted datasets by portions, shuffled, without holding their texts in memory.

A portion of 2.9 takes every row twice and nine tenths of the rows, drawn at random, a third time. Only the place of
each line is kept (16 bytes a row); the lines themselves are copied, byte for byte, from their files in the shuffled
order. The order comes from hashes of (seed, dataset, copy, line), not from a random generator, so that it is the same
on every machine and in every Python, and so that a dataset's draw does not depend on what it is mixed with.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from tqdm import tqdm

from utils.data.blocks import parse
from utils.data.formats import BadRow
from utils.io.errors import UserError, suggest
from utils.io.files import atomic_file, write_json

_ROLES = frozenset(("system", "user", "assistant"))


@dataclass
class Part:
    """One dataset of a mix.

    Args:
        name: its folder.
        path: its `data.jsonl`.
        portion: how often each row is taken, on average.
        starts: `[rows + 1]` uint64, where in the file each line begins and where the last one ends.
        sha256: of the file.
    """

    name: str
    path: Path
    portion: Decimal
    starts: np.ndarray
    sha256: str

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return len(self.starts) - 1

    @property
    def taken(self) -> int:
        """Rows of the mix: `rows * portion`, rounded down, in exact decimal arithmetic."""
        return int(self.rows * self.portion)


def read_portions(path: Path) -> dict[str, Decimal]:
    """Read the mapping `portions` of a YAML file.

    Raises:
        UserError: the file is not there or not of that form.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    portions = content.get("portions") if isinstance(content, dict) else None
    if not isinstance(portions, dict) or not portions or len(content) > 1:
        raise UserError(f"{path}: must hold one mapping, `portions:`, with a line `NAME: 1.0` for each dataset")
    return {str(name): _portion(str(name), str(value), str(path)) for name, value in portions.items()}


def parse_portions(texts: list[str]) -> dict[str, Decimal]:
    """Parse `NAME=2.9` arguments.

    Raises:
        UserError: one is not of that form, or a name comes twice.
    """
    portions = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--portions {text}: must be NAME=NUMBER, for example vicuna_sharegpt=2.9")
        if name in portions:
            raise UserError(f"--portions {text}: {name} is there twice")
        portions[name] = _portion(name, value, "--portions")
    return portions


def _portion(name: str, value: str, place: str) -> Decimal:
    try:
        portion = Decimal(value)
    except InvalidOperation:
        portion = Decimal("nan")
    if not portion.is_finite() or not 0 <= portion <= 1000:
        raise UserError(f"{place}: {name}: portion {value!r} must be a number from 0 to 1000")
    return portion


def find_parts(reformatted_dir: Path, portions: Mapping[str, Decimal]) -> dict[str, Path]:
    """Return the `data.jsonl` of each dataset that is mixed; a portion of 0 leaves a dataset out.

    Raises:
        UserError: one is not there, or nothing is left to mix.
    """
    wanted = [name for name, portion in portions.items() if portion]
    if not wanted:
        raise UserError("nothing to mix: all portions are 0")
    paths = {name: reformatted_dir / name / "data.jsonl" for name in wanted}
    absent = [name for name in wanted if not paths[name].is_file()]
    if absent:
        there = sorted(path.parent.name for path in reformatted_dir.glob("*/data.jsonl"))
        raise UserError(
            f"{paths[absent[0]]}: not there{suggest(absent[0], there)}; reformat {', '.join(absent)} first, or choose "
            f"with --portions from what {reformatted_dir} has: {', '.join(there) or 'nothing'}"
        )
    return paths


def index_part(name: str, path: Path, portion: Decimal) -> Part:
    """Read a dataset once: check each line, note where it begins, and hash the file.

    Raises:
        UserError: a line is not a row of `messages`, or the last one is cut off.
    """
    digest, starts, offset = hashlib.sha256(), [0], 0
    blocks: list[np.ndarray] = []
    bar = tqdm(total=path.stat().st_size, desc=f"check {name}", unit="B", unit_scale=True, disable=None)
    with open(path, "rb", buffering=1 << 20) as file, bar:
        for number, line in enumerate(file):
            _check_line(line, path, number, offset)
            digest.update(line)
            offset += len(line)
            starts.append(offset)
            if len(starts) == 65536:
                blocks.append(np.array(starts, dtype=np.uint64))
                starts = []
                bar.update(offset - bar.n)
        bar.update(offset - bar.n)
    blocks.append(np.array(starts, dtype=np.uint64))
    return Part(name, path, portion, np.concatenate(blocks), digest.hexdigest())


def _check_line(line: bytes, path: Path, number: int, offset: int) -> None:
    place = f"{path}: row {number}, byte {offset}"
    if not line.endswith(b"\n"):
        raise UserError(f"{place}: the last line is cut off; reformat the dataset again")
    try:
        row, repaired = parse(line)
    except BadRow as error:
        place = f"{path}: row {number}, byte {offset + error.byte}"
        raise UserError(f"{place}: {error.detail}; reformat the dataset again") from None
    if repaired:
        raise UserError(f"{place}: a lone surrogate, which is not UTF-8; reformat the dataset again")
    try:
        sound = type(row["dataset"]) is str and type(row["id"]) is str and len(row["messages"]) > 0
        sound = sound and all(m["role"] in _ROLES and type(m["content"]) is str for m in row["messages"])
    except (TypeError, KeyError):
        sound = False
    if not sound:
        raise UserError(f'{place}: not a row of the form {{"dataset": ..., "id": ..., "messages": [...]}}')


def shuffled(parts: list[Part], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the rows of the mix and bring them into their order.

    Args:
        parts: the datasets.
        seed: other seeds give other draws and orders.

    Returns:
        For each line of the mix, `[lines]` the number of its part and `[lines]` its line in that part.
    """
    keys, owners, lines = [np.empty(0, np.uint64)], [np.empty(0, np.uint16)], [np.empty(0, np.uint32)]
    for number, part in enumerate(parts):
        left, copy = part.taken, 0
        while left > 0:
            key = _hashes(f"{seed}/{part.name}/{copy}", part.rows)
            # The last copy may be a part of the rows: those with the smallest draw, hashed apart from the order.
            rows = np.arange(part.rows)
            if left < part.rows:
                draw = _hashes(f"{seed}/{part.name}/draw", part.rows)
                rows = np.sort(np.argsort(draw, kind="stable")[:left])
            keys.append(key[rows])
            lines.append(rows.astype(np.uint32))
            owners.append(np.full(len(rows), number, dtype=np.uint16))
            left, copy = left - len(rows), copy + 1
    order = np.argsort(np.concatenate(keys), kind="stable")
    return np.concatenate(owners)[order], np.concatenate(lines)[order]


def _hashes(label: str, count: int) -> np.ndarray:
    """Return `[count]` uint64, the BLAKE2b hashes of `label/0`, `label/1`, ..."""
    base = hashlib.blake2b(f"{label}/".encode(), digest_size=8)
    result = bytearray()
    for number in range(count):
        one = base.copy()
        one.update(b"%d" % number)
        result += one.digest()
    return np.frombuffer(result, dtype="<u8")


def write_mix(parts: list[Part], seed: int, save_path: Path) -> dict[str, Any]:
    """Write `data.jsonl` and `manifest.json`.

    Args:
        parts: the datasets.
        seed: of draw and order.
        save_path: folder of the two files; an earlier mix in it is replaced.

    Returns:
        The manifest.

    Raises:
        UserError: a dataset has changed since it was checked.
    """
    owners, lines = shuffled(parts, seed)
    digest, size = hashlib.sha256(), 0
    files = [open(part.path, "rb", buffering=0) for part in parts]  # noqa: SIM115 (closed below)
    try:
        with atomic_file(save_path / "data.jsonl", "wb") as out:
            for start in tqdm(range(0, len(lines), 1024), desc="write", unit="Krow", disable=None):
                text = b"".join(
                    _line(parts[owner], files[owner], line)
                    for owner, line in zip(
                        owners[start : start + 1024].tolist(), lines[start : start + 1024].tolist(), strict=True
                    )
                )
                digest.update(text)
                size += len(text)
                out.write(text)
            # A manifest that is there belongs to the data that is there: the old one goes before the new data comes.
            (save_path / "manifest.json").unlink(missing_ok=True)
    finally:
        for file in files:
            file.close()
    manifest = {
        "seed": seed,
        "rows": len(lines),
        "bytes": size,
        "sha256": digest.hexdigest(),
        "inputs": [
            {
                "name": part.name,
                "file": str(part.path),
                "portion": float(part.portion),
                "rows": part.rows,
                "taken": part.taken,
                "sha256": part.sha256,
            }
            for part in parts
        ],
    }
    write_json(save_path / "manifest.json", manifest)
    return manifest


def _line(part: Part, file: IO[bytes], number: int) -> bytes:
    start, end = int(part.starts[number]), int(part.starts[number + 1])
    line = os.pread(file.fileno(), end - start, start)
    if len(line) != end - start or line[-1:] != b"\n":
        raise UserError(f"{part.path}: has changed while it was mixed; mix again")
    return line
