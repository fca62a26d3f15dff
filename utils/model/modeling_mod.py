"""Llama, Mistral, Qwen2 and Qwen3 with routers: three mixins over transformers' classes, one class set for each.

The decoder layers of these architectures have the same body, so one layer mixin serves all; attention, MLP, norms,
masks and rotary embeddings are transformers' own. This file travels inside every checkpoint, with its siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.utils import can_return_tuple, is_peft_available

from .cache_mod import MoDCache, NoCache, adapt_cache, check_cache, holds_decisions, refuse_decisions
from .calls_mod import MoDGenerationMixin, check_forward
from .configuration_mod import (
    EXECUTIONS,
    MoDLlamaConfig,
    MoDMistralConfig,
    MoDQwen2Config,
    MoDQwen3Config,
    MoDSettings,
    Place,
    check_choice,
    layer_of,
    module_name,
)
from .decode_mod import choose_execution
from .execution_mod import dense_forward, sparse_forward
from .moe_mod import expert_forward
from .routing_mod import Decision, MoDRouter, Room, Routing
from .substitute_mod import MoDSubstitute


@dataclass
class MoDCausalLMOutput(CausalLMOutputWithPast):
    """A causal language model's output and what its routers decided.

    Args:
        router_scores: `R(x)`, float32 [routers, batch] or [routers, batch, tokens], in the order of the settings'
            `places`, for most granularities one for each routed layer; carries gradient.
        router_gates: `M`, same shape, exactly 0 or 1; carries the straight-through gradient. None if routing is off.
        states: [positions, hidden_size], the last hidden states that `states_at` asked for.
    """

    router_scores: torch.Tensor | None = None
    router_gates: torch.Tensor | None = None
    states: torch.Tensor | None = None


class MoDDecoderLayerMixin:
    """Over a pre-norm decoder layer: adds a router for each branch that is executed or not."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.mod_settings = config.mod_settings
        num_experts = config.num_experts if self.mod_settings.target == "expert" else None
        for branch in self.mod_settings.branches:
            place = self.place_of(branch)
            setattr(self, module_name(place, "router"), MoDRouter(config.hidden_size, num_experts))
            rank = self.mod_settings.substitute_rank(place)
            self.set_substitute(place, None if rank is None else MoDSubstitute(config.hidden_size, rank))

    def place_of(self, branch: str) -> Place:
        """Return where the router of this branch is."""
        return self.mod_settings.place_of(self.layer_idx, branch)

    def router_of(self, branch: str) -> MoDRouter:
        """Return the router of a branch that has one."""
        return getattr(self, module_name(self.place_of(branch), "router"))

    def substitute_of(self, branch: str) -> MoDSubstitute | None:
        """Return what stands in for a branch that has a router; None for nothing."""
        return getattr(self, module_name(self.place_of(branch), "substitute"))

    def set_substitute(self, place: Place, substitute: MoDSubstitute | None) -> None:
        """Let this stand in for what the router there skips; None for nothing."""
        setattr(self, module_name(place, "substitute"), substitute)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        routing: Routing | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Run the layer on `hidden_states` [batch, tokens, hidden_size]; the rest as the base layer takes it."""
        attention_kwargs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids if routing.packed else None,
            "past_key_values": None if isinstance(past_key_values, NoCache) else past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        if not routing.enabled:
            return super().forward(hidden_states, **attention_kwargs)
        run = sparse_forward if routing.sparse else dense_forward
        if self.mod_settings.target == "expert":
            run = expert_forward
        return run(self, hidden_states, routing, attention_kwargs)


class MoDPreTrainedMixin:
    """What inner model and language model share: routers start at zero, and stay float32 in a low-precision load."""

    _keep_in_fp32_modules_strict = [r"layers\.\d+\.(attn_|mlp_)?router"]
    _keys_to_ignore_on_load_missing = [r"layers\.\d+\.(attn_|mlp_)?router\.weight$"]
    _keys_to_ignore_on_load_unexpected = [  # of a layer that `mod.layers` leaves out
        r"layers\.\d+\.(attn_|mlp_)?router\.weight$"
    ]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, MoDRouter):
            init.zeros_(module.weight)
        elif isinstance(module, MoDSubstitute):
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs):
        """Load as transformers does, but refuse a checkpoint that lacks a base weight or holds an unknown one.

        A missing router is no error: it starts at zero, which keeps every input.

        Raises:
            ValueError: a weight is missing, unknown or of another shape; the message names it.
        """
        if args and not is_peft_available() and Path(args[0], "adapter_config.json").is_file():
            raise ValueError(f"{args[0]} holds a LoRA adapter, which needs peft: pip install peft")
        # transformers' own error over a shape doesn't name the weight
        model, info = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        for loaded in (model.__dict__.pop("_loaded_base", info), info):
            if not ignore_mismatched_sizes:
                for name, found, expected in sorted(loaded["mismatched_keys"]):
                    raise ValueError(f"{name} has the shape {list(found)} in the checkpoint, not {list(expected)}")
            for problem in ("missing", "unexpected"):
                names = sorted(loaded[f"{problem}_keys"])
                if names:
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    raise ValueError(f"the checkpoint has {problem} weights: {', '.join(names[:3])}{more}")
        return (model, info) if output_loading_info else model

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # where an adapter follows, transformers reports on its weights alone (5.23); `from_pretrained` takes this away
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        model._loaded_base = loading_info.to_dict()
        return loading_info

    def router_modules(self) -> dict[Place, MoDRouter]:
        """Return place -> router, in the order of the settings' `places`."""
        layers, settings = self.get_decoder().layers, self.mod_settings
        return {place: layers[layer_of(place)].router_of(settings.branch_of(place)) for place in settings.places}

    def set_mod_settings(self, settings: MoDSettings) -> None:
        """Run with other settings of the same layers, granularity and substitutes."""
        self.config.mod = settings.to_dict()
        for module in self.modules():
            if hasattr(module, "mod_settings"):
                module.mod_settings = settings

    def set_capacity(self, capacity: float) -> None:
        """Execute another share of the inputs: one of those that the checkpoint was calibrated for, or in between; or
        1, all.

        Raises:
            ValueError: it was calibrated for none, or `capacity` lies outside those that it was calibrated for.
        """
        self.set_mod_settings(self.config.mod_settings.at_capacity(capacity))

    def substitute_modules(self) -> dict[Place, MoDSubstitute]:
        """Return place -> substitute, in the same order; empty where nothing stands in for what is skipped."""
        layers, settings = self.get_decoder().layers, self.mod_settings
        found = {place: layers[layer_of(place)].substitute_of(settings.branch_of(place)) for place in settings.places}
        return {place: substitute for place, substitute in found.items() if substitute is not None}

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """Recompute activations in the backward, as transformers does, but only where there is one to be done.

        transformers also makes the embeddings' output require gradients, which non-reentrant checkpointing can do
        without, and which would run a backward through all the frozen layers below the first one that trains. These
        keep nothing, so there is nothing to recompute either.
        """
        super().activation_checkpointing_enable(*args, **kwargs)
        self.disable_input_require_grads()
        if not self.get_input_embeddings().weight.requires_grad:
            for layer in self.get_decoder().layers:
                if any(parameter.requires_grad for parameter in layer.parameters()):
                    break
                layer.gradient_checkpointing = False

    def make_routing(
        self,
        inputs: torch.Tensor,
        attention_mask: Any,
        execution: str | None,
        drafts: int = 0,
        token_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs,
    ) -> Routing:
        """Prepare the routing of one forward.

        Args:
            inputs: the new tokens or their embeddings, [batch, tokens, ...].
            attention_mask: [batch, past + tokens], or None; at token level any mask that the base model takes.
            execution: `dense`, `sparse`, or None for what `choose_execution` says.
            drafts: number of trailing tokens that have no say in a sequence's decision.
            token_mask: bool [batch, tokens], which tokens have, where `attention_mask` isn't to say it.
            past_key_values: the cache, or None.
            kwargs: the forward's further keywords.

        Raises:
            ValueError: as `MoDForCausalLMMixin.forward`.
        """
        settings = self.mod_settings
        if execution is None:
            execution = choose_execution(settings, inputs, past_key_values, self.training)
        check_choice("execution", execution, EXECUTIONS)
        if execution == "sparse" and kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("sparse execution computes no attention map for what it skips: pass execution='dense'")
        of_call = {"token_mask": token_mask, "past_key_values": past_key_values, **kwargs}
        check_forward(settings, inputs, attention_mask, **of_call)
        routing = Routing(token_mask=None, sparse=execution == "sparse")
        if settings.level == "token":
            if settings.target != "expert" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
                routing.room = Room({place: settings.threshold_of(place) for place in settings.places}, inputs)
            return routing
        if holds_decisions(past_key_values, settings):
            return routing

        batch, tokens = inputs.shape[:2]
        if token_mask is not None:
            pass
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -tokens:].bool()
        elif attention_mask is not None:
            raise ValueError("a decision for each sequence needs the 2D attention_mask [batch, tokens], or none")
        if drafts:
            counted = torch.arange(tokens, device=inputs.device).expand(batch, -1) < tokens - drafts
            token_mask = counted if token_mask is None else token_mask & counted
        routing.token_mask = token_mask
        return routing

    def make_cache(
        self, inputs: torch.Tensor, past_key_values: Any, use_cache: bool | None, routing: Routing
    ) -> tuple[Any, bool]:
        """Return the cache of one forward over `inputs`, adapted or new or None, and whether it is to be returned.

        Raises:
            ValueError: as `MoDForCausalLMMixin.forward`.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not routing.enabled:
            refuse_decisions(past_key_values)
        elif past_key_values is not None:
            adapt_cache(past_key_values, self.mod_settings, self.config.num_hidden_layers)
            check_cache(past_key_values, self.mod_settings, *inputs.shape[:2], routing.sparse)
        elif use_cache:
            past_key_values = MoDCache(self.config)
        return past_key_values, use_cache


class MoDModelMixin(MoDPreTrainedMixin):
    """Over the inner model: puts routed layers in place of the plain ones."""

    _keys_to_ignore_on_load_unexpected = [*MoDPreTrainedMixin._keys_to_ignore_on_load_unexpected, r"^lm_head\."]
    decoder_layer_class: type

    def __init__(self, config):
        super().__init__(config)
        self.mod_settings = config.mod_settings
        for index in self.mod_settings.layers:
            self.layers[index] = self.decoder_layer_class(config, index)
        self.post_init()

    def get_decoder(self):
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routing: Routing | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states, [batch, tokens, hidden_size]; `routing` is made here if it isn't given."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        if routing is None:
            of_call = {"position_ids": position_ids, "past_key_values": past_key_values, **kwargs}
            routing = self.make_routing(inputs, attention_mask, execution=None, **of_call)
            routing.packed = position_ids is not None and past_key_values is None
        past_key_values, use_cache = self.make_cache(inputs, past_key_values, use_cache, routing)
        plain = attention_mask is None and position_ids is None and past_key_values is None and not use_cache
        if plain and not self.is_activation_checkpointing:
            past_key_values = NoCache()
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            **kwargs,
        )
        if isinstance(past_key_values, NoCache):
            output.past_key_values = None
        return output


class MoDForCausalLMMixin(MoDGenerationMixin, MoDPreTrainedMixin):
    """Over the causal language model: carries the routing through the forward and returns what was decided."""

    model_class: type
    output_class: type = MoDCausalLMOutput

    def __init__(self, config):
        super().__init__(config)
        self.mod_settings = config.mod_settings
        self.model = self.model_class(config)  # in place of the plain one that the base class has just made
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        route: bool = True,
        execution: str | None = None,
        drafted: bool = False,
        token_mask: torch.Tensor | None = None,
        states_at: torch.Tensor | None = None,
        gate_rule: Callable[[Place, torch.Tensor], Decision] | None = None,
        **kwargs,
    ) -> MoDCausalLMOutput | CausalLMOutputWithPast:
        """Run the language model, as transformers' `forward` with six more keywords.

        Args:
            input_ids: int64 [batch, tokens], or `inputs_embeds` [batch, tokens, hidden_size].
            attention_mask: [batch, past + tokens], 1 for real tokens; None where there is no padding.
            past_key_values: an empty `DynamicCache`, `MoDCache` or `StaticCache`, or one that this model has filled.
                The decisions that its first call takes for sequences hold for all later ones.
            labels: int64 [batch, tokens], -100 where unsupervised.
            use_cache: default as the config says, but False in training.
            route: False runs the dense base model, as if every input were kept.
            execution: `dense` or `sparse`; by default as `choose_execution` says. A growing cache stays with one where
                it decides what is stored, a static one goes on with either.
            drafted: the last `logits_to_keep - 1` tokens are drafts to be verified and have no say in a sequence's
                decision; `generate` sets it, so that assisted decoding decides as plain decoding does.
            token_mask: bool [batch, tokens], the tokens that have a say in a sequence's decision, in place of
                `attention_mask`: padding on the right needs no attention mask, as nothing real attends to it.
            states_at: int64 [positions], indices into the flattened [batch * tokens]: return the last hidden states
                there as `states`, and no logits. For a loss that computes logits where it needs them.
            gate_rule: decides instead of the threshold; see `Routing`.

        Returns:
            `MoDCausalLMOutput` with logits [batch, tokens, vocabulary], or states [positions, hidden_size].

        Raises:
            ValueError: the execution is unknown; attention maps are asked for in sparse execution; `labels` and
                `states_at` are both given; a sequence decision would have to guess the padding from a mask that isn't
                2D; the cache is of a class that can't hold decisions, was filled without routing or by the other
                execution, or by another batch size; or what `check_forward` refuses.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if route:
            inputs = input_ids if input_ids is not None else inputs_embeds
            drafts = logits_to_keep - 1 if drafted and isinstance(logits_to_keep, int) and logits_to_keep > 1 else 0
            of_call = {"position_ids": position_ids, "past_key_values": past_key_values, **kwargs}
            routing = self.make_routing(inputs, attention_mask, execution, drafts, token_mask, **of_call)
            routing.gate_rule = gate_rule
        else:
            routing = Routing(token_mask=None, sparse=False, enabled=False)
        routing.packed = position_ids is not None and past_key_values is None
        inner_kwargs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "routing": routing,
            **kwargs,
            "return_dict": True,
        }
        if states_at is None:
            output = super().forward(labels=labels, logits_to_keep=logits_to_keep, **inner_kwargs)
        elif labels is not None:
            raise ValueError("labels need logits, which states_at leaves out: give one of the two")
        else:
            inner = self.model(**inner_kwargs)
            states = inner.last_hidden_state.flatten(0, 1)
            states = states.index_select(0, states_at.to(states.device))
            output = MoDCausalLMOutput(states=states, past_key_values=inner.past_key_values)
        if not routing.enabled:
            return output
        return self.output_class(**output, **self.decided(routing))

    def decided(self, routing: Routing) -> dict[str, torch.Tensor]:
        """Return the output's fields for what was decided in a forward, each [routers, ...]."""
        scores, gates = routing.stacked(self.mod_settings.places)
        return {"router_scores": scores, "router_gates": gates}


class MoDLlamaDecoderLayer(MoDDecoderLayerMixin, LlamaDecoderLayer):
    """A Llama layer with a router."""


class MoDLlamaModel(MoDModelMixin, LlamaModel):
    """Llama without its head, with routers."""

    config_class = MoDLlamaConfig
    decoder_layer_class = MoDLlamaDecoderLayer
    _no_split_modules = ["LlamaDecoderLayer", "MoDLlamaDecoderLayer"]


class MoDLlamaForCausalLM(MoDForCausalLMMixin, LlamaForCausalLM):
    """Llama with routers."""

    config_class = MoDLlamaConfig
    model_class = MoDLlamaModel


class MoDMistralDecoderLayer(MoDDecoderLayerMixin, MistralDecoderLayer):
    """A Mistral layer with a router."""


class MoDMistralModel(MoDModelMixin, MistralModel):
    """Mistral without its head, with routers."""

    config_class = MoDMistralConfig
    decoder_layer_class = MoDMistralDecoderLayer
    _no_split_modules = ["MistralDecoderLayer", "MoDMistralDecoderLayer"]


class MoDMistralForCausalLM(MoDForCausalLMMixin, MistralForCausalLM):
    """Mistral with routers."""

    config_class = MoDMistralConfig
    model_class = MoDMistralModel


class MoDQwen2DecoderLayer(MoDDecoderLayerMixin, Qwen2DecoderLayer):
    """A Qwen2 layer with a router."""


class MoDQwen2Model(MoDModelMixin, Qwen2Model):
    """Qwen2 without its head, with routers."""

    config_class = MoDQwen2Config
    decoder_layer_class = MoDQwen2DecoderLayer
    _no_split_modules = ["Qwen2DecoderLayer", "MoDQwen2DecoderLayer"]


class MoDQwen2ForCausalLM(MoDForCausalLMMixin, Qwen2ForCausalLM):
    """Qwen2 with routers."""

    config_class = MoDQwen2Config
    model_class = MoDQwen2Model


class MoDQwen3DecoderLayer(MoDDecoderLayerMixin, Qwen3DecoderLayer):
    """A Qwen3 layer with a router."""


class MoDQwen3Model(MoDModelMixin, Qwen3Model):
    """Qwen3 without its head, with routers."""

    config_class = MoDQwen3Config
    decoder_layer_class = MoDQwen3DecoderLayer
    _no_split_modules = ["Qwen3DecoderLayer", "MoDQwen3DecoderLayer"]


class MoDQwen3ForCausalLM(MoDForCausalLMMixin, Qwen3ForCausalLM):
    """Qwen3 with routers."""

    config_class = MoDQwen3Config
    model_class = MoDQwen3Model


for _config_class, _model_class in (
    (MoDLlamaConfig, MoDLlamaForCausalLM),
    (MoDMistralConfig, MoDMistralForCausalLM),
    (MoDQwen2Config, MoDQwen2ForCausalLM),
    (MoDQwen3Config, MoDQwen3ForCausalLM),
):
    # `save_pretrained` then writes `auto_map` and copies these files into the checkpoint
    _config_class.register_for_auto_class()
    _model_class.register_for_auto_class("AutoModelForCausalLM")
