"""OLMoE, Qwen2-MoE, Mixtral and DeepSeek-V2 with routers: the mixins of `modeling_mod.py` over transformers' classes.

On disk each expert has matrices of its own; transformers 5 merges those of a layer as it loads them, by a table of
model types in which a routed model has to be entered. This file travels inside every checkpoint.
"""

from dataclasses import dataclass

import torch
from transformers import (
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
    MixtralForCausalLM,
    MixtralModel,
    OlmoeForCausalLM,
    OlmoeModel,
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer

from .configuration_mod import MoDDeepseekV2Config, MoDMixtralConfig, MoDOlmoeConfig, MoDQwen2MoeConfig
from .modeling_mod import MoDCausalLMOutput, MoDDecoderLayerMixin, MoDForCausalLMMixin, MoDModelMixin
from .routing_mod import Routing


@dataclass
class MoDMoECausalLMOutput(MoDCausalLMOutput):
    """A mixture-of-experts language model's output and what its routers decided.

    Args:
        router_scores: as in `MoDCausalLMOutput`; for assignments [routed layers, batch, tokens, top_k].
        router_gates: the same shape.
        router_experts: int64, the same shape: the expert of each assignment. None where experts are not routed.
        router_logits: of the model's own gates, float [batch * tokens, experts] for each layer, if asked for.
        aux_loss: the gates' load-balancing loss, if the base computes it; no part of `loss`.
    """

    router_experts: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class MoDMoEModelMixin(MoDModelMixin):
    """Over the inner model of a mixture of experts."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers 5.23 looks for the decorator of the experts in the file of the class
        return True


class MoDMoEForCausalLMMixin(MoDForCausalLMMixin):
    """Over the language model of a mixture of experts."""

    output_class = MoDMoECausalLMOutput

    def __init__(self, config):
        super().__init__(config)
        # with `output_router_logits` the base would add the gates' load-balancing loss to the task's (Eq. 9)
        self.router_aux_loss_coef = 0.0

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def decided(self, routing: Routing) -> dict[str, torch.Tensor]:
        """Return the output's fields for what was decided in a forward, each [routers, ...]."""
        fields = super().decided(routing)
        if self.mod_settings.target == "expert":
            device = fields["router_gates"].device
            experts = [routing.decisions[index].experts.to(device) for index in self.mod_settings.layers]
            fields["router_experts"] = torch.stack(experts)
        return fields


class MoDOlmoeDecoderLayer(MoDDecoderLayerMixin, OlmoeDecoderLayer):
    """An OLMoE layer with a router."""


class MoDOlmoeModel(MoDMoEModelMixin, OlmoeModel):
    """OLMoE without its head, with routers."""

    config_class = MoDOlmoeConfig
    decoder_layer_class = MoDOlmoeDecoderLayer
    _no_split_modules = ["OlmoeDecoderLayer", "MoDOlmoeDecoderLayer"]


class MoDOlmoeForCausalLM(MoDMoEForCausalLMMixin, OlmoeForCausalLM):
    """OLMoE with routers."""

    config_class = MoDOlmoeConfig
    model_class = MoDOlmoeModel


class MoDQwen2MoeDecoderLayer(MoDDecoderLayerMixin, Qwen2MoeDecoderLayer):
    """A Qwen2-MoE layer with a router."""


class MoDQwen2MoeModel(MoDMoEModelMixin, Qwen2MoeModel):
    """Qwen2-MoE without its head, with routers."""

    config_class = MoDQwen2MoeConfig
    decoder_layer_class = MoDQwen2MoeDecoderLayer
    _no_split_modules = ["Qwen2MoeDecoderLayer", "MoDQwen2MoeDecoderLayer"]


class MoDQwen2MoeForCausalLM(MoDMoEForCausalLMMixin, Qwen2MoeForCausalLM):
    """Qwen2-MoE with routers."""

    config_class = MoDQwen2MoeConfig
    model_class = MoDQwen2MoeModel


class MoDMixtralDecoderLayer(MoDDecoderLayerMixin, MixtralDecoderLayer):
    """A Mixtral layer with a router."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        # noise that teaches a gate to explore; it would be multiplied into what the router reads, in place
        self.mlp.jitter_noise = 0.0


class MoDMixtralModel(MoDMoEModelMixin, MixtralModel):
    """Mixtral without its head, with routers."""

    config_class = MoDMixtralConfig
    decoder_layer_class = MoDMixtralDecoderLayer
    _no_split_modules = ["MixtralDecoderLayer", "MoDMixtralDecoderLayer"]


class MoDMixtralForCausalLM(MoDMoEForCausalLMMixin, MixtralForCausalLM):
    """Mixtral with routers."""

    config_class = MoDMixtralConfig
    model_class = MoDMixtralModel


class MoDDeepseekV2DecoderLayer(MoDDecoderLayerMixin, DeepseekV2DecoderLayer):
    """A DeepSeek-V2 layer with a router."""


class MoDDeepseekV2Model(MoDMoEModelMixin, DeepseekV2Model):
    """DeepSeek-V2 without its head, with routers."""

    config_class = MoDDeepseekV2Config
    decoder_layer_class = MoDDeepseekV2DecoderLayer
    _no_split_modules = ["DeepseekV2DecoderLayer", "MoDDeepseekV2DecoderLayer"]


class MoDDeepseekV2ForCausalLM(MoDMoEForCausalLMMixin, DeepseekV2ForCausalLM):
    """DeepSeek-V2 with routers."""

    config_class = MoDDeepseekV2Config
    model_class = MoDDeepseekV2Model


for _config_class, _model_class in (
    (MoDOlmoeConfig, MoDOlmoeForCausalLM),
    (MoDQwen2MoeConfig, MoDQwen2MoeForCausalLM),
    (MoDMixtralConfig, MoDMixtralForCausalLM),
    (MoDDeepseekV2Config, MoDDeepseekV2ForCausalLM),
):
    _config_class.register_for_auto_class()
    _model_class.register_for_auto_class("AutoModelForCausalLM")
    # without it the merged matrices of the experts stay random
    register_checkpoint_conversion_mapping(
        _config_class.model_type,
        get_checkpoint_conversion_mapping(_config_class.model_type.removeprefix("mod_")),
        overwrite=True,
    )
