"""Counting what a routed model executes while something else drives it, padding left out."""

from typing import Any

import torch
from transformers import PreTrainedModel

from utils.model.configuration_mod import report_key
from utils.model.costs import budget, capacity_of, capacity_weights, number_of_experts


class CapacityMeter:
    """Listens to a routed model's forward and counts its decisions.

    A sequence is counted once, where it is decided; its later tokens follow that. At token level every real token is
    counted, generated ones too. The sums stay on the device until they are read.

    Args:
        model: a routed model.
    """

    def __init__(self, model: PreTrainedModel):
        self.settings = model.mod_settings
        self._config = model.config.to_dict()
        self._experts = number_of_experts(self._config)
        self._sums: torch.Tensor | None = None  # [routers, 2]: executed inputs, inputs
        self._by_expert: torch.Tensor | None = None  # [routed layers, 2, experts]: executed assignments, assignments
        self._handle = model.register_forward_hook(self._observe, with_kwargs=True)

    def close(self) -> None:
        """Stop listening."""
        self._handle.remove()

    def read(self) -> dict[str, Any] | None:
        """Return what was counted since the last reading, and start anew; None where nothing was.

        Returns:
            `inputs`: how many were decided on in each layer; `capacity`: share of all that was executed; `skipped`,
            `flops_saved_512` and the like: what that saves (`costs.budget`); `layers`: the share of each routed
            layer, by its index, or of each of its routers, by their names. Where experts are routed also `experts`: of
            each routed layer the tokens that each expert was `assigned`, and those that it `executed` (Figure 8).
        """
        if self._sums is None:
            return None
        executed, inputs = self._sums.T.tolist()
        self._sums = None
        shares = [share / count for share, count in zip(executed, inputs, strict=True)]
        shares = dict(zip(self.settings.places, shares, strict=True))
        counted = {
            "inputs": round(inputs[0]),
            "capacity": capacity_of(shares, capacity_weights(self._config, self.settings)),
            **budget(self._config, self.settings, shares),
            "layers": {report_key(place): share for place, share in shares.items()},
        }
        if self._by_expert is not None:
            by_expert, self._by_expert = self._by_expert.round().long().tolist(), None
            counted["experts"] = {
                layer: {"assigned": assigned, "executed": kept}
                for layer, (kept, assigned) in zip(self.settings.layers, by_expert, strict=True)
            }
        return counted

    def _observe(self, model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        gates = getattr(output, "router_gates", None)
        if gates is None:
            return
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        batch, tokens = inputs.shape[:2]
        weights = gates.new_ones(batch)
        if self.settings.level == "sequence":
            cache = output.past_key_values
            if cache is not None and cache.get_seq_length() > tokens:
                return  # counted at its prefill
        else:
            mask = kwargs.get("attention_mask")
            weights = gates.new_ones(batch, tokens) if mask is None else mask[:, -tokens:].to(gates.dtype)
            if gates.dim() == 4:  # [routed layers, batch, tokens, assignments to experts]
                weights = weights.unsqueeze(-1)
        dtype = torch.float32 if gates.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        weights = weights.to(dtype).expand_as(gates)
        sums = torch.stack([(gates.detach() * weights).flatten(1).sum(1), weights.flatten(1).sum(1)], dim=1)
        self._sums = sums if self._sums is None else self._sums + sums
        experts = getattr(output, "router_experts", None)
        if experts is not None:
            counts = torch.stack([gates.detach() * weights, weights], dim=1).flatten(2)  # [layers, 2, assignments]
            index = experts.flatten(1).unsqueeze(1).expand_as(counts)
            by_expert = counts.new_zeros(len(counts), 2, self._experts).scatter_add(2, index, counts)
            self._by_expert = by_expert if self._by_expert is None else self._by_expert + by_expert
