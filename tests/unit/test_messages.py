"""Files of conversations: what is read, and what each mistake is told as."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from utils.data.messages import load_messages
from utils.data.reformat import reformat_set
from utils.io.errors import UserError

ROW = {"dataset": "alpaca", "id": "alpaca_0", "messages": [{"role": "user", "content": "Grüße 😀"}]}


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def test_rows_are_read_as_they_are(tmp_path):
    other = ROW | {"id": "alpaca_1", "extra": 1}
    dataset = load_messages(write(tmp_path / "data.jsonl", ROW, b"\n", other))
    assert dataset.to_list() == [ROW, ROW | {"id": "alpaca_1"}]


def test_a_prompt_and_a_completion_become_two_turns(tmp_path):
    dataset = load_messages(write(tmp_path / "pairs.jsonl", {"prompt": "1 + 1?", "completion": "2"}))
    assert dataset[0] == {
        "dataset": "pairs",
        "id": "pairs_1",
        "messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}],
    }


def test_only_the_first_rows_are_read_where_asked(tmp_path):
    assert len(load_messages(write(tmp_path / "data.jsonl", ROW, ROW, b"not read"), max_rows=2)) == 2


def test_the_fingerprint_follows_from_the_content(tmp_path):
    first = load_messages(write(tmp_path / "a.jsonl", ROW))
    same = load_messages(write(tmp_path / "a.jsonl", ROW, b"\n"))
    other = load_messages(write(tmp_path / "a.jsonl", ROW, ROW))
    assert first._fingerprint == same._fingerprint != other._fingerprint


def test_a_long_file_is_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.messages._CHUNK_BYTES", 1000)
    rows = [ROW | {"id": str(at)} for at in range(500)]
    assert load_messages(write(tmp_path / "data.jsonl", *rows)).to_list() == rows


def turn(**changes):
    return ROW | {"messages": [{"role": "user", "content": "x"} | changes]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [\n', "line 2: not a JSON object on one line"),
        (b"[1, 2]\n", "line 2: expected a JSON object, not a list"),
        (b'"x"\n', "line 2: expected a JSON object, not a string"),
        (b'{"messages": "\xff"}\n', "line 2: byte 15 is not UTF-8"),
        (b"[" * 100000 + b"\n", "line 2: not a conversation: nested too deep"),
        (
            {"text": "x", "id": 1},
            "line 2: expected a column 'messages', or 'prompt' and 'completion', .* there are 'text', 'id'",
        ),
        ({"prompt": "x"}, "there are 'prompt'"),
        ({}, "there are no columns at all"),
        ({"messages": "x"}, "'messages' is a string, not a list of turns"),
        ({"messages": ["x"]}, "turn 1 is not an object with 'role' and 'content'"),
        ({"prompt": "x", "completion": None}, "turn 2: the content is null, not a string"),
        (turn(role="gpt"), "turn 1: the role 'gpt' is not one of system, user, assistant"),
        (turn(role=["user"]), "turn 1: the role \\['user'\\] is not one of"),
        (turn(content=1), "turn 1: the content is a number, not a string"),
        (turn(content="\ud800"), "turn 1: the content has a lone surrogate"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", ROW, line)
    with pytest.raises(UserError, match=message) as error:
        load_messages(path)
    assert str(error.value).startswith(f"{path}: line 2: ")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, message in [
        (tmp_path / "nowhere.jsonl", "no such file"),
        (tmp_path, "is a folder; name the file of conversations in it, such as .*data.jsonl"),
        (write(tmp_path / "empty.jsonl", b""), "is empty"),
        (write(tmp_path / "blank.jsonl", b"\n \n"), "is empty"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_messages(path)
        assert str(path) in str(error.value)


QUESTION, ANSWER = "Wie heißt die Stadt?\n", " Köln "
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAPES = {
    "messages": {"messages": TURNS},
    "messages with parts": {
        "messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    },
    "a table of several shapes": {"messages": None, "text": None, "prompt": QUESTION, "completion": ANSWER},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt and completion of turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "ShareGPT": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "ShareGPT's other names": {
        "conversations": [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": ANSWER}]
    },
    "conversations of turns": {"conversations": TURNS},
    "Alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "Alpaca without input": {"instruction": QUESTION, "output": ANSWER},
    "MetaMath": {"type": "x", "query": QUESTION, "response": ANSWER},
}


def lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FILES = {
    "data.jsonl": lines,
    "data.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=4, ensure_ascii=False).encode(),
    "data.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "data.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "data.jsonl.zst": lambda rows: zstandard.compress(lines(rows)),
    "data.parquet": parquet,
    "with a mark.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "with a mark.json": lambda rows: b"\xef\xbb\xbf \n" + json.dumps(rows).encode(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FILES)
def test_conversations_are_read_in_every_shape_and_file_and_reformatted_alike(tmp_path, name, shape):
    path = tmp_path / "raw/generic" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(FILES[name]([SHAPES[shape]] * 2))
    read = load_messages(path)
    assert read["messages"] == [TURNS] * 2
    stem = name.split(".")[0]
    assert read["id"] == [f"{stem}_1", f"{stem}_2"]
    reformat_set("generic", [path], tmp_path / "data.jsonl")
    again = load_messages(tmp_path / "data.jsonl")
    assert again["messages"] == [TURNS] * 2
    assert again["id"] == ["generic_0", "generic_1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"prompt,completion\na,b\n", "is a table with commas; convert it to JSON lines"),
        ("rows.tsv", b"prompt\tcompletion\n", "is a table with tabs; convert it"),
        ("rows.xlsx", b"PK\x03\x04\x00\x00", "is a zip archive or a spreadsheet; convert it"),
        ("rows.arrow", b"ARROW1\x00\x00", "is an Arrow file"),
        ("rows.db", b"SQLite format 3\x00", "is an SQLite database"),
        ("rows.jsonl.xz", b"\xfd7zXZ\x00", "is compressed with xz"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("rows.jsonl", "{}".encode("utf-16"), "is UTF-16 and not UTF-8"),
        ("rows.jsonl", b"<!DOCTYPE html>\n", "is a web page"),
        ("rows.json", b'{\n  "data": []\n}', "line 1: not a JSON object on one line"),
        ("rows.jsonl.gz", gzip.compress(lines([ROW] * 9))[:-20], r"row \d, .*the compressed file ends early"),
        ("rows.json", b'[{"messages": []}, {"messages": [', "row 2, byte .*ends inside this row"),
        ("rows.json", b"[1, 2]", "row 1, byte 1: expected a JSON object, not a number"),
        ("rows.json", b"[]", "is empty"),
        ("rows.json", b'[{"messages": "\\ud800"}]', "row 1, byte 1: a text has a lone surrogate"),
        ("rows.parquet", b"PAR1" * 3, "not a whole parquet file"),
        ("rows.parquet", parquet([{"text": "x"}]), "row 1, row group 0: expected a column 'messages'"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_messages(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(error.value)
