"""Finds the files of a raw dataset and opens them as streams of bytes, compressed or not.

A download is kept as it came: a clone of the hub repository, with or without `.gz` or `.zst` on its files. What a file
is, its first bytes say, not its name. Nothing here looks inside the rows.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from utils.io.errors import UserError

CHUNK = 1 << 17  # bytes read at a time; what fits the processor's cache is parsed fastest
# A few bytes of zstd can stand for 128 KiB: small pieces keep what one call unpacks below 128 MiB, whatever the file.
_COMPRESSED_PIECE = 4096

_COMPRESSIONS = ("", ".gz", ".zst")
_SHARDS = ("data/train-*.parquet", "default/train/*.parquet", "train-*.parquet")
_SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})\b")


class StreamFault(Exception):
    """A compressed file that cannot be unpacked further; `reason` is `truncated` or `corrupt`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def find_raw_files(folder: Path, file: str) -> list[Path]:
    """Return the files of a dataset in the order of their rows; an empty list where there are none.

    The hub's own file comes first, then parquet shards, then the only data file of another name.

    Args:
        folder: the dataset's folder under `data/raw`.
        file: name of the data file in the hub repository.

    Raises:
        UserError: a shard is missing, or several files could be meant.
    """
    for ending in _COMPRESSIONS:
        if (folder / (file + ending)).is_file():
            return [folder / (file + ending)]
    for pattern in _SHARDS:
        if shards := sorted(path for path in folder.glob(pattern) if path.is_file()):
            _check_shards(folder, shards)
            return shards
    kinds = [f"*{kind}{ending}" for kind in (".json", ".jsonl", ".parquet") for ending in _COMPRESSIONS]
    notes = ("dataset_infos.json", "dataset_info.json", "download.json")
    others = sorted(
        path
        for kind in kinds
        for path in (*folder.glob(kind), *folder.glob(f"data/{kind}"))
        if path.is_file() and path.name not in notes and not path.name.startswith(".")
    )
    if len(others) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        raise UserError(f"{folder}: which file holds the rows? There is no {file}, but {names}; keep only one")
    return others


def _check_shards(folder: Path, shards: list[Path]) -> None:
    numbered = [match for path in shards if (match := _SHARD_OF.search(path.name))]
    if not numbered:
        return
    totals = {int(match[2]) for match in numbered}
    there = [int(match[1]) for match in numbered]
    missing = sorted(set(range(max(totals))) - set(there))
    if len(totals) > 1 or len(there) != len(set(there)):
        raise UserError(f"{folder}: shards of different sets: {', '.join(path.name for path in shards[:5])}")
    if missing:
        raise UserError(f"{folder}: shard {missing[0]:05d} of {max(totals):05d} is missing; download it again")


class RawStream:
    """Reads a file from its beginning, unpacking gzip and zstandard on the way.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        magic = self._file.read(4)
        self._file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            self._pieces: Iterator[bytes] | None = _unpack(self._file, lambda: zlib.decompressobj(wbits=31))
        elif magic == b"\x28\xb5\x2f\xfd":
            self._pieces = _unpack(self._file, lambda: zstandard.ZstdDecompressor().decompressobj())
        else:
            self._pieces = None

    def __enter__(self) -> "RawStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def consumed(self) -> int:
        """Bytes of the file on disk that have been read."""
        return self._file.tell()

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes or up to a chunk more, fewer only at the end of the file, none after it.

        Raises:
            StreamFault: the compressed file is damaged here; all before it has been returned.
        """
        parts, length = [], 0
        while length < size:
            try:
                part = next(self._pieces, b"") if self._pieces else self._file.read(size - length)
            except StreamFault as fault:
                if not parts:
                    raise
                self._pieces = _raise_again(fault)
                break
            if not part:
                break
            parts.append(part)
            length += len(part)
        return b"".join(parts)


def _raise_again(fault: StreamFault) -> Iterator[bytes]:
    raise fault
    yield b""


def _unpack(file: Any, new_decoder: Any) -> Iterator[bytes]:
    """Yield the unpacked content of all members of a gzip file or all frames of a zstandard file."""
    decoder = None
    while data := file.read(_COMPRESSED_PIECE):
        while data:
            if decoder is None:
                data = data.lstrip(b"\0")  # gzip files may be padded with zeros between and after members
                if not data:
                    break
                decoder = new_decoder()
            try:
                piece = decoder.decompress(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise StreamFault(
                    "corrupt", f"the compressed data is damaged near byte {file.tell()}: {error}"
                ) from None
            for start in range(0, len(piece), CHUNK):
                yield piece[start : start + CHUNK]
            data = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = None
    if decoder is not None:
        raise StreamFault("truncated", "the compressed file ends early; download it again")
