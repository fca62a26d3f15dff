"""Routers by regression: each learns to predict what skipping its layer costs an input, and skips below a price.

At sequence level a run has few inputs, one for each row and layer, and routers trained by gradient steps end as static
choices of layers. The cost can be measured instead. With the gates of all layers at `a`, between skipped (0) and kept
(1), one backward pass gives for each input and layer

    D = -dL/dg  at  g = a,

`L` being the loss summed over the row's supervised tokens: at the dense model itself the divergence from it has no
slope. A ridge regression of `D` on what the router reads, its strength chosen by the error on left-out rows in closed
form, gives `D ~ W x + c`. What a router is to predict is the cost relative to what the row's layers cost on average: in
absolute numbers short prompts, with long answers, would execute more, and what is executed would follow from a prompt's
length. An input is executed where the predicted cost is at least a price, the same for all routers, times what skipping
it saves, `W x + c >= s price`, so the router's cut is `s price - c`; the calibration finds the price at which the
target share of inputs is executed. Where attention and MLP are routed apart, `s` is what an input counts in the
capacity, relative to the mean of all routers; elsewhere it is 1.

Every row is measured once: the error on left-out rows would be too small where the same row is there twice. Nothing is
drawn and no learning rate matters; the routers stay at zero until the end of training.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from utils.model.configuration_mod import Place
from utils.model.routing_mod import Decision, MoDRouter

from .calibration import weighted_quantile

GATE = 0.7
"""Value `a` of all gates while costs are measured."""
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-4, 7))
"""Candidates for the ridge, in units of the average input's squared length."""


class RegressionControl:
    """Measures costs in training, and turns them into routers at its end.

    Args:
        routers: place -> router, in the order of the settings' `places`.
        target: capacity to reach, in [0, 1].
        weights: place -> what its inputs count in a capacity, of `capacity_weights`; None for all alike.
    """

    def __init__(self, routers: Mapping[Place, MoDRouter], target: float, weights: Mapping[Place, float] | None = None):
        self.routers = dict(routers)
        self.target = target
        self.savings = {place: len(routers) * weights[place] if weights else 1.0 for place in routers}  # mean 1
        self.rows: list[torch.Tensor] = []  # each [rows, layers, hidden_size + 1]: router inputs and the cost
        self._window: list[tuple[torch.Tensor, dict[Place, tuple[torch.Tensor, torch.Tensor]]]] = []

    def rule(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        counts: torch.Tensor | None = None,
    ) -> Callable[[Place, torch.Tensor], Decision]:
        """Return the `gate_rule` of a micro-batch: gates of `GATE` whose gradient is kept.

        Args:
            input_ids, attention_mask: int64 [batch, tokens].
            counts: bool [batch], False for rows that are there for the second time; None for all True.
        """
        measured: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        counts = input_ids.new_ones(len(input_ids)) if counts is None else counts
        self._window.append((counts, measured))

        def measure(place: Place, inputs: torch.Tensor) -> Decision:
            gates = torch.full(inputs.shape[:-1], GATE, device=inputs.device, requires_grad=True)
            measured.setdefault(place, (inputs.detach(), gates))  # activation checkpointing comes here twice
            scores = 0.0 * self.routers[place](inputs)  # every router has a part in every step, on every process
            return Decision(scores + GATE, gates + scores)

        return measure

    def loss(self, capacity: torch.Tensor) -> torch.Tensor:
        """Return 0: nothing is pushed."""
        return 0.0 * capacity

    def step(self, progress: float, rate: float, accelerator: Any, summed: float = 1.0) -> None:
        """Close an accumulation window: collect what was measured on all processes.

        Args:
            progress, rate: not needed.
            accelerator: of the run.
            summed: what the window's loss was divided by.
        """
        rows, there = [], []
        for counts, measured in self._window:
            parts = [torch.cat([x.float(), -summed * gates.grad[:, None]], dim=1) for x, gates in measured.values()]
            rows.append(torch.stack(parts, dim=1))  # [batch, layers, hidden_size + 1]
            there.append(counts.to(torch.int64))
        self._window = []
        parts = (torch.cat(rows), torch.cat(there))
        rows, there = (accelerator.gather(accelerator.pad_across_processes(values)) for values in parts)
        self.rows.append(rows[there > 0].cpu())

    def solve(self, progress: bool = False) -> tuple[dict[Place, torch.Tensor], dict[Place, tuple[float, float]]]:
        """Return place -> router weight, float32 [1, hidden_size], place -> cut and its unit.

        Args:
            progress: show a bar.
        """
        rows = torch.cat(self.rows).double()
        costs = rows[:, :, -1]  # [rows, layers]
        costs /= costs.abs().mean(dim=1, keepdim=True).clamp(min=1e-12)
        numbers = tqdm(range(len(self.routers)), desc="fitting routers", unit="router", disable=not progress)
        fits = [ridge(rows[:, number, :-1], rows[:, number, -1]) for number in numbers]
        saved = list(self.savings.values())
        left_out = torch.cat([predictions / unit for (*_, predictions), unit in zip(fits, saved, strict=True)])
        counts = torch.tensor(saved, dtype=left_out.dtype).repeat_interleave(len(rows))
        price = weighted_quantile(left_out, 1 - self.target, counts)
        weights = {place: fit[0].float()[None] for place, fit in zip(self.routers, fits, strict=True)}
        cuts = {
            place: (unit * price - fit[1], unit) for (place, unit), fit in zip(self.savings.items(), fits, strict=True)
        }
        return weights, cuts

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training goes on from, at the end of a window."""
        return {"rows": torch.cat(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.rows = [state["rows"]]


def ridge(inputs: torch.Tensor, costs: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Fit `costs ~ inputs w + c` with the ridge that predicts left-out rows best.

    Args:
        inputs: float64 [rows, features].
        costs: float64 [rows].

    Returns:
        `w` [features], `c`, and the prediction for each row by the fit without it [rows].
    """
    mean, scale = inputs.mean(dim=0), inputs.std(dim=0)
    scale = scale + 0.1 * scale.mean() + 1e-12  # a feature that hardly varies is not blown up
    features, centre = (inputs - mean) / scale, costs.mean()
    kernel = features @ features.T / features.shape[1]  # [rows, rows]
    values, vectors = torch.linalg.eigh(kernel)
    values = values.clamp(min=0.0)
    projected = vectors.T @ (costs - centre)
    unit = values.mean()
    best = None
    for strength in STRENGTHS:
        ridge_size = strength * unit + 1e-12
        dual = vectors @ (projected / (values + ridge_size))
        # the diagonal of the inverse; the mean takes one more degree of freedom
        diagonal = (vectors**2 / (values + ridge_size)).sum(dim=1) - 1 / (ridge_size * len(costs))
        errors = dual / diagonal.clamp(min=1e-12 / ridge_size)
        error = float((errors**2).mean())
        if best is None or error < best[0]:
            best = error, dual, errors
    _, dual, errors = best
    w = features.T @ dual / features.shape[1] / scale
    return w, float(centre - mean @ w), costs - errors
