"""Tokenizer and model are checked against each other, and an answer ends where the chat template ends a turn."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from utils.data.chat_format import encode_prompt, ends_of_turn
from utils.io.errors import UserError
from utils.model.checkpoint import build_mod_checkpoint, load_tokenizer, make_settings, read_config
from utils.model.tokenizer_match import check_positions, end_generation_at, stop_tokens

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot|>{% endfor %}"
END_OF_TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
NO_MARK = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


@pytest.fixture
def model(tmp_path, smollm2_dir):
    """A tiny dense model with a tokenizer of 49152 tokens; returns its folder."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, eos_token_id=0
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, tmp_path / "base" / name)
    return tmp_path / "base"


def add_tokens(model, *tokens, template=None, **named):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens], **named})
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize(
    ("tokens", "named", "message"),
    [
        (["<|user|>"], {}, r"the token '<\|user\|>' with number 49152, and the model embeddings for 49152"),
        (["<|a|>", "<|b|>"], {}, r"'<\|a\|>' with number 49152 and 1 more,"),
        ([], {"pad_token": "[PAD]"}, r"the token '\[PAD\]' with number 49152,"),
    ],
)
def test_a_token_without_an_embedding_is_refused_when_a_checkpoint_is_built_and_loaded(model, tokens, named, message):
    settings = make_settings(read_config(model))
    build_mod_checkpoint(model, model.parent / "mod", settings)
    add_tokens(model, *tokens, **named)
    with pytest.raises(UserError, match=message):
        build_mod_checkpoint(model, model.parent / "other", settings)
    assert not (model.parent / "other").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, model.parent / "mod" / name)
    with pytest.raises(UserError, match=message):
        load_tokenizer(model.parent / "mod")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot|>"),
        (END_OF_TEXT, "<|endoftext|>"),
        (NO_MARK, None),
        ("{{ 1 / 0 }}", None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_behind_it(smollm2_dir, template, end):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"], "eos_token": "<|endoftext|>"})
    tokenizer.chat_template = template
    assert ends_of_turn(tokenizer) == ([] if end is None else [tokenizer.convert_tokens_to_ids(end)])
    tokenizer.chat_template = None
    assert ends_of_turn(tokenizer) == []


@pytest.mark.parametrize(
    ("generation", "stops"),
    [(None, [0, 2, 7]), ({"eos_token_id": 5, "top_k": 3}, [0, 2, 5, 7]), ({"eos_token_id": [7, 5]}, [0, 2, 5, 7])],
)
def test_an_answer_ends_at_what_model_tokenizer_and_template_name(model, generation, stops):
    path = model / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation:
        path.write_text(json.dumps(generation))
    tokenizer = load_tokenizer(model)
    assert tokenizer.eos_token_id == 2
    assert stop_tokens(model, tokenizer, [7]) == stops
    assert end_generation_at(model, stops)
    assert json.loads(path.read_text()) == {**(generation or {}), "eos_token_id": stops}
    assert not end_generation_at(model, stops)


@pytest.mark.parametrize("wrong", ["</s>", [1, "2"], {"a": 1}, 1.5])
def test_an_end_that_is_no_number_is_one_line(model, wrong):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is .* not a number or a list"):
        stop_tokens(model, load_tokenizer(model), [])


def test_a_template_that_refuses_a_system_message_is_one_line(smollm2_dir):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.chat_template = NO_SYSTEM
    messages = [{"role": role, "content": "x"} for role in ("system", "user")]
    assert encode_prompt(tokenizer, messages[1:])["input_ids"].shape[0] == 1
    with pytest.raises(UserError, match="refuses messages of system, user: System role not supported"):
        encode_prompt(tokenizer, messages)


def test_what_is_longer_than_the_model_has_positions_is_refused():
    check_positions({"max_position_embeddings": 8}, 8, "the prompt", "")
    check_positions({}, 8, "the prompt", "")
    with pytest.raises(UserError, match=r"the prompt: 9 tokens, and the model has 8 positions .*; shorten it"):
        check_positions({"max_position_embeddings": 8}, 9, "the prompt", "shorten it")
