"""What a run can go on from: training checkpoints that hold routers and optimizer state, not the frozen backbone."""

import os
from pathlib import Path

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from utils.model.checkpoint import ROUTERS_FILE, load_routers, router_name, save_routers

COMPLETE_FILE = "COMPLETE"
"""Written last into a training checkpoint: one without it was cut short and is not resumed from."""


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest training checkpoint in `output_dir` that was written to its end, or None."""
    complete = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_FILE}")]
    return str(max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if complete else None


class TrainingCheckpoints:
    """The part of a Trainer that writes and reads checkpoints; mixed in before `Trainer`."""

    def router_state(self) -> dict[str, torch.Tensor]:
        """Return contract name -> float32 router weight on the CPU; every process must call it."""
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
