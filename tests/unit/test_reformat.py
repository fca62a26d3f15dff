"""A set is written whole or not at all, and every row of it is accounted for."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data.formats import SOURCES
from utils.data.reformat import reformat_set
from utils.io.errors import UserError

GOOD = {"instruction": "a", "input": "", "output": "b"}


def reformat(tmp_path, name, data, on_error="stop"):
    raw, out = tmp_path / "raw.json", tmp_path / "out" / "data.jsonl"
    raw.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    report = reformat_set(name, [raw], out, on_error)
    return report, [json.loads(line) for line in out.read_bytes().decode().split("\n")[:-1]]


def test_ids_keep_the_number_of_the_raw_row_whatever_is_left_out(tmp_path):
    rows = [GOOD, {"instruction": "a"}, GOOD, 7, GOOD]
    report, lines = reformat(tmp_path, "alpaca", rows, "skip")
    assert [line["id"] for line in lines] == ["alpaca_0", "alpaca_2", "alpaca_4"]
    assert (report.read, report.written) == (5, 3)
    assert report.faults == {"missing_field": 1, "not_an_object": 1}


def test_numbers_go_on_across_shards(tmp_path):
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_text((json.dumps(GOOD) + "\n") * 2)
    report = reformat_set("alpaca", paths, tmp_path / "data.jsonl")
    ids = [json.loads(line)["id"] for line in (tmp_path / "data.jsonl").open()]
    assert ids == [f"alpaca_{number}" for number in range(4)]
    assert report.written == 4


def test_rows_with_the_same_raw_id_are_all_kept_under_ids_of_their_own(tmp_path):
    rows = [{"id": "same", "conversations": [{"from": "human", "value": "a"}]}] * 3
    _, lines = reformat(tmp_path, "vicuna_sharegpt", rows)
    assert len({line["id"] for line in lines}) == 3


def test_texts_are_written_as_they_are(tmp_path):
    text = '\x00 \x7f \u2028\u2029\ufeff " \\ / \r\n\t ü 😀 \ud7ff\ue000 ' + "\U0010ffff"
    _, lines = reformat(tmp_path, "meta_math_qa", [{"query": text, "response": text[::-1]}])
    assert [message["content"] for message in lines[0]["messages"]] == [text, text[::-1]]


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    report, lines = reformat(tmp_path, "meta_math_qa", [{"query": "a\ud83d", "response": "b"}])
    assert lines[0]["messages"][0]["content"] == "a\ufffd"
    assert report.repaired == 1


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b'[{"query": "a", "response": "b"}, {"query": "a", "response": 3}]', "row 1, byte 34: 'response' is a number"),
        (b'[{"query": "a", "response": "b"}, {"query": "a", "response": "b}]', "row 1, byte 65: the file ends inside"),
        (b'[{"query": "a", "response": "b"}, {"query": "a", "response": "\xfc"}]', "row 1, byte 62: byte 0xfc is not"),
        (b'{"query": "a", "response": "b"}\n\n{"query": "a"}\n', "row 1, byte 33: no field 'response'"),
        (b'{"query": "a", "response": "b"}\n{"query": "a",, "x": 1}\n', "row 1, byte 46: not JSON"),
    ],
)
def test_a_fault_names_file_row_and_byte_and_leaves_the_earlier_output(tmp_path, data, place):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.jsonl").write_text("earlier")
    with pytest.raises(UserError) as error:
        reformat(tmp_path, "meta_math_qa", data)
    assert f"{tmp_path / 'raw.json'}: {place}" in str(error.value)
    assert "--on_error skip" in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.jsonl"]
    assert (tmp_path / "out" / "data.jsonl").read_text() == "earlier"


def test_progress_ends_at_the_size_of_the_files(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 50_000)
    told = []
    reformat_set("alpaca", [path, path], tmp_path / "data.jsonl", tell=lambda *progress: told.append(progress))
    assert told == sorted(told)
    assert told[-1] == (100_000, 2 * path.stat().st_size)


values = st.none() | st.booleans() | st.integers() | st.text(st.characters(codec=None), max_size=8) | st.just([])
senders = st.sampled_from(["human", "user", "gpt", "chatgpt", "bard", "system", "bing", "GPT", ""]) | values
chat_turns = st.dictionaries(st.sampled_from(["from", "value", "weight"]), senders | st.text(max_size=8)) | values
any_rows = st.lists(
    st.fixed_dictionaries({}, optional={"id": values, "conversations": st.lists(chat_turns, max_size=4) | values})
    | st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("instruction", "input", "output", "query", "response", "text"), values)
    )
    | values,
    max_size=6,
)


@given(name=st.sampled_from(sorted(SOURCES)), rows=any_rows, as_lines=st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_json_comes_in_out_come_valid_messages_or_a_clear_error(tmp_path, name, rows, as_lines):
    data = ("\n".join(map(json.dumps, [{}, *rows])) if as_lines else json.dumps(rows)).encode()
    report, lines = reformat(tmp_path, name, data, "skip")
    assert report.read == len(rows) + as_lines
    assert report.read == report.written + sum(report.dropped.values()) + sum(report.faults.values())
    assert len({line["id"] for line in lines}) == len(lines) == report.written
    for line in lines:
        assert list(line) == ["dataset", "id", "messages"]
        assert line["dataset"] == SOURCES[name].dataset
        assert line["messages"]
        for message in line["messages"]:
            assert list(message) == ["role", "content"]
            assert message["role"] in ("system", "user", "assistant")
            assert isinstance(message["content"], str)
    if report.faults:
        with pytest.raises(UserError) as error:
            reformat(tmp_path, name, data)
        assert "\n" not in str(error.value)
    else:
        assert reformat(tmp_path, name, data)[1] == lines
