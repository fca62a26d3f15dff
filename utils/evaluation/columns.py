"""The models that the benchmark compares, side by side on one set of weights.

Each is a model of its own, built without weights and then given the modules of the loaded one, so that all of them
take the memory of one. Nothing is patched: what is executed is forced by a model's own routers and threshold, and the
columns without routers have decoder layers that lack the branch, or run it on a part of the batch.

    dense        the base class of transformers: no routing code at all
    all_kept     every router at zero, which keeps everything: what routing itself costs
    tuned        the checkpoint as it is
    random       routers that ignore their input and keep a given share
    share_alone  the base class whose routed branches run on as many inputs as `random` keeps, the first ones: what is
                 left to save of them on this machine, without router, gather and mask; its text means nothing
    all_skipped  every router at zero under a higher threshold, which skips everything
    unreplaced   the same without substitutes, where there are some: the difference is what they cost
    oracle       the base class without the routed layers' branch: what skipping can cost at best

Substitutes are a part of `tuned`, `random` and `all_skipped`, and of no other column.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from utils.model.cache_mod import MoDCache
from utils.model.configuration_mod import MoDSettings, layer_of, module_name
from utils.model.moe_mod import add_shared_experts
from utils.model.projections_mod import keys_and_values, queries_of
from utils.model.routing_mod import MoDRouter

COLUMNS = ("dense", "all_kept", "tuned", "random", "share_alone", "all_skipped", "unreplaced", "oracle")

SEED = 233
"""Of the decisions of the random column; the layer's index is added."""


@dataclass
class Column:
    """One of the compared models.

    Args:
        name: one of `COLUMNS`.
        model: in evaluation mode.
        make_cache: returns an empty cache for it.
    """

    name: str
    model: PreTrainedModel
    make_cache: Callable[[], Cache]

    @property
    def routed(self) -> bool:
        """Whether the model has routers, and returns what they decided."""
        return self.name not in ("dense", "share_alone", "oracle")


def kept_of(inputs: int, share: float, offset: float) -> int:
    """Return how many of `inputs` a layer keeps; `offset`, in (0, 1), spread over layers, makes their sum right."""
    return int(share * inputs + offset)


class RandomRouter(MoDRouter):
    """Keep a share of the inputs whatever they are, the same ones in each call of a size.

    Args:
        hidden_size: width of the model.
        share: share of the inputs to keep; where experts are routed, of all pairs of a token and an expert.
        offset: of `kept_of`.
        seed: of the choice.
        num_experts: of a layer, where they are routed.
    """

    def __init__(self, hidden_size: int, share: float, offset: float, seed: int, num_experts: int | None = None):
        super().__init__(hidden_size, num_experts)
        self.share, self.offset, self.seed = share, offset, seed
        self.drawn: dict[int, torch.Tensor] = {}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [...], of 1 (kept) and -1 for `hidden_states` [..., hidden_size]."""
        logits = super().forward(hidden_states)  # zeros: a router's usual work
        inputs = logits.numel()
        if inputs not in self.drawn:  # drawing takes longer than routing
            generator = torch.Generator(logits.device).manual_seed(self.seed)
            order = torch.randperm(inputs, generator=generator, device=logits.device)
            self.drawn[inputs] = torch.where(order < kept_of(inputs, self.share, self.offset), 1.0, -1.0)
        return logits + self.drawn[inputs].view_as(logits)


class WithoutAttention(nn.Module):
    """A decoder layer whose attention is gone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.mlp, self.post_attention_layernorm = layer.mlp, layer.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Run the MLP on `hidden_states` [batch, tokens, hidden_size]."""
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class WithoutMLP(nn.Module):
    """A decoder layer whose MLP is gone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.self_attn, self.input_layernorm = layer.self_attn, layer.input_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Run the attention on `hidden_states` [batch, tokens, hidden_size]."""
        return hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]


class WithoutBlock(nn.Module):
    """A decoder layer that does nothing."""

    def __init__(self, layer: nn.Module):
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return `hidden_states`."""
        return hidden_states


class WithoutExperts(nn.Module):
    """A decoder layer whose experts are gone, but for those that every token has."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.self_attn, self.input_layernorm = layer.self_attn, layer.input_layernorm
        self.mlp, self.post_attention_layernorm = layer.mlp, layer.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Run attention and shared experts on `hidden_states` [batch, tokens, hidden_size]."""
        hidden_states = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        if not hasattr(self.mlp, "shared_expert") and not hasattr(self.mlp, "shared_experts"):
            return hidden_states
        normed = self.post_attention_layernorm(hidden_states)
        return add_shared_experts(self.mlp, normed, hidden_states)


class ShareAlone(nn.Module):
    """A decoder layer whose branch runs on the first of its inputs alone: of the sequences, or of each one's tokens.

    Args:
        layer: the base's layer.
        settings: what is routed.
        share: share of the inputs to run on.
        offset: of `kept_of`.
    """

    def __init__(self, layer: nn.Module, settings: MoDSettings, share: float, offset: float):
        super().__init__()
        self.layer, self.settings, self.share, self.offset = layer, settings, share, offset

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Run the layer on `hidden_states` [batch, tokens, hidden_size]."""
        (rows, each), target = hidden_states.shape[:2], self.settings.target
        if target in ("mlp", "expert"):
            hidden_states = hidden_states + self._attend(hidden_states, **kwargs)
        if self.settings.level == "token" and each > 1:
            each = kept_of(each, self.share, self.offset)
        else:
            rows = kept_of(rows, self.share, self.offset)
        if target == "expert":
            return self._add_experts_to_part(hidden_states, rows, each)
        part = hidden_states[:rows, :each]  # of two branches that are routed apart, both run on it
        if target != "mlp" and self.settings.level == "token":
            part = part + self._attend_part(hidden_states, rows, each, **kwargs)
        elif target != "mlp" and rows > 0:
            part = part + self._attend(part, **kwargs)
        if target != "attn":
            part = self._add_mlp(part)
        hidden_states = hidden_states.clone()
        hidden_states[:rows, :each] = part
        return self._add_mlp(hidden_states) if target == "attn" else hidden_states

    def _attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.layer.self_attn(hidden_states=self.layer.input_layernorm(hidden_states), **kwargs)[0]

    def _add_mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.layer.mlp(self.layer.post_attention_layernorm(hidden_states))

    def _attend_part(
        self, hidden_states: torch.Tensor, rows: int, each: int, position_embeddings, past_key_values, **kwargs
    ) -> torch.Tensor:
        """Attend from `each` queries of `rows` sequences, without a mask, to as many keys as a token sees on average.

        Keys and values are those of all tokens.
        """
        attention, (batch, tokens) = self.layer.self_attn, hidden_states.shape[:2]
        normed = self.layer.input_layernorm(hidden_states)
        keys, values = keys_and_values(attention, normed, position_embeddings, past_key_values)
        if rows * each == 0:
            return hidden_states[:rows, :each]
        chosen = torch.arange(batch * tokens, device=normed.device).view(batch, tokens)[:rows, :each].flatten()
        queries = queries_of(attention, normed, chosen, position_embeddings).unflatten(0, (rows, each))
        seen = keys.shape[2] - tokens + (tokens + 1) // 2
        output = nn.functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys[:rows, :, :seen],
            values[:rows, :, :seen],
            scale=attention.scaling,
            enable_gqa=True,
        )
        return attention.o_proj(output.transpose(1, 2).flatten(2))

    def _add_experts_to_part(self, hidden_states: torch.Tensor, rows: int, each: int) -> torch.Tensor:
        """Run the experts on `each` tokens of `rows` sequences, and those that every token has on all."""
        block, normed = self.layer.mlp, self.layer.post_attention_layernorm(hidden_states)
        output = torch.zeros_like(normed)
        part = normed[:rows, :each].reshape(-1, normed.shape[-1])
        if len(part) > 0:
            _, weights, experts = block.gate(part)
            output[:rows, :each] = block.experts(part, experts, weights).view(rows, each, -1)
        return hidden_states + add_shared_experts(block, normed, output)


_WITHOUT = {
    "attn": WithoutAttention,
    "mlp": WithoutMLP,
    "block": WithoutBlock,
    "attn_mlp": WithoutBlock,
    "expert": WithoutExperts,
}


class PartialCache(DynamicCache):
    """The cache of a model some of whose layers have no attention: those count as the others of their kind do.

    Args:
        config: the model's config.
        attending: indices of the layers with attention.
    """

    def __init__(self, config, attending: list[int]):
        super().__init__(config=config)
        self.attending = attending

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return super().get_seq_length(self._stand_in(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset of the keys that a mask has to cover."""
        return super().get_mask_sizes(query_length, self._stand_in(layer_idx))

    def _stand_in(self, layer_idx: int) -> int:
        kind = type(self.layers[layer_idx])  # with or without a sliding window
        return next((index for index in self.attending if type(self.layers[index]) is kind), self.attending[0])


def make_columns(model: PreTrainedModel, random_share: float) -> list[Column]:
    """Build all columns around a loaded routed model.

    Args:
        model: a routed model, on its device and in its dtype; it is the column `tuned`.
        random_share: share of the inputs that the column `random` keeps.

    Returns:
        Columns in the order of `COLUMNS`, `unreplaced` where there are substitutes; all share the parameters of
        `model` but for the routers.
    """
    settings: MoDSettings = model.config.mod_settings
    num_experts = model.config.num_experts if settings.target == "expert" else None
    at_zero = [MoDRouter(model.config.hidden_size, num_experts) for _ in settings.places]
    offsets = [(number + 0.5) / len(settings.layers) for number in range(len(settings.layers))]
    offset_of = dict(zip(settings.layers, offsets, strict=True))
    random = [
        RandomRouter(
            model.config.hidden_size,
            random_share,
            offset_of[layer_of(place)],
            SEED + layer_of(place) + 1000 * (settings.branch_of(place) == "mlp" and len(settings.branches) > 1),
            num_experts,
        )
        for place in settings.places
    ]
    oracle, alone = dense_twin(model), dense_twin(model)
    for index, offset in offset_of.items():
        layers = oracle.get_decoder().layers
        layers[index] = _WITHOUT[settings.target](layers[index])
        layers = alone.get_decoder().layers
        layers[index] = ShareAlone(layers[index], settings, random_share, offset)
    depth = range(model.config.num_hidden_layers)
    attending = [index for index in depth if settings.target in ("mlp", "expert") or index not in settings.layers]
    models = {
        "dense": dense_twin(model),
        "all_kept": routed_twin(model, at_zero, threshold=0.5),
        "tuned": model.eval(),
        "random": routed_twin(model, random, threshold=0.5),
        "share_alone": alone.eval(),
        "all_skipped": routed_twin(model, at_zero, threshold=0.75),
        "oracle": oracle.eval(),
    }
    if settings.substitute is not None:
        models["unreplaced"] = routed_twin(model, at_zero, threshold=0.75, substitute=None)

    def make_cache(name: str) -> Callable[[], Cache]:
        config = models[name].config
        if name in ("share_alone", "oracle"):
            return lambda: PartialCache(config, attending)
        return lambda: DynamicCache(config=config) if name == "dense" else MoDCache(config)

    return [Column(name, models[name], make_cache(name)) for name in COLUMNS if name in models]


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return the dense model of transformers that a routed model extends, on the same weights."""
    base_class = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    fields = model.config.to_dict()
    for name in ("mod", "model_type", "auto_map", "architectures"):
        fields.pop(name, None)
    return _share_weights(base_class, base_class.config_class(**fields), model)


def routed_twin(model: PreTrainedModel, routers: list[MoDRouter], **changed) -> PreTrainedModel:
    """Return a routed model on the weights of `model`, with routers and these fields of the settings of its own."""
    settings = replace(model.config.mod_settings, **changed)
    fields = {name: value for name, value in model.config.to_dict().items() if name not in ("mod", "model_type")}
    twin = _share_weights(type(model), type(model.config)(**fields, mod=settings.to_dict()), model)
    for place, router in zip(settings.places, routers, strict=True):
        setattr(twin.get_decoder().layers[layer_of(place)], module_name(place, "router"), router.to(model.device))
    return twin


def _share_weights(model_class: type, config, source: PreTrainedModel) -> PreTrainedModel:
    """Build a model without weights and give it the modules of `source` that it has too, routers excepted."""
    config._attn_implementation = source.config._attn_implementation
    with torch.device("meta"):
        model = model_class(config)
    model.lm_head = source.lm_head
    inner, shared = model.get_decoder(), source.get_decoder()
    for name, child in shared.named_children():
        if name != "layers":
            setattr(inner, name, child)
    for layer, original in zip(inner.layers, shared.layers, strict=True):
        for name, child in original.named_children():
            if not isinstance(child, MoDRouter) and getattr(layer, name, None) is not None:
                setattr(layer, name, child)
    return model.eval()
