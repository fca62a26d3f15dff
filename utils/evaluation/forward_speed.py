"""How fast a forward pass is, dense and routed, measured side by side on the same text.

A quick figure for the end of a training run, without a KV cache. It says nothing about generation.
"""

import statistics
import time
from collections.abc import Sequence

import torch


@torch.inference_mode()
def forward_speed(
    model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]], repeats: int = 3
) -> dict[str, float]:
    """Time forward passes over `batches`, dense and routed in turn.

    Args:
        model: a routed model, on the device that is measured; left in evaluation mode.
        batches: each with `input_ids` and `attention_mask`, int64 [batch, tokens].
        repeats: counted passes of each kind, after one that is not counted.

    Returns:
        `dense` and `routed`: real tokens per second, medians; `ratio`: routed over dense.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    seconds: dict[str, list[float]] = {"dense": [], "routed": []}
    for _ in range(repeats + 1):
        for kind, times in seconds.items():
            _synchronize(device)
            start = time.perf_counter()
            for batch in batches:
                model(**batch, route=kind == "routed", use_cache=False)
            _synchronize(device)
            times.append(time.perf_counter() - start)
    dense, routed = (tokens / statistics.median(times[1:]) for times in seconds.values())
    return {"dense": dense, "routed": routed, "ratio": routed / dense}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
