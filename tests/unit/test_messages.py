"""Files of conversations: what is read, and what each mistake is told as."""

import json

import pytest

from utils.data.messages import load_messages
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
        (b"[1, 2]\n", "line 2: expected a JSON object, not list; a JSON array is converted by"),
        (b'"x"\n', "line 2: expected a JSON object, not str"),
        (b'{"messages": "\xff"}\n', "line 2: byte 15 is not UTF-8"),
        (b"[" * 100000 + b"\n", "line 2: not a conversation: nested too deep"),
        (
            {"text": "x", "id": 1},
            "line 2: expected a column 'messages', or 'prompt' and 'completion'; there are 'text', 'id'",
        ),
        ({"prompt": "x"}, "there are 'prompt'"),
        ({}, "there are no columns at all"),
        ({"messages": "x"}, "'messages' is str, not a list of turns"),
        ({"messages": ["x"]}, "turn 1 is not an object with 'role' and 'content'"),
        ({"prompt": "x", "completion": None}, "turn 2: the content is NoneType, not a string"),
        (turn(role="gpt"), "turn 1: the role 'gpt' is not one of system, user, assistant"),
        (turn(role=["user"]), "turn 1: the role \\['user'\\] is not one of"),
        (turn(content=1), "turn 1: the content is int, not a string"),
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
