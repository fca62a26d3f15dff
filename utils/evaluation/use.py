"""What a routed model is in use: three figures of the answers that it gives to prompts, beside its dense base.

Both answer each prompt greedily. *Agreement* is the share of the dense model's answer tokens, its end of turn
included, that the routed model would give too, had it the same tokens before it. *Executed* is the share of routed
computations that this executes, of the prompt's and the answer's tokens alike: what the capacity comes to in
generation; *skipped* is the share of the decoder layers' parameters that it leaves out, for a token. *Foreign* is by
how many nats a token the dense model finds the routed model's answer less likely than its own.

As in generation, a sequence is decided by its prompt, and the cache holds the decision while it is answered. A prompt's
figures do not depend on the batch that it is in. It is the likeliest token that counts, so what a checkpoint's
`generation_config.json` says of sampling and penalties does not enter: `generate` is not used.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.io.errors import UserError
from utils.model.costs import capacity_weights, skipped_share

Prompt = Mapping[str, Any]
"""`text`, to be shown; `input_ids`, a list of integers; `end_token`, the id that ends an answer besides the model's."""

FIGURES = ("agreement", "executed", "skipped", "foreign")
WITHOUT_ANSWERS = FIGURES[:3]
"""Those that need no answers of the routed model."""
NEW_TOKENS = 40
"""Length of an answer, at most."""


def longest_prompt(positions: int, max_seq_length: int, max_new_tokens: int = NEW_TOKENS) -> int:
    """Return how many tokens a prompt may have.

    Args:
        positions: tokens that the model takes.
        max_seq_length: tokens of a row of its training.
        max_new_tokens: that an answer needs room for.
    """
    return min(max_seq_length, positions - max_new_tokens)


@torch.inference_mode()
def figures_of_use(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int = 8,
    progress: Callable[[int], Any] = lambda answered: None,
    capacities: Sequence[float] = (),
) -> dict[str, Any]:
    """Let a routed model and its dense base answer prompts, and compare.

    Args:
        model: a routed model; left in evaluation mode.
        tokenizer: turns answers into text, and says which token ends them.
        prompts: as `utils.data.prompts.encode_prompts` makes them.
        max_new_tokens: length of an answer, at most.
        batch_size: prompts answered at a time.
        progress: called with the number of prompts that a batch has had.
        capacities: other capacities of the model, for agreement and executed, which need no further generation.

    Returns:
        `use`: for each of `FIGURES` its `mean` and `stderr` (None for a single prompt), and `prompts` and
        `max_new_tokens`. Agreement is of all tokens together, the others are means over prompts. `answers`: for each
        prompt, in their order, `prompt`, `dense` and `routed` as text, `tokens` (of the dense answer), and the figures.
        `use_at`: of each of the capacities what `use` has, less foreign.

    Raises:
        UserError: there is no prompt, one of them is empty or leaves no place for an answer, or a number is below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    check_prompts(prompts, model.config.max_position_embeddings, max_new_tokens)
    model.eval()
    ends = _end_tokens(model, tokenizer)
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]["input_ids"]))
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        rows = longest_first[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        for row, figures in zip(rows, _compare(model, batch, ends, max_new_tokens, capacities), strict=True):
            texts = {
                name: tokenizer.decode(figures.pop(f"{name}_tokens"), skip_special_tokens=True)
                for name in ("dense", "routed")
            }
            answers[row] = {"prompt": prompts[row]["text"], **texts, **figures}
        progress(len(rows))
    of_all = {"prompts": len(prompts), "max_new_tokens": max_new_tokens}
    at = [answer.pop("at") for answer in answers]
    return {
        "use": summarize(answers) | of_all,
        "answers": answers,
        "use_at": {
            capacity: summarize([of[capacity] for of in at], WITHOUT_ANSWERS) | of_all for capacity in capacities
        },
    }


def check_prompts(prompts: Sequence[Prompt], positions: int, max_new_tokens: int) -> None:
    """Refuse prompts that cannot be answered.

    Args:
        positions: tokens that the model takes.

    Raises:
        UserError: as `figures_of_use`.
    """
    if not prompts:
        raise UserError("no prompts: figures of use need at least one")
    for number, prompt in enumerate(prompts, 1):
        tokens = len(prompt["input_ids"])
        if tokens == 0:
            raise UserError(f"prompt {number} of {len(prompts)} is empty")
        if tokens + max_new_tokens > positions:
            raise UserError(
                f"prompt {number} of {len(prompts)} ({prompt['text'][:40]!r}) has {tokens} tokens, and with "
                f"max_new_tokens {max_new_tokens} that is more than the {positions} that the model takes: shorten it, "
                "or leave it out"
            )


def summarize(
    answers: Sequence[Mapping[str, Any]], figures: Sequence[str] = FIGURES
) -> dict[str, dict[str, float | None]]:
    """Return mean and standard error of each of the `figures` over prompts.

    Args:
        answers: each with the figures and `tokens`.
        figures: of `FIGURES`.

    Returns:
        `mean` and `stderr` by name. Agreement is a ratio of sums, so that each token counts alike; its error is that of
        the ratio's linearisation.
    """
    mean_tokens = statistics.fmean(answer["tokens"] for answer in answers)
    summary = {}
    for name in figures:
        weights = [answer["tokens"] / mean_tokens if name == "agreement" else 1.0 for answer in answers]
        values = [answer[name] for answer in answers]
        mean = statistics.fmean(values, weights)
        stderr = None
        if len(answers) > 1:
            squares = sum((weight * (value - mean)) ** 2 for weight, value in zip(weights, values, strict=True))
            stderr = (squares / (len(answers) * (len(answers) - 1))) ** 0.5
        summary[name] = {"mean": mean, "stderr": stderr}
    return summary


def text_of(figure: Mapping[str, float | None], form: str = ".3f") -> str:
    """Return a figure's mean and, where there is one, its standard error as text."""
    error = "" if figure["stderr"] is None else f" ± {figure['stderr']:{form}}"
    return f"{figure['mean']:{form}}{error}"


@dataclass
class _Batch:
    """Prompts side by side.

    Args:
        input_ids: int64 [prompts, tokens], padded on the left.
        mask: int64, same shape, 1 for real tokens.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token in its prompt, int64, same shape."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def lengths(self) -> torch.Tensor:
        """Number of real tokens, int64 [prompts, 1]."""
        return self.mask.sum(dim=1, keepdim=True)


def _compare(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    ends: Iterable[int],
    max_new_tokens: int,
    capacities: Sequence[float],
) -> list[dict[str, Any]]:
    """Return of each prompt its figures, `tokens`, both answers as `dense_tokens` and `routed_tokens`.

    `at` has `WITHOUT_ANSWERS` and tokens by capacity.
    """
    input_ids, mask = _pad([prompt["input_ids"] for prompt in prompts], "left", model.device)
    batch = _Batch(input_ids, mask)
    stops = [frozenset({*ends, prompt["end_token"]}) for prompt in prompts]
    dense = _answer(model, batch, stops, max_new_tokens, route=False)
    routed = _answer(model, batch, stops, max_new_tokens, route=True)
    agreed, executed, skipped = _follow(model, batch, dense, stops)
    strange = _surprise(model, batch, routed) - _surprise(model, batch, dense)
    at: list[dict[float, dict[str, float]]] = [{} for _ in prompts]
    settings = model.config.mod_settings
    try:
        for capacity in capacities:
            model.set_capacity(capacity)
            for row, figures in enumerate(zip(*_follow(model, batch, dense, stops), strict=True)):
                at[row][capacity] = dict(zip(WITHOUT_ANSWERS, map(float, figures), strict=True)) | {
                    "tokens": len(dense[row])
                }
    finally:
        model.set_mod_settings(settings)
    return [
        {
            "agreement": agreement,
            "executed": share,
            "skipped": saved,
            "foreign": nats,
            "tokens": len(own),
            "dense_tokens": own,
            "routed_tokens": other,
            "at": others,
        }
        for agreement, share, saved, nats, own, other, others in zip(
            *(figure.tolist() for figure in (agreed, executed, skipped, strange)), dense, routed, at, strict=True
        )
    ]


def _answer(
    model: PreTrainedModel, batch: _Batch, stops: Sequence[frozenset[int]], max_new_tokens: int, route: bool
) -> list[list[int]]:
    """Decode greedily; an answer ends with the first of its prompt's `stops`."""
    answers: list[list[int]] = [[] for _ in stops]
    open_rows = set(range(len(stops)))
    input_ids, mask, positions, cache = batch.input_ids, batch.mask, batch.positions, None
    for _ in range(max_new_tokens):
        output = model(
            input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            route=route,
        )
        likeliest, cache = output.logits[:, -1].argmax(dim=-1), output.past_key_values
        tokens = likeliest.tolist()
        for row in tuple(open_rows):
            answers[row].append(tokens[row])
            if tokens[row] in stops[row]:
                open_rows.remove(row)
        if not open_rows:
            break
        input_ids = likeliest[:, None].to(batch.mask.device)
        mask, positions = torch.cat([mask, torch.ones_like(input_ids)], dim=1), positions[:, -1:] + 1
    return answers


def _follow(
    model: PreTrainedModel, batch: _Batch, answers: Sequence[list[int]], stops: Sequence[frozenset[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the routed model along the dense model's answers, decided on the prompts.

    Returns:
        The share of each answer's tokens that the routed model finds likeliest too, the share of routed computations
        executed, and what that skips, float [prompts] each.
    """
    tokens, given = _pad(answers, "right", batch.mask.device)
    prefill = model(
        batch.input_ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=True, logits_to_keep=1
    )
    rest = model(
        tokens,
        attention_mask=torch.cat([batch.mask, given], dim=1),
        position_ids=batch.lengths + torch.arange(tokens.shape[1], device=tokens.device),
        past_key_values=prefill.past_key_values,
        use_cache=True,
    )
    likeliest = torch.cat([prefill.logits, rest.logits[:, :-1]], dim=1).argmax(dim=-1).to(tokens.device)
    agreed = ((likeliest == tokens) * given).sum(dim=1) / given.sum(dim=1)
    if model.mod_settings.level == "sequence":
        return agreed, *_of_executed(model, prefill.router_gates)
    # the token that ends an answer is never read
    read = given.clone()
    for row, (answer, ending) in enumerate(zip(answers, stops, strict=True)):
        if answer[-1] in ending:
            read[row, len(answer) - 1] = 0
    gates = torch.cat([prefill.router_gates, rest.router_gates], dim=2).double()
    gates = gates.mean(dim=3) if gates.dim() == 4 else gates  # [routers, prompts, tokens]
    counted = torch.cat([batch.mask, read], dim=1).to(gates.device)
    return agreed, *_of_executed(model, (gates * counted).sum(dim=2) / counted.sum(dim=1))


def _of_executed(model: PreTrainedModel, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the capacity, and what it skips, float64 [prompts] each, of shares executed [routers, prompts]."""
    config, settings = model.config.to_dict(), model.config.mod_settings
    of_prompts = [dict(zip(settings.places, column, strict=True)) for column in shares.T.tolist()]
    skipped = [skipped_share(config, settings, executed) for executed in of_prompts]
    return over_routers(model, shares), torch.tensor(skipped, dtype=torch.float64)


def over_routers(model: PreTrainedModel, gates: torch.Tensor) -> torch.Tensor:
    """Return the capacity, float64 [...], of gates [routers, ...]."""
    weights = capacity_weights(model.config.to_dict(), model.mod_settings)
    return torch.tensordot(gates.new_tensor(list(weights.values()), dtype=torch.float64), gates.double(), dims=1)


def _surprise(model: PreTrainedModel, batch: _Batch, answers: Sequence[list[int]]) -> torch.Tensor:
    """Return the nats a token, float32 [prompts], that answers cost the dense model."""
    tokens, given = _pad(answers, "right", batch.mask.device)
    logits = model(
        torch.cat([batch.input_ids, tokens], dim=1),
        attention_mask=torch.cat([batch.mask, given], dim=1),
        position_ids=torch.cat(
            [batch.positions, batch.lengths + torch.arange(tokens.shape[1], device=tokens.device)], dim=1
        ),
        use_cache=False,
        logits_to_keep=tokens.shape[1] + 1,
        route=False,
    ).logits[:, :-1]
    tokens, given = tokens.to(logits.device), given.to(logits.device)
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")
    return (nats * given).sum(dim=1) / given.sum(dim=1)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return what ends generation by the model and by its tokenizer."""
    by_model = model.generation_config.eos_token_id
    ends = {*(by_model if isinstance(by_model, list | tuple) else [by_model]), tokenizer.eos_token_id}
    return {token for token in ends if token is not None}


def _pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of token ids as one tensor, int64 [rows, longest], and its mask, int64, same shape."""
    tensors = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(tensors, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side=side)
    return input_ids.to(device), mask.to(device)
