"""Labels from character offsets, against slow and independent ways to find them."""

import json
import logging
import os

import numpy as np
import pytest
from chat_tokenizers import (
    CHATML,
    KINDS,
    LLAMA3,
    TEMPLATES,
    VICUNA,
    make_tokenizer,
    prefix_mask,
    supervised_pieces,
    turns,
)
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.tokenization import ConversationEncoder, tokenize_dataset
from utils.io.errors import UserError


def dataset_of(*conversations) -> Dataset:
    return Dataset.from_list([{"messages": messages} for messages in conversations])


CONVERSATION = turns(
    "What is the capital of France?", "Paris, and it is a large city. 😀", "Grüße", "naïve café\n\nyes"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_supervised_tokens_decode_to_the_answers(kind, template):
    tokenizer = make_tokenizer(kind, TEMPLATES[template])
    rows, _ = tokenize_dataset(dataset_of(CONVERSATION), tokenizer, 1000, progress=False)
    pieces = supervised_pieces(rows[0], tokenizer)
    mark = {"llama3": "<|eot|>", "llama2": "</s>", "mistral": "</s>", "vicuna": "</s>"}.get(template, "<|im_end|>")
    answers = [CONVERSATION[1]["content"], CONVERSATION[3]["content"]]
    assert [piece.removesuffix(mark).strip() for piece in pieces] == answers
    assert all(piece.endswith(mark) for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_the_labels_equal_those_of_encoding_every_prefix(kind):
    tokenizer = make_tokenizer(kind, CHATML)
    rows, _ = tokenize_dataset(dataset_of(CONVERSATION), tokenizer, 1000, progress=False)
    assert (np.array(rows[0]["labels"]) != -100).tolist() == prefix_mask(tokenizer, CONVERSATION)


TEXTS = st.one_of(
    st.text(max_size=30), st.sampled_from(["", " ", "\n", "  yes", "yes \n", "👩‍👩‍👧", "é\u0301", "<|user|>"])
)


ENCODERS = {kind: ConversationEncoder(make_tokenizer(kind, LLAMA3), 1000) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(contents=st.lists(TEXTS, min_size=2, max_size=4))
def test_whatever_the_contents_only_answers_are_supervised(kind, contents):
    tokenizer = ENCODERS[kind].tokenizer
    messages = turns(*contents)
    batch = ENCODERS[kind].encode([messages])
    if batch.dropped:
        return
    row = {"input_ids": batch.input_ids[0].tolist(), "labels": batch.labels[0].tolist()}
    answers = [message["content"].strip() for message in messages[1::2]]
    expected = tokenizer.decode(tokenizer("".join(a + "<|eot|>" for a in answers), add_special_tokens=False).input_ids)
    assert "".join("".join(supervised_pieces(row, tokenizer)).split()) == "".join(expected.split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_word_that_is_one_token_with_the_space_before_it_is_supervised(kind):
    tokenizer = make_tokenizer(kind, VICUNA)
    rows, _ = tokenize_dataset(dataset_of(turns("Hello", "yes")), tokenizer, 1000, progress=False)
    assert [piece.strip() for piece in supervised_pieces(rows[0], tokenizer)] == ["yes</s>"]


@pytest.mark.parametrize(("template", "marks"), [(LLAMA3, 1), (TEMPLATES["mistral"], 1), (CHATML, 0), (None, 1)])
def test_there_is_at_most_one_begin_mark(template, marks):
    tokenizer = make_tokenizer("sentencepiece", template)
    rows, _ = tokenize_dataset(dataset_of(turns("Hello", "yes")), tokenizer, 1000, progress=False)
    assert rows[0]["input_ids"].count(tokenizer.bos_token_id) == marks


@pytest.mark.parametrize("limit", [9, 12, 15, 16, 20])
def test_a_cut_row_is_the_start_of_the_whole_row(limit):
    tokenizer = make_tokenizer()
    whole, _ = tokenize_dataset(dataset_of(CONVERSATION), tokenizer, 1000, progress=False)
    try:
        cut, report = tokenize_dataset(dataset_of(CONVERSATION), tokenizer, limit, progress=False)
    except UserError:
        assert all(label == -100 for label in whole[0]["labels"][:limit])
        return
    assert cut[0]["input_ids"] == whole[0]["input_ids"][:limit]
    assert cut[0]["labels"] == whole[0]["labels"][:limit]
    assert cut[0]["length"] == limit
    assert report.truncated == 1


def test_dropped_rows_are_counted_by_reason_and_the_others_stay_in_order():
    conversations = [
        turns("Hello", "one"),
        turns("Hello"),
        [],
        turns("Hello " * 100, "too late"),
        [{"role": "system", "content": "Be brief."}, *turns("Hello", "Hi")],
        turns("Hello", "end</s>mark"),
        turns("Hello", "two"),
    ]
    tokenizer = make_tokenizer(template=TEMPLATES["mistral"])
    rows, report = tokenize_dataset(dataset_of(*conversations), tokenizer, 60, progress=False)
    assert [supervised_pieces(row, tokenizer) for row in rows] == [["one</s>"], ["two</s>"]]
    assert report.dropped == {
        "no assistant's turn": 2,
        "no supervised token within max_seq_length": 1,
        "refused by the chat template: Only user and assistant roles are supported!": 1,
        "a content spells out a control token of the chat": 1,
    }
    assert (report.rows_read, report.rows_kept) == (7, 2)
    assert report.tokens == sum(rows["length"])
    assert report.supervised_tokens == sum(label != -100 for labels in rows["labels"] for label in labels)


def test_no_row_left_is_an_error_that_gives_the_reasons():
    with pytest.raises(UserError, match=r"no row is left .* dropped 1: no assistant's turn"):
        tokenize_dataset(dataset_of(turns("Hello")), make_tokenizer(), 100, progress=False)


def test_several_processes_give_the_same_rows():
    conversations = dataset_of(*[turns(f"Question {at}", f"Answer {at}") for at in range(1100)], turns("x"))
    alone = tokenize_dataset(conversations, make_tokenizer(), 100, progress=False)
    together = tokenize_dataset(conversations, make_tokenizer(), 100, num_proc=2, progress=False)
    assert alone[0].to_list() == together[0].to_list()
    assert alone[1] == together[1]


class EndsTheProcessThatUnpicklesIt:
    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_process_is_an_error_and_not_a_hang():
    tokenizer = make_tokenizer()
    tokenizer.extra = EndsTheProcessThatUnpicklesIt()
    conversations = dataset_of(*[CONVERSATION] * 600)
    with pytest.raises(UserError, match="one of the 2 tokenization processes was killed"):
        tokenize_dataset(conversations, tokenizer, 100, num_proc=2, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seq_length": 0}, "max_seq_length: 0"),
        ({"num_proc": 0}, "num_proc: 0"),
        ({"chat_format": "tag"}, "did you mean 'tags'"),
        ({"dataset": Dataset.from_list([{"text": "x"}])}, "expected a column 'messages'; there are 'text'"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    defaults = {"dataset": dataset_of(CONVERSATION), "tokenizer": make_tokenizer(), "max_seq_length": 100}
    with pytest.raises(UserError, match=message):
        tokenize_dataset(**(defaults | arguments), progress=False)


def test_a_slow_tokenizer_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(UserError, match="SlowTokenizer is a slow tokenizer"):
        tokenize_dataset(dataset_of(CONVERSATION), SlowTokenizer(), 100, progress=False)


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    tokenize_dataset(dataset_of(CONVERSATION), tokenizer, 20, progress=False)
    assert tokenizer.backend_tokenizer.to_str() == before


class TestCache:
    def tokenize(self, folder, tokenizer=None, conversations=(CONVERSATION,), **arguments):
        arguments = {"max_seq_length": 100, "progress": False} | arguments
        return tokenize_dataset(
            dataset_of(*conversations), tokenizer or make_tokenizer(), cache_dir=folder, **arguments
        )

    def test_a_second_call_reads_what_the_first_wrote(self, tmp_path, monkeypatch):
        first = self.tokenize(tmp_path)
        monkeypatch.setattr(ConversationEncoder, "encode", None)
        second = self.tokenize(tmp_path)
        assert first[0].to_list() == second[0].to_list()
        assert first[1] == second[1]
        assert len(list(tmp_path.iterdir())) == 2

    def test_the_tokenizers_passing_settings_do_not_matter(self, tmp_path):
        self.tokenize(tmp_path)
        tokenizer = make_tokenizer()
        tokenizer("some text", truncation=True, max_length=3)
        self.tokenize(tmp_path, tokenizer)
        assert len(list(tmp_path.glob("*.arrow"))) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"max_seq_length": 99},
            {"chat_format": "tags"},
            {"tokenizer": make_tokenizer(template=LLAMA3)},
            {"tokenizer": make_tokenizer("sentencepiece")},
            {"tokenizer": make_tokenizer(eos_token="<|im_end|>")},
            {"conversations": [turns("Hello", "Hi")]},
        ],
    )
    def test_whatever_changes_the_result_makes_a_new_entry(self, tmp_path, change):
        self.tokenize(tmp_path)
        self.tokenize(tmp_path, **change)
        assert len(list(tmp_path.glob("*.arrow"))) == 2

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record", "old record"])
    def test_a_damaged_entry_is_made_again_with_a_warning(self, tmp_path, caplog, damage):
        caplog.set_level(logging.WARNING)
        expected = self.tokenize(tmp_path)[0].to_list()
        (arrow,), (record,) = tmp_path.glob("*.arrow"), tmp_path.glob("*.json")
        content = arrow.read_bytes()
        if damage == "flip":
            arrow.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
        elif damage == "cut":
            arrow.write_bytes(content[: len(content) // 2])
        elif damage == "remove":
            arrow.unlink()
        elif damage == "record":
            record.write_text('{"sha256": ')
        else:
            value = json.loads(record.read_text())
            value["report"]["other"] = 1
            record.write_text(json.dumps(value))
        assert self.tokenize(tmp_path)[0].to_list() == expected
        assert "damaged" in caplog.text
        caplog.clear()
        self.tokenize(tmp_path)
        assert not caplog.text

    def test_an_error_leaves_nothing_behind(self, tmp_path):
        with pytest.raises(UserError):
            self.tokenize(tmp_path, conversations=[turns("Hello")])
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lost", "said"), [(0, False), (1, True), (5, True), (6, "refused")])
def test_losing_a_tenth_of_the_rows_is_in_sight_and_losing_more_than_half_is_refused(caplog, lost, said):
    tokenizer = make_tokenizer("byte_level", TEMPLATES["mistral"])
    bad = [{"role": "system", "content": "x"}, {"role": "system", "content": "y"}]
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    dataset = Dataset.from_dict({"messages": [bad + good] * lost + [good] * (10 - lost)})
    if said == "refused":
        with pytest.raises(UserError, match=r"6 of 10 rows can't be trained on \(6: .*--max_dropped 0\.6"):
            tokenize_dataset(dataset, tokenizer, 64, max_dropped=0.5, progress=False)
        tokenize_dataset(dataset, tokenizer, 64, max_dropped=0.6, progress=False)
    else:
        tokenize_dataset(dataset, tokenizer, 64, max_dropped=0.5, progress=False)
    assert ("rows can't be trained on" in caplog.text) == bool(said)
