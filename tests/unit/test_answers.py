"""Rows as generation has them, and which tokens of a row are learned from."""

import pytest
import torch
from model_zoo import make_pair, randomize_routers, texts
from transformers import GenerationConfig

from utils.model.generation import generation_by
from utils.pipeline.answers import SHORT_PROMPTS, answered, prompt_share, short_prompts
from utils.pipeline.batches import IGNORE_INDEX, SupervisedBatches


def row(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


def test_prompts_are_answered_as_the_dense_model_answers_each_alone():
    _, model = make_pair("llama", "block_token")
    randomize_routers(model, scale=0.7)
    prompts = [text.tolist() for text in texts((9, 4, 6))]
    ends = {model.generate(torch.tensor([prompts[1]]), route=False, max_new_tokens=3, do_sample=False)[0, -1].item()}
    made = answered(model, [row(prompt, [7, 7]) for prompt in prompts], ends, new_tokens=(6, 2))
    for prompt, got, limit in zip(sorted(prompts, key=len), made, (6, 2, 6), strict=True):
        alone = model.generate(
            torch.tensor([prompt]),
            route=False,
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
        )[0].tolist()
        assert got["input_ids"] == alone
        assert got["labels"] == [IGNORE_INDEX] * len(prompt) + alone[len(prompt) :]
        assert got["length"] == len(alone)
    assert len(made[0]["input_ids"]) <= 4 + 3


def test_what_a_models_files_say_of_generation_does_not_enter():
    _, model = make_pair("llama", "block_token")
    rows = [row(text.tolist(), [7]) for text in texts((5, 3))]
    expected = answered(model, rows, {199}, new_tokens=(4,))
    odd = {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 9.0, "cache_implementation": "static"}
    model.generation_config = own = GenerationConfig(**odd, return_dict_in_generate=True, suppress_tokens=[*range(90)])
    before = own.to_dict()
    assert answered(model, rows, {199}, new_tokens=(4,)) == expected
    with generation_by(model, do_sample=False), pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(torch.tensor([[5]]), max_new_tokens=-1)
    assert model.generation_config is own
    assert own.to_dict() == before


def test_the_shortest_prompts_are_taken_and_what_has_none_is_left_out():
    rows = [row([1] * length, [2]) for length in (5, 0, 3)]
    others = [row([1] * length, [2]) for length in range(4, 60)]
    lengths = [one["labels"].count(IGNORE_INDEX) for one in short_prompts(rows, others)]
    assert lengths == sorted(lengths)
    assert len(lengths) == SHORT_PROMPTS
    assert lengths[:3] == [3, 4, 5]
    assert short_prompts([row([], [2, 3])], ()) == [row([], [2, 3])]


def test_the_share_of_prompts_is_the_mean_over_rows():
    assert prompt_share([row([1], [2] * 3), row([1] * 3, [2])]) == 0.5
    assert prompt_share([row([1] * 3, [2])]) == 0.75
    assert prompt_share([row([], [2])]) == 0.5


def test_a_rows_first_supervised_token_counts_as_often_as_asked():
    def collate(features):
        return {"labels": torch.tensor(features)}

    labels = [[-100, -100, 5, 6, 7], [-100, 8, 9, -100, -100]]
    for every, expected in ((1, [5, 6, 7, 8, 9, 5, 8, 5, 8]), (2, [5, 7, 8, 5, 8, 5, 8])):
        batch = SupervisedBatches(collate, every, first=3)(labels)
        assert batch["targets"][batch["taught"]].tolist() == expected
