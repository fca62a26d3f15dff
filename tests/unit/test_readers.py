"""Whatever a raw file holds, its rows come out whole and in order, and damage comes out as a fault with its place."""

import contextlib
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data import blocks, json_rows, raw_files
from utils.data.blocks import Block, Fault
from utils.data.raw_files import find_raw_files
from utils.data.readers import read_rows
from utils.io.errors import UserError

FIELDS = ("id", "conversations")
ROWS = [
    {"id": "a_0", "conversations": [{"from": "human", "value": 'quote " brace } { "id": [ \\ end'}]},
    {"id": "b_0", "conversations": [], "more": [1, 2.5, None, True, "ü € 😀"]},
    {"id": "a_0", "conversations": [{"from": "gpt", "value": '}, {"id":"x","conversations":[]}, \n\t'}]},
    {"id": "c_0", "conversations": [{"from": "gpt", "value": "x" * 300}]},
]


@pytest.fixture(params=[1 << 20, 16], ids=["large_chunks", "tiny_chunks"])
def chunk(request, monkeypatch):
    """Chunks of 16 bytes put a border between any two bytes of a small file."""
    for module in (blocks, json_rows, raw_files):
        monkeypatch.setattr(module, "CHUNK", request.param)


def read(path, fields=FIELDS):
    rows, faults = [], []
    for item in read_rows(path, fields):
        if isinstance(item, Fault):
            faults.append(item)
        else:
            rows += item.rows
    return rows, faults


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def texts(rows):
    compact = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return {
        "indented": json.dumps(rows, indent=1),
        "spaced": json.dumps(rows),
        "compact": compact,
        "compact_with_mark": "\ufeff" + compact,
        "blank_around": f"\n\n  {compact}\r\n ",
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "lines_crlf_and_blank": "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in rows),
        "lines_without_last_break": "\n".join(json.dumps(row) for row in rows),
    }


@pytest.mark.parametrize("form", texts(ROWS))
@pytest.mark.parametrize("compress", [None, "gz", "zst"])
@pytest.mark.usefixtures("chunk")
def test_rows_come_out_in_order_from_every_form(tmp_path, form, compress):
    data = texts(ROWS)[form].encode()
    if compress == "gz":
        data = gzip.compress(data[:40]) + gzip.compress(data[40:])
    elif compress == "zst":
        data = zstandard.compress(data[:40]) + zstandard.compress(data[40:])
    assert read(write(tmp_path / "any.json", data)) == (ROWS, [])


def test_parquet_rows_come_out_in_order(tmp_path):
    rows = [{"instruction": f"i{n}", "input": "", "output": "ü"} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    assert read(tmp_path / "a.parquet") == (rows, [])


@pytest.mark.parametrize("form", ["indented", "compact", "lines"])
@pytest.mark.usefixtures("chunk")
def test_a_file_cut_anywhere_gives_its_whole_rows_and_one_fault(tmp_path, form):
    data = texts(ROWS)[form].encode()
    for length in range(1, len(data)):
        path = write(tmp_path / "cut.jsonl", data[:length])
        rows, faults = read(path)
        assert rows == ROWS[: len(rows)]
        if form == "lines":
            ends = [at for at, byte in enumerate(data) if byte == 10]
            # a line is whole with or without its break
            assert len(rows) == sum(end <= length for end in ends)
            assert [fault.reason for fault in faults] == ["truncated"] * (length not in (*ends, *(e + 1 for e in ends)))
        else:
            assert [fault.reason for fault in faults] == ["truncated"], length
            assert faults[0].where == f"byte {length}"


@pytest.mark.parametrize("form", ["indented", "compact", "spaced", "lines"])
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"b_0"', b'"b_0', "malformed"),
        (b'"b_0"', b"b_0", "malformed"),
        (b'"b_0"', b'"b\\x_0"', "malformed"),
        (b'"b_0"', b'"b\x00_0"', "malformed"),
        (b'"b_0"', b'"b\xff_0"', "invalid_utf8"),
        (b'"b_0"', b'"b\xed\xa0\x80_0"', "invalid_utf8"),
    ],
)
@pytest.mark.usefixtures("chunk")
def test_a_broken_row_is_named_and_the_others_are_kept(tmp_path, form, old, new, reason):
    data = texts(ROWS)[form].encode()
    at = data.index(old)
    rows, faults = read(write(tmp_path / "broken.json", data.replace(old, new, 1)))
    assert rows == [ROWS[0], ROWS[2], ROWS[3]]
    assert [fault.reason for fault in faults] == [reason]
    place = int(faults[0].where.removeprefix("byte "))
    assert at <= place <= at + 80


@pytest.mark.parametrize("form", ["indented", "compact"])
@pytest.mark.usefixtures("chunk")
def test_a_row_that_lost_its_end_does_not_take_the_next_with_it(tmp_path, form):
    text = texts(ROWS)[form]
    middle = text.index('"more"')
    following = text.index("{", text.index("😀" if form == "compact" else "\\ud83d"))
    rows, faults = read(write(tmp_path / "broken.json", text[:middle] + text[following:]))
    assert rows == [ROWS[0], ROWS[2], ROWS[3]]
    assert [fault.reason for fault in faults] == ["malformed"]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    ("text", "count", "detail"),
    [
        ('[{"id": 1} {"id": 2}]', 2, "no comma"),
        ('[{"id": 1},, {"id": 2}]', 2, "a comma without a row"),
        ('[,{"id": 1}]', 1, "a comma without a row"),
        ('[{"id": 1},]', 1, "a comma before the end"),
        ('[{"id": 1}] x', 1, "something follows"),
        ('[{"id": 1}][{"id": 2}]', 1, "something follows"),
    ],
)
def test_damage_between_rows_loses_none_of_them(tmp_path, text, count, detail):
    rows, faults = read(write(tmp_path / "a.json", text))
    assert len(rows) == count
    assert [(fault.reason, fault.rows) for fault in faults] == [("malformed", 0)]
    assert detail in faults[0].detail


def test_an_empty_array_has_no_rows_and_no_fault(tmp_path):
    assert read(write(tmp_path / "a.json", " [ ] ")) == ([], [])


def test_rows_need_not_begin_with_the_same_key(tmp_path):
    rows = [dict(reversed(row.items())) if n % 2 else row for n, row in enumerate(ROWS * 3)]
    assert read(write(tmp_path / "a.json", json.dumps(rows))) == (rows, [])


def test_rows_whose_first_key_is_nested_too_are_read_right(tmp_path):
    rows = [{"from": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 3
    assert read(write(tmp_path / "a.json", json.dumps(rows))) == (rows, [])


@pytest.mark.parametrize("form", ["compact", "lines"])
def test_lone_surrogates_become_replacement_characters_and_are_counted(tmp_path, form):
    rows = [{"id": "a", "conversations": ["ok"]}, {"id": "b", "conversations": ["x\ud83dy\ude00", "\ud83d\ude00"]}]
    data = json.dumps(rows) if form == "compact" else "\n".join(map(json.dumps, rows))
    items = list(read_rows(write(tmp_path / "a.json", data), FIELDS))
    assert [row for item in items for row in item.rows][1] == {"id": "b", "conversations": ["x\ufffdy\ufffd", "😀"]}
    assert sum(item.repaired for item in items) == 1


def test_nan_in_a_field_that_nobody_reads_is_no_fault(tmp_path):
    rows, faults = read(
        write(tmp_path / "a.json", '[{"id": NaN}, {"id": 1}, {"id": 1e999, "x": 123456789012345678901}]')
    )
    assert len(rows) == 3
    assert not faults


def test_nesting_without_end_is_a_fault_and_no_crash(tmp_path):
    rows, faults = read(write(tmp_path / "a.jsonl", b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b'}\n{"id": 1}\n'))
    assert rows == [{"id": 1}]
    assert [fault.reason for fault in faults] == ["malformed"]


@pytest.mark.parametrize("form", ["indented", "compact", "lines"])
def test_a_turn_of_ten_megabytes_is_a_row_like_any_other(tmp_path, form):
    rows = [ROWS[0], {"id": "big", "conversations": [{"from": "gpt", "value": 'é"\\ ' * 2_000_000}]}, ROWS[3]]
    assert read(write(tmp_path / "a.json", texts(rows)[form])) == (rows, [])


@pytest.mark.parametrize("form", ["indented", "lines"])
def test_a_row_beyond_the_limit_is_a_fault_and_reading_goes_on(tmp_path, monkeypatch, form):
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    for module in (blocks, json_rows, raw_files):
        monkeypatch.setattr(module, "CHUNK", 64)
    rows = [ROWS[0], {"id": "big", "conversations": ["x" * 9000]}, ROWS[1], ROWS[2]]
    got, faults = read(write(tmp_path / "a.json", texts(rows)[form]))
    assert got == [ROWS[0], ROWS[1], ROWS[2]]
    assert [fault.reason for fault in faults] == ["too_large"]


def test_places_lead_to_the_rows_of_a_block(tmp_path):
    for form in ("indented", "compact", "lines"):
        data = texts(ROWS * 3)[form].encode()
        for item in read_rows(write(tmp_path / "a.json", data), FIELDS):
            for number, row in enumerate(item.rows):
                start = int(item.where(number).removeprefix("byte "))
                assert json.JSONDecoder().raw_decode(data[start:].decode())[0] == row


@pytest.mark.parametrize("form", ["compact", "lines"])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damaged_compression_keeps_the_rows_before_it(tmp_path, kind, form):
    rows = [{"id": f"r{n}", "conversations": [str(n * 7919**5)]} for n in range(5000)]
    data = texts(rows)[form].encode()
    packed = gzip.compress(data) if kind == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    got, faults = read(write(tmp_path / "cut.json", packed[: len(packed) // 2]))
    assert got == rows[: len(got)]
    assert kind == "zst" or len(got) > 1000
    assert [fault.reason for fault in faults] == ["truncated"]
    end = bytes([packed[-5] ^ 255])  # within the checksum of both
    got, faults = read(write(tmp_path / "flipped.json", packed[:-5] + end + packed[-4:]))
    assert [fault.reason for fault in faults] == ["corrupt"] or kind == "zst"


def test_damaged_parquet_keeps_whole_row_groups_and_numbers(tmp_path):
    rows = [{"instruction": f"row {n} " + "x" * 50, "input": "", "output": "y"} for n in range(900)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300, use_dictionary=False, compression="zstd")
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 200] = bytes(200)
    path.write_bytes(data)
    got, faults = read(path)
    assert got == rows[:300] + rows[600:]
    assert [(fault.reason, fault.rows, fault.where) for fault in faults] == [("corrupt", 300, "row group 1")]


def test_invalid_utf8_in_parquet_is_a_fault_of_its_row(tmp_path):
    texts_ = pa.array([b"a", b"\xff", b"c"], type=pa.binary()).view(pa.utf8())
    pq.write_table(pa.table({"id": texts_}), tmp_path / "a.parquet")
    rows, faults = read(tmp_path / "a.parquet")
    assert rows == [{"id": "a"}, {"id": "c"}]
    assert [fault.reason for fault in faults] == ["invalid_utf8"]


def test_parquet_with_a_column_name_that_is_no_utf8_is_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "naming": ["b"]}), tmp_path / "a.parquet", store_schema=False)
    whole = (tmp_path / "a.parquet").read_bytes()
    assert b"naming" in whole
    (tmp_path / "a.parquet").write_bytes(whole.replace(b"naming", b"\xe3aming"))
    with pytest.raises(UserError, match=r"not a whole parquet file \('utf-8' codec"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PAR1 cut", "not a whole parquet file"),
        (b"hello", "neither a JSON array"),
        (b'\xff\xfe[\x00{\x00"\x00', "neither a JSON array"),
        (b"\x1f\x8b\x08\x00", "ends early"),
    ],
)
def test_a_file_that_is_something_else_is_named_as_such(tmp_path, data, words):
    path = write(tmp_path / "a.json", data)
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)


def test_raw_files_are_found_by_name_shards_or_as_the_only_one(tmp_path):
    def found(*names):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return [path.relative_to(folder).as_posix() for path in find_raw_files(folder, "rows.json")]

    assert found("rows.json", "rows.json.gz", "other.json", "README.md") == ["rows.json"]
    assert found("rows.json.zst", ".gitattributes") == ["rows.json.zst"]
    shards = [f"data/train-0000{n}-of-00003-ab.parquet" for n in range(3)]
    assert found(*shards, "data/test-00000-of-00001.parquet") == shards
    assert found("mine.jsonl.gz", "dataset_infos.json") == ["mine.jsonl.gz"]
    assert found("README.md", "rows.json.incomplete") == []
    with pytest.raises(UserError, match="00001 of 00003 is missing"):
        found(shards[0], shards[2])
    with pytest.raises(UserError, match="keep only one"):
        found("one.json", "two.json")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=10,
)
rows_strategy = st.lists(
    st.fixed_dictionaries({"id": json_values, "conversations": json_values}) | json_values, max_size=8
)


@given(
    rows=rows_strategy,
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
    size=st.sampled_from([7, 64, 1 << 20]),
)
@settings(max_examples=300, deadline=None)
def test_any_json_array_is_read_as_python_reads_it(tmp_path_factory, rows, indent, ascii, size):
    path = tmp_path_factory.getbasetemp() / "property.json"
    write(path, json.dumps(rows, indent=indent, ensure_ascii=ascii).encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, json_rows, raw_files):
            patch.setattr(module, "CHUNK", size)
        assert read(path) == (json.loads(path.read_bytes()), [])


pieces = st.sampled_from(
    [
        *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\n", b" ", b"\x00", b"\xff", b"PAR1"),
        *(b"1", b"null", b"NaN", b"\\ud800", b'"id"', b'{"id":', b'{"id":1,"conversations":[]}'),
    ]
)


@given(parts=st.lists(pieces | st.binary(max_size=4), max_size=30), kind=st.sampled_from(["", "gz", "zst"]))
@settings(max_examples=500, deadline=None)
def test_no_bytes_make_a_reader_crash_or_hang(tmp_path_factory, parts, kind):
    data = b"".join(parts)
    if kind:
        data = (gzip.compress(data) if kind == "gz" else zstandard.compress(data))[: len(data) + 8]
    path = write(tmp_path_factory.getbasetemp() / "property.json", data)
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, json_rows, raw_files):
            patch.setattr(module, "CHUNK", 8)
        with contextlib.suppress(UserError):
            assert all(isinstance(item, Block | Fault) for item in read_rows(path, FIELDS))
