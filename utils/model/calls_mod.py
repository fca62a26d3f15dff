"""Which of transformers' calls a routed model answers: what can't be right is refused before anything is computed.

Right means: the tokens of plain generation, or of the dense specification. A decision for each token depends on that
token alone, and goes with nearly every call. A decision for a sequence needs the whole prompt at once, and one prompt
in a row. `tests/unit/test_calls.py` walks all options of `generate` and all keywords of `forward`. This file travels
inside every checkpoint.
"""

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_mod import holds_decisions
from .configuration_mod import MoDSettings
from .routing_mod import Decision

OURS = ("route", "execution", "gate_rule")
"""Keywords of the routed `forward` that `generate` hands through."""

ONE_SEQUENCE = "a decision for each sequence needs rows of one sequence each: "


def check_forward(
    settings: MoDSettings,
    inputs: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> None:
    """Refuse a forward that routing can't honour.

    Where positions are given without a mask, at the first call of a sequence, they are read on the host: transformers
    itself takes positions that start again for rows of several texts.

    Args:
        settings: of the routed model.
        inputs: the new tokens or their embeddings, [batch, tokens, ...].
        attention_mask: as the base model takes it.
        position_ids: int64 [1 or batch, tokens].
        past_key_values: the cache, or None.
        token_mask: bool [batch, tokens].
        is_causal: the keyword of transformers' attention functions.
        kwargs: the forward's further keywords.

    Raises:
        ValueError: without a mask of all pairs a token would attend to later ones; or, where sequences are decided on,
            rows hold several of them, the keys are in a paged cache, or `token_mask` has another shape than the input.
    """
    says_all = (
        isinstance(attention_mask, dict) or getattr(attention_mask, "ndim", 2) > 2 or kwargs.get("cache") is not None
    )
    if is_causal is False and not says_all:
        raise ValueError("is_causal=False: a routed model attends to earlier tokens only; leave it out")
    if settings.level == "token":
        return
    if kwargs.get("cache") is not None:
        raise ValueError(f"cache={type(kwargs['cache']).__name__}: {ONE_SEQUENCE}continuous batching mixes them")
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {ONE_SEQUENCE}pad them instead of packing them")
    shape = tuple(inputs.shape[:2])
    if token_mask is not None and tuple(token_mask.shape) != shape:
        raise ValueError(f"token_mask has the shape {list(token_mask.shape)}, but the input {list(shape)}")
    if position_ids is None or attention_mask is not None or shape[1] == 1:
        return
    if isinstance(past_key_values, Cache) and past_key_values.get_seq_length() > 0:
        return
    # under torch.compile the values aren't there to be looked at
    if not torch.compiler.is_compiling() and bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(f"position_ids that do not count up by one: {ONE_SEQUENCE}pad them instead of packing them")


class MoDGenerationMixin:
    """Over the language model: `generate` and its kin."""

    def generate(self, *args, **kwargs):
        """Generate as transformers does, and for sequences by the decision of the prompt, with and without a cache.

        Raises:
            ValueError: an option that routing can't honour; the message names it and the way out. Nothing has been
                computed by then.
        """
        options = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        options |= options.pop("kwargs", {})
        if options.get("route", True):
            self._check_generation(options)
        return super().generate(*args, **kwargs)

    def _check_generation(self, options: dict[str, Any]) -> None:
        """Refuse what `generate` can't do with routing; `options` are its arguments by name."""

        def option(name: str) -> Any:
            """Return an option's value by the precedence of `generate`, None where nobody set it."""
            configs = (options.get("generation_config"), self.generation_config)
            values = (options.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        def refuse(name: str, reason: str) -> None:
            value = options.get(name, option(name))
            shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
            raise ValueError(f"generate({name}={shown}) with routing: {reason}")

        if isinstance(option("custom_generate"), str) or option("trust_remote_code"):
            name = "custom_generate" if option("custom_generate") else "trust_remote_code"
            refuse(
                name, "code from the hub knows nothing of decisions; pass a function as custom_generate, or route=False"
            )
        if option("assistant_early_exit") is not None:
            refuse("assistant_early_exit", "the first layers alone lack routers of the rest; pass an assistant_model")
        for name in ("use_mtp", "speculation_type"):
            if option(name):
                refuse(name, "the model has no such drafts; pass an assistant_model or prompt_lookup_num_tokens")
        cache = option("cache_implementation")
        if cache not in (None, "dynamic", "static", "paged"):
            refuse(
                "cache_implementation",
                "only a growing or a static one can hold decisions; leave it out, or pass static or route=False",
            )
        for name in ("token_mask", "states_at"):
            if options.get(name) is not None:
                refuse(name, "it is of one forward, and generate makes many; leave it out")
        if options.get("synced_gpus") and options.get("execution") != "dense":
            refuse("synced_gpus", "processes that skip different layers wait for each other; pass execution='dense'")
        if self.mod_settings.level == "token":
            return
        whole_prompt = "a sequence is decided on its whole prompt at once; leave it out, or pass route=False"
        if cache == "paged":
            refuse("cache_implementation", whole_prompt)
        if option("prefill_chunk_size") is not None:
            refuse("prefill_chunk_size", whole_prompt)
        keep = options.get("logits_to_keep")
        if isinstance(keep, int) and keep > 1:
            refuse("logits_to_keep", "generate says with it how many tokens are drafts; leave it out")
        if option("guidance_scale") not in (None, 1) and option("use_cache") is False:
            refuse("guidance_scale", "the other prompt's decision is held in its cache; leave use_cache=False out")

    def init_continuous_batching(self, *args, **kwargs):
        """Start continuous batching as transformers does, for `generate_batch` too.

        Raises:
            ValueError: sequences are decided on: a prompt may come in several parts, beside others in one row.
        """
        if self.mod_settings.level == "sequence":
            raise ValueError(
                f"continuous batching with {self.mod_settings.granularity}: it takes prompts apart and packs them in "
                "one row, and a sequence is decided on its whole prompt at once; call generate"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs) -> dict[str, Any]:
        """Return `forward`'s keywords for one step of `generate`."""
        # transformers takes embeddings where they are in this signature
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        mask, cache = kwargs.get("attention_mask"), inputs.get("past_key_values")
        if (
            self.mod_settings.level == "sequence"
            and getattr(mask, "ndim", None) == 2
            and inputs["attention_mask"] is not mask  # for a static cache transformers makes the kernel's mask of it
            and not holds_decisions(cache, self.mod_settings)
        ):
            new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            inputs["token_mask"] = mask[:, -new.shape[1] :].bool().to(new.device)
        return inputs | {"drafted": True}

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], assistant_model=None, **kwargs):
        """Hand a model that drafts what it knows of, and nothing else: it may be a dense one."""
        if assistant_model is not None:
            known = set(inspect.signature(assistant_model.forward).parameters)
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OURS or name in known}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        """Carry the decisions of sequences to the next step, where no cache does."""
        gates = getattr(outputs, "router_gates", None)
        if gates is not None and self.mod_settings.level == "sequence" and not model_kwargs.get("use_cache"):
            of_routers = zip(self.mod_settings.places, outputs.router_scores, gates, strict=True)
            decisions = {place: Decision(scores, gate) for place, scores, gate in of_routers}
            model_kwargs["gate_rule"] = lambda place, inputs: decisions[place].to(inputs.device)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
