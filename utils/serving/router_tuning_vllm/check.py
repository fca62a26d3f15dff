"""Whether a checkpoint can be served: what can be told from its files, before an engine is started. Needs no vLLM."""

import json
from pathlib import Path
from typing import Any

from . import ARCHITECTURES
from .routing import Routing

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


class CheckpointProblem(ValueError):
    """Why a checkpoint can't be served, in one line that names the way out."""


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointProblem(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointProblem(f"{path}: not a JSON object")
    return values


def check_checkpoint(directory: str | Path) -> Routing:
    """Return what a checkpoint routes, if it can be served.

    Raises:
        CheckpointProblem: it can't.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointProblem(f"{directory}: no such directory; give the output directory of a training")
    if not (directory / "config.json").is_file():
        raise CheckpointProblem(f"{directory}: not a checkpoint, it has no config.json")
    config = _read(directory / "config.json")
    model_type = str(config.get("model_type"))
    if not model_type.startswith("mod_"):
        raise CheckpointProblem(
            f"{directory}: model type {model_type!r} is a dense model's, which vLLM serves as it is; routed ones come "
            "from finetune_mod.sh or build_mod_checkpoint.py"
        )
    if model_type not in ARCHITECTURES:
        raise CheckpointProblem(
            f"{directory}: model type {model_type!r} is not served (mixtures of experts are not); served are "
            f"{', '.join(ARCHITECTURES)}; generate.py runs the others"
        )
    if (directory / "adapter_config.json").is_file():
        raise CheckpointProblem(
            f"{directory}: holds a LoRA adapter that is not merged: build_mod_checkpoint.py --folder_name merged-mod "
            f"--merge_lora {directory} makes ckpt/merged-mod, which can be served"
        )
    if config.get("quantization_config"):
        raise CheckpointProblem(f"{directory}: quantized weights are not served; serve the unquantized checkpoint")
    try:
        routing = Routing.from_config(config.get("mod"), config["num_hidden_layers"], config["hidden_size"])
    except KeyError as error:
        raise CheckpointProblem(f"{directory}/config.json: lacks {error.args[0]}") from None
    except ValueError as error:
        raise CheckpointProblem(f"{directory}/config.json: {error}") from None
    _check_weights(directory, routing)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tekken.json")):
        raise CheckpointProblem(f"{directory}: has no tokenizer; copy its base's tokenizer files into it")
    return routing


def _check_weights(directory: Path, routing: Routing) -> None:
    if (directory / INDEX_FILE).is_file():
        places = _read(directory / INDEX_FILE).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointProblem(f"{directory / INDEX_FILE}: has no weight_map")
        lost = sorted(name for name in set(places.values()) if not (directory / name).is_file())
        if lost:
            raise CheckpointProblem(
                f"{directory}: {INDEX_FILE} names {lost[0]}, which is not there (a link whose target is gone?); "
                "--save_base copy of the training makes outputs that can be moved"
            )
        names = set(places)
    elif (directory / SINGLE_FILE).is_file():
        names = _names_in(directory / SINGLE_FILE)
    else:
        raise CheckpointProblem(f"{directory}: has neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors are served")
    wanted = [name for place in routing.places for name in place.weights]
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointProblem(
            f"{directory}: lacks {missing[0]}, which config.json promises; train it, or copy it anew"
        )


def _names_in(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file: its header is JSON after eight bytes of length."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError, MemoryError, OverflowError):
        raise CheckpointProblem(f"{path}: damaged, not a safetensors file; copy it anew") from None
    return set(header)
