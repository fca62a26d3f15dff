"""vLLM's own dense models, some layers of which get a routed class. Tensor parallelism and loading come with them."""

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from .batch import Routed
from .config import options_of, routing_of
from .layer import RoutedLayer


class _Routed:
    """Over a causal language model; weight names stay as they are."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        routing = routing_of(config)
        capacity, execution = options_of(config)
        self.routed = Routed(routing, capacity, execution)
        for index in sorted({place.layer for place in routing.places}):
            layer = self.model.layers[index]
            layer.__class__ = type(f"Routed{type(layer).__name__}", (RoutedLayer, type(layer)), {})
            layer.init_routing(vllm_config, f"{prefix}.routed.{index}", index, self.routed)


class MoDLlamaForCausalLM(_Routed, LlamaForCausalLM):
    """Llama with routers."""


class MoDMistralForCausalLM(_Routed, MistralForCausalLM):
    """Mistral with routers."""


class MoDQwen2ForCausalLM(_Routed, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with routers."""


class MoDQwen3ForCausalLM(_Routed, Qwen3ForCausalLM):
    """Qwen3 with routers."""
