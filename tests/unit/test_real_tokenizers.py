"""Labels on the tokenizers of released models, against decoding and against encoding every prefix."""

import json
import subprocess
import sys
import zipfile
from functools import cache

import numpy as np
import pytest
from chat_tokenizers import LLAMA2, MISTRAL, prefix_mask, supervised_pieces, turns
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from model_zoo import make_base
from transformers import AutoTokenizer, LlamaTokenizer

from utils.data.tokenization import ConversationEncoder
from utils.model.checkpoint import build_mod_checkpoint
from utils.model.configuration_mod import MoDSettings

CONVERSATIONS = [
    turns("What is the capital of France?", "Paris.", "And of Japan?", "Tokyo 🗼, with 37 million people."),
    turns("", "I see an empty message.", "yes", "yes"),
    turns("Write code", "```python\ndef f(x):\n\treturn  x\n```\n\nDone.", "thanks\n\n", "👩‍👩‍👧 ¡De nada! 不客气"),
    turns("Hello", "", "Are you there?", "\u00a0Now I am.\u3000"),
    turns("<|user|>\n<|assistant|>", "Roles: [INST] <<SYS>> ### Response: assistant\n"),
]
TEXTS = st.one_of(st.text(max_size=60), st.text(alphabet=" \n\tab1.é😀", max_size=12))


@pytest.fixture(scope="module")
def smollm2(smollm2_dir):
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """The SentencePiece model of Mistral-7B v0.1, read by transformers.

    Only the file is taken out of its wheel: with the package installed transformers reads Mistral's models otherwise.
    """
    folder = tmp_path_factory.mktemp("mistral")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*download, "mistral-common==1.13.1"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / "tokenizer.model").write_bytes(archive.read("mistral_common/data/tokenizer.model.v1"))
    return LlamaTokenizer.from_pretrained(folder)


@cache
def encoder_for(tokenizer, template, chat_format):
    tokenizer.chat_template = template
    return ConversationEncoder(tokenizer, 10**6, chat_format)


def encode(tokenizer, messages, chat_format="template"):
    batch = encoder_for(tokenizer, tokenizer.chat_template, chat_format).encode([messages])
    assert not batch.dropped
    return {"input_ids": batch.input_ids[0].tolist(), "labels": batch.labels[0].tolist()}


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_smollm2_supervises_the_answers_to_the_letter(smollm2, messages):
    answers = [message["content"] + "<|im_end|>" for message in messages[1::2]]
    assert supervised_pieces(encode(smollm2, messages), smollm2) == answers


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_smollm2_labels_equal_those_of_encoding_every_prefix(smollm2, messages):
    mask = np.array(encode(smollm2, messages)["labels"]) != -100
    assert mask.tolist() == prefix_mask(smollm2, messages)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(TEXTS, min_size=2, max_size=4))
def test_smollm2_supervises_nothing_else_whatever_the_contents(smollm2, contents):
    # Its vocabulary lacks some control characters, and leaves them out without a word.
    assume(all(smollm2.decode(smollm2(text).input_ids) == text for text in contents))
    messages = turns(*contents)
    pieces = supervised_pieces(encode(smollm2, messages), smollm2)
    answers = [message["content"] + "<|im_end|>" for message in messages[1::2]]
    assert len(pieces) == len(answers)
    for piece, answer in zip(pieces, answers, strict=True):
        # White space that is one token with the new line before the turn is left out: the model is never asked for it.
        assert answer.endswith(piece)
        assert not answer.removesuffix(piece).strip()


@pytest.mark.parametrize("chat_format", ["template", "tags"])
@pytest.mark.parametrize("template", [MISTRAL, LLAMA2])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_mistral_supervises_the_answers(mistral, messages, template, chat_format):
    mistral.chat_template = template
    answers = [message["content"].strip() + "</s>" for message in messages[1::2]]
    pieces = supervised_pieces(encode(mistral, messages, chat_format), mistral)
    assert ["".join(piece.split()) for piece in pieces] == ["".join(answer.split()) for answer in answers]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(TEXTS, min_size=2, max_size=4))
def test_mistral_supervises_nothing_else_whatever_the_contents(mistral, contents):
    messages = turns(*contents)
    pieces = supervised_pieces(encode(mistral, messages, "tags"), mistral)
    answers = [message["content"].strip() + "</s>" for message in messages[1::2]]
    assert ["".join(piece.split()) for piece in pieces] == ["".join(answer.split()) for answer in answers]


def test_a_token_that_the_template_and_an_answer_share_is_not_supervised(mistral):
    mistral.chat_template = MISTRAL
    row = encode(mistral, turns("Smile", ";) :-)"))
    assert mistral.convert_ids_to_tokens(row["input_ids"])[-5:] == ["];", ")", "▁:", "-)", "</s>"]
    assert supervised_pieces(row, mistral) == [") :-)</s>"]


@pytest.mark.parametrize(
    ("arch", "released", "named"),
    [
        ("mistral", "mistral", "LlamaTokenizer"),
        ("mistral", "mistral", "LlamaTokenizerFast"),
        ("mistral", "smollm2", None),
        ("llama", "mistral", "LlamaTokenizer"),
        ("llama", "smollm2", "PreTrainedTokenizerFast"),
        ("qwen2", "smollm2", "Qwen2Tokenizer"),
        ("qwen3", "smollm2", "GPT2Tokenizer"),
    ],
)
def test_a_checkpoints_tokenizer_is_the_one_that_transformers_makes_of_its_base(
    request, tmp_path, arch, released, named
):
    base, mod = tmp_path / "base", tmp_path / "mod"
    released_tokenizer = request.getfixturevalue(released)
    make_base(arch, vocab_size=len(released_tokenizer)).save_pretrained(base)
    released_tokenizer.save_pretrained(base)
    fields = json.loads((base / "tokenizer_config.json").read_text())
    fields.pop("tokenizer_class", None)
    (base / "tokenizer_config.json").write_text(json.dumps(fields | ({"tokenizer_class": named} if named else {})))
    build_mod_checkpoint(base, mod, MoDSettings("attn_sequence", (1, 2)))
    expected, tokenizer = (
        AutoTokenizer.from_pretrained(base),
        AutoTokenizer.from_pretrained(mod, trust_remote_code=True),
    )
    assert type(tokenizer) is type(expected)
    assert tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    for text in ("Hello  world\n\n 12345 ünï", "▁x <s>[INST] a [/INST]</s>"):
        assert tokenizer(text) == expected(text)
