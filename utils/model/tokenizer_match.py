"""Whether a tokenizer and a model go together: tokens and embeddings, the ends of turns, lengths and positions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.io.errors import UserError
from utils.io.files import read_json, write_json


def check_vocabulary(directory: str | Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for.

    Args:
        directory: that both are in, for the message.
        config: the model's `config.json`.

    Raises:
        UserError: names the first such token.
    """
    rows = config.get("vocab_size")
    if type(rows) is not int:  # what is wrong with it is said where the model is made
        return
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise UserError(
            f"{directory}: its tokenizer has the token {token!r} with number {number}{more}, and the model embeddings "
            f"for {rows} (vocab_size): take the tokenizer that belongs to it, or give the model rows for them "
            "(resize_token_embeddings of transformers)"
        )


def stop_tokens(directory: str | Path, tokenizer: PreTrainedTokenizerBase, ends_of_turn: Iterable[int]) -> list[int]:
    """Return the numbers of all tokens at which an answer ends: the model's, the tokenizer's, the template's.

    Args:
        directory: with `config.json` and perhaps `generation_config.json`.
        ends_of_turn: tokens by which the chat template ends an assistant's turn.

    Raises:
        UserError: a file says something else than numbers.
    """
    found = {*ends_of_turn, tokenizer.eos_token_id} - {None}
    for name in ("generation_config.json", "config.json"):
        named = _read(Path(directory) / name).get("eos_token_id")
        numbers = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(number) is int for number in numbers):
            raise UserError(f"{Path(directory) / name}: eos_token_id is {named!r}, not a number or a list of numbers")
        found |= set(numbers)
    return sorted(found)


def end_generation_at(directory: str | Path, stops: list[int]) -> bool:
    """Have plain `generate` of transformers end at these tokens; returns whether that changed a file.

    What `generation_config.json` says else is left as it is; without one it is made.
    """
    path = Path(directory) / "generation_config.json"
    config = _read(path)
    named = config.get("eos_token_id")
    if set(stops) <= set(named if isinstance(named, list) else [named]):
        return False
    write_json(path, config | {"eos_token_id": stops})
    return True


def check_positions(config: dict[str, Any], tokens: int, what: str, way_out: str) -> None:
    """Refuse texts that are longer than a model has positions.

    Args:
        config: the model's `config.json`.
        tokens: number of tokens of the longest text.
        what: the text, for the message.
        way_out: what to do, for the message.

    Raises:
        UserError: they are.
    """
    limit = config.get("max_position_embeddings")
    if limit is not None and tokens > limit:
        raise UserError(
            f"{what}: {tokens} tokens, and the model has {limit} positions (max_position_embeddings); {way_out}"
        )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
