"""Build, save and load MoD checkpoints and router files (the layout is in the README, "Checkpoints").

A checkpoint is one directory: the base's `config.json` with the object `mod`, the base's weights (linked, not copied,
where the file system allows) as `base*.safetensors`, the routers alone as `routers.safetensors`, an index over both,
the tokenizer, and the `*_mod.py` files that let transformers load it without this repository; where skipped branches
have substitutes, these as `substitutes.safetensors`. The index is written last: a directory without it is not a
checkpoint.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from transformers import AutoConfig, AutoTokenizer, DynamicCache
from transformers.core_model_loading import revert_weight_conversion

from utils.io.errors import UserError
from utils.io.files import atomic_file, link_or_copy, read_json, write_json

from .base_models import read_index
from .configuration_mod import EXPERT_GRANULARITY, MoDSettings, Place, layer_of, module_name, routed_layers
from .lora import ADAPTER_FILES, Adapter, check_adapter, holds_adapter, merged_weights
from .modeling_mod import MoDLlamaForCausalLM, MoDMistralForCausalLM, MoDQwen2ForCausalLM, MoDQwen3ForCausalLM
from .modeling_moe_mod import (
    MoDDeepseekV2ForCausalLM,
    MoDMixtralForCausalLM,
    MoDOlmoeForCausalLM,
    MoDQwen2MoeForCausalLM,
)
from .quantized import refuse_quantized
from .substitute_mod import MoDSubstitute
from .tokenizer_match import check_vocabulary

logger = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": MoDLlamaForCausalLM,
    "mistral": MoDMistralForCausalLM,
    "qwen2": MoDQwen2ForCausalLM,
    "qwen3": MoDQwen3ForCausalLM,
    "olmoe": MoDOlmoeForCausalLM,
    "qwen2_moe": MoDQwen2MoeForCausalLM,
    "mixtral": MoDMixtralForCausalLM,
    "deepseek_v2": MoDDeepseekV2ForCausalLM,
}
"""Base model type -> routed model class."""

ROUTERS_FILE = "routers.safetensors"
SUBSTITUTES_FILE = "substitutes.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ROUTER_NAME = re.compile(r"^model\.layers\.(\d+)\.(?:attn_|mlp_)?router\.weight$")
SUBSTITUTE_NAME = re.compile(r"^model\.layers\.\d+\.(?:attn_|mlp_)?substitute\.\w+$")
ADDED_NAME = re.compile(f"{ROUTER_NAME.pattern}|{SUBSTITUTE_NAME.pattern}")
"""What a checkpoint has beside its base's weights."""
WHOLE_DTYPES = ("F32", "F16", "BF16", "F64")
UNITS_FIELD = "mod_units"
"""Field of `config.json` that keeps the units of the routers where `save_pretrained` writes them without a file."""
IGNORED_NAME = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old base checkpoints hold and transformers drops
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("generation_config.json", "LICENSE*", "NOTICE*"),
)
"""Files that go from base to checkpoint unchanged, but for the tokenizer's class (`_name_tokenizer_class`)."""


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return the `config.json` of a model directory.

    Raises:
        UserError: there is no such directory or file, or it is not JSON, or lacks what every decoder's has.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    path = directory / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{directory}: not a model directory, it has no config.json") from None
    model_class_for(config)
    for name in ("num_hidden_layers", "hidden_size"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise UserError(f"{path}: {name} is {config.get(name)!r}, not a whole number above 0")
    if is_mod(config) and not isinstance(config.get("mod"), dict):
        raise UserError(f"{path}: mod is {config.get('mod')!r}, not the object that says what is routed")
    return config


def is_mod(config: dict[str, Any]) -> bool:
    """Tell whether a `config.json` is a MoD checkpoint's."""
    return str(config.get("model_type", "")).startswith("mod_")


def model_class_for(config: dict[str, Any]) -> type:
    """Return the routed model class for a dense or MoD `config.json`; raises `UserError` for other architectures."""
    base_type = str(config.get("model_type", "")).removeprefix("mod_")
    if base_type not in ARCHITECTURES:
        raise UserError(f"model type {base_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[base_type]


def make_settings(
    config: dict[str, Any],
    mod_n: int | None = None,
    granularity: str | None = None,
    threshold: float | None = None,
    target_capacity: float | None = None,
    base_model: str | None = None,
) -> MoDSettings:
    """Return the settings for a model, from its `config.json` and from whatever is given here instead.

    Args:
        config: a dense model's or a MoD checkpoint's `config.json`; what a dense one lacks is the paper's default:
            half of the layers, `attn_sequence`, threshold 0.5.
        mod_n: number of routed layers, counted from the deepest but one.

    Raises:
        UserError: a value is out of range or unknown.
    """
    try:
        if is_mod(config):
            settings = MoDSettings.from_dict(config.get("mod"))
        else:
            depth = config["num_hidden_layers"]
            settings = MoDSettings("attn_sequence", tuple(routed_layers(depth, max(1, depth // 2))))
        given = {
            "layers": None if mod_n is None else tuple(routed_layers(config["num_hidden_layers"], mod_n)),
            "granularity": granularity,
            "threshold": threshold,
            "target_capacity": target_capacity,
            "base_model": base_model,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(settings.threshold, tuple) and threshold is None:  # those of single routers hold for no others
            same = given.get("granularity", settings.granularity) == settings.granularity
            known = dict(zip(settings.places, settings.threshold, strict=True)) if same else {}
            layers = given.get("layers", settings.layers)
            places = replace(settings, threshold=0.5, substitute=None, capacities=None, layers=layers).places
            given["threshold"] = tuple(known.get(place, 0.5) for place in places) if known else 0.5
            known = set(map(layer_of, known))
            if reset := [layer for layer in layers if layer not in known]:
                kept = [layer for layer in layers if layer in known]
                logger.warning(
                    "the thresholds of layers %s start at 0.5, as none were calibrated for them%s",
                    reset,
                    f"; layers {kept} keep theirs" if kept else "",
                )
        others = tuple(given.get(name, getattr(settings, name)) for name in ("granularity", "layers"))
        if others != (settings.granularity, settings.layers):  # these are for no others either
            given |= {"capacities": None, "sequence_pooling": None, "substitute": _grown_substitute(settings, *others)}
        settings = replace(settings, **given)
        if settings.granularity == EXPERT_GRANULARITY:
            _config_object(config, settings)  # knows which layers have experts
        return settings
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _grown_substitute(settings: MoDSettings, granularity: str, layers: tuple[int, ...]) -> dict[str, Any] | None:
    """Return kind and ranks of the substitutes where more layers are routed; None where they stand for other branches.

    A new layer's have the rank of the first one that stands for the same branch.
    """
    same = granularity == settings.granularity and set(settings.layers) <= set(layers)
    if settings.substitute is None or not same:
        return None
    ranks = settings.substitute["rank"]
    if isinstance(ranks, int):
        return settings.substitute
    known = dict(zip(settings.places, ranks, strict=True))
    of_branch = {settings.branch_of(place): rank for place, rank in reversed(known.items())}
    grown = replace(settings, threshold=0.5, substitute=None, capacities=None, layers=layers)
    return settings.substitute | {
        "rank": [known.get(place, of_branch[grown.branch_of(place)]) for place in grown.places]
    }


def read_settings(directory: str | Path, capacity: float | None = None) -> MoDSettings:
    """Return a MoD checkpoint's settings, at another capacity where one is given.

    Args:
        directory: MoD checkpoint; without a capacity a dense base will do, with `make_settings`' defaults.

    Raises:
        UserError: the checkpoint was not calibrated for the capacity (the message has those that it was calibrated
            for), or is dense.
    """
    config = read_config(directory)
    settings = make_settings(config)
    if capacity is None:
        return settings
    if not is_mod(config):
        raise UserError(f"{directory}: a dense model routes nothing, so it has no capacity to set; leave it out")
    try:
        return settings.at_capacity(capacity)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from None


def router_name(place: Place) -> str:
    """Return the name of a router's weight in a checkpoint."""
    return f"model.layers.{layer_of(place)}.{module_name(place, 'router')}.weight"


def weight_map(directory: str | Path) -> dict[str, str]:
    """Return weight name -> file name for all safetensors weights of a model directory.

    Raises:
        UserError: there are none, or the index names a file that isn't there.
    """
    directory = Path(directory)
    index, single = directory / INDEX_FILE, directory / "model.safetensors"
    if index.exists():
        mapping = read_index(index)
    elif single.exists():
        with _open_safetensors(single) as file:
            mapping = dict.fromkeys(file.keys(), single.name)
    else:
        raise UserError(f"{directory}: no model.safetensors and no {INDEX_FILE}; only safetensors weights are read")
    lost = sorted(name for name in set(mapping.values()) if not (directory / name).exists())
    if lost:
        raise UserError(f"{directory}: {INDEX_FILE} names {lost[0]}, which is not there")
    return mapping


def check_base_weights(directory: str | Path, config: dict[str, Any]) -> dict[str, str]:
    """Compare names and shapes of a base's weights with what its architecture needs; reads headers only.

    Returns:
        Name -> file name of the base's weights, without routers.

    Raises:
        UserError: a weight is missing, unknown or of another shape; the message names it.
    """
    directory = Path(directory)
    places = weight_map(directory)
    refuse_quantized(directory, config, places)
    model = meta_model(config, make_settings(config))
    found = {n: f for n, f in places.items() if not ADDED_NAME.match(n) and not IGNORED_NAME.search(n)}
    weights = _named_as_in(found, model, model.state_dict())
    expected = {name: tuple(t.shape) for name, t in weights.items() if not ADDED_NAME.match(name)}
    tied = set(model.all_tied_weights_keys)
    _refuse(directory, "lacks the weight", sorted(set(expected) - set(found) - tied))
    _refuse(directory, "has the unknown weight", sorted(set(found) - set(expected)))
    for file_name in sorted(set(places.values())):
        with _open_safetensors(directory / file_name) as file:
            names = set(file.keys())
            promised = {name for name, place in places.items() if place == file_name}
            _refuse(directory, f"has an index by which {file_name} holds, and does not,", sorted(promised - names))
            for name in sorted(promised & found.keys()):
                if tuple(file.get_slice(name).get_shape()) != expected[name]:
                    shape = list(file.get_slice(name).get_shape())
                    raise UserError(f"{directory}: {name} has shape {shape}, expected {list(expected[name])}")
                if file.get_slice(name).get_dtype() not in WHOLE_DTYPES:
                    dtype = file.get_slice(name).get_dtype()
                    raise UserError(f"{directory}: {name} is {dtype}, quantized; name the base that it was made from")
    return found


def save_routers(
    path: str | Path,
    routers: dict[str, torch.Tensor],
    settings: MoDSettings,
    units: Mapping[Place, float] | None = None,
) -> None:
    """Write routers alone, float32, atomically; the file says what they are for, and in which units they compare.

    Args:
        units: place -> how far a common shift of all routers moves this one's logits; None where not known.
    """
    fields = settings.to_dict()
    metadata = {"format": "pt", "granularity": settings.granularity}
    metadata |= {name: json.dumps(fields[name]) for name in ("layers", "threshold")}
    if units is not None:
        metadata["units"] = json.dumps([units[place] for place in settings.places])
    tensors = {name: tensor.detach().float().contiguous().cpu() for name, tensor in routers.items()}
    with atomic_file(path, "wb") as file:
        file.write(to_safetensors(tensors, metadata))


def load_routers(model: torch.nn.Module, path: str | Path) -> None:
    """Load a router file, or the router file of a directory, into `model`, with its thresholds.

    Raises:
        UserError: there is no such file, or it is for other layers, another granularity or another hidden size.
    """
    settings, file_path = model.config.mod_settings, path
    routers, metadata = read_routers(path)
    granularity = metadata.get("granularity", settings.granularity)
    if granularity != settings.granularity:
        raise UserError(f"{file_path}: routers for {granularity}, but this run routes {settings.granularity}")
    expected = {router_name(place): router.weight for place, router in model.router_modules().items()}
    if set(routers) != set(expected):
        raise UserError(f"{file_path}: routers for layers {_layers(routers)}, but this run routes {_layers(expected)}")
    with torch.no_grad(), whole_parameters(expected.values()):
        for name, weight in expected.items():
            if routers[name].shape != weight.shape:
                got, want = list(routers[name].shape), list(weight.shape)
                raise UserError(f"{file_path}: {name} has shape {got}, expected {want}: it is another model's")
            weight.copy_(routers[name])
    if "threshold" in metadata:
        set_thresholds(model, json.loads(metadata["threshold"]))


def substitute_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return contract name -> parameter of all substitutes of a routed model, ascending by layer; {} without any."""
    return {
        f"model.layers.{layer_of(place)}.{module_name(place, 'substitute')}.{name}": parameter
        for place, substitute in model.substitute_modules().items()
        for name, parameter in substitute.named_parameters()
    }


def add_substitutes(model: torch.nn.Module, substitute: dict[str, Any]) -> None:
    """Give a routed model substitutes at zero, float32, on the device of its routers.

    Args:
        substitute: kind and rank, as in `MoDSettings`.

    Raises:
        UserError: the rank is not between 1 and the hidden size, or the kind is unknown.
    """
    try:
        settings = replace(model.config.mod_settings, substitute=substitute)
        settings.check_size(model.config.hidden_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    for place, router in model.router_modules().items():
        made = MoDSubstitute(model.config.hidden_size, settings.substitute_rank(place))
        model.get_decoder().layers[layer_of(place)].set_substitute(place, made.to(router.weight.device))
    model.set_mod_settings(settings)


def remove_substitutes(model: torch.nn.Module) -> None:
    """Let a routed model return nothing for what it skips, as published."""
    for place in model.router_modules():
        model.get_decoder().layers[layer_of(place)].set_substitute(place, None)
    change_settings(model, substitute=None)


def save_substitutes(path: str | Path, substitutes: Mapping[str, torch.Tensor], settings: MoDSettings) -> None:
    """Write substitutes alone, float32, atomically; the file says what they are for."""
    metadata = {"format": "pt", "granularity": settings.granularity, "substitute": json.dumps(settings.substitute)}
    tensors = {name: tensor.detach().float().contiguous().cpu() for name, tensor in substitutes.items()}
    with atomic_file(path, "wb") as file:
        file.write(to_safetensors(tensors, metadata))


def load_substitutes(model: torch.nn.Module, path: str | Path) -> None:
    """Load the substitutes that belong to `path` into a `model` that has substitutes of the same ranks.

    Args:
        path: as `read_substitutes` takes it.

    Raises:
        UserError: there are none, or they are for other layers, another granularity, rank or hidden size.
    """
    settings = model.config.mod_settings
    saved, metadata = read_substitutes(path)
    if not saved:
        raise UserError(f"{path}: no {SUBSTITUTES_FILE} there; --substitute none runs without")
    granularity = metadata.get("granularity", settings.granularity)
    if granularity != settings.granularity:
        raise UserError(f"{path}: substitutes for {granularity}, but this run routes {settings.granularity}")
    parameters = substitute_parameters(model)
    _refuse(Path(path), "lacks", sorted(set(parameters) - set(saved)))
    _refuse(Path(path), "has the unknown", sorted(set(saved) - set(parameters)))
    with torch.no_grad(), whole_parameters(parameters.values()):
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                got, want = list(saved[name].shape), list(parameter.shape)
                raise UserError(f"{path}: {name} has shape {got}, expected {want}: another rank, or another model")
            parameter.copy_(saved[name])


def read_substitutes(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the substitutes that belong to routers, and what `save_substitutes` says of them beside them.

    Args:
        path: a file of substitutes, a router file that they lie beside, or a directory: one that has either, or a MoD
            checkpoint that `save_pretrained` has written, with all weights together.

    Returns:
        Contract name -> tensor, {} where there are none, and the metadata.

    Raises:
        UserError: a file is damaged.
    """
    path = Path(path)
    for file_path in (path, (path if path.is_dir() else path.parent) / SUBSTITUTES_FILE):
        if file_path.is_file():
            with _open_safetensors(file_path) as file:
                names = [name for name in file.keys() if SUBSTITUTE_NAME.match(name)]  # noqa: SIM118 - not a dict
                if names:
                    return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    if (path / ROUTERS_FILE).is_file() or not (path / "config.json").is_file():
        return {}, {}
    config, substitutes = read_config(path), {}
    if not is_mod(config):
        return {}, {}
    for name, place in weight_map(path).items():
        if SUBSTITUTE_NAME.match(name):
            with _open_safetensors(path / place) as file:
                substitutes[name] = file.get_tensor(name)
    fields = make_settings(config).to_dict()
    metadata = {"granularity": fields["granularity"]}
    if "substitute" in fields:
        metadata["substitute"] = json.dumps(fields["substitute"])
    return substitutes, metadata


def read_routers(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the routers of a router file or of a MoD checkpoint, and what `save_routers` says of them beside them.

    A checkpoint that `save_pretrained` has written has its routers among the other weights, and says in its
    `config.json` what they are for.

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    file_path = path / ROUTERS_FILE if path.is_dir() else path
    if file_path.is_file():
        with _open_safetensors(file_path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dict
    if not (path / "config.json").is_file() or not is_mod(config := read_config(path)):
        raise UserError(f"{path}: no {ROUTERS_FILE} there to start from")
    routers = {}
    for name, place in weight_map(path).items():
        if ROUTER_NAME.match(name):
            with _open_safetensors(path / place) as file:
                routers[name] = file.get_tensor(name)
    fields = make_settings(config).to_dict()
    metadata = {"granularity": fields["granularity"]}
    metadata |= {name: json.dumps(fields[name]) for name in ("layers", "threshold")}
    if UNITS_FIELD in config:
        metadata["units"] = json.dumps(config[UNITS_FIELD])
    return routers, metadata


def read_units(directory: str | Path) -> dict[Place, float] | None:
    """Return the units that a checkpoint's routers compare in, as `save_routers` takes them; None if it has none."""
    metadata = read_routers(directory)[1]
    if "units" not in metadata:
        return None
    places = MoDSettings(metadata["granularity"], tuple(json.loads(metadata["layers"]))).places
    units = json.loads(metadata["units"])
    if (
        not isinstance(units, list)
        or len(units) != len(places)
        or not all(type(unit) in (int, float) for unit in units)
    ):
        raise UserError(f"{directory}: the units of its routers are {units!r}, not a number for each routed layer")
    return dict(zip(places, units, strict=True))


def set_thresholds(model: torch.nn.Module, threshold: float | list) -> None:
    """Let a routed model decide by these thresholds, given as in `MoDSettings`."""
    change_settings(model, threshold=threshold)


def change_settings(model: torch.nn.Module, **fields: Any) -> None:
    """Let a routed model run with other values of these fields of `MoDSettings`."""
    model.set_mod_settings(replace(model.config.mod_settings, **fields))


def whole_parameters(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """Put parameters that DeepSpeed's ZeRO-3 has in parts together within this block; what is written there stays."""
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parts, modifier_rank=0)


def build_mod_checkpoint(
    base_dir: str | Path, output_dir: str | Path, settings: MoDSettings, copy_base: bool = False
) -> str:
    """Write the MoD checkpoint of a dense base, its routers at zero.

    Args:
        base_dir: a dense checkpoint with safetensors weights.
        settings: what of them belongs to trained routers is left out: thresholds of single layers, other capacities,
            what a sequence is decided on, substitutes.
        output_dir: made if it is not there; may hold a `config.json`, which is replaced.
        copy_base: copy the base's weights instead of linking them.

    Returns:
        How the base's weights got there: `hard link`, `symbolic link` or `copy`.

    Raises:
        UserError: the base is not one that is supported, is a MoD checkpoint itself, or its weights don't fit.
    """
    config = read_config(base_dir)
    if is_mod(config):
        raise UserError(f"{base_dir}: already a MoD checkpoint; name its dense base instead")
    load_tokenizer(base_dir)  # it comes from the base: better refused now than at the first training
    size, settings = config["hidden_size"], _untrained(settings)
    rows = _config_object(config, settings).num_experts if settings.granularity == EXPERT_GRANULARITY else 1
    routers = {router_name(place): torch.zeros(rows, size) for place in settings.places}
    return write_checkpoint(output_dir, base_dir, settings, routers, copy_base=copy_base)


def _untrained(settings: MoDSettings) -> MoDSettings:
    """Return the settings without what belongs to trained routers, and log what that was."""
    dropped = {name: None for name in ("capacities", "sequence_pooling", "substitute") if getattr(settings, name)}
    if isinstance(settings.threshold, tuple):
        dropped["threshold"] = 0.5
    if dropped:
        logger.warning("left out of the settings, as they belong to trained routers: %s", ", ".join(sorted(dropped)))
    return replace(settings, **dropped)


def write_checkpoint(
    output_dir: str | Path,
    source_dir: str | Path,
    settings: MoDSettings,
    routers: dict[str, torch.Tensor],
    copy_base: bool = False,
    trained_base: dict[str, torch.Tensor] | None = None,
    adapter: Adapter | None = None,
    units: Mapping[Place, float] | None = None,
    substitutes: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Write a MoD checkpoint into `output_dir`, which may hold other files; the index comes last.

    Args:
        source_dir: a dense or MoD checkpoint that the base's weights, config and tokenizer are taken from.
        routers: contract name -> float32 [1, hidden_size], or for experts [num_experts, hidden_size].
        trained_base: all other weights, where they were trained too; written instead of linked.
        adapter: LoRA weights that were trained beside the routers; transformers applies them when it loads.
        units: in which the routers compare, as `save_routers` takes them.
        substitutes: contract name -> tensor; there exactly where the settings have substitutes.

    Returns:
        How the base's weights got there: `hard link`, `symbolic link`, `copy` or `trained weights`.
    """
    source_dir, output_dir = Path(source_dir), Path(output_dir)
    source_config = read_config(source_dir)
    base_files = check_base_weights(source_dir, source_config)
    _config_object(source_config, settings)
    substitutes = substitutes or {}
    assert bool(substitutes) == (settings.substitute is not None)
    of_adapter = {} if adapter is None else adapter.weights
    for what, tensors in (("routers are", routers), ("substitutes are", substitutes), ("adapter is", of_adapter)):
        if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise UserError(f"{output_dir}: not written, as the {what} not finite; was the learning rate too high?")
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in (INDEX_FILE, SUBSTITUTES_FILE, *ADAPTER_FILES):
        (output_dir / name).unlink(missing_ok=True)
    for left_over in [*output_dir.glob(".checkpoint.*"), *output_dir.glob("base*.safetensors")]:
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    with tempfile.TemporaryDirectory(prefix=".checkpoint.", dir=output_dir) as temporary:
        staged = Path(temporary)
        if trained_base is None:
            mapping, how = _link_base(source_dir, staged, base_files, copy_base)
        else:
            model = meta_model(source_config, make_settings(source_config))
            weights = _named_as_in(base_files, model, trained_base)
            # an expert's matrix is a part of its layer's, which safetensors refuses to write as it is
            weights = {
                name: t if name in trained_base else t.clone() for name, t in weights.items() if name in base_files
            }
            mapping, how = _save_base(staged, _in_dtype_of(source_dir, base_files, weights)), "trained weights"
        save_routers(staged / ROUTERS_FILE, routers, settings, units)
        if adapter is not None:
            adapter.save(staged)
        for path in _companions(source_dir):
            shutil.copyfile(path, staged / path.name)
        _name_tokenizer_class(source_dir, staged)
        for path in sorted(Path(__file__).parent.glob("*_mod.py")):
            shutil.copyfile(path, staged / path.name)
        config = mod_config(source_config, settings) | {UNITS_FIELD: None}
        if units is not None:
            config[UNITS_FIELD] = [units[place] for place in settings.places]
        if config[UNITS_FIELD] is None:
            del config[UNITS_FIELD]
        write_json(staged / "config.json", config)
        mapping |= dict.fromkeys(routers, ROUTERS_FILE)
        if substitutes:
            save_substitutes(staged / SUBSTITUTES_FILE, substitutes, settings)
            mapping |= dict.fromkeys(substitutes, SUBSTITUTES_FILE)
        size = sum((staged / name).stat().st_size for name in set(mapping.values()))
        write_json(staged / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": dict(sorted(mapping.items()))})
        for path in sorted(staged.iterdir(), key=lambda path: path.name == INDEX_FILE):
            os.replace(path, output_dir / path.name)
    return how


def merge_adapter(trained_dir: str | Path, output_dir: str | Path) -> str:
    """Write the MoD checkpoint that a run with LoRA ends in, its adapter merged into the weights.

    Args:
        trained_dir: the run's output directory.
        output_dir: another directory; made if it is not there.

    Returns:
        How the base's weights got there: `trained weights`.

    Raises:
        UserError: there is no adapter in `trained_dir`, or it is not a MoD checkpoint.
    """
    config = read_config(trained_dir)
    if not (is_mod(config) and holds_adapter(trained_dir)):
        raise UserError(f"{trained_dir}: nothing to merge, it is not the output of a run with --use_lora")
    model = load_mod_model(trained_dir, dtype=torch.float32)
    routers = {router_name(place): router.weight for place, router in model.router_modules().items()}
    settings = MoDSettings.from_dict(config["mod"])
    substitutes = {name: parameter.detach() for name, parameter in substitute_parameters(model).items()}
    trained_base, units = merged_weights(model), read_units(trained_dir)
    return write_checkpoint(
        output_dir, trained_dir, settings, routers, trained_base=trained_base, units=units, substitutes=substitutes
    )


def mod_config(source_config: dict[str, Any], settings: MoDSettings) -> dict[str, Any]:
    """Return the `config.json` of a MoD checkpoint: the base's fields unchanged, plus what makes it one.

    `architectures` names the routed class: a server chooses its model by it, and would run the dense base.
    """
    model_class = model_class_for(source_config)
    return {
        **source_config,
        "architectures": [model_class.__name__],
        "model_type": model_class.config_class.model_type,
        "auto_map": {
            "AutoConfig": f"configuration_mod.{model_class.config_class.__name__}",
            "AutoModelForCausalLM": f"{model_class.__module__.rpartition('.')[2]}.{model_class.__name__}",
        },
        "mod": settings.to_dict(),
    }


def load_mod_model(directory: str | Path, settings: MoDSettings | None = None, **kwargs: Any) -> torch.nn.Module:
    """Load a MoD checkpoint, or a dense base with routers at zero.

    Args:
        directory: MoD or dense checkpoint.
        settings: routes these layers at this granularity instead of what the checkpoint says.
        **kwargs: passed to `from_pretrained` (`dtype`, `attn_implementation`, ...).

    Raises:
        UserError: the weights don't fit, or the settings differ from those that the checkpoint's routers were
            trained with.
    """
    directory = Path(directory)
    config = read_config(directory)
    model_class = model_class_for(config)
    check_base_weights(directory, config)
    check_adapter(directory)
    settings = settings or make_settings(config)
    loading_class = model_class
    if is_mod(config):
        trained = MoDSettings.from_dict(config["mod"])
        _refuse_other_routing(directory, trained, settings)
        if settings.substitute and (new := sorted(set(settings.layers) - set(trained.layers))):  # these start at zero
            lacking = rf"layers\.({'|'.join(map(str, new))})\.(attn_|mlp_)?substitute\."
            allowed = [*model_class._keys_to_ignore_on_load_missing, lacking]
            loading_class = type(model_class.__name__, (model_class,), {"_keys_to_ignore_on_load_missing": allowed})
    try:
        model = loading_class.from_pretrained(directory, config=_config_object(config, settings), **kwargs)
        model.__class__ = model_class
        return model
    except (ImportError, ValueError) as error:  # an attention whose package is not installed; weights that don't fit
        raise UserError(f"{directory}: {error}") from None


def load_tokenizer(directory: str | Path):
    """Load the tokenizer of a MoD or dense checkpoint: the base's, by the rules for the base's architecture.

    Raises:
        UserError: there is none, or it has tokens that the model has no embedding for.
    """
    config = read_config(directory)
    # transformers chooses the tokenizer's class by the config; the checkpoint's own would ask to run remote code
    base_config = AutoConfig.for_model(str(config["model_type"]).removeprefix("mod_"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, config=base_config)
    except Exception as error:  # they are a user's files, and each class of transformers has errors of its own
        raise UserError(f"{directory}: no tokenizer could be loaded: {_reason(error)}") from None
    check_vocabulary(directory, config, tokenizer)
    return tokenizer


def _refuse_other_routing(directory: Path, trained: MoDSettings, settings: MoDSettings) -> None:
    """Routers mean nothing for another granularity, and must not be dropped unseen; at zero they may.

    Substitutes stand for the branches that they were fitted to.
    """
    same_granularity = settings.granularity == trained.granularity
    if trained.substitute is not None and not (same_granularity and set(trained.layers) <= set(settings.layers)):
        raise UserError(
            f"{directory}: holds substitutes for {trained.granularity} of layers {list(trained.layers)}; train from "
            f"the dense base to route {settings.granularity} of layers {list(settings.layers)}"
        )
    if same_granularity and set(trained.layers) <= set(settings.layers):
        return
    for name, file_name in weight_map(directory).items():
        match = ROUTER_NAME.match(name)
        if match and not (same_granularity and int(match[1]) in settings.layers):
            with _open_safetensors(directory / file_name) as file:
                if file.get_tensor(name).any():
                    raise UserError(
                        f"{directory}: holds routers trained for {trained.granularity} of layers "
                        f"{list(trained.layers)}; train from the dense base to route {settings.granularity} of "
                        f"layers {list(settings.layers)}"
                    )


def _config_object(config: dict[str, Any], settings: MoDSettings):
    drop = ("model_type", "auto_map", "mod")
    values = {name: value for name, value in config.items() if name not in drop}
    for name in ("dtype", "torch_dtype"):
        known = getattr(torch, str(config.get(name)).removeprefix("torch."), None)
        if config.get(name) is not None and not isinstance(known, torch.dtype):
            raise UserError(f"config.json: {name} is {config[name]!r}; allowed are float32, bfloat16, float16, float64")
    try:
        made = model_class_for(config).config_class(**values, mod=settings.to_dict())
    except Exception as error:  # it is a user's file, and each check of transformers has an error of its own
        raise UserError(f"config.json: {_reason(error)}") from None
    window = getattr(made, "sliding_window", None)
    if window is not None and (type(window) is not int or window < 1):  # checked nowhere before a cache is cut by it
        raise UserError(f"config.json: sliding_window is {window!r}, not a whole number above 0, or null")
    return made


def complete_config(config: dict[str, Any], settings: MoDSettings) -> dict[str, Any]:
    """Return a `config.json` with the architecture's defaults for what it leaves out.

    Raises:
        UserError: it has a value that its architecture can't have, alone or so routed.
    """
    config_object = _config_object(config, settings)
    try:
        return config_object.to_dict() | config
    except Exception as error:  # as above
        raise UserError(f"config.json: {_reason(error)}") from None


def meta_model(config: dict[str, Any], settings: MoDSettings) -> torch.nn.Module:
    """Return the routed model of a `config.json` on the meta device, without weights.

    Raises:
        UserError: no model can be made of it.
    """
    config_object = _config_object(config, settings)
    try:
        with torch.device("meta"):
            DynamicCache(config=config_object)  # knows the types of layers
            return model_class_for(config)(config_object)
    except Exception as error:  # as above
        raise UserError(f"config.json: no model can be made of it: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text} is not known to transformers" if isinstance(error, KeyError) else text or type(error).__name__


def _named_as_in(
    files: dict[str, str], model: torch.nn.Module, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a model's weights under the names that its files have.

    Published mixtures of experts hold each expert's matrices by themselves, transformers 5 holds those of a layer as
    one; either is read.
    """
    on_disk = revert_weight_conversion(model, weights)
    merged = set(weights) - set(on_disk)
    return weights if merged & set(files) else on_disk


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None


def _link_base(source: Path, target: Path, files: dict[str, str], copy: bool) -> tuple[dict[str, str], str]:
    """Link the base's weight files as `base*.safetensors`.

    The names differ from those that `save_pretrained` writes: it would otherwise write through a link into the base.
    """
    names = sorted(set(files.values()))
    many = f"-of-{len(names):05d}" if len(names) > 1 else ""
    renamed = {name: f"base{f'-{i:05d}{many}' if many else ''}.safetensors" for i, name in enumerate(names, start=1)}
    how = "copy"
    for name, new in renamed.items():
        how = link_or_copy(source / name, target / new, copy=copy)
    return {weight: renamed[name] for weight, name in files.items()}, how


def _in_dtype_of(source: Path, files: dict[str, str], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights in the dtype that the source has them in, which its `config.json` names."""
    dtypes = {}
    for file_name in set(files.values()):
        with _open_safetensors(source / file_name) as file:
            dtypes |= {name: file.get_slice(name)[:0].dtype for name, place in files.items() if place == file_name}
    return {name: tensor.to(dtypes[name]) for name, tensor in weights.items()}


def _save_base(target: Path, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    with redirect_stdout(None):  # it prints the temporary path
        save_torch_state_dict(weights, target, filename_pattern="base{suffix}.safetensors")
    index = target / "base.safetensors.index.json"
    if not index.exists():
        return dict.fromkeys(weights, "base.safetensors")
    mapping = read_index(index)
    index.unlink()
    return mapping


def _companions(directory: Path) -> list[Path]:
    return sorted({path for pattern in COMPANIONS for path in directory.glob(pattern) if path.is_file()})


def _name_tokenizer_class(source_dir: Path, staged: Path) -> None:
    """Have plain `AutoTokenizer` choose the class that it chooses for the base.

    It has rules for model types of its own (they overrule what a `mistral` base names, for one), and for a `mod_*` type
    it follows `tokenizer_config.json`.
    """
    if not any(staged.glob("tokenizer*")):
        return
    path = staged / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    write_json(path, config | {"tokenizer_class": type(load_tokenizer(source_dir)).__name__})


def _refuse(directory: Path, problem: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{directory}: {problem} {names[0]}{more}; is it another model's, or cut short?")


def _layers(routers: dict[str, Any]) -> list[int]:
    return sorted(int(match[1]) for match in map(ROUTER_NAME.match, routers) if match)
