"""The shapes in which people keep conversations, told apart by the keys of a row: what can be read without doubt.

| keys | what |
|---|---|
| `messages` | turns with `role` and `content`, as chat APIs and transformers have them |
| `conversations` | turns with `from` and `value` (ShareGPT), or with `role` and `content` |
| `prompt`, `completion` | texts, or lists of turns |
| `instruction`, `output`, and perhaps `input` | Alpaca's |
| `query`, `response` | MetaMath's |

Anything else is named, not guessed at.
"""

from collections.abc import Callable
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
SENDERS = {
    **{"human": "user", "user": "user", "system": "system"},
    **dict.fromkeys(("gpt", "chatgpt", "bard", "assistant"), "assistant"),
}
"""Sender of a ShareGPT turn -> role."""


class BadRow(Exception):
    """A row that is not what its format promises.

    Args:
        reason: the name under which the report counts it.
        detail: what is wrong, for a person.
        byte: where in the row's own bytes, if that is known.
    """

    def __init__(self, reason: str, detail: str, byte: int = 0):
        super().__init__(detail)
        self.reason, self.detail, self.byte = reason, detail, byte


def kind(value: Any) -> str:
    """Return what a JSON value is, for a person."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def conversation_of(row: Any) -> list[Message]:
    """Return the messages of a row in one of the shapes above.

    Raises:
        BadRow: it is in none of them, or not what its keys promise.
    """
    if type(row) is not dict:
        raise BadRow("not_an_object", f"expected a JSON object, not {kind(row)}")
    for keys, convert in SHAPES.items():
        # a table such as parquet has the columns of all its rows in each
        if all(key in row for key in keys) and any(row[key] is not None for key in keys):
            return convert(row)
    there = ", ".join(map(repr, row)) or "no columns at all"
    raise BadRow(
        "missing_field",
        "expected a column 'messages', or 'prompt' and 'completion', or 'conversations', or 'instruction' and "
        f"'output'; there are {there:.200}",
    )


def with_input(instruction: str, extra: str) -> str:
    """Return an instruction of Alpaca's with its input, as the method's data has it."""
    return f"{instruction}\nInput: {extra}\n" if extra else instruction


def _turns(value: Any, key: str) -> list[Message]:
    if type(value) is not list:
        raise BadRow("not_a_list", f"{key!r} is {kind(value)}, not a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def _turn(turn: Any, number: int) -> Message:
    if type(turn) is not dict or not ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()):
        raise BadRow("not_an_object", f"turn {number} is not an object with 'role' and 'content'")
    if "role" in turn and "content" in turn:
        role, content, known = turn["role"], turn["content"], ROLES
    else:
        role, content, known = turn["from"], turn["value"], tuple(SENDERS)
    if type(role) is not str or role not in known:
        raise BadRow("unknown_sender", f"turn {number}: the role {role!r:.80} is not one of {', '.join(known)}")
    return {"role": SENDERS[role], "content": _content(content, number)}


def _content(content: Any, number: int) -> str:
    if type(content) is list and len(content) == 1 and type(content[0]) is dict and content[0].get("type") == "text":
        content = content[0].get("text")  # as chat APIs write a text that might have had images beside it
    if type(content) is not str:
        raise BadRow("not_a_string", f"turn {number}: the content is {kind(content)}, not a string")
    return content


def _side(value: Any, key: str, role: str) -> list[Message]:
    """Return a prompt or completion: a text of that role, or the turns that stand there."""
    number = 1 if role == "user" else 2
    return _turns(value, key) if type(value) is list else [{"role": role, "content": _content(value, number)}]


def _pair(question: str, answer: str) -> Callable[[dict[str, Any]], list[Message]]:
    return lambda row: _side(row[question], question, "user") + _side(row[answer], answer, "assistant")


def _alpaca(row: dict[str, Any]) -> list[Message]:
    instruction, extra, output = row["instruction"], row.get("input") or "", row["output"]
    for name, value in (("instruction", instruction), ("input", extra), ("output", output)):
        if type(value) is not str:
            raise BadRow("not_a_string", f"{name!r} is {kind(value)}, not a string")
    return [
        {"role": "user", "content": with_input(instruction, extra)},
        {"role": "assistant", "content": output},
    ]


SHAPES: dict[tuple[str, ...], Callable[[dict[str, Any]], list[Message]]] = {
    ("messages",): lambda row: _turns(row["messages"], "messages"),
    ("conversations",): lambda row: _turns(row["conversations"], "conversations"),
    ("prompt", "completion"): _pair("prompt", "completion"),
    ("instruction", "output"): _alpaca,
    ("query", "response"): _pair("query", "response"),
}
"""Keys of a row -> its messages; the first that fit are taken."""
FIRST_KEYS = tuple(dict.fromkeys(key for keys in SHAPES for key in keys))
"""Keys by which a reader finds the next row behind damage."""
