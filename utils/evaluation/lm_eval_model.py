"""A checkpoint as a model of lm-evaluation-harness: `mod` gives at any batch size what `hf` gives at batch size 1.

The harness (0.4.13) pads a batch of log-likelihood requests on the right with token 0 and tells the model nothing of
it, and a sequence decision would count the padding. This class scores the same requests with an attention mask. A
batch without padding is run exactly as the harness runs it.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from utils.io.devices import choose_device
from utils.io.errors import UserError
from utils.model.checkpoint import is_mod, load_mod_model, load_tokenizer, read_config, read_settings
from utils.model.configuration_mod import MoDSettings

from .capacity import CapacityMeter

logger = logging.getLogger(__name__)

POOLS = ("all", "context")
"""What a sequence decision sees in a log-likelihood request: context and continuation, or the context alone."""


def choose_pool(settings: MoDSettings, pool: str | None) -> str:
    """Return what a sequence decision is to see: `pool` if it is given, else what the checkpoint was calibrated for.

    Raises:
        UserError: there is no such pool.
    """
    if pool is None:
        return "context" if settings.sequence_pooling == "prompt" else "all"
    if pool not in POOLS:
        raise UserError(f"pool {pool!r} is not one of {', '.join(POOLS)}")
    return pool


def load_model(
    directory: str | Path, dtype: str = "auto", capacity: float | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a MoD checkpoint or a dense base in evaluation mode.

    Args:
        dtype: auto is the checkpoint's own.
        capacity: another than the checkpoint's own, which it was calibrated for.
        **kwargs: of `from_pretrained`.

    Raises:
        UserError: it is neither, its weights don't fit, or it wasn't calibrated for this capacity.
    """
    settings = read_settings(directory, capacity)
    if is_mod(read_config(directory)):
        return load_mod_model(directory, settings, dtype=dtype, **kwargs).eval()
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **kwargs).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no model could be loaded: {' '.join(str(error).split())}") from None


@register_model("mod")
class MoDLM(HFLM):
    """Scores requests with a routed model, or a dense one, and counts what its routers executed.

    Args:
        pretrained: a checkpoint's directory, or a loaded model.
        tokenizer: default the checkpoint's; needed with a loaded model.
        pool: `all`, as published: in a log-likelihood request a sequence decision sees context and continuation;
            `context`: the context alone, as in generation. Default: the one that the checkpoint was calibrated for,
            `all` where it doesn't say.
        capacity: where `pretrained` is a directory, another share to execute than the checkpoint's own.
        route: False evaluates the dense base of a routed model.
        device, dtype: where `pretrained` is a directory.
        batch_size: an integer.
        **kwargs: as `HFLM` takes them (`max_length`, `add_bos_token`, ...).
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        tokenizer: Any = None,
        pool: str | None = None,
        capacity: float | None = None,
        route: bool = True,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = 1,
        **kwargs: Any,
    ):
        if not str(batch_size or 1).isdigit():
            raise UserError(f"batch_size {batch_size!r} must be a number: with --model mod it changes no result")
        if isinstance(pretrained, PreTrainedModel):
            if capacity is not None:
                raise UserError(f"capacity {capacity}: a loaded model is set by its `set_capacity`; leave it out")
        else:
            choose_pool(read_settings(pretrained, capacity), pool)  # refused before anything is loaded
            tokenizer = tokenizer or load_tokenizer(pretrained)
            device = choose_device(device)
            pretrained = load_model(pretrained, dtype, capacity).to(device)
        super().__init__(
            pretrained=pretrained, tokenizer=tokenizer, backend="causal", batch_size=int(batch_size or 1), **kwargs
        )
        settings = getattr(pretrained, "mod_settings", None)
        self.route = route and settings is not None
        self._options = {} if settings is None else {"route": self.route}
        self._pools_context = self.route and settings.level == "sequence" and choose_pool(settings, pool) == "context"
        self.meter = CapacityMeter(pretrained) if self.route else None

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            requests: of each what lm-eval caches it by, the context's tokens and the continuation's.
            override_bs: batch size instead of the model's.

        Returns:
            Of each the sum of its continuation's log-probabilities in nats, and whether greedy decoding gives it.
        """
        # as in the harness, requests that differ in their last token alone are computed once
        same_input: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            window = (context + continuation)[-(self.max_length + 1) :]
            decided_on = len(window) - len(continuation) if self._pools_context else 0
            same_input[tuple(window[:-1]), decided_on].append(index)
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            logger.warning("%d of %d requests are cut on the left to %d tokens", cut, len(requests), self.max_length)
        inputs = sorted(same_input, key=lambda item: (-len(item[0]), item))
        answers: list[Any] = [None] * len(requests)
        size = override_bs or self.batch_size
        with tqdm(total=len(requests), desc="log-likelihood", unit="request", disable=disable_tqdm or None) as bar:
            for start in range(0, len(inputs), size):
                batch = inputs[start : start + size]
                counts = [max(len(requests[index][2]) for index in same_input[item]) for item in batch]
                for item, logits in zip(batch, self._logits(batch, counts), strict=True):
                    for index in same_input[item]:
                        key, _, continuation = requests[index]
                        answers[index] = _score(logits[-len(continuation) :], continuation, self.softmax_dtype)
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, answers[index])
                        bar.update(1)
        return answers

    def _logits(self, batch: Sequence[tuple[tuple[int, ...], int]], counts: Sequence[int]) -> list[torch.Tensor]:
        """Return the logits [tokens, vocabulary] of each input's last tokens, of at least as many as `counts` says."""
        rows = [torch.tensor(tokens, device=self.device) for tokens, _ in batch]
        if not self._pools_context:
            input_ids, mask = _pad(rows, "right")
            # those of whole contexts would take more memory than all else
            first = min(len(tokens) - count for tokens, count in zip(rows, counts, strict=True))
            keep = input_ids.shape[1] - first
            logits = self._forward(input_ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
            return [logits[row, : len(tokens) - first] for row, tokens in enumerate(rows)]

        contexts, rests = zip(*((row[:n], row[n:]) for row, (_, n) in zip(rows, batch, strict=True)), strict=True)
        input_ids, mask = _pad(contexts, "left")
        positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp(min=0)
        prefill = self._forward(
            input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache(config=self.model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        if max(map(len, rests)) == 0:
            return list(prefill.logits)
        rest_ids, rest_mask = _pad(rests, "right")
        if mask is not None or rest_mask is not None:
            mask = torch.ones_like(input_ids) if mask is None else mask
            rest_mask = torch.ones_like(rest_ids) if rest_mask is None else rest_mask
            mask = torch.cat([mask, rest_mask], dim=1)
        lengths = torch.tensor([[len(context)] for context in contexts], device=self.device)
        logits = self._forward(
            rest_ids,
            attention_mask=mask,
            position_ids=lengths + torch.arange(rest_ids.shape[1], device=self.device),
            past_key_values=prefill.past_key_values,
            use_cache=True,
        ).logits
        return [torch.cat([prefill.logits[row], logits[row, : len(rest)]]) for row, rest in enumerate(rests)]

    def _forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        given = {name: value for name, value in kwargs.items() if value is not None}
        with torch.no_grad(), autocast:
            return self.model(input_ids, **given, **self._options)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, **kwargs, **self._options)


def _pad(rows: Sequence[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return rows [tokens_i] as one tensor [rows, longest], and its mask; None where nothing was padded."""
    input_ids = pad_sequence(rows, batch_first=True, padding_side=side)
    if all(len(row) == input_ids.shape[1] for row in rows):
        return input_ids, None
    return input_ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)


def _score(logits: torch.Tensor, continuation: list[int], dtype: torch.dtype | None) -> tuple[float, bool]:
    """Score a continuation by the logits [tokens, vocabulary] that predict its tokens."""
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=dtype)
    tokens = torch.tensor(continuation, device=logits.device)
    greedy = bool((log_probabilities.argmax(dim=-1) == tokens).all())
    return float(log_probabilities.gather(1, tokens.unsqueeze(-1)).squeeze(-1).unsqueeze(0).sum()), greedy
