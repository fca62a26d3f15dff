"""Render conversations as text and say which characters of it the assistant wrote.

Two formats: `template`, the tokenizer's own chat template, and `tags`, the plain `<|user|>` / `<|assistant|>` text that
the paper's experiments were trained with. Both answer with the text and the character spans of the assistant's turns,
each with its end mark (`<|im_end|>`, `</s>`, ...); `tokenization.py` turns the spans into labels.

How the spans of a template are found. A template is a program, so its text cannot be searched for the contents (a
content may occur twice, or be stripped). Instead the template is rendered once for each sequence of roles with a
unique sentinel in place of every content. What stands between the sentinels is the fixed text of the chat, and how
much of the white space around each sentinel is left says whether the template strips that content. Filling in the real
contents must then give, character for character, what the template renders for the real conversation: where it does,
the spans are exact, and where it does not, the conversation is refused.

What it does not do: templates whose text depends on a content beyond stripping it (Qwen3 moves `<think>` blocks about)
have those conversations refused, not guessed at; `{% generation %}` tags are not needed and not used; tools and
documents are not passed. A content that spells out one of the chat's control tokens is refused as well: the tokenizer
would read it as the real one, and a user could forge the assistant's turn, or an answer end in its middle.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from utils.io.errors import UserError, suggest

CHAT_FORMATS = ("template", "tags", "auto")
Message = dict[str, str]

# Stands for content number 3: _PROBE.format(3). str.strip() removes what is around the middle, str.strip("\n") only the
# new lines; no template writes a vertical tab or so many new lines of its own, so what is left tells the cases apart.
_PROBE = "\n" * 8 + "\x0b\ue0f0{}\ue0f1\x0b" + "\n" * 8
_PROBE_LEFT = re.compile("(\n{8})?(\x0b)?\ue0f0(\\d+)\ue0f1(\x0b)?(\n{8})?")


class RefusedConversationError(ValueError):
    """A conversation that cannot be trained on as it is; its message is the reason under which it is counted."""


@dataclass(frozen=True)
class RenderedChat:
    """One conversation as text.

    Attributes:
        text: what the tokenizer is to encode.
        spans: (start, end) in characters of each assistant turn, end mark included, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Turn:
    """Where one content goes in a skeleton: after `before`, stripped of `left` and `right` (None: left as it is)."""

    before: str
    index: int
    left: str | None
    right: str | None
    end_mark: int  # characters of the end mark that follow; 0 for turns that are not the assistant's


def resolve_chat_format(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `template` or `tags` for what the user asked for; `auto` takes the template where there is one.

    Raises:
        UserError: the name is unknown, or `template` was asked for and the tokenizer has none.
    """
    if chat_format not in CHAT_FORMATS:
        raise UserError(
            f"chat_format: {chat_format!r} is not one of {', '.join(CHAT_FORMATS)}{suggest(chat_format, CHAT_FORMATS)}"
        )
    if chat_format == "auto":
        return "template" if tokenizer.chat_template else "tags"
    if chat_format == "template" and not tokenizer.chat_template:
        raise UserError(
            f"chat_format 'template': the tokenizer {tokenizer.name_or_path!r} has no chat template; use 'tags'"
        )
    return chat_format


def make_chat_format(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> "TagsFormat | TemplateFormat":
    """Return the renderer for `chat_format`.

    Raises:
        UserError: the name is unknown, or the tokenizer cannot serve that format (its template has no end mark, ...).
    """
    resolved = resolve_chat_format(chat_format, tokenizer)
    return TagsFormat(tokenizer) if resolved == "tags" else TemplateFormat(tokenizer)


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token by which the chat template ends an assistant's turn; none where it has no single one."""
    if not tokenizer.chat_template:
        return []
    try:
        mark = TemplateFormat(tokenizer).end_mark
    except UserError:  # nothing can be trained on it
        return []
    return [tokenizer.convert_tokens_to_ids(mark)] if mark in tokenizer.get_vocab() else []


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> BatchEncoding:
    """Return a conversation that the assistant is to continue as `input_ids`, int64 [1, tokens].

    Raises:
        UserError: the chat template refuses it, as some do a system message.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    except Exception as error:  # a template is a program: there is nothing that it can't raise
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} refuses messages of {roles}: {_reason(error)}"
        ) from None


class TagsFormat:
    """The text of the paper's experiments, after open-instruct: `<|role|>` and the stripped content, each on a line.

    `<|user|>\\n{content}\\n<|assistant|>\\n{content}{eos}\\n`, with `<|system|>` the same way and no new line at the
    end of the whole. The tags are ordinary text, so a content that contains them changes nothing in the labels. The
    tokenizer's own begin mark is added. Unlike there, the new line between an end mark and the next turn is not
    supervised: a model that has ended its turn does not write it.
    """

    name = "tags"
    add_special_tokens = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.eos_token:
            raise UserError(
                f"chat_format 'tags': the tokenizer {tokenizer.name_or_path!r} has no eos_token to end the assistant's "
                "turns with; set it or use 'template'"
            )
        self.end_mark = tokenizer.eos_token
        self._control_tokens = _control_token_pattern(tokenizer, self.end_mark)

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Render one conversation.

        Raises:
            RefusedConversationError: a content spells out a control token.
        """
        _refuse_control_tokens(messages, self._control_tokens)
        text, spans = "", []
        for message in messages:
            text += f"<|{message['role']}|>\n"
            start = len(text)
            text += message["content"].strip()
            if message["role"] == "assistant":
                text += self.end_mark
                spans.append((start, len(text)))
            text += "\n"
        return RenderedChat(text.rstrip(), tuple(spans))

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render a conversation up to where the assistant begins its answer; raises as `render`."""
        chat = self.render([*messages, {"role": "assistant", "content": ""}])
        return chat.text[: chat.spans[-1][0]]


class TemplateFormat:
    """The tokenizer's own chat template; it writes the begin mark itself, so the tokenizer must not add one."""

    name = "template"
    add_special_tokens = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as error:
            names = ", ".join(tokenizer.chat_template or ())
            raise UserError(
                f"chat_format 'template': none of the chat templates of {tokenizer.name_or_path!r} ({names}) is called "
                "'default'; set tokenizer.chat_template or use 'tags'"
            ) from error
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        end_marks = sorted({mark for mark in [*added, tokenizer.eos_token] if mark and mark.strip()}, key=len)
        self._end_mark = re.compile(r"\s*(?:" + "|".join(re.escape(mark) for mark in reversed(end_marks)) + ")")
        self._skeletons: dict[tuple[str, ...], tuple[list[_Turn], str]] = {}
        try:
            turns, tail = self._skeleton(("user", "assistant"))
            self.end_mark = tail[: turns[-1].end_mark].strip()
        except RefusedConversationError as error:
            raise UserError(
                f"chat_format 'template': cannot train on the chat template of {tokenizer.name_or_path!r} ({error}); "
                "use 'tags'"
            ) from error
        fixed = "".join(turn.before for turn in turns) + tail
        self.end_mark = tail[: turns[-1].end_mark].strip()
        self._control_tokens = _control_token_pattern(tokenizer, self.template + fixed)

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Render one conversation.

        Raises:
            RefusedConversationError: the template refuses its roles, or changes a content other than by stripping it,
                or a content spells out a control token.
        """
        _refuse_control_tokens(messages, self._control_tokens)
        text = self._apply(messages)
        roles = tuple(message["role"] for message in messages)
        spans = self._fill(roles, messages, text)
        if spans is None and self._skeletons.pop(roles, None):
            # A template may write today's date: a skeleton from before midnight is made afresh, once.
            spans = self._fill(roles, messages, text)
        if spans is None:
            raise RefusedConversationError("the chat template changes a content, so its place in the text is not known")
        return RenderedChat(text, spans)

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render a conversation up to where the assistant begins its answer; raises as `render`."""
        _refuse_control_tokens(messages, self._control_tokens)
        return self._apply(messages, add_generation_prompt=True)

    def _fill(
        self, roles: tuple[str, ...], messages: Sequence[Message], text: str
    ) -> tuple[tuple[int, int], ...] | None:
        """Return the assistant's spans in `text`, or None where skeleton and contents do not give `text`."""
        turns, tail = self._skeleton(roles)
        pieces, spans, position = [], [], 0
        for turn in turns:
            content = messages[turn.index]["content"]
            content = content if turn.left is None else content.lstrip(turn.left or None)
            content = content if turn.right is None else content.rstrip(turn.right or None)
            pieces += [turn.before, content]
            start = position + len(turn.before)
            position = start + len(content)
            if turn.end_mark:
                spans.append((start, position + turn.end_mark))
        return tuple(spans) if "".join(pieces) + tail == text else None

    def _skeleton(self, roles: tuple[str, ...]) -> tuple[list[_Turn], str]:
        """Return the fixed text around the contents of a conversation with these roles, and the text after the last."""
        if roles not in self._skeletons:
            if len(self._skeletons) >= 4096:
                self._skeletons.clear()
            self._skeletons[roles] = self._build_skeleton(roles)
        return self._skeletons[roles]

    def _build_skeleton(self, roles: tuple[str, ...]) -> tuple[list[_Turn], str]:
        text = self._apply([{"role": role, "content": _PROBE.format(index)} for index, role in enumerate(roles)])
        turns, position = [], 0
        for match in _PROBE_LEFT.finditer(text):
            index, end = int(match[3]), match.end()
            left = None if match[1] else "\n" if match[2] else ""
            right = None if match[5] else "\n" if match[4] else ""
            end_mark = 0
            if roles[index] == "assistant":
                mark = self._end_mark.match(text, end)
                if mark is None:
                    raise RefusedConversationError(
                        "no control token follows the assistant's turn in the chat template, so it has no end mark"
                    )
                end_mark = mark.end() - end
            turns.append(_Turn(text[position : match.start()], index, left, right, end_mark))
            position = end
        found = sorted(turn.index for turn in turns if turn.end_mark)
        if found != [index for index, role in enumerate(roles) if role == "assistant"]:
            raise RefusedConversationError("the chat template leaves out or repeats an assistant's turn")
        return turns, text[position:]

    def _apply(self, messages: Sequence[Message], **options: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, **options
            )
        except Exception as error:  # a template is a program: there is nothing that it can't raise
            reason = _reason(error)
            raise RefusedConversationError(f"refused by the chat template: {reason}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _control_token_pattern(tokenizer: PreTrainedTokenizerBase, fixed_text: str) -> re.Pattern[str]:
    """Return a pattern for the special tokens that give the chat its structure: the named ones and those it writes."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named: Iterable[Any] = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    tokens = {token for token in named if token} | {token for token in special if token in fixed_text}
    tokens = {token for token in tokens if token.strip()}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _refuse_control_tokens(messages: Sequence[Message], control_tokens: re.Pattern[str]) -> None:
    for message in messages:
        if control_tokens.search(message["content"]):
            raise RefusedConversationError("a content spells out a control token of the chat")


def ends_of_answers(tokenizer: PreTrainedTokenizerBase, chat_format: str = "auto") -> set[int]:
    """Return the tokens that end an answer: the tokenizer's own end of text, and the chat's end of a turn.

    Raises:
        UserError: as `make_chat_format`.
    """
    mark = make_chat_format(chat_format, tokenizer).end_mark
    return {tokenizer.convert_tokens_to_ids(mark), tokenizer.eos_token_id} - {None}
