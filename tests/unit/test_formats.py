"""Each converter gives the method's texts and roles, drops what the method drops, and names what it cannot use."""

import pytest

from utils.data.formats import SOURCES, BadRow, Dropped


def convert(name, row):
    return [(m["role"], m["content"]) for m in SOURCES[name].convert(row)]


def turns(*pairs):
    return {"id": "x", "conversations": [{"from": sender, "value": value} for sender, value in pairs]}


def test_alpaca_without_input_is_the_instruction_alone():
    row = {"instruction": "Add 1 and 2.", "input": "", "output": "3", "text": "ignored"}
    assert convert("alpaca", row) == [("user", "Add 1 and 2."), ("assistant", "3")]


def test_alpaca_input_is_appended_as_the_method_has_it():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert convert("alpaca", row) == [("user", "Add.\nInput: 1, 2\n"), ("assistant", "3")]


def test_alpaca_input_of_blanks_counts_as_input_and_blank_output_is_kept():
    row = {"instruction": "Add.", "input": " ", "output": ""}
    assert convert("alpaca", row) == [("user", "Add.\nInput:  \n"), ("assistant", "")]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("meta_math_qa", {"type": "t", "query": "q", "original_question": "o", "response": "a"}),
        ("evol_code_alpaca", {"output": "a", "instruction": "q"}),
    ],
)
def test_question_sets_take_their_two_fields(name, row):
    assert convert(name, row) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("name", ["vicuna_sharegpt", "evol_instruct", "slim_orca"])
def test_conversations_map_every_known_sender(name):
    row = turns(("human", "a"), ("gpt", "b"), ("user", "c"), ("chatgpt", "d"), ("human", "e"), ("bard", "f"))
    roles = ["user", "assistant"] * 3
    assert convert(name, row) == list(zip(roles, "abcdef", strict=True))


@pytest.mark.parametrize("name", ["vicuna_sharegpt", "slim_orca"])
def test_system_turns_are_kept_where_the_method_keeps_them(name):
    assert convert(name, turns(("system", "s"), ("human", "a")))[0] == ("system", "s")


def test_conversations_keep_order_blanks_and_same_role_turns():
    row = turns(("gpt", " starts"), ("gpt", ""), ("human", "\x00 nul"), ("human", "x" * 10))
    assert [content for _, content in convert("vicuna_sharegpt", row)] == [" starts", "", "\x00 nul", "x" * 10]


@pytest.mark.parametrize(
    ("name", "sender"), [("vicuna_sharegpt", "bing"), ("evol_instruct", "bing"), ("evol_instruct", "system")]
)
def test_rows_with_senders_the_method_leaves_out_are_dropped_whole(name, sender):
    with pytest.raises(Dropped) as drop:
        convert(name, turns(("human", "a"), (sender, "b"), ("nobody", "c")))
    assert drop.value.reason == f"{sender}_turn"


@pytest.mark.parametrize("name", ["vicuna_sharegpt", "evol_instruct", "slim_orca"])
def test_rows_without_turns_are_dropped(name):
    with pytest.raises(Dropped, match="no_turns"):
        convert(name, {"conversations": []})


@pytest.mark.parametrize(
    ("name", "row", "reason", "words"),
    [
        ("vicuna_sharegpt", turns(("humann", "a")), "unknown_sender", "did you mean 'human'"),
        ("slim_orca", turns(("bing", "a")), "unknown_sender", "'bing'"),
        ("vicuna_sharegpt", turns((7, "a")), "unknown_sender", "turn 0 is from 7"),
        ("vicuna_sharegpt", turns((["x"], "a")), "unknown_sender", "a list"),
        ("vicuna_sharegpt", turns(("human", None)), "not_a_string", "null"),
        ("vicuna_sharegpt", turns(("human", {"a": 1})), "not_a_string", "an object"),
        ("vicuna_sharegpt", {"conversations": [{"value": "a"}]}, "missing_field", "'from'"),
        ("vicuna_sharegpt", {"conversations": [{"from": "human"}]}, "missing_field", "'value'"),
        ("vicuna_sharegpt", {"conversations": ["hello"]}, "not_an_object", "turn 0 is a string"),
        ("vicuna_sharegpt", {"conversations": None}, "not_a_list", "null"),
        ("vicuna_sharegpt", {"items": []}, "missing_field", "'conversations'"),
        ("vicuna_sharegpt", ["row"], "not_an_object", "a list"),
        ("alpaca", {"instruction": "a", "output": "b"}, "missing_field", "'input'"),
        ("alpaca", {"instruction": "a", "input": None, "output": "b"}, "not_a_string", "'input' is null"),
        ("meta_math_qa", {"query": "q", "response": 4}, "not_a_string", "'response' is a number"),
        ("evol_code_alpaca", {"instruction": "q"}, "missing_field", "'output'"),
        ("evol_code_alpaca", True, "not_an_object", "a boolean"),
    ],
)
def test_faults_name_their_reason_and_the_offending_value(name, row, reason, words):
    with pytest.raises(BadRow) as bad:
        convert(name, row)
    assert bad.value.reason == reason
    assert words in bad.value.detail
    assert "\n" not in bad.value.detail
