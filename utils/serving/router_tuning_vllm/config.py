"""Config classes of the routed model types: a base's own, with the object `mod`."""

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from . import ARCHITECTURES
from .routing import CAPACITY_FIELD, EXECUTION_FIELD, EXECUTIONS, Routing


class _Routed:
    """Over a base's config class; what may be overridden when a server starts has no value in a checkpoint."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # checkpoints of before they named it say the dense base, which vLLM would take
        self.architectures = [ARCHITECTURES[self.model_type]]


class MoDLlamaConfig(_Routed, LlamaConfig):
    model_type = "mod_llama"
    mod: dict | None = None


class MoDMistralConfig(_Routed, MistralConfig):
    model_type = "mod_mistral"
    mod: dict | None = None


class MoDQwen2Config(_Routed, Qwen2Config):
    model_type = "mod_qwen2"
    mod: dict | None = None


class MoDQwen3Config(_Routed, Qwen3Config):
    model_type = "mod_qwen3"
    mod: dict | None = None


CONFIG_CLASSES = {each.model_type: each for each in (MoDLlamaConfig, MoDMistralConfig, MoDQwen2Config, MoDQwen3Config)}


def routing_of(config) -> Routing:
    """Return what a config says is routed.

    Raises:
        ValueError: it says nothing that can be served.
    """
    return Routing.from_config(config.mod, config.num_hidden_layers, config.hidden_size)


def options_of(config) -> tuple[float | None, str]:
    """Return what `--hf-overrides` chose: a capacity (None for the checkpoint's own thresholds), and the execution.

    Raises:
        ValueError: an option is unknown or has a value that is not allowed.
    """
    known = (CAPACITY_FIELD, EXECUTION_FIELD)
    unknown = sorted(name for name in vars(config) if name.startswith("routing_") and name not in known)
    if unknown:
        raise ValueError(f"{unknown[0]} is not an option of routed checkpoints; there are {' and '.join(known)}")
    execution = getattr(config, EXECUTION_FIELD, EXECUTIONS[0])
    if execution not in EXECUTIONS:
        raise ValueError(f"{EXECUTION_FIELD} {execution!r} is not one of {', '.join(EXECUTIONS)}")
    return getattr(config, CAPACITY_FIELD, None), execution
