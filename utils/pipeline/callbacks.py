"""What a run shows while it trains, and how it claims its output directory."""

import sys
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from utils.io.files import write_json

from .run_directory import RUN_FILE

SHOWN = ("loss", "task_loss", "mod_loss", "capacity", "grad_norm", "learning_rate")


class RouterProgressCallback(ProgressCallback):
    """Trainer's progress bar, with one short line for each log; the full log goes to TensorBoard and the like."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        shown = [f"{name} {logs[prefix + name]:.4g}" for name in SHOWN if prefix + name in logs]
        if shown:
            where = f"{'held-out' if prefix else 'step'} {state.global_step}/{state.max_steps}"
            self.training_bar.write(f"{where}: {', '.join(shown)}", file=sys.stderr)


class ClaimOutputDirectory(TrainerCallback):
    """Writes `run.json` when training starts, and not before: a run that was refused leaves nothing behind."""

    def __init__(self, run: dict[str, Any]):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / RUN_FILE, self.run)
