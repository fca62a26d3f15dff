"""What each raw dataset looks like and how one of its rows becomes `messages`: one table, one converter per format.

The texts are those of the method's data, byte for byte: nothing is stripped, reordered or merged. A converter knows
nothing of files; it takes one parsed row and returns its messages, or raises `Dropped` (the method leaves such rows
out) or `BadRow` (the row is not what the format promises). Reading is in `readers.py`, counting in `reformat.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from utils.data.shapes import FIRST_KEYS, BadRow, Message, conversation_of, kind, with_input
from utils.io.errors import suggest


class Dropped(Exception):
    """A sound row that the method leaves out; `reason` is its name in the report."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Source:
    """One raw dataset.

    Args:
        name: its folder under `data/raw` and `data/reformatted`, and its name on the command line.
        dataset: the field `dataset` of its rows and the prefix of their ids.
        file: what the data file of its hub repository is called (parquet shards are found by themselves).
        fields: the keys of a row; a reader that lost its place in a damaged array looks for them.
        convert: from a parsed row to its messages.
    """

    name: str
    dataset: str
    file: str
    fields: tuple[str, ...]
    convert: Callable[[Any], list[Message]]


_USER = {"human": "user", "user": "user"}
_ASSISTANT = dict.fromkeys(("gpt", "chatgpt", "bard", "assistant"), "assistant")
_SYSTEM = {"system": "system"}


def _conversation(roles: Mapping[str, str], left_out: tuple[str, ...] = ()) -> Callable[[Any], list[Message]]:
    """Make the converter for rows that hold `conversations: [{from, value}, ...]`.

    Args:
        roles: role of each sender.
        left_out: senders whose rows the method drops; the first of them ends the row, whatever follows.
    """

    def convert(row: Any) -> list[Message]:
        turns = _field(row, "conversations")
        if type(turns) is not list:
            raise BadRow("not_a_list", f"'conversations' is {kind(turns)}, not a list")
        messages = []
        for number, turn in enumerate(turns):
            try:
                sender = turn["from"]
                role = roles.get(sender)
                if role is None:
                    raise _unknown(sender, number, roles, left_out)
                content = turn["value"]
            except (KeyError, TypeError):
                raise _bad_turn(turn, number) from None
            if type(content) is not str:
                raise BadRow("not_a_string", f"'value' of turn {number} is {kind(content)}, not a string")
            messages.append({"role": role, "content": content})
        if not messages:
            raise Dropped("no_turns")
        return messages

    return convert


def _unknown(sender: str, number: int, roles: Mapping[str, str], left_out: tuple[str, ...]) -> Exception:
    if sender in left_out:
        return Dropped(f"{sender}_turn")
    known = [*roles, *left_out]
    near = suggest(sender, known) if type(sender) is str else ""
    return BadRow("unknown_sender", f"turn {number} is from {sender!r:.80}{near}; known senders: {', '.join(known)}")


def _bad_turn(turn: Any, number: int) -> BadRow:
    if type(turn) is not dict:
        return BadRow("not_an_object", f"turn {number} is {kind(turn)}, not an object")
    missing = [key for key in ("from", "value") if key not in turn]
    if missing:
        return BadRow("missing_field", f"turn {number} has no {missing[0]!r}")
    return BadRow("unknown_sender", f"'from' of turn {number} is {kind(turn['from'])}, not a string")


def _question(prompt: str, answer: str) -> Callable[[Any], list[Message]]:
    """Make the converter for rows of one question and one answer, held in the fields `prompt` and `answer`."""

    def convert(row: Any) -> list[Message]:
        return [
            {"role": "user", "content": _text(row, prompt)},
            {"role": "assistant", "content": _text(row, answer)},
        ]

    return convert


def _alpaca(row: Any) -> list[Message]:
    question = with_input(_text(row, "instruction"), _text(row, "input"))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]


def _field(row: Any, key: str) -> Any:
    if type(row) is not dict:
        raise BadRow("not_an_object", f"the row is {kind(row)}, not an object")
    if key not in row:
        raise BadRow("missing_field", f"no field {key!r} (there are: {', '.join(map(repr, list(row)[:8])) or 'none'})")
    return row[key]


def _text(row: Any, key: str) -> str:
    value = _field(row, key)
    if type(value) is not str:
        raise BadRow("not_a_string", f"{key!r} is {kind(value)}, not a string")
    return value


def _any_shape(row: Any) -> list[Message]:
    messages = conversation_of(row)
    if not messages:
        raise Dropped("no_turns")
    return messages


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="vicuna_sharegpt",
            dataset="ShareGPT_Vicuna_unfiltered",
            file="ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
            fields=("id", "conversations"),
            convert=_conversation({**_USER, **_ASSISTANT, **_SYSTEM}, left_out=("bing",)),
        ),
        Source(
            name="evol_instruct",
            dataset="WizardLM_evol_instruct_V2_143k",
            file="WizardLM_evol_instruct_V2_143k.json",
            fields=("idx", "conversations"),
            convert=_conversation({**_USER, **_ASSISTANT}, left_out=("system", "bing")),
        ),
        Source(
            name="slim_orca",
            dataset="SlimOrca",
            file="oo-labeled_correct.gpt4.sharegpt.jsonl",
            fields=("conversations",),
            convert=_conversation({**_USER, **_ASSISTANT, **_SYSTEM}),
        ),
        Source(
            name="meta_math_qa",
            dataset="MetaMathQA",
            file="MetaMathQA-395K.json",
            fields=("type", "query", "original_question", "response"),
            convert=_question("query", "response"),
        ),
        Source(
            name="evol_code_alpaca",
            dataset="evol_codealpaca_v1",
            file="train.jsonl",
            fields=("instruction", "output"),
            convert=_question("instruction", "output"),
        ),
        Source(
            name="alpaca",
            dataset="alpaca",
            file="alpaca_data.json",
            fields=("instruction", "input", "output", "text"),
            convert=_alpaca,
        ),
        Source(name="generic", dataset="generic", file="data.jsonl", fields=FIRST_KEYS, convert=_any_shape),
    )
}
