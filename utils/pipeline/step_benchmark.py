"""What a router-tuning step costs, beside the straightforward way and beside the sum of its parts.

The measured step is the trainer's forward, losses and backward with the hinge and without distillation, called without
the Trainer around it; beside it stands the default recipe's, with the capacity control and the dense teacher.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .capacity_control import FORWARD_INPUTS, BudgetControl, router_moments
from .distillation import DenseTeacher, distilled_nll
from .losses import capacity_hinge, executed_inputs, next_token_nll
from .regression_control import RegressionControl

TARGET_CAPACITY, GRADIENT_SCALE = 0.5, 0.3


class StepsDifferError(Exception):
    """The two ways of a step gave another loss or other gradients."""


class StepBenchmark:
    """Runs the steps that are compared, on one batch.

    Args:
        model: a routed model whose routers alone require gradients, on the device that is measured.
        batch: as `SupervisedBatches` makes it; with `taught` the default recipe's step learns from those positions.
    """

    def __init__(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]):
        self.model = model.train()
        self.device = next(model.parameters()).device
        self.batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.first = model.config.mod_settings.layers[0]
        self.steps: dict[str, Callable[[], Any]] = {
            "ours": self.ours,
            "default_recipe": self.default_recipe,
            "straightforward": self.straightforward,
            "forward": self.forward,
            "suffix_forward": self.suffix_forward,
            "suffix": self.suffix,
        }
        self._teacher = DenseTeacher(model)
        self._budget = self._make_budget() if model.config.mod_settings.level == "token" else None
        self._suffix_input = self._capture_suffix_input()

    def ours(self) -> torch.Tensor:
        """Return the loss after a step as the trainer makes it."""
        loss = self._loss(self._states())
        loss.backward()
        return loss.detach()

    def default_recipe(self) -> torch.Tensor:
        """Return the loss after a step of the default recipe, but for the steering between steps."""
        mask = self.batch["attention_mask"]
        control = self._budget or RegressionControl(self.model.router_modules(), TARGET_CAPACITY)
        rule = control.rule(self.batch["input_ids"], mask)
        positions, targets = self.batch["positions"], self.batch["targets"]
        if "taught" in self.batch:
            positions, targets = (values.index_select(0, self.batch["taught"]) for values in (positions, targets))
        outputs = self._states(rule, positions)
        teacher = self._teacher.states(self.batch["input_ids"], positions)
        head = self.model.get_output_embeddings()
        loss = distilled_nll(outputs.states, teacher, head, targets, 1.0)[0] / len(targets)
        executed, inputs = executed_inputs(outputs.router_scores, mask)
        loss = loss + control.loss(executed.mean(dim=0).sum() / inputs.sum())
        loss.backward()
        return loss.detach()

    def _make_budget(self) -> BudgetControl:
        control = BudgetControl(self.model.router_modules(), TARGET_CAPACITY)
        batch = {name: self.batch[name] for name in FORWARD_INPUTS if name in self.batch}
        control.begin(router_moments(self.model, [batch]), self.model.config.mod_settings.threshold_of)
        return control

    def straightforward(self) -> torch.Tensor:
        """Return the loss after a step with gradients from the embeddings on, and logits of every token."""
        self.model.enable_input_require_grads()
        try:
            inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask", "labels")}
            outputs = self.model(**inputs, use_cache=False)
            loss = outputs.loss + self._capacity_loss(outputs.router_gates)
            loss.backward()
        finally:
            self.model.disable_input_require_grads()
        return loss.detach()

    @torch.no_grad()
    def forward(self) -> None:
        """Run the forward of all layers, without gradient and without logits."""
        self._states()

    @torch.no_grad()
    def suffix_forward(self) -> None:
        """Run the layers from the first routed one on, and nothing after them, without gradient."""
        with self._prefix_left_out():
            self._states()

    def suffix(self) -> None:
        """Run forward, losses and backward from the input of the first routed layer on."""
        with self._prefix_left_out():
            self._loss(self._states()).backward()

    def check(self) -> None:
        """Raise `StepsDifferError` unless the two ways give the same loss and gradients, but for rounding."""
        results = []
        for step in (self.ours, self.straightforward):
            self.model.zero_grad()
            loss = step()
            gradients = [router.weight.grad.flatten() for router in self.model.router_modules().values()]
            results.append((loss.float(), torch.cat(gradients)))
        (loss, gradient), (other, expected) = results
        bound = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 3e-2
        for name, got, want in (("losses", loss, other), ("gradients", gradient, expected)):
            difference = float((got - want).norm() / want.norm())
            if not difference < bound:
                raise StepsDifferError(f"the {name}, relatively by {difference:.1e}")

    def measure(
        self,
        repeats: int,
        peak_memory: Callable[[torch.device, Callable[[], Any]], int],
        progress: Callable[[], Any] = lambda: None,
    ) -> dict[str, Any]:
        """Time all steps in turn and measure their memory.

        Args:
            repeats: counted ones, after one that is not.
            peak_memory: runs a call and returns the most bytes that its tensors took at a time.
            progress: called after each.

        Returns:
            `seconds` and `peak_bytes` (beyond what was there before) of each step, `sum_of_parts` in seconds,
            `ratios`, and what the batch holds: `tokens`, `supervised`.
        """
        seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        for _ in range(repeats + 1):
            for name, step in self.steps.items():
                self.model.zero_grad()
                self._synchronize()
                start = time.perf_counter()
                step()
                self._synchronize()
                seconds[name].append(time.perf_counter() - start)
            progress()
        times = {name: values[1:] for name, values in seconds.items()}
        parts = [
            forward + both - alone
            for forward, both, alone in zip(times["forward"], times["suffix"], times["suffix_forward"], strict=True)
        ]
        measured = ("ours", "default_recipe", "straightforward")
        memory = {name: peak_memory(self.device, self.steps[name]) for name in measured}
        ours, other, default = times["ours"], times["straightforward"], times["default_recipe"]
        return {
            "tokens": self.batch["input_ids"].numel(),
            "supervised": len(self.batch["targets"]),
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "sum_of_parts": statistics.median(parts),
            "peak_bytes": memory,
            "ratios": {
                "step_to_straightforward": statistics.median(a / b for a, b in zip(ours, other, strict=True)),
                "default_recipe_to_step": statistics.median(a / b for a, b in zip(default, ours, strict=True)),
                "step_to_sum_of_parts": statistics.median(a / b for a, b in zip(ours, parts, strict=True)),
                "memory_to_straightforward": memory["ours"] / memory["straightforward"],
            },
        }

    def table(self, cell: Mapping[str, Any]) -> str:
        """Return what `measure` returned as a few lines of text."""
        seconds, memory, ratios = cell["seconds"], cell["peak_bytes"], cell["ratios"]
        return "\n".join(
            [
                f"{cell['tokens']} tokens, {cell['supervised']} of them supervised",
                f"step             {seconds['ours']:8.3f} s   {memory['ours'] / 2**20:8.0f} MiB",
                f"default recipe   {seconds['default_recipe']:8.3f} s   {memory['default_recipe'] / 2**20:8.0f} MiB"
                f"   ratio {ratios['default_recipe_to_step']:.3f}",
                f"straightforward  {seconds['straightforward']:8.3f} s   {memory['straightforward'] / 2**20:8.0f} MiB"
                f"   ratios {ratios['step_to_straightforward']:.3f} and {ratios['memory_to_straightforward']:.3f}",
                f"sum of parts     {cell['sum_of_parts']:8.3f} s   ratio {ratios['step_to_sum_of_parts']:.3f}",
            ]
        )

    def _states(self, rule=None, positions=None):
        mask = self.batch.get("attention_mask")
        return self.model(
            input_ids=self.batch["input_ids"],
            token_mask=None if mask is None else mask.bool(),
            states_at=self.batch["positions"] if positions is None else positions,
            gate_rule=rule,
            use_cache=False,
        )

    def _loss(self, outputs) -> torch.Tensor:
        nll = next_token_nll(outputs.states, self.model.get_output_embeddings(), self.batch["targets"])
        return nll / len(self.batch["targets"]) + self._capacity_loss(outputs.router_gates)

    def _capacity_loss(self, gates: torch.Tensor) -> torch.Tensor:
        executed, inputs = executed_inputs(gates, self.batch.get("attention_mask"))
        return GRADIENT_SCALE * capacity_hinge(executed, inputs, TARGET_CAPACITY).mean()

    def _capture_suffix_input(self) -> torch.Tensor:
        layer, seen = self.model.get_decoder().layers[self.first], []
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        with torch.no_grad():
            self._states()
        handle.remove()
        return seen[0]

    def _prefix_left_out(self) -> "_Patched":
        return _Patched(self.model.get_decoder(), self.first, self._suffix_input)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _Patched:
    """Within the block the decoder has only its layers from `first` on, and they start from `hidden_states`."""

    def __init__(self, decoder: torch.nn.Module, first: int, hidden_states: torch.Tensor):
        self.decoder, self.first, self.hidden_states = decoder, first, hidden_states
        self.layers = decoder.layers
        self.handle: RemovableHandle | None = None

    def __enter__(self):
        self.decoder.layers = self.layers[self.first :]
        self.handle = self.decoder.layers[0].register_forward_pre_hook(lambda _, args: (self.hidden_states, *args[1:]))

    def __exit__(self, *_):
        self.handle.remove()
        self.decoder.layers = self.layers
