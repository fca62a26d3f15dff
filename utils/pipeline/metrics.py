"""Sums that a run collects on the device, and reads on the host only when it logs."""

from collections.abc import Callable
from typing import Any

import torch

from utils.model.configuration_mod import MoDSettings, place_name
from utils.model.costs import budget, capacity_of, capacity_weights


class RoutingMeter:
    """Collects loss and capacity over micro-batches; exact means whatever their sizes.

    Args:
        config: of the model, as a dict.
        settings: what is routed.
        device: where the sums live.
    """

    def __init__(self, config: dict[str, Any], settings: MoDSettings, device: torch.device):
        self._config, self._settings = config, settings
        self.weights = capacity_weights(config, settings)
        # negative log-likelihood, supervised tokens, divergence from the dense model, hinge, sequences, inputs,
        # executed inputs of each router
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self._sums = torch.zeros(6 + len(settings.places), device=device, dtype=dtype)

    def add(
        self,
        nll: torch.Tensor,
        tokens: torch.Tensor,
        hinge: torch.Tensor | None = None,
        executed: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
        divergence: torch.Tensor | None = None,
    ) -> None:
        """Add a micro-batch.

        Args:
            nll: float [], sum of the negative log-likelihood over the supervised tokens.
            tokens: [], number of supervised tokens.
            divergence: float [], sum of the KL to the dense model over the supervised tokens, where it was measured.
            hinge: float [batch], executed: float [routers, batch], inputs: float [batch], 0 for a row that doesn't
                count; all None where nothing is routed.
        """
        with torch.no_grad():
            self._sums[0] += nll
            self._sums[1] += tokens
            if divergence is not None:
                self._sums[2] += divergence
            if executed is not None:
                self._sums[3] += hinge.sum()
                self._sums[4] += (inputs > 0).sum()
                self._sums[5] += inputs.sum()
                self._sums[6:] += executed.sum(dim=-1)

    def flush(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the means since the last flush and start anew; nothing if nothing was added.

        Args:
            reduce: sums a tensor over all processes; every process calls `flush` at the same step.
        """
        nll, tokens, divergence, hinge, sequences, inputs, *executed = reduce(self._sums).tolist()
        self._sums.zero_()
        means: dict[str, float] = {}
        if tokens:
            means["task_loss"] = nll / tokens
            if divergence:
                means["distillation_loss"] = divergence / tokens
        if inputs:
            means["mod_loss"] = hinge / sequences
            shares = {place: kept / inputs for place, kept in zip(self.weights, executed, strict=True)}
            means["capacity"] = capacity_of(shares, self.weights)
            means |= budget(self._config, self._settings, shares)
            means |= {f"capacity/layer_{place_name(place)}": share for place, share in shares.items()}
        return means
