"""One HTML page that shows which layers a text used: tokens shaded by depth, and a map of layers by inputs.

The page holds its data, style and script, needs no network, and uses one scale of grey, so that it prints.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.io.errors import UserError
from utils.model.configuration_mod import report_key
from utils.model.costs import capacity_of, capacity_weights

TEMPLATE = Path(__file__).with_suffix(".html")


def read_inputs(path: str | Path) -> list[str]:
    """Return the inputs of a text file: its paragraphs, or the rows of a `.jsonl` file, whose strings are joined.

    Raises:
        UserError: there is no such file, it is not UTF-8 or JSON lines, or it holds no text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            inputs = ["\n".join(_contents(json.loads(line))) for line in text.splitlines() if line.strip()]
        else:
            inputs = [part.strip("\n") for part in re.split(r"\n\s*\n", text)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON lines: {error}") from None
    inputs = [part for part in inputs if part.strip()]
    if not inputs:
        raise UserError(f"{path}: no text")
    return inputs


@torch.inference_mode()
def route_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str],
    max_tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run each input by itself and note what its tokens executed.

    Args:
        model: a routed model.
        tokenizer: its tokenizer.
        inputs: texts; the first `max_tokens` tokens of each are read.
        progress: called after each input.

    Returns:
        What `render_report` takes: `layers` (where each has two routers, these by name), `routers_of_a_layer`,
        `granularity`, `level`, `depth`, `capacity`, and `inputs`, each with its `tokens` as text and its `gates`, a
        string of 0 and 1 (one character a router) for each token, or one.

    Raises:
        UserError: the routers decide on neither sequences nor tokens.
    """
    settings = model.mod_settings
    if settings.target == "expert":
        raise UserError(f"granularity {settings.granularity}: experts are chosen beside each other, not in depth")
    places = settings.places
    shown, executed, decisions = [], torch.zeros(len(places), dtype=torch.float64), 0
    for text in inputs:
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=max_tokens)
        input_ids = torch.tensor([encoded["input_ids"]], device=model.device)
        gates = model(input_ids, use_cache=False, logits_to_keep=1).router_gates[:, 0].cpu()
        gates = gates.reshape(len(places), -1)  # [routers, 1 or tokens]
        executed += gates.double().sum(dim=1)
        decisions += gates.shape[1]
        shown.append(
            {
                "tokens": _token_texts(text, encoded["offset_mapping"], encoded["input_ids"], tokenizer),
                "gates": ["".join(map(str, row)) for row in gates.T.int().tolist()],
            }
        )
        progress()
    shares = dict(zip(places, (executed / decisions).tolist(), strict=True))
    return {
        "layers": [report_key(place) for place in places],
        "routers_of_a_layer": len(settings.branches),
        "granularity": settings.granularity,
        "level": settings.level,
        "depth": model.config.num_hidden_layers,
        "capacity": capacity_of(shares, capacity_weights(model.config.to_dict(), settings)),
        "inputs": shown,
    }


def render_report(routed: dict[str, Any], checkpoint: str) -> str:
    """Return the page for what `route_inputs` found."""
    values = json.dumps(routed | {"checkpoint": checkpoint}, ensure_ascii=False)
    # inside a script element only `</script` and `<!--` mean something
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", values.replace("<", "\\u003c"))


def _token_texts(
    text: str, offsets: Sequence[tuple[int, int]], token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return what each token shows, so that together they are the text; a part of a character shows a mark."""
    shown, end = [], 0
    for (start, stop), token_id in zip(offsets, token_ids, strict=True):
        if start == stop:
            shown.append(tokenizer.convert_ids_to_tokens(token_id))
            continue
        shown.append(text[end:stop] or "\u00b7")
        end = max(end, stop)
    return shown


def _contents(value: Any) -> list[str]:
    """Return the texts of a row: of messages their contents, else every string."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _contents(item)]
    if isinstance(value, dict):
        if isinstance(value.get("messages"), list):
            return _contents([message["content"] for message in value["messages"]])
        return [text for item in value.values() for text in _contents(item)]
    return []
