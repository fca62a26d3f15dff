"""Collation, the order of batches, and the held-out split."""

import numpy as np
import pytest
import torch
from chat_tokenizers import make_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from utils.data.collation import SupervisedCollator
from utils.data.sampling import LengthGroupedSampler
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


class TestLengthGroupedSampler:
    LENGTHS = np.random.default_rng(0).integers(1, 500, 1003).tolist()

    def order(self, epoch=0, seed=0, batch_size=8):
        sampler = LengthGroupedSampler(self.LENGTHS, batch_size, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(self.LENGTHS)
        return list(sampler)

    def test_each_row_comes_once(self):
        assert sorted(self.order()) == list(range(1003))

    def test_the_order_follows_from_seed_and_epoch_alone(self):
        first = self.order(epoch=1)
        torch.manual_seed(5)
        np.random.seed(5)
        assert self.order(epoch=1) == first
        assert self.order(epoch=2) != first
        assert self.order(epoch=1, seed=1) != first

    def test_rows_of_a_batch_are_about_equally_long_and_batches_are_in_no_order(self):
        lengths = np.array(self.LENGTHS)[self.order()[:1000]].reshape(-1, 8)
        padding = 1 - lengths.sum() / (lengths.max(axis=1).sum() * 8)
        assert padding < 0.03
        assert lengths[0].sum() == lengths.sum(axis=1).max()
        assert abs(np.corrcoef(lengths[:-1].mean(axis=1), lengths[1:].mean(axis=1))[0, 1]) < 0.3

    @pytest.mark.parametrize("rows", [0, 1, 7, 8, 9])
    def test_few_rows_are_ordered_too(self, rows):
        assert sorted(LengthGroupedSampler([5] * rows, 8)) == list(range(rows))

    def test_a_resumed_run_sees_the_batches_of_the_run_it_continues(self, tmp_path):
        seen = []

        class Collator:
            def __call__(self, features):
                seen.append([feature["input_ids"][0] for feature in features])
                return SupervisedCollator(0)(features)

        class GroupingTrainer(Trainer):
            def _get_train_sampler(self, train_dataset=None):
                return LengthGroupedSampler(self.train_dataset["length"][:], batch_size=4, seed=self.args.seed)

        def train(**arguments):
            seen.clear()
            torch.manual_seed(0)
            sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
            config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, **sizes)
            settings = TrainingArguments(
                str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, save_steps=8, save_strategy="steps",
                use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            rows = [{"input_ids": [at] * (1 + at % 5), "labels": [at] * (1 + at % 5)} for at in range(24)]
            dataset = Dataset.from_list([row | {"length": len(row["labels"])} for row in rows])
            GroupingTrainer(LlamaForCausalLM(config), settings, train_dataset=dataset, data_collator=Collator()).train(
                **arguments
            )
            return list(seen)

        whole = train()
        assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))[-4:] == whole[8:]
        assert sorted(whole[:6]) != sorted(whole[6:])
