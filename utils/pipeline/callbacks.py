"""What a run shows while it trains."""

import sys

from transformers import ProgressCallback

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
