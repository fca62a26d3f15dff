"""Small real tokenizers, chat templates of the common families, and slow ways to check labels."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What is the capital of France? The capital of France is Paris, and it is a large city.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "Write a short poem about the sea.\nThe sea is wide, the sea is deep,\nit sings the sailors all to sleep.",
    "Übermäßig schöne Grüße aus Köln; naïve café, ¡señor!",
    "system user assistant You are a helpful assistant. Hello, how are you? I am fine, thanks. yes no ok",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>", "<|eot|>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# SmolLM2 and Qwen2 write a system turn of their own where there is none.
CHATML_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
# Llama-3: begin mark in the text, contents stripped.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start|>' + message['role'] + '<|sep|>\n\n' + "
    "message['content'] | trim + '<|eot|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
)
# Llama-2: the system turn goes into the first user's, joined before stripping; roles must alternate.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Mistral: no system role, contents as they are, nothing between a user's mark and the answer.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Vicuna: fixed text that ends with a space before the answer, and no control token but the end mark.
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
)
# Qwen3: strips new lines only, empties the thinking of earlier turns, adds an empty thinking block to the last.
QWEN3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% set content = message.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# With the tags that mark what the model writes.
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml_default_system": CHATML_DEFAULT_SYSTEM,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "vicuna": VICUNA,
    "qwen3": QWEN3,
    "generation": GENERATION,
}


@cache
def _byte_level() -> str:
    """A byte-level BPE as in GPT-2, SmolLM2, Qwen and Llama-3; its offsets leave out the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer.to_str()


@cache
def _sentencepiece() -> str:
    """A SentencePiece BPE as in Llama-2 and Mistral: spaces become part of the words, other bytes fall back."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = sorted({character for sentence in SENTENCES for character in sentence} - {" ", "\n"})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=[*SPECIAL, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator([sentence.replace("\n", " ") for sentence in SENTENCES * 4], trainer)
    tokenizer.pre_tokenizer = None
    # The bytes are ordinary tokens of the model, not control tokens.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return tokenizer.to_str()


KINDS = {"byte_level": _byte_level, "sentencepiece": _sentencepiece}


def make_tokenizer(
    kind: str = "byte_level", template: str | None = CHATML, **marks: str | None
) -> PreTrainedTokenizerFast:
    """Return a fresh tokenizer of one of `KINDS` with that chat template."""
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | marks
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(KINDS[kind]()), **marks)
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def supervised_pieces(row, tokenizer) -> list[str]:
    """Decode each run of supervised tokens."""
    runs, last = [], None
    for at, label in enumerate(row["labels"]):
        if label != -100:
            assert label == row["input_ids"][at]
            if last != at - 1:
                runs.append([])
            runs[-1].append(label)
            last = at
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def prefix_mask(tokenizer, messages) -> list[bool]:
    """The slow way: encode the conversation up to and with each answer, and count tokens."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    mask = [False] * len(ids(tokenizer.apply_chat_template(messages, tokenize=False)))
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
            through = tokenizer.apply_chat_template(messages[: at + 1], tokenize=False).removesuffix("\n")
            mask[len(ids(before)) : len(ids(through))] = [True] * (len(ids(through)) - len(ids(before)))
    return mask
