"""The trainer: Hugging Face's own loop, with the routing loss, router-only checkpoints and capacity in the log."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from utils.io.errors import UserError
from utils.model.checkpoint import ROUTERS_FILE, load_routers, router_name, save_routers

from .losses import capacity_hinge, executed_inputs
from .metrics import RoutingMeter

COMPLETE_FILE = "COMPLETE"
"""Written last into a training checkpoint: one without it was cut short and is not resumed from."""


def freeze_backbone(model: nn.Module) -> None:
    """Let only the routers require gradients; they are found by their type, never by name (Section 3.2)."""
    model.requires_grad_(False)
    for router in model.router_modules().values():
        router.requires_grad_(True)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest training checkpoint in `output_dir` that was written to its end, or None."""
    complete = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_FILE}")]
    return str(max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if complete else None


class RouterTrainer(Trainer):
    """Trains routers: `L = L_task + lambda * L_MoD` (Eq. 9). Make it after `freeze_backbone`.

    `train_sampler`, if given, orders the training rows instead of Trainer's own sampler.

    Logged besides Trainer's own: `task_loss` (true mean over the supervised tokens), `mod_loss`, `capacity`, and
    `capacity/layer_i`. A checkpoint holds routers and optimizer state, not the frozen backbone.
    """

    def __init__(self, *args: Any, train_sampler: Sampler | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._train_sampler = train_sampler
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise UserError("DeepSpeed ZeRO-3 is not supported; ZeRO-1 is (configs/accelerate/deepspeed_zero1.yaml)")
        layers = self.model.config.mod_settings.layers
        self._meters = {mode: RoutingMeter(layers, self.args.device) for mode in ("train", "eval")}
        self._window_sequences = 0
        self._route = True

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
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window_sequences = sum(len(batch["input_ids"]) for batch in batches)
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        # undo the scaling by the window's tokens over all processes
        nll = loss.detach() * num_items_in_batch / self.accelerator.num_processes
        executed, sizes = executed_inputs(outputs.router_gates, inputs.get("attention_mask"))
        hinge = capacity_hinge(executed, sizes, self.args.target_capacity)
        self._meters["train"].add(nll, tokens, hinge, executed, sizes)
        loss = loss + self.args.gradient_scale * hinge.sum() / self._window_sequences
        return (loss, outputs) if return_outputs else loss

    def _evaluation_loss(self, model, inputs, return_outputs):
        """Return the mean over the batch's own tokens, and add its sums to the meter."""
        real = self._real_rows(len(inputs["labels"]))
        labels = inputs["labels"].masked_fill(~real[:, None], -100)
        tokens = (labels[:, 1:] != -100).sum()
        outputs = model(**(inputs | {"labels": labels}), route=self._route, use_cache=False)
        nll = torch.where(tokens > 0, outputs.loss * tokens, 0.0)
        if self._route:
            executed, sizes = executed_inputs(outputs.router_gates, inputs.get("attention_mask"))
            executed, sizes = executed[:, real], sizes[real]
            hinge = capacity_hinge(executed, sizes, self.args.target_capacity)
            self._meters["eval"].add(nll, tokens, hinge, executed, sizes)
        else:
            self._meters["eval"].add(nll, tokens)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _real_rows(self, rows: int) -> torch.Tensor:
        """Tell, bool [rows], which rows of this evaluation batch are not there for the second time.

        So that all processes have as many batches, accelerate fills the last round with rows from the start.
        """
        state = self.accelerator.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0):
            return torch.ones(rows, dtype=torch.bool, device=self.args.device)
        first = self.args.process_index * rows
        return torch.arange(first, first + rows, device=self.args.device) < state.remainder

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # `logs` is changed in place: `evaluate` returns the same dict
        if "loss" in logs:
            logs |= self._meters["train"].flush(self._sum_over_processes)
        for key in [key for key in logs if key.endswith("_loss") and f"{key[:-5]}_runtime" in logs]:
            if key != "train_loss":  # an evaluation's: Trainer's is a mean of batch means
                means = self._meters["eval"].flush(self._sum_over_processes)
                prefix = key.removesuffix("_loss")
                logs[key] = means.pop("task_loss")
                logs |= {f"{prefix}_{name}": value for name, value in means.items()}
        super().log(logs, start_time)

    def _sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums.clone(), reduction="sum")

    def router_state(self) -> dict[str, torch.Tensor]:
        """Return contract name -> float32 [1, hidden_size] on the CPU; every process must call it."""
        routers = {router_name(layer): router.weight for layer, router in self.model.router_modules().items()}
        if self.is_deepspeed_enabled and self.optimizer is not None:
            from deepspeed.utils import safe_get_full_fp32_param

            # the optimizer's float32 copy: under bf16 the engine rounds the module's own
            full = {name: safe_get_full_fp32_param(weight) for name, weight in routers.items()}
            routers = {name: weight if full[name] is None else full[name] for name, weight in routers.items()}
        return {name: weight.detach().float().cpu().clone() for name, weight in routers.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the routers into a training checkpoint; with a trained backbone, all weights."""
        if not self.args.router_only:
            super().save_model(output_dir, _internal_call)
        routers = self.router_state()
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_routers(directory / ROUTERS_FILE, routers, self.model.config.mod_settings)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.args.router_only:
            load_routers(model if model is not None else self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model, trial):
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        complete = Path(self._get_output_dir(trial=trial), name, COMPLETE_FILE)
        if self.args.should_save:
            complete.unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            complete.touch()

    # Trainer keeps frozen weights out of DeepSpeed's files for PEFT models only (transformers 5.23); the next two
    # hooks do the same for routers.
    def _save_optimizer_and_scheduler(self, output_dir):
        if not (self.is_deepspeed_enabled and self.args.router_only):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not (self.is_deepspeed_enabled and self.args.router_only and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint

        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared
