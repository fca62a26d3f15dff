"""How fast a forward pass is, dense and routed, measured side by side on the same text.

A quick figure for the end of a training run, without a KV cache. It says nothing about generation.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm


@torch.inference_mode()
def forward_speed(
    model: torch.nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    repeats: int = 3,
    capacities: Sequence[float] = (),
    progress: bool = False,
) -> dict[str, float | dict[float, float]]:
    """Time forward passes over `batches`, dense and routed in turn.

    Args:
        model: a routed model, on the device that is measured; left in evaluation mode.
        batches: each with `input_ids` and `attention_mask`, int64 [batch, tokens], and, if not all tokens decide,
            bool `token_mask`, same shape.
        repeats: counted passes of each kind, after one that is not counted.
        capacities: other capacities of the model, timed in turn with the rest.
        progress: show a bar.

    Returns:
        `dense` and `routed`: real tokens per second, medians; `ratio`: routed over dense, the median over the repeats,
        in processor time on a CPU; `ratio_at`: the same of each of the capacities.
    """
    model.eval()
    device, settings = next(model.parameters()).device, model.config.mod_settings
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    names = ("input_ids", "attention_mask", "token_mask")
    batches = [{name: batch[name].to(device) for name in names if name in batch} for batch in batches]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    kinds = ("dense", "routed", *capacities)
    walls: dict[str | float, list[float]] = {kind: [] for kind in kinds}
    costs: dict[str | float, list[float]] = {kind: [] for kind in kinds}
    passes = tqdm(kinds * (repeats + 1), desc="timing forwards", unit="pass", disable=not progress)
    try:
        for kind in passes:
            model.set_mod_settings(settings)
            if kind in capacities:
                model.set_capacity(kind)
            _synchronize(device)
            wall, cost = time.perf_counter(), clock()
            for batch in batches:
                model(**batch, route=kind != "dense", use_cache=False)
            _synchronize(device)
            walls[kind].append(time.perf_counter() - wall)
            costs[kind].append(clock() - cost)
    finally:
        model.set_mod_settings(settings)
    ratios = {
        kind: statistics.median(dense / own for dense, own in zip(costs["dense"][1:], costs[kind][1:], strict=True))
        for kind in kinds[1:]
    }
    dense, routed = (tokens / statistics.median(walls[kind][1:]) for kind in ("dense", "routed"))
    at = {capacity: ratios[capacity] for capacity in capacities}
    return {"dense": dense, "routed": routed, "ratio": ratios["routed"], "ratio_at": at}


def middling_batches(
    rows: Sequence[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """Return up to three batches of four rows to time a model on, of middling lengths.

    A router may well treat the longest rows otherwise than most.

    Args:
        rows: each with `length`, in tokens.
        collate: makes a batch of rows.
    """
    ordered = sorted(rows, key=lambda row: row["length"])
    starts = sorted({int(share * max(0, len(ordered) - 4)) for share in (0.25, 0.5, 0.75)})
    return [collate(ordered[start : start + 4]) for start in starts]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
