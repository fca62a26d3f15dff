"""The trainer: Hugging Face's own loop, with the routing loss, and capacity in the log."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer

from utils.io.errors import UserError

from .batches import IGNORE_INDEX, SupervisedBatches
from .losses import capacity_hinge, executed_inputs, next_token_nll
from .metrics import RoutingMeter
from .processes import Termination
from .training_checkpoint import TrainingCheckpoints


def freeze_backbone(model: nn.Module) -> None:
    """Let only the routers require gradients; they are found by their type, never by name (Section 3.2)."""
    model.requires_grad_(False)
    for router in model.router_modules().values():
        router.requires_grad_(True)


class RouterTrainer(TrainingCheckpoints, Trainer):
    """Trains routers: `L = L_task + lambda * L_MoD` (Eq. 9). Make it after `freeze_backbone`.

    `train_sampler`, if given, orders the training rows instead of Trainer's own sampler.

    Logged besides Trainer's own: `task_loss` (true mean over the supervised tokens), `mod_loss`, `capacity`, and
    `capacity/layer_i`.
    """

    def __init__(self, *args: Any, train_sampler: Sampler | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator = SupervisedBatches(self.data_collator)
        self.loss_is_scaled_for_ga = True  # by `compute_loss`
        self._train_sampler = train_sampler
        if self.is_fsdp_enabled:
            raise UserError("FSDP is not supported; DeepSpeed is (configs/accelerate)")
        self.termination = Termination()
        self.add_callback(self.termination)
        layers = self.model.config.mod_settings.layers
        self._meters = {mode: RoutingMeter(layers, self.args.device) for mode in ("train", "eval")}
        self._window_sequences: float | torch.Tensor = 0.0
        self._route = True
        # processes that skip different layers would gather different weights, and wait for each other for ever
        self._zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        self._eval_execution = "dense" if self._zero3 else None

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
        last = batches[-1]
        # accelerate forgets the remainder when it skips to where a run left off (1.15)
        remainder = len(self.train_dataset) % (self._train_batch_size * self.args.world_size)
        real = self._real_rows(len(last["labels"]), remainder, last["labels"].device)
        last["targets"] = _without(last, ~real)
        last["real"] = real
        tokens = sum((batch["targets"] != IGNORE_INDEX).sum() for batch in batches)
        sequences = sum(len(batch["labels"]) for batch in batches[:-1]) + real.sum()
        received = torch.tensor(int(self.termination.received))
        counts = torch.stack([count.to(device) for count in (tokens, sequences, received)])
        if self.args.world_size > 1:
            tokens, sequences, received = self.accelerator.reduce(counts, reduction="sum").unbind()
            self.termination.agree(received)
        self._window_sequences = sequences / self.args.world_size
        return batches, tokens.to(device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        nll, outputs = self._task_loss(model, inputs, inputs["targets"])
        executed, sizes = executed_inputs(outputs.router_gates, inputs.get("attention_mask"))
        if "real" in inputs:
            executed, sizes = executed * inputs["real"], sizes * inputs["real"]
        hinge = capacity_hinge(executed, sizes, self.args.target_capacity)
        self._meters["train"].add(nll, (inputs["targets"] != IGNORE_INDEX).sum(), hinge, executed, sizes)
        # both over the accumulation window; what the processes' gradients are averaged to is the mean over all of them
        loss = nll * self.accelerator.num_processes / num_items_in_batch
        loss = loss + self.args.gradient_scale * hinge.sum() / self._window_sequences
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, model, inputs, targets):
        """Return the sum of the negative log-likelihoods of `targets`, and the model's outputs without logits."""
        mask = inputs.get("attention_mask")
        outputs = model(
            input_ids=inputs["input_ids"],
            token_mask=None if mask is None else mask.bool(),
            states_at=inputs["positions"],
            route=self._route,
            execution=None if model.training else self._eval_execution,
            use_cache=False,
        )
        head = self.model.get_output_embeddings()
        if self._zero3:  # the head's weight is in parts, which only calling the head puts together
            return F.cross_entropy(head(outputs.states).float(), targets, reduction="sum"), outputs
        return next_token_nll(outputs.states, head, targets), outputs

    def _evaluation_loss(self, model, inputs, return_outputs):
        """Return the mean over the batch's own tokens, and add its sums to the meter."""
        remainder = self.accelerator.gradient_state.remainder
        real = self._real_rows(len(inputs["labels"]), remainder, inputs["labels"].device)
        targets = _without(inputs, ~real)
        tokens = (targets != IGNORE_INDEX).sum()
        nll, outputs = self._task_loss(model, inputs, targets)
        loss = nll / tokens
        if self._route:
            executed, sizes = executed_inputs(outputs.router_gates, inputs.get("attention_mask"))
            executed, sizes = executed[:, real], sizes[real]
            hinge = capacity_hinge(executed, sizes, self.args.target_capacity)
            self._meters["eval"].add(nll, tokens, hinge, executed, sizes)
        else:
            self._meters["eval"].add(nll, tokens)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None):
        if self.optimizer is not None or self.args.router_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        routers = {id(router.weight) for router in self.model.router_modules().values()}
        for group in list(optimizer.param_groups):
            apart = [parameter for parameter in group["params"] if id(parameter) in routers]
            if apart:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in routers]
                optimizer.add_param_group({**group, "params": apart, "lr": self.args.router_learning_rate})
        return optimizer

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
        for key in [key for key in logs if key.endswith("_loss") and f"{key[:-5]}_runtime" in logs]:
            if key != "train_loss":  # an evaluation's: Trainer's is a mean of batch means
                means = self._meters["eval"].flush(self._sum_over_processes)
                prefix = key.removesuffix("_loss")
                logs[key] = means.pop("task_loss")
                logs |= {f"{prefix}_{name}": value for name, value in means.items()}
        super().log(logs, start_time)

    def _sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums.clone(), reduction="sum")


def _without(batch: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Return a batch's targets, -100 in the rows that `rows`, bool [batch], is True for."""
    return batch["targets"].masked_fill(rows[batch["positions"] // batch["labels"].shape[1]], IGNORE_INDEX)
