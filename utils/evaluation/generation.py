"""Generate from messages, streamed, and observe what was executed, how fast, and what the cache holds."""

import time
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from utils.model.cache_mod import MoDCache
from utils.model.configuration_mod import Place, layer_of, place_name
from utils.model.costs import capacity_of, capacity_weights, skipped_share
from utils.model.generation import generation_by

from .kv_memory import kv_bytes_by_layer


@dataclass
class Generation:
    """What one generation was.

    Args:
        token_ids: int64 [new tokens], of the answer.
        prompt_tokens: number of tokens before it.
        prefill_seconds: from the start to the logits of the first new token.
        decode_seconds: from there to those of the last.
        shares: place of a router -> share of its decisions that executed; empty for a dense run.
        capacity: of them all, as `capacity_weights` counts them; None for a dense run.
        skipped: share of the decoder layers' parameters that was not computed with for a token; None for a dense run.
        kv_bytes: keys and values of each layer at the end.
    """

    token_ids: torch.Tensor
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    shares: dict[Place, float]
    capacity: float | None
    skipped: float | None
    kv_bytes: list[int]

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decode; None where a single token was generated."""
        return (len(self.token_ids) - 1) / self.decode_seconds if len(self.token_ids) > 1 else None


class _Observer:
    """Listens to the outputs of a model's forward while it is attached."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.times: list[float] = []
        self.gates: list[torch.Tensor] = []

    def __enter__(self) -> "_Observer":
        self.handle = self.model.register_forward_hook(self._observe)
        return self

    def __exit__(self, *exception) -> None:
        self.handle.remove()

    @torch.compiler.disable  # generate compiles steps with a static cache on a GPU; this is not a part of them
    def _observe(self, model, inputs, output) -> None:
        if output.logits.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        gates = getattr(output, "router_gates", None)
        if gates is not None:
            self.gates.append(gates.flatten(1).clone())  # [routers, decisions]


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    streamer: BaseStreamer,
    max_new_tokens: int,
    route: bool = True,
    static: bool = False,
    **options,
) -> Generation:
    """Generate after one prompt.

    Args:
        model: a routed model.
        input_ids: int64 [1, tokens], on the model's device.
        streamer: gets the tokens as they come.
        max_new_tokens: length of the answer, at most.
        route: False runs the dense base.
        static: take a cache of fixed shape, with which transformers compiles the steps on a GPU.
        **options: of transformers' `GenerationConfig`; what the model's files say besides does not enter.

    Returns:
        The new tokens and what was observed.
    """
    if static:
        cache: Cache = StaticCache(config=model.config, max_cache_len=input_ids.shape[1] + max_new_tokens)
    else:
        cache = MoDCache(model.config) if route else DynamicCache(config=model.config)
    start = time.perf_counter()
    with generation_by(model, max_new_tokens=max_new_tokens, **options) as config, _Observer(model) as observer:
        output = model.generate(
            input_ids,
            generation_config=config,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            streamer=streamer,
            route=route,
        )
    shares, capacity, skipped, settings = {}, None, None, model.config.mod_settings
    if route:
        executed = torch.cat(observer.gates, dim=1).mean(dim=1).tolist()
        shares = dict(zip(settings.places, executed, strict=True))
        config = model.config.to_dict()
        capacity = capacity_of(shares, capacity_weights(config, settings))
        skipped = skipped_share(config, settings, shares)
    return Generation(
        token_ids=output[0, input_ids.shape[1] :],
        prompt_tokens=input_ids.shape[1],
        prefill_seconds=observer.times[0] - start,
        decode_seconds=observer.times[-1] - observer.times[0],
        shares=shares,
        capacity=capacity,
        skipped=skipped,
        kv_bytes=kv_bytes_by_layer(cache),
    )


def describe(generation: Generation) -> str:
    """Return share and KV memory of each routed layer, and speed, as text."""
    lines = []
    if generation.shares:
        width = max(5, *(len(place_name(place)) for place in generation.shares))
        lines.append(f"{'layer':<{width}}  executed   KV KiB")
        for place, share in generation.shares.items():
            of_layer = generation.kv_bytes[layer_of(place)] / 1024
            lines.append(f"{place_name(place):>{width}}  {share:>8.2f}  {of_layer:>7.1f}")
        lines.append(
            f"{'all':>{width}}  {generation.capacity:>8.2f}  of the routed layers; skipped "
            f"{generation.skipped:.1%} of the layers' parameters for a token"
        )
    speed = generation.tokens_per_second
    lines.append(
        f"{generation.prompt_tokens} tokens read in {generation.prefill_seconds:.2f} s, {len(generation.token_ids)} "
        f"generated{'' if speed is None else f' at {speed:.1f} tokens/s'}; KV cache {sum(generation.kv_bytes)} bytes"
    )
    return "\n".join(lines)
