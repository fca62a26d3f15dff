"""Tell one base model from another by what it is: weights, configuration, tokenizer; never by what it is called.

Of the weights each tensor counts with name, dtype, shape and three samples of its numbers, wherever in whichever file
it lies. So a base is the same under another path, through a link, in other shards, and inside the MoD checkpoints that
are made of it; and one that was trained further is another one. Reading that of a 7B model takes well below a second.

What it does not do: find a change of single numbers between the samples.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from utils.io.errors import UserError
from utils.io.files import read_json

from .checkpoint import ADDED_NAME, UNITS_FIELD, read_config, weight_map

NOT_OF_THE_BASE = (
    *("model_type", "auto_map", "mod", UNITS_FIELD, "architectures", "transformers_version", "_name_or_path"),
    *("dtype", "torch_dtype", "use_cache"),  # of the weights each counts with its own
)
"""Fields of `config.json` that say who wrote it, or that it is a MoD checkpoint."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "chat_template*"),
    *("special_tokens_map.json", "added_tokens.json"),
)
TOKENIZER_CONFIG = "tokenizer_config.json"
"""It may have the template and the special tokens; the class that it names is another one in a MoD checkpoint."""
_SAMPLE = 1024  # bytes

Identity = dict[str, dict[str, Any]]


def identify_model(directory: str | Path) -> Identity:
    """Return what identifies a dense model or a MoD checkpoint.

    Args:
        directory: with `config.json` and safetensors weights.

    Returns:
        `weights` (tensor -> digest), `config` (field -> value), `tokenizer` (file -> digest, and the fields of its
        config) of the base, and `routing`, empty for a dense model: settings, and what is added to the weights.

    Raises:
        UserError: there is no model there, or a file of it is cut short.
    """
    directory = Path(directory)
    config = read_config(directory)
    places = weight_map(directory)
    weights, added = {}, {}
    for file in sorted(set(places.values())):
        for name, sample in _sampled(directory / file).items():
            if places.get(name) == file:
                (added if ADDED_NAME.match(name) else weights)[name] = sample
    if lost := sorted(places.keys() - weights.keys() - added.keys()):
        raise UserError(f"{directory}: {lost[0]} is not in {places[lost[0]]}, where the index has it")
    settings = {name: value for name, value in (config.get("mod") or {}).items() if name != "base_model"}
    files = sorted({path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)})
    fields = {name: value for name, value in config.items() if name not in NOT_OF_THE_BASE}
    tokenizer = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if (directory / TOKENIZER_CONFIG).is_file():
        of_file = read_json(directory / TOKENIZER_CONFIG)
        tokenizer |= {name: value for name, value in of_file.items() if name != "tokenizer_class"}
    return {
        "weights": weights,
        "config": fields | {"model_type": config["model_type"].removeprefix("mod_")},
        "tokenizer": tokenizer,
        "routing": settings | added,
    }


def digest(value: Any) -> str:
    """Return one hash for an identity, or a part of one."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def difference_of_bases(one: Identity, other: Identity) -> str | None:
    """Return what the first difference between two models' bases is of, None where they have the same base."""
    for part in ("config", "weights", "tokenizer"):
        for name in sorted(one[part].keys() | other[part].keys()):
            if one[part].get(name) != other[part].get(name):
                return f"{name} of its {part}"
    return None


def _sampled(path: Path) -> dict[str, str]:
    """Return tensor name -> digest of its dtype, shape, first, middle and last bytes; reads no more than these."""
    size = path.stat().st_size
    sampled = {}
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, size)))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                if end > size:
                    raise ValueError
                value = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
                for place in (start, (start + end) // 2, max(start, end - _SAMPLE)):
                    file.seek(place)
                    value.update(file.read(min(_SAMPLE, end - place)))
                sampled[name] = value.hexdigest()
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a whole safetensors file") from None
    return sampled
