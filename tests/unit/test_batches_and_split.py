"""Collation and the held-out split."""

import numpy as np
import pytest
import torch
from chat_tokenizers import make_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from utils.data.collation import SupervisedCollator
from utils.data.splitting import split_held_out
from utils.io.errors import UserError

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3},
    {"input_ids": np.array([8], dtype=np.int32), "labels": torch.tensor([8])},
]


def test_rows_are_padded_on_the_right_and_masked():
    batch = SupervisedCollator(pad_token_id=9)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert list(batch) == ["input_ids", "attention_mask", "labels"]


@pytest.mark.parametrize(("multiple", "length"), [(None, 3), (1, 3), (3, 3), (4, 4), (8, 8)])
def test_the_length_is_a_multiple_where_asked(multiple, length):
    assert SupervisedCollator(0, multiple)(ROWS)["labels"].shape == (2, length)


def test_a_multiple_below_one_is_an_error():
    with pytest.raises(UserError, match="pad_to_multiple_of: 0"):
        SupervisedCollator(0, 0)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token_and_is_not_changed():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    assert SupervisedCollator.for_tokenizer(tokenizer).pad_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token is None
    assert len(tokenizer) == size
    assert SupervisedCollator.for_tokenizer(make_tokenizer(pad_token="<unk>")).pad_token_id == 0
    with pytest.raises(UserError, match="neither a pad_token nor an eos_token"):
        SupervisedCollator.for_tokenizer(make_tokenizer(eos_token=None))


def conversations(texts):
    return Dataset.from_list(
        [{"id": str(at), "messages": [{"role": "user", "content": text}]} for at, text in enumerate(texts)]
    )


def test_the_split_is_the_same_everywhere():
    train, held_out = split_held_out(conversations(map(str, range(20))), num_rows=5, seed=233)
    assert held_out["id"][:] == ["3", "5", "7", "14", "15"]
    assert len(train) == 15


def test_the_split_follows_from_the_texts_and_not_from_their_places():
    texts = [str(at) for at in range(50)]

    def held_out_texts(texts):
        _, held_out = split_held_out(conversations(texts), fraction=0.3, seed=1)
        return {messages[0]["content"] for messages in held_out["messages"]}

    assert held_out_texts(texts) == held_out_texts(texts[::-1])
    assert len(held_out_texts(texts)) == 15


@given(
    texts=st.lists(st.sampled_from("abcdefgh"), min_size=3, max_size=40),
    wanted=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_no_text_is_on_both_sides_and_none_is_lost(texts, wanted, seed):
    try:
        train, held_out = split_held_out(conversations(texts), num_rows=wanted, seed=seed)
    except UserError:
        return
    sides = [{messages[0]["content"] for messages in side["messages"]} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert sorted([*train["id"], *held_out["id"]], key=int) == [str(at) for at in range(len(texts))]
    assert len(held_out) <= wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a number of rows or a fraction"),
        ({"num_rows": 1, "fraction": 0.1}, "either a number of rows or a fraction"),
        ({"num_rows": 4}, "cannot hold out 4 of 3 rows"),
        ({"num_rows": -1}, "cannot hold out -1 of 3 rows"),
        ({"fraction": 1.5}, "the fraction 1.5 is not between 0 and 1"),
        ({"num_rows": 3}, "leaves none to train on"),
    ],
)
def test_a_split_that_cannot_be_is_an_error(arguments, message):
    with pytest.raises(UserError, match=message):
        split_held_out(conversations("abc"), **arguments)
