"""A run's output directory: what run it belongs to, and where that run left off.

`run.json` holds the resolved arguments, versions and seed. The same command started again goes on from its last whole
checkpoint; another run is refused, and so is one that is done.
"""

import dataclasses
import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from utils.io.errors import UserError
from utils.model.checkpoint import INDEX_FILE

from .training_checkpoint import COMPLETE_FILE, last_complete_checkpoint

RUN_FILE = "run.json"
RESULT_NEUTRAL = ("tokenized_cache_dir", "save_base")
"""Model and data arguments that leave the result as it is."""
TRAINING_IDENTITY = (
    *("gradient_scale", "target_capacity", "router_only", "global_batch_size", "learning_rate", "weight_decay"),
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "optim", "max_grad_norm", "seed"),
    *("data_seed", "train_sampling_strategy", "bf16", "fp16", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_kwargs", "optim_args"),
)
"""Training arguments that the result follows from."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers")


def describe_run(model_args: Any, data_args: Any, training_args: TrainingArguments) -> dict[str, Any]:
    """Return what `run.json` holds: `identity` (what the result follows from), all arguments, versions."""
    identity = dataclasses.asdict(model_args) | dataclasses.asdict(data_args)
    identity = {name: value for name, value in identity.items() if name not in RESULT_NEUTRAL}
    identity |= {name: getattr(training_args, name) for name in TRAINING_IDENTITY}
    identity["train_file_sha256"] = _sha256("train_file", Path(data_args.train_file))
    if data_args.eval_file:
        identity["eval_file_sha256"] = _sha256("eval_file", Path(data_args.eval_file))
    return json.loads(
        json.dumps(
            {
                "identity": identity,
                "arguments": {
                    "model": dataclasses.asdict(model_args),
                    "data": dataclasses.asdict(data_args),
                    "training": training_args.to_sanitized_dict(),
                },
                "versions": {"python": platform.python_version(), **installed_versions()},
            },
            default=str,
        )
    )


def installed_versions() -> dict[str, str | None]:
    """Return package -> version for what a result may depend on; None where it isn't installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def checkpoint_to_resume(training_args: TrainingArguments, run: dict[str, Any]) -> str | None:
    """Return the checkpoint in the output directory that `run` goes on from, or None to start; writes nothing.

    Raises:
        UserError: the directory holds another run (the message names what differs), a finished one, or other files.
    """
    output_dir = Path(training_args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; choose another --output_dir")
    if (output_dir / RUN_FILE).is_file():
        _refuse_other_run(output_dir, run)
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} holds other files; choose another --output_dir")
    resume = training_args.resume_from_checkpoint
    if not resume or resume.lower() in ("true", "1", "false", "0"):
        return last_complete_checkpoint(output_dir)
    if not (Path(resume) / COMPLETE_FILE).is_file():
        raise UserError(f"resume_from_checkpoint {resume}: not a checkpoint that was written to its end")
    return resume


def _refuse_other_run(output_dir: Path, run: dict[str, Any]) -> None:
    try:
        held = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output_dir / RUN_FILE} is damaged; choose another --output_dir") from None
    differing = sorted(n for n in held.keys() | run["identity"].keys() if held.get(n) != run["identity"].get(n))
    if differing:
        name = differing[0]
        raise UserError(
            f"output_dir {output_dir} holds another run: its {name} is {held.get(name)!r}, "
            f"this one's {run['identity'].get(name)!r}; choose another --output_dir"
        )
    if (output_dir / INDEX_FILE).exists():
        raise UserError(f"output_dir {output_dir} holds this run, finished; choose another --output_dir to repeat it")


def _sha256(name: str, path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{name} {path}: no such file; make it with `python entrypoints/data/reformat_datasets.py` "
            "(see the README, Data)"
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
