"""Speed and memory of prefill and decode, column by column, and the check that has to pass first.

All columns read the same prompts and, in decode, go on with the same real text, so that they do equal work. Each is
measured beside the dense base, and the two take turns every few tokens of a decode: what slows the machine down for a
while slows both, and ratios are taken within such a pair. So there are never more than two KV caches at a time. The
order of pairs, and within them, is drawn anew for each repeat. What is measured is the model's forward, without
tokenizer and sampling.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from utils.model.configuration_mod import MoDSettings
from utils.model.costs import layer_cost
from utils.model.routing_mod import decide

from .columns import Column
from .kv_memory import kv_bytes_by_layer
from .prompts import cut_prompts
from .timing import Stopwatch, median_with_interval, peak_memory, with_interval
from .use import over_routers

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far logits of equal decisions may lie apart, relative to the largest, by dtype: rounding, summed over layers."""

TURN = 8
"""Decoded tokens after which it is the other column's turn."""


class CheckFailedError(Exception):
    """Sparse execution does not give the numbers of the dense specification, so its speed means nothing."""


@torch.inference_mode()
def check_columns(columns: Sequence[Column], token_ids: torch.Tensor, length: int = 48, batch: int = 3) -> float:
    """Compare sparse execution with the dense specification, with a cache, and the forced columns with the base.

    Args:
        columns: of `make_columns`.
        token_ids: int64 [tokens], a text.
        length: tokens of each prompt, one of which is padded on the left; a few more are decoded.
        batch: number of prompts.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        CheckFailedError: a difference is beyond `BOUNDS`, or decisions differ other than by rounding.
    """
    by_name = {column.name: column for column in columns}
    device, dtype = by_name["tuned"].model.device, by_name["tuned"].model.dtype
    input_ids = cut_prompts(token_ids, batch, length + 3).to(device)
    mask = torch.ones_like(input_ids)
    mask[0, : length // 3] = 0
    worst = 0.0

    def run(name: str, execution: str | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Prefill, then decode a token and two; returns logits, scores and gates, all with the batch first."""
        column, outputs, start = by_name[name], [], 0
        cache = column.make_cache()
        for end in (length, length + 1, length + 3):
            options = {} if execution is None else {"execution": execution}
            outputs.append(
                column.model(input_ids[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True, **options)
            )
            start = end
        logits = torch.cat([output.logits for output in outputs], dim=1).float()
        if execution is None:
            return logits, None, None
        # [routers, batch], and at token level [..., tokens] or for experts [..., tokens, top_k]
        join = torch.stack if outputs[0].router_gates.dim() == 2 else torch.cat
        scores, gates = (
            join([getattr(output, name) for output in outputs], dim=2).transpose(0, 1).float()
            for name in ("router_scores", "router_gates")
        )
        return logits, scores, gates  # [batch, tokens, vocabulary] and twice [batch, routers, decisions, ...]

    def compare(what: str, logits: torch.Tensor, expected: torch.Tensor, rows: torch.Tensor) -> None:
        nonlocal worst
        counted = mask.bool() & rows[:, None]
        if not counted.any():
            return
        difference = float((logits - expected)[counted].abs().max() / expected[counted].abs().max())
        if not difference <= BOUNDS[dtype]:
            raise CheckFailedError(f"{what}: logits differ by {difference:.1e} of the largest, over {BOUNDS[dtype]}")
        worst = max(worst, difference)

    every_row = torch.ones(batch, dtype=torch.bool, device=device)
    base = {name: run(name, None)[0] for name in ("dense", "oracle")}
    for name in (column.name for column in columns if column.routed):
        logits, scores, gates = run(name, "sparse")
        expected, dense_scores, dense_gates = run(name, "dense")
        if scores.shape[2] == len(input_ids[0]):
            real = mask.bool()[:, None].view(batch, 1, -1, *[1] * (gates.dim() - 3)).expand_as(gates)
        else:
            real = torch.ones_like(gates, dtype=torch.bool)
        flipped = (gates != dense_gates) & real
        rounding = (scores - dense_scores).abs() <= BOUNDS[dtype]
        if not rounding[flipped].all():
            raise CheckFailedError(f"{name}: sparse and dense execution decide differently")
        compare(f"{name}, sparse against dense", logits, expected, rows=~flipped.flatten(1).any(dim=1))
        nothing_left = "unreplaced" if "unreplaced" in by_name else "all_skipped"
        forced = {"all_kept": "dense", nothing_left: "oracle"}.get(name)
        if forced:
            compare(f"{name} against {forced}", logits, base[forced], every_row)
    return worst


@torch.inference_mode()
def measure_cell(
    columns: Sequence[Column],
    token_ids: torch.Tensor,
    batch: int,
    length: int,
    decode_tokens: int,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Time one batch size and prompt length.

    Args:
        columns: of `make_columns`, the dense one first.
        token_ids: int64 [tokens], the text that prompts are cut from.
        batch: number of prompts.
        length: tokens of each.
        decode_tokens: tokens to decode after them; 0 for prefill alone.
        repeats: counted repeats, after one that is not counted.
        progress: called after each repeat, `repeats + 1` times.

    Returns:
        For each column what `summarize` makes of it, the router's own cost, and, where there are substitutes, the
        share of a skipped branch's time that is saved in spite of them (`saved_with_substitutes`).
    """
    device = columns[0].model.device
    input_ids = cut_prompts(token_ids, batch, length + decode_tokens).to(device)
    stopwatch, shuffle = Stopwatch(device), random.Random(0)
    dense, *others = columns
    facts = {column.name: _observe(column, input_ids, length) for column in columns}
    seconds = {phase: {column.name: [] for column in columns} for phase in ("prefill", "decode")}
    to_dense = {phase: {column.name: [] for column in others} for phase in seconds}
    for repeat in range(repeats + 1):
        of_dense = {phase: [] for phase in seconds}
        for column in shuffle.sample(others, k=len(others)):
            pair = _time_pair(shuffle.sample([dense, column], k=2), input_ids, length, stopwatch)
            for phase, taken in pair.items():
                of_dense[phase].append(taken["dense"])
                if repeat > 0 and taken["dense"]:
                    seconds[phase][column.name].append(taken[column.name])
                    to_dense[phase][column.name].append(taken[column.name] / taken["dense"])
        if repeat > 0:
            for phase, each in of_dense.items():
                seconds[phase]["dense"].append(statistics.median(each))
        progress()
    for of in to_dense.values():
        of["dense"] = [1.0] * repeats
    model = columns[0].model
    settings = next(column.model.config.mod_settings for column in columns if column.routed)
    tokens = {"prefill": batch * length, "decode": batch * decode_tokens}
    routers = {"prefill": router_seconds(columns, batch, length, stopwatch, repeats)}
    if decode_tokens and settings.level == "token":  # a sequence is routed at prefill alone
        routers["decode"] = decode_tokens * router_seconds(columns, batch, 1, stopwatch, repeats)
    skippable = {phase: skippable_share(model.config, settings, length, phase == "decode") for phase in tokens}
    with_substitutes = {
        phase: saved_with_substitutes(to_dense[phase]) for phase in tokens if tokens[phase] and settings.substitute
    }
    return {
        "batch": batch,
        "length": length,
        "decode_tokens": decode_tokens,
        "router_share": {phase: own / statistics.median(seconds[phase]["dense"]) for phase, own in routers.items()},
        "skippable_share_of_branch": skippable,
        "saved_with_substitutes": with_substitutes,
        "columns": {
            column.name: facts[column.name]
            | {
                phase: summarize(
                    column.name, seconds[phase][column.name], to_dense[phase], tokens[phase], facts, skippable[phase]
                )
                for phase in tokens
                if tokens[phase]
            }
            for column in columns
        },
    }


def summarize(
    name: str,
    seconds: Sequence[float],
    to_dense: dict[str, list[float]],
    tokens: int,
    facts: dict[str, dict[str, Any]],
    skippable: float,
) -> dict[str, Any]:
    """Turn the seconds of a phase into what the table shows of one column.

    Args:
        name: the column.
        seconds: its own, of each repeat.
        to_dense: column -> in each repeat, its seconds relative to those that the dense base took beside it.
        tokens: processed in a repeat.
        facts: column -> share executed and the like.
        skippable: share of the routed branch's arithmetic that skipping an input saves.

    Returns:
        Seconds, tokens per second, time relative to dense and to the oracle (ratios within one pair, and of two pairs
        of one repeat), and the share
        that was reached of the time that skipping should save: by arithmetic the oracle's saving times the share
        skipped (`saving_reached`), and, for random decisions, what the plain branch saves on this machine when it is
        given as few inputs (`saving_reached_of_share_alone`).
    """
    own, oracle = (np.asarray(to_dense[column]) for column in (name, "oracle"))
    result = {
        "seconds": median_with_interval(seconds),
        "tokens_per_second": tokens / float(np.median(seconds)),
        "to_dense": median_with_interval(own),
        "to_oracle": median_with_interval(own / oracle),
        "raw_seconds": list(seconds),
    }
    share = facts[name].get("share_executed")
    if share is not None and share < 1:
        references = {"saving_reached": (oracle, (1 - share) * skippable)}
        if name == "random":
            references["saving_reached_of_share_alone"] = (np.asarray(to_dense["share_alone"]), 1.0)
        for key, (reference, part) in references.items():
            reached = with_interval(partial(_saving_reached, part=part), own, reference)
            if np.isfinite(list(reached.values())).all():
                result[key] = reached
    return result


def saved_with_substitutes(to_dense: dict[str, list[float]]) -> dict[str, float]:
    """Return which share of the time that is saved where everything is skipped substitutes leave, with its interval.

    Args:
        to_dense: column -> in each repeat, its seconds relative to those of the dense base.
    """
    own, without = (np.asarray(to_dense[name]) for name in ("all_skipped", "unreplaced"))
    return with_interval(partial(_saving_reached, part=1.0), own, without)


def _saving_reached(own_to_dense: np.ndarray, reference_to_dense: np.ndarray, part: float) -> np.ndarray:
    """Return the saving as a share of `part` times the reference's, of ratios [..., repeats]."""
    own, reference = (1 - np.median(ratio, axis=-1) for ratio in (own_to_dense, reference_to_dense))
    return own / (part * np.where(reference == 0, np.nan, reference))


def skippable_share(config, settings: MoDSettings, length: int, decode: bool) -> float:
    """Return which share of the routed branches' multiplications a skipped input saves, over all routed layers.

    All of it, but for token decisions over attention, where keys and values are computed for every token. What a
    sliding window hides counts as seen.

    Args:
        config: the model's.
        settings: what is routed.
        length: tokens of the prompt.
        decode: whether a query sees the whole prompt (decode) or, on average, half of it (prefill).
    """
    if settings.level == "sequence" or settings.target in ("mlp", "expert"):
        return 1.0
    visible, saved, keys_and_values = length if decode else length / 2, 0.0, 0.0
    for layer in settings.layers:
        one, two = (layer_cost(config.to_dict(), tokens, layer) for tokens in (1, 2))
        pair = two.queries - 2 * one.queries  # a query and one more key
        saved += one.queries + (visible - 1) * pair
        saved += one.mlp + one.experts if settings.target != "attn" else 0.0
        keys_and_values += one.keys_and_values
    return saved / (saved + keys_and_values)


@torch.inference_mode()
def router_seconds(
    columns: Sequence[Column], batch: int, length: int, stopwatch: Stopwatch, repeats: int, calls: int = 10
) -> float:
    """Return the median seconds that the routers of all layers together take in one forward."""
    model = next(column.model for column in columns if column.name == "tuned")
    settings, routers = model.config.mod_settings, model.router_modules()
    hidden_states = torch.randn(batch, length, model.config.hidden_size, dtype=model.dtype, device=model.device)

    def run_all() -> None:
        for _ in range(calls):
            for router in routers.values():
                decide(router, hidden_states, settings.level, 0.5, token_mask=None)

    return statistics.median([stopwatch.time(run_all) for _ in range(repeats + 1)][1:]) / calls


def table(cell: dict[str, Any]) -> str:
    """Return one cell of the grid as text, a block of lines for each phase."""
    lines = []
    for phase in ("prefill", "decode"):
        if phase == "decode" and not cell["decode_tokens"]:
            continue
        what = f"{cell['length']} tokens" if phase == "prefill" else f"{cell['decode_tokens']} tokens"
        lines.append(f"{phase}, batch {cell['batch']} x {what}")
        lines.append(
            f"  {'':<12}{'executed':>9}{'tokens/s':>10}{'time to dense':>24}{'to oracle':>11}{'saved':>7}"
            f"{'of alone':>10}{'KV MiB':>9}{'peak MiB':>10}"
        )
        for name, column in cell["columns"].items():
            row, share, ratio = column[phase], column.get("share_executed"), column[phase]["to_dense"]
            saved, alone = (
                format(row[key]["median"], ".0%") if key in row else ""
                for key in ("saving_reached", "saving_reached_of_share_alone")
            )
            between = f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
            lines.append(
                f"  {name:<12}{'' if share is None else f'{share:.2f}':>9}{row['tokens_per_second']:>10.1f}"
                f"{between:>24}{row['to_oracle']['median']:>11.3f}"
                f"{saved:>7}{alone:>10}"
                f"{column['kv_bytes'] / 2**20:>9.2f}{column['peak_memory_bytes'] / 2**20:>10.1f}"
            )
    shares = ", ".join(f"{share:.2%} of a dense {phase}" for phase, share in cell["router_share"].items())
    lines.append(f"the routers alone: {shares}")
    for phase, saved in cell["saved_with_substitutes"].items():
        lines.append(
            f"saved of a skipped branch's time with a substitute in its place: {saved['median']:.1%} "
            f"({saved['low']:.1%}-{saved['high']:.1%}) of a {phase}"
        )
    return "\n".join(lines)


def _observe(column: Column, input_ids: torch.Tensor, length: int) -> dict[str, Any]:
    """Prefill once, untimed: memory, and the share executed of all routed decisions."""
    caches: dict[str, Any] = {column.name: column.make_cache()}
    outputs = []
    peak = peak_memory(input_ids.device, lambda: outputs.append(_prefill(column, input_ids[:, :length], caches)))
    facts: dict[str, Any] = {"kv_bytes": sum(kv_bytes_by_layer(caches[column.name])), "peak_memory_bytes": peak}
    if column.routed:
        gates = outputs[0].router_gates
        facts["share_executed"] = float(over_routers(column.model, gates.flatten(1).double().mean(dim=1)))
    return facts


def _time_pair(
    pair: Sequence[Column], input_ids: torch.Tensor, length: int, stopwatch: Stopwatch
) -> dict[str, dict[str, float]]:
    """Prefill `length` tokens with two columns and decode the others; returns phase -> column -> seconds."""
    caches = {column.name: column.make_cache() for column in pair}
    prompts = input_ids[:, :length]
    prefill = {column.name: stopwatch.time(partial(_prefill, column, prompts, caches)) for column in pair}
    decode = dict.fromkeys(prefill, 0.0)
    for start in range(length, input_ids.shape[1], TURN):
        for column in pair:
            tokens = input_ids[:, start : start + TURN]
            decode[column.name] += stopwatch.time(partial(_decode, column, tokens, caches))
    return {"prefill": prefill, "decode": decode}


def _prefill(column: Column, input_ids: torch.Tensor, caches: dict[str, Any]) -> Any:
    return column.model(input_ids, past_key_values=caches[column.name], use_cache=True, logits_to_keep=1)


def _decode(column: Column, tokens: torch.Tensor, caches: dict[str, Any]) -> None:
    for token in tokens.split(1, dim=1):
        column.model(token, past_key_values=caches[column.name], use_cache=True)
