"""The trainer: Hugging Face's own loop, with the routing loss, and capacity in the log."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from utils.io.errors import UserError
from utils.model.checkpoint import change_settings, router_name, set_thresholds, whole_parameters
from utils.model.configuration_mod import Place
from utils.model.costs import capacity_weights

from .answers import answered, prompt_share, short_prompts
from .batches import IGNORE_INDEX, SupervisedBatches, deciding_tokens
from .calibration import calibrate_table, cuts_of, fold_table, pack_capacities
from .capacity_control import BudgetControl, router_moments
from .distillation import DenseTeacher, distillation_loss, distilled_nll
from .importance import starting_margins
from .losses import capacity_hinge, executed_inputs, next_token_nll, over_routers
from .metrics import RoutingMeter
from .processes import Termination
from .regression_control import RegressionControl
from .substitutes import MISSED_WEIGHT, BranchExamples, common_beginning, fit, missed_of_beginning, rows_to_fit
from .training_checkpoint import TrainingCheckpoints

logger = logging.getLogger(__name__)

FIRST_TOKEN = 8
"""How many times an answer's first token counts where the dense model is learned from: it is what a prompt decides, and
one in dozens of tokens."""
MOMENT_ROWS = 32
"""Training rows on which the budget control measures what the routers read."""


def freeze_backbone(model: nn.Module) -> None:
    """Let only the routers require gradients, and substitutes where there are some (Section 3.2).

    They are found by their type, never by name.
    """
    model.requires_grad_(False)
    for module in (*model.router_modules().values(), *model.substitute_modules().values()):
        module.requires_grad_(True)


class RouterTrainer(TrainingCheckpoints, Trainer):
    """Trains routers. Make it after `freeze_backbone`.

    `L = (1 - a) L_task + a L_KL + lambda L_capacity`: with `a` 0 and the hinge it is Eq. 9 of the paper; `L_KL` is the
    KL divergence from the dense model (`distillation.py`), the budget's `L_capacity` is in `capacity_control.py`, and
    what regression makes of `L` in `regression_control.py`. Substitutes add what they miss of what all rows begin with
    (`substitutes.missed_of_beginning`).

    `train_sampler`, if given, orders the training rows instead of Trainer's own sampler.

    Logged besides Trainer's own: `task_loss` (mean over the supervised tokens as they count in the loss),
    `distillation_loss` where it is learned from, `mod_loss`, `capacity` with what it saves (`costs.budget`), and
    `capacity/layer_i`; these not while a regression measures, whose gates are no decisions.
    """

    def __init__(self, *args: Any, train_sampler: Sampler | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        distilled = bool(self.args.distillation_weight)
        every, first = (self.args.distillation_every, FIRST_TOKEN) if distilled else (1, 1)
        self.data_collator = SupervisedBatches(self.data_collator, every, first)
        self.loss_is_scaled_for_ga = True  # by `compute_loss`
        self._train_sampler = train_sampler
        if self.is_fsdp_enabled:
            raise UserError("FSDP is not supported; DeepSpeed is (configs/accelerate)")
        self.termination = Termination()
        self.add_callback(self.termination)
        settings = self.model.config.mod_settings
        self.units = dict.fromkeys(settings.places, 1.0)  # of the routers' logits, for later shifts of all thresholds
        self._calibration: Sequence[Any] = ()
        self._ends: Collection[int] = ()
        self._is_answered = False
        self._beginning: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}  # examples that substitutes are held to
        weights = capacity_weights(config := self.model.config.to_dict(), settings)
        self._meters = {mode: RoutingMeter(config, settings, self.args.device) for mode in ("train", "eval")}
        self._of_routers = None  # what their inputs count in a capacity, float32 [routers]; None for all alike
        if len(settings.branches) > 1:
            self._of_routers = torch.tensor(list(weights.values()), device=self.args.device)
        self._window_sequences: float | torch.Tensor = 0.0
        self._window_inputs = self._window_tokens = torch.ones(())  # of all processes
        self._route = True
        # processes that skip different layers would gather different weights, and wait for each other for ever
        self._zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        self._eval_execution = "dense" if self._zero3 else None
        self.args.suit_model(self.model.config.hidden_size, self.model.config.mod_settings.granularity)
        if self.args.capacity_control != "hinge":
            if self.args.capacity_control == "regression":
                self._check_one_epoch()
            routers, target = self.model.router_modules(), self.args.target_capacity
            if self.args.capacity_control == "regression":
                self.capacity_control = RegressionControl(routers, target, weights)
            else:
                self.capacity_control = BudgetControl(routers, target)
        self.add_callback(_ControlSteps(self))
        self._teacher = (
            DenseTeacher(self.model, share_prefix=not self._zero3) if self.args.distillation_weight else None
        )

    def _check_one_epoch(self) -> None:
        """Raise `UserError` where `max_steps` would have a regression measure a row again, and take it for another."""
        rows, together = len(self.train_dataset), self.args.per_device_train_batch_size * self.args.world_size
        batches = rows // together if self.args.dataloader_drop_last else -(-rows // together)
        steps = -(-batches // self.args.gradient_accumulation_steps)
        if self.args.max_steps > steps:
            raise UserError(
                f"max_steps {self.args.max_steps} must be at most {steps} with capacity_control regression, which "
                f"measures each of the {rows} rows once; or take --capacity_control budget"
            )

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Evaluate the dense base model within this block, as if every input were kept."""
        self._route = False
        try:
            yield
        finally:
            self._route = True

    def _get_train_sampler(self, train_dataset=None):
        return self._train_sampler or super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Draw an accumulation window's batches, and count its supervised tokens over all processes.

        So that all processes have as many batches, accelerate fills an epoch's last round with rows from the start:
        their targets are taken away here, and they count for nothing.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        for batch in batches:
            if "taught" in batch:
                taught = batch.pop("taught")
                batch |= {name: batch[name].index_select(0, taught) for name in ("positions", "targets")}
        last = batches[-1]
        # accelerate forgets the remainder when it skips to where a run left off (1.15)
        together = self._train_batch_size * self.args.world_size
        remainder = 0 if self.args.dataloader_drop_last else len(self.train_dataset) % together
        real = self._real_rows(len(last["labels"]), remainder, last["labels"].device)
        last["targets"] = _without(last, ~real)
        last["real"] = real
        tokens = sum((batch["targets"] != IGNORE_INDEX).sum() for batch in batches)
        sequences = sum(len(batch["labels"]) for batch in batches[:-1]) + real.sum()
        inputs, settings = sequences, self.model.config.mod_settings
        if settings.level == "token":
            inputs = (
                sum(self._weights(batch).sum() for batch in batches[:-1]) + (self._weights(last) * real[:, None]).sum()
            )
        if settings.target == "expert":  # each assignment of a token is an input
            inputs = inputs * self.model.config.num_experts_per_tok
        received = torch.tensor(int(self.termination.received))
        counts = torch.stack([count.to(device).float() for count in (tokens, sequences, received, inputs)])
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
            self.termination.agree(counts[2])
        tokens, sequences, _, inputs = counts.unbind()
        self._window_sequences = sequences / self.args.world_size
        self._window_inputs, self._window_tokens = inputs, tokens
        return batches, tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        rule = teacher = None
        real = inputs.get("real")
        mask, targets = inputs.get("attention_mask"), inputs["targets"]
        if self.capacity_control is not None:
            rule = self.capacity_control.rule(inputs["input_ids"], _mask(inputs), real)
        outputs = self._forward(model, inputs, rule)
        with self.accelerator.autocast():  # accelerate's own, of the model's forward, ends before the head
            if self._teacher is not None:
                teacher = self._teacher.states(inputs["input_ids"], inputs["positions"])
            loss, nll, divergence = self._loss(outputs.states, targets, teacher)
        executed, sizes = executed_inputs(outputs.router_gates, mask)
        if "real" in inputs:
            executed, sizes = executed * inputs["real"], sizes * inputs["real"]
        hinge = capacity_hinge(executed, sizes, self.args.target_capacity, self.args.capacity_scope, self._of_routers)
        if isinstance(self.capacity_control, RegressionControl):  # its gates are no decisions
            self._meters["train"].add(nll, (targets != IGNORE_INDEX).sum(), divergence=divergence)
        else:
            self._meters["train"].add(nll, (targets != IGNORE_INDEX).sum(), hinge, executed, sizes, divergence)
        # both over the accumulation window; what the processes' gradients are averaged to is the mean over all of them
        processes = self.accelerator.num_processes
        loss = loss * processes / num_items_in_batch
        if self.capacity_control is None:
            loss = loss + self.args.gradient_scale * hinge.sum() / self._window_sequences
        else:
            kept, _ = executed_inputs(outputs.router_scores, self._weights(inputs))
            kept = kept if real is None else kept * real
            share = over_routers(kept, self._of_routers).sum() * processes / self._window_inputs
            loss = loss + self.capacity_control.loss(share.float())
        if self._beginning:
            rows = len(inputs["labels"]) if real is None else real.sum()
            missed = missed_of_beginning(self.model, self._beginning)
            loss = loss + MISSED_WEIGHT * missed * rows / self._window_sequences
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model, inputs, rule=None):
        """Return the model's outputs without logits, but with the states that `targets` are predicted from."""
        return model(
            input_ids=inputs["input_ids"],
            **self._deciding_tokens(inputs),
            states_at=inputs["positions"],
            route=self._route,
            gate_rule=rule,
            execution=None if model.training else self._eval_execution,
            use_cache=False,
        )

    def _loss(self, states, targets, teacher=None):
        """Return the loss to learn from, the negative log-likelihood and the divergence from the teacher, as sums."""
        head, weight = self.model.get_output_embeddings(), self.args.distillation_weight
        if self._zero3:  # the head's weight is in parts, which only calling the head puts together
            logits = head(states).float()
            nll = F.cross_entropy(logits, targets, reduction="sum")
            if teacher is None:
                return nll, nll.detach(), None
            with torch.no_grad():
                teacher_logits = head(teacher)
            divergence = distillation_loss(logits, teacher_logits, targets)
            return (1 - weight) * nll + weight * divergence, nll.detach(), divergence.detach()
        if teacher is None:
            nll = next_token_nll(states, head, targets)
            return nll, nll.detach(), None
        return distilled_nll(states, teacher, head, targets, weight)

    def _deciding_tokens(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the keyword that says which tokens decide."""
        mask = inputs.get("attention_mask")
        return {"token_mask": deciding_tokens(mask, inputs["labels"], self.args.sequence_pooling)}

    def _router_batches(self, rows: Any, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield rows in batches on the device, as the model's forward takes them to decide; on every process all."""
        for start in range(0, len(rows), size):
            batch = self.data_collator([rows[row] for row in range(start, min(start + size, len(rows)))])
            batch = {name: values.to(self.args.device) for name, values in batch.items()}
            decided_on = {"input_ids": batch["input_ids"], "attention_mask": _mask(batch)}
            yield decided_on | self._deciding_tokens(batch)

    def begin_control(self) -> None:
        """Fit substitutes, and let budget and hinge start from the routers as they are; not after a checkpoint."""
        self._hold_beginning()
        if self.state.global_step:
            return
        if isinstance(self.capacity_control, BudgetControl) and len(self._calibration):
            weigh_to, there = prompt_share(self._answered()), prompt_share(self.train_dataset)
            self.capacity_control.weights_of_parts = weigh_to / there, (1 - weigh_to) / (1 - there)
        self._fit_substitutes()
        budget = isinstance(self.capacity_control, BudgetControl)
        by_importance = self.args.router_init == "importance" and not isinstance(
            self.capacity_control, RegressionControl
        )
        if not (budget or by_importance):
            return
        rows, margins = self.train_dataset, None
        batches = list(self._first_batches(min(MOMENT_ROWS, len(rows))))
        if by_importance and any(weight.any() for weight in self.router_state().values()):
            logger.warning("router_init importance has no effect: the routers do not start at zero")
        elif by_importance:
            margins = starting_margins(self.model, batches)
        if budget:
            moments = router_moments(self.model, batches)
            self.capacity_control.begin(moments, self.model.config.mod_settings.threshold_of, margins)
        elif margins is not None:
            lowest = min(margins.values())  # starts on its threshold, the others above theirs
            set_thresholds(self.model, [_threshold(lowest - margin) for margin in margins.values()])

    def _first_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        first = [self.train_dataset[row] for row in range(rows)]
        return self._router_batches(first, self.args.per_device_eval_batch_size)

    def _hold_beginning(self) -> None:
        """Hold substitutes that train to the branches of what all rows begin with, where those do not change."""
        parameters = [p for module in self.model.substitute_modules().values() for p in module.parameters()]
        if not (self.args.router_only and any(p.requires_grad for p in parameters)) or self.args.use_lora:
            return
        batches = list(self._first_batches(self._rows_to_fit()))
        tokens = common_beginning(batches)
        if not tokens:
            return
        first = {name: batches[0][name][:1, :tokens] for name in ("input_ids", "attention_mask")}
        branches = BranchExamples(self.model)
        training = self.model.training
        self.model.eval()
        branches.read([first])
        self.model.train(training)
        self._beginning = branches.examples

    def _rows_to_fit(self) -> int:
        return rows_to_fit((len(row["input_ids"]) for row in self.train_dataset), self.model.config.hidden_size)

    @torch.no_grad()
    def _fit_substitutes(self) -> None:
        """Set substitutes that were not trained already to the closed-form fit; every process must call it."""
        substitutes = self.model.substitute_modules()
        parameters = [parameter for module in substitutes.values() for parameter in module.parameters()]
        with whole_parameters(parameters):
            trained = {place for place, module in substitutes.items() if any(p.any() for p in module.parameters())}
        substitutes = {place: module for place, module in substitutes.items() if place not in trained}
        if not substitutes:
            return
        show = self.is_world_process_zero() and not self.args.disable_tqdm
        fitted = fit(self.model, list(self._first_batches(self._rows_to_fit())), progress=show)
        for layer, substitute in substitutes.items():
            for name, parameter in substitute.named_parameters():
                self.set_parameter(parameter, broadcast(fitted[layer][name]))

    def step_control(self) -> None:
        """Close an accumulation window."""
        if self.capacity_control is None:
            return
        rate = self.lr_scheduler.get_last_lr()[0] / (self.args.learning_rate or 1.0)
        summed = float(self._window_tokens) / self.accelerator.num_processes
        self.capacity_control.step(self.state.global_step / self.state.max_steps, rate, self.accelerator, summed)

    def calibrate_on(self, rows: Any, ends: Collection[int] = ()) -> None:
        """Say what the thresholds are calibrated on, before training; without it they aren't.

        Args:
            rows: tokenized rows that are not trained on. The dense model answers their prompts, so that the capacity
                is that of generation. As what is executed follows from a prompt's length too, the shortest ones are
                taken, from the training rows as well.
            ends: tokens that end an answer.
        """
        self._calibration, self._ends = rows, ends

    def _answered(self) -> Sequence[dict[str, list[int]]]:
        """Return the rows to calibrate on, with the dense model's answers; every process must call it.

        A dense model that trains answers each time anew: at the end of training as what it is then, whether or not the
        training was cut short.
        """
        if self._is_answered or not len(self._calibration):
            return self._calibration
        rows = short_prompts(self._calibration, self.train_dataset)
        if self._zero3:
            logger.warning("under ZeRO-3 no answers are generated: thresholds are calibrated on those of the data")
        else:
            show = self.is_world_process_zero() and not self.args.disable_tqdm
            rows = answered(self.model, rows, self._ends, progress=show)
        if self._zero3 or (self.args.router_only and not self.args.use_lora):
            self._calibration, self._is_answered = rows, True
        return rows

    def finish(self) -> None:
        """Settle routers and thresholds: after it the model decides by itself, as its checkpoint will."""
        calibration_rows = self._answered()
        control, settings = self.capacity_control, self.model.config.mod_settings
        show = self.is_world_process_zero() and not self.args.disable_tqdm
        weights = self.router_weights()
        if isinstance(control, RegressionControl):
            weights, cuts = control.solve(progress=show)
        elif control is not None:
            cuts = control.cuts()
        elif not len(calibration_rows):
            return
        else:
            cuts = {layer: (cut, 1.0) for layer, cut in cuts_of(settings).items()}
        self.set_routers(weights)
        self.capacity_control = None
        settled = {self.args.target_capacity: {layer: cut for layer, (cut, _) in cuts.items()}}
        if len(calibration_rows):
            batches = list(self._router_batches(calibration_rows, self.args.per_device_eval_batch_size))
            options = {"progress": show, "execution": self._eval_execution}
            capacities = sorted({*self.args.capacities, self.args.target_capacity}, reverse=True)
            settled = calibrate_table(self.model, batches, cuts, capacities, **options)
        table, factors = fold_table(settled)
        self.set_routers({layer: weights[layer] * factor for layer, factor in factors.items()})
        self.units = {layer: factor * cuts[layer][1] for layer, factor in factors.items()}
        change_settings(
            self.model,
            threshold=table[self.args.target_capacity],
            capacities=pack_capacities(table) if len(calibration_rows) else None,
        )

    def router_weights(self) -> dict[Place, torch.Tensor]:
        """Return place -> float32 router weight on the CPU; every process must call it."""
        weights = self.router_state()
        return {layer: weights[router_name(layer)] for layer in self.model.router_modules()}

    def set_routers(self, weights: dict[Place, torch.Tensor]) -> None:
        """Give the routers other weights, place -> weight; every process must call it."""
        for layer, router in self.model.router_modules().items():
            self.set_parameter(router.weight, weights[layer])

    def _evaluation_loss(self, model, inputs, return_outputs):
        """Return the mean over the batch's own tokens, and add its sums to the meter."""
        remainder = self.accelerator.gradient_state.remainder
        real = self._real_rows(len(inputs["labels"]), remainder, inputs["labels"].device)
        targets = _without(inputs, ~real)
        tokens = (targets != IGNORE_INDEX).sum()
        control, rule = self.capacity_control, None
        if self._route and isinstance(control, BudgetControl) and control.means is not None:
            rule = control.settled_rule()  # by what training has come to
        outputs = self._forward(model, inputs, rule)
        with self.accelerator.autocast():
            nll, *_ = self._loss(outputs.states, targets)
        loss = nll / tokens
        if self._route:
            executed, sizes = executed_inputs(outputs.router_gates, inputs.get("attention_mask"))
            executed, sizes = executed[:, real], sizes[real]
            hinge = capacity_hinge(executed, sizes, self.args.target_capacity, weights=self._of_routers)
            self._meters["eval"].add(nll, tokens, hinge, executed, sizes)
        else:
            self._meters["eval"].add(nll, tokens)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        substitutes = [p for module in self.model.substitute_modules().values() for p in module.parameters()]
        routers = [router.weight for router in self.model.router_modules().values()]
        for parameters, rate in (
            (substitutes, self.args.substitute_learning_rate),
            (routers, self.args.router_learning_rate),
        ):
            if rate is not None:
                _set_apart(optimizer, parameters, rate)
        # DeepSpeed drops groups without parameters, and a scheduler's state has a rate for each group
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _weights(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what each token counts in the capacity, float32 [batch, tokens]; 0 for padding.

        By these weights prompts have the share of the rows' tokens that they have in generation.
        """
        control = self.capacity_control
        of_prompts, of_answers = control.weights_of_parts if isinstance(control, BudgetControl) else (1.0, 1.0)
        return _mask(batch) * torch.where(batch["labels"] == IGNORE_INDEX, of_prompts, of_answers)

    def _real_rows(self, rows: int, remainder: int, device: torch.device) -> torch.Tensor:
        """Tell, bool [rows], which rows of the batch that was drawn last are not there for the second time.

        Args:
            remainder: rows of the last round of batches, over all processes, that are there once; 0 where all are.
        """
        if not (self.accelerator.gradient_state.end_of_dataloader and remainder > 0):
            return torch.ones(rows, dtype=torch.bool, device=device)
        first = self.args.process_index * rows
        return torch.arange(first, first + rows, device=device) < remainder

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # `logs` is changed in place: `evaluate` returns the same dict
        if "loss" in logs:
            logs |= self._meters["train"].flush(self._sum_over_processes)
            if self.args.router_learning_rate is not None:
                logs["router_learning_rate"] = self.lr_scheduler.get_last_lr()[-1]  # the group that came last
            if isinstance(self.capacity_control, BudgetControl):
                logs |= {"capacity_price": self.capacity_control.price, "capacity_shift": self.capacity_control.shift}
        for key in [key for key in logs if key.endswith("_loss") and f"{key[:-5]}_runtime" in logs]:
            if key != "train_loss":  # an evaluation's: Trainer's is a mean of batch means
                means = self._meters["eval"].flush(self._sum_over_processes)
                prefix = key.removesuffix("_loss")
                logs[key] = means.pop("task_loss")
                logs |= {f"{prefix}_{name}": value for name, value in means.items()}
        super().log(logs, start_time)

    def _sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums.clone(), reduction="sum")


def _set_apart(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    """Move parameters, as far as the optimizer has them, into groups of their own with this learning rate."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if apart:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": apart, "lr": rate})


def _without(batch: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Return a batch's targets, -100 in the rows that `rows`, bool [batch], is True for."""
    return batch["targets"].masked_fill(rows[batch["positions"] // batch["labels"].shape[1]], IGNORE_INDEX)


def _mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a batch's attention mask, ones where it has none."""
    return batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])


class _ControlSteps(TrainerCallback):
    """Tells the capacity control where training begins and where an accumulation window ends."""

    def __init__(self, trainer: RouterTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_control()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.step_control()


def _threshold(cut: float | list[float]) -> float | list[float]:
    return torch.tensor(cut, dtype=torch.float64).sigmoid().clamp(1e-7, 1 - 1e-7).tolist()
