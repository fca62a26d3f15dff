"""Random damage, for as long as one likes: the readers never crash, and agree with Python's json on what is sound.

FUZZ_SECONDS=600 python -m pytest -m slow tests/unit/test_readers_fuzz.py
"""

import contextlib
import gzip
import json
import os
import random
import time

import pytest
import zstandard

from utils.data import blocks, json_rows, raw_files
from utils.data.blocks import Fault
from utils.data.raw_files import RawStream
from utils.data.readers import read_rows
from utils.io.errors import UserError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
FIELDS = ("id", "conversations")
ROWS = [
    {"id": "a_0", "conversations": [{"from": "human", "value": 'say "{" \\ ü 😀'}, {"from": "gpt", "value": "}, {"}]},
    {"id": "b_0", "conversations": [], "weight": [1, -2.5e3, None, True]},
    {"conversations": [{"from": "gpt", "value": "\ud83d\x00\n"}], "id": '{"id":'},
    {"id": "", "conversations": [{"from": "system", "value": "x" * 40}]},
]
SPLICES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"\\",
    b"\n",
    b" ",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"1",
    b"NaN",
]
SPLICES += [
    b'{"id":',
    b'"id"',
    b"null",
    b"\\ud800",
    b"\xf0\x9f\x98\x80",
    b'{"id":1,"conversations":[]},',
    b"[[[[",
    b"\r",
]


def damaged(draw, data):
    for _ in range(draw.choice((0, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        until = min(len(data), at + draw.choice((0, 0, 1, 1, 2, 20, 200)))
        data = (
            data[:at]
            + draw.choice([b"", draw.choice(SPLICES), draw.randbytes(2), data[until : until + 30]])
            + data[until:]
        )
    return data


def without_surrogates(value):
    return json.loads(
        json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


def by_python(data):
    """The rows of an array or of lines as Python's json has them; None where it finds them unsound."""
    text = data.decode("utf-8").removeprefix("\ufeff")
    if text.lstrip(" \t\r\n").startswith("["):
        return without_surrogates(json.loads(text))
    return [without_surrogates(json.loads(line)) for line in text.split("\n") if line.strip(" \t\r\n\v\f")]


@pytest.mark.slow
def test_damage_never_crashes_a_reader_and_never_passes_unseen(tmp_path, monkeypatch):
    draw, path, runs, sound = random.Random(0), tmp_path / "fuzz.json", 0, 0
    texts = [json.dumps(ROWS * 3), json.dumps(ROWS * 3, indent=1, ensure_ascii=True)]
    texts += [json.dumps(ROWS[:1] * 9, ensure_ascii=False, separators=(",", ":"))]
    texts += ["\n".join(map(json.dumps, ROWS * 3)), "\r\n\n".join(map(json.dumps, ROWS * 3)) + "\n"]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for module in (blocks, json_rows, raw_files):
            monkeypatch.setattr(module, "CHUNK", draw.choice((3, 17, 100, 1 << 17)))
        data = damaged(draw, draw.choice(texts).encode())
        path.write_bytes(data)
        try:
            expected = by_python(data)
        except (ValueError, RecursionError):
            expected = None
        try:
            items = list(read_rows(path, FIELDS))
        except UserError:
            assert expected in (None, []) or not data.lstrip(b" \t\r\n\xef\xbb\xbf").startswith((b"[", b"{")), data
            continue
        faults = [item for item in items if isinstance(item, Fault)]
        rows = [row for item in items if not isinstance(item, Fault) for row in item.rows]
        assert (not faults) == (expected is not None), (data, faults)
        assert expected is None or json.dumps(rows) == json.dumps(expected), data
        runs, sound = runs + 1, sound + (expected is not None)
    print(f"{runs} files, {sound} of them sound")
    assert sound > runs // 20


@pytest.mark.slow
def test_damaged_compression_never_crashes_a_stream(tmp_path):
    draw, path = random.Random(1), tmp_path / "fuzz"
    text = json.dumps(ROWS * 50).encode()
    packed = [gzip.compress(text), zstandard.compress(text), gzip.compress(text) + bytes(9) + gzip.compress(text)]
    packed += [zstandard.ZstdCompressor(write_checksum=True).compress(text) * 2]
    end = time.monotonic() + SECONDS / 4
    while time.monotonic() < end:
        path.write_bytes(damaged(draw, draw.choice(packed)))
        with RawStream(path) as stream, contextlib.suppress(raw_files.StreamFault):
            while stream.read(1 << 16):
                pass
