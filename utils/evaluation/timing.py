"""Clocks, and what a median of interleaved repeats is worth.

On a CPU the clock is the process's own processor time, which other programs on the machine stretch far less than the
clock on the wall; on a GPU it is the time between two CUDA events.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from utils.model.allocation import AllocatedBytes


class Stopwatch:
    """Adds up the seconds that calls take on a device.

    Args:
        device: where the calls' work is done.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def time(self, call: Callable[[], Any]) -> float:
        """Run `call` and return its seconds: of processor time on a CPU, of the device's own time on a GPU."""
        if not self.on_gpu:
            start = time.process_time()
            call()
            return time.process_time() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def median_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Return `median`, `low` and `high` of `values`, one for each repeat; see `with_interval`."""
    return with_interval(lambda drawn: np.median(drawn, axis=-1), values)


def with_interval(
    statistic: Callable[..., np.ndarray], *series: Sequence[float], level: float = 0.95, resamples: int = 2000
) -> dict[str, float]:
    """Return a statistic of repeats and its bootstrap confidence interval.

    Args:
        statistic: reduces the last axis of as many arrays as there are series.
        *series: each with one value for each repeat; repeats are drawn together.
        level: of confidence.
        resamples: number of bootstrap samples; they are drawn with a fixed seed.

    Returns:
        `median` (the statistic is one, or made of some), `low` and `high`.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in series]
    drawn = np.random.default_rng(0).integers(len(arrays[0]), size=(resamples, len(arrays[0])))
    tail = 50 * (1 - level)
    low, high = np.percentile(statistic(*(values[drawn] for values in arrays)), [tail, 100 - tail])
    return {"median": float(statistic(*arrays)), "low": float(low), "high": float(high)}


def peak_memory(device: torch.device, call: Callable[[], Any]) -> int:
    """Run `call` and return the most bytes that its tensors took at a time, beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with AllocatedBytes() as allocated:
        call()
    return allocated.peak
