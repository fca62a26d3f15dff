"""LoRA adapters beside the routers, with peft (Table 8).

The adapters go into the model itself, as transformers' own integration puts them there, so a routed model stays one.
They are saved as a peft directory: transformers applies one that lies in a checkpoint's folder when it loads the
checkpoint, and plain peft loads it onto the checkpoint that the run started from. Routers never get an adapter.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from utils.io.errors import UserError, suggest
from utils.io.files import atomic_file, read_json, write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What gets an adapter by default: all projections of attention and MLP."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is saved.

    Args:
        config: what goes into `adapter_config.json`.
        weights: peft's names -> tensors on the CPU.
    """

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]

    def save(self, directory: str | Path) -> None:
        """Write the two files of a peft directory, each atomically."""
        with atomic_file(Path(directory) / ADAPTER_WEIGHTS, "wb") as file:
            file.write(to_safetensors(self.weights, {"format": "pt"}))
        write_json(Path(directory) / ADAPTER_CONFIG, self.config)


def holds_adapter(directory: str | Path) -> bool:
    """Tell whether a model directory has an adapter in it."""
    return (Path(directory) / ADAPTER_CONFIG).exists()


def check_adapter(directory: str | Path) -> None:
    """Refuse an adapter, where there is one, that peft could not load; reads no weights.

    Raises:
        UserError: a file of it is missing or damaged, or it is of a kind that peft doesn't know.
    """
    if not holds_adapter(directory):
        return
    from peft import PeftConfig

    config, weights = Path(directory) / ADAPTER_CONFIG, Path(directory) / ADAPTER_WEIGHTS
    if "peft_type" not in read_json(config):
        raise UserError(f"{config}: no adapter's, it names no peft_type")
    try:
        PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # it is a user's file, and each check of peft has an error of its own
        raise UserError(f"{config}: no adapter that peft can load: {error!r}") from None
    if not weights.is_file():
        raise UserError(f"{directory}: no {ADAPTER_WEIGHTS} there beside {ADAPTER_CONFIG}")
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{weights}: not a whole safetensors file: {error}") from None


def add_lora(
    model: torch.nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    only_routed: bool = False,
) -> None:
    """Put untrained adapters into a routed model; they, its routers and substitutes train, and nothing else.

    Args:
        model: a routed model.
        rank: of the adapters' two matrices.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: probability in [0, 1) of dropping an adapter's input.
        targets: names of linear modules, such as `q_proj`; default `PROJECTIONS`, as far as the model has them.
        only_routed: leave out the layers without a router, so that those below the first one need no backward.

    Raises:
        UserError: a target is no linear module of the model's layers, or the router.
    """
    from peft import LoraConfig

    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.get_decoder().layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name in targets or ():
        if name not in linear:
            raise UserError(
                f"lora_target_modules {name!r} is not one of {', '.join(sorted(linear))}{suggest(name, linear)}"
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(targets or linear & set(PROJECTIONS)),
        layers_to_transform=list(model.config.mod_settings.layers) if only_routed else None,
        layers_pattern="layers" if only_routed else None,
        task_type="CAUSAL_LM",
    )
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # small steps would be lost in the dtype of a frozen bfloat16 base
    for module in (*model.router_modules().values(), *model.substitute_modules().values()):
        module.requires_grad_(True)


def adapter_of(
    model: torch.nn.Module, whole: Callable[[torch.nn.Parameter], torch.Tensor | None] = lambda parameter: parameter
) -> Adapter:
    """Return what is to be saved of a model with adapters.

    Args:
        model: with one adapter.
        whole: returns a parameter's value; DeepSpeed's is in its optimizer. None where it has none, before it trains.
    """
    config = next(iter(model.peft_config.values())).to_dict()
    # without a base of its own: in a checkpoint it is for the weights beside it
    config |= {"base_model_name_or_path": None, "inference_mode": True}
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    weights = {}
    for name, parameter in _parameters(model).items():
        value = whole(parameter)
        value = parameter if value is None else value
        weights[f"base_model.model.{name}"] = value.detach().float().cpu().contiguous().clone()
    return Adapter(json.loads(json.dumps(config, default=str)), weights)


def load_adapter(model: torch.nn.Module, directory: str | Path) -> None:
    """Load the weights of a saved adapter into a model that has the same adapters.

    Raises:
        UserError: there is no adapter, or one for other modules or of another rank.
    """
    path = Path(directory) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{directory}: no {ADAPTER_WEIGHTS} there")
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}
    parameters = _parameters(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise UserError(f"{path}: an adapter for other modules, or of another rank")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def _parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters under the names that peft saves them by, which lack the adapter's own."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_" in name}


def merged_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Merge the adapters of `model` into its weights, in place, and return all weights under the base's names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
