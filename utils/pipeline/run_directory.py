"""A run's output directory: what run it belongs to, and where that run left off.

`run.json` holds the resolved arguments, versions and seed. The same command started again goes on from its last whole
checkpoint; another run is refused, and so is one that is done.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from utils.io.errors import UserError
from utils.io.files import write_json
from utils.model.checkpoint import INDEX_FILE

from .processes import from_every_process, on_each_machine, on_main_process
from .training_checkpoint import UNFINISHED, damage, last_whole_checkpoint, read_manifest

RUN_FILE = "run.json"
RESULT_NEUTRAL = ("tokenized_cache_dir", "save_base")
"""Model and data arguments that leave the result as it is."""
TRAINING_IDENTITY = (
    *("recipe", "capacity_control", "capacity_scope", "distillation_weight", "calibration_rows", "sequence_pooling"),
    *("gradient_scale", "target_capacity", "router_only", "global_batch_size", "learning_rate", "weight_decay"),
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "optim", "max_grad_norm", "seed"),
    *("data_seed", "train_sampling_strategy", "bf16", "fp16", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_kwargs", "optim_args", "router_learning_rate", "use_lora", "lora_rank", "lora_alpha"),
    *("lora_dropout", "lora_target_modules", "lora_layers", "regression_rows", "router_init", "distillation_every"),
    *("substitute", "substitute_rank", "substitute_learning_rate", "capacities"),
)
"""Training arguments that the result follows from."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "tokenizers")


def describe_run(
    model_args: Any, data_args: Any, training_args: TrainingArguments, model_dir: str | Path
) -> dict[str, Any]:
    """Return what `run.json` holds: `identity` (what the result follows from), all arguments, versions."""
    identity = dataclasses.asdict(model_args) | dataclasses.asdict(data_args)
    identity = {name: value for name, value in identity.items() if name not in RESULT_NEUTRAL}
    identity |= {name: getattr(training_args, name) for name in TRAINING_IDENTITY}
    identity["model_fingerprint"] = _model_fingerprint(model_dir)
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


def agree_on_run(
    model_args: Any, data_args: Any, training_args: TrainingArguments, model_dir: str | Path
) -> dict[str, Any]:
    """Return `describe_run`'s on every process, read by the first one of each machine.

    Raises:
        UserError: a file is missing, or the machines would train something else each; the message names what differs.
    """
    runs = on_each_machine(training_args, lambda: describe_run(model_args, data_args, training_args, model_dir))
    for number, run in enumerate(runs):
        for name, value in run["identity"].items():
            if value != runs[0]["identity"][name]:
                raise UserError(
                    f"machine {number} has another {name} than machine 0: {value!r}, not "
                    f"{runs[0]['identity'][name]!r}; give every machine the same arguments and files"
                )
    return runs[0]


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
    """Return the checkpoint that `run` goes on from, or None to start; leaves nothing behind that wasn't there.

    Raises:
        UserError: the directory holds another run (the message names what differs), a finished one, or other files;
            the checkpoint is another run's, damaged, or for another number of processes.
        OSError: the directory cannot be written to.
    """
    output_dir = Path(training_args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; choose another --output_dir")
    if (output_dir / RUN_FILE).is_file():
        _refuse_other_run(output_dir, run)
    elif output_dir.is_dir() and any(not path.match(".*.tmp") for path in output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} holds other files; choose another --output_dir")
    _try_to_write(output_dir)
    resume = training_args.resume_from_checkpoint
    if not resume or resume.lower() in ("true", "1", "false", "0"):
        resume = last_whole_checkpoint(output_dir)
    else:
        problem = damage(resume)
        if problem:
            raise UserError(f"resume_from_checkpoint {resume}: not a whole checkpoint: {problem}")
        held, way_out = read_manifest(resume)["run"], "name one of this run's"
        _refuse_difference(f"resume_from_checkpoint {resume} is of", held, run["identity"], way_out)
    if resume:
        parts = read_manifest(resume)["parts"]
        if parts not in (None, training_args.world_size):
            raise UserError(
                f"{resume} was written by {parts} processes, each its part of the optimizer; there are "
                f"{training_args.world_size} now: go on with {parts}"
            )
    return resume


def claim_output_directory(training_args: TrainingArguments, run: dict[str, Any]) -> None:
    """Write `run.json`, before anything else is written there, and clear away what a kill left; all processes call it.

    Raises:
        UserError: it cannot be written, or not every process sees it.
    """
    path = Path(training_args.output_dir) / RUN_FILE

    def write() -> None:
        write_json(path, run)
        shutil.rmtree(path.parent / UNFINISHED, ignore_errors=True)

    on_main_process(training_args, write)
    patience = time.monotonic() + 60  # a network's file system may take a while to show a new file
    while not path.is_file() and time.monotonic() < patience:
        time.sleep(0.1)
    if not all(from_every_process(training_args, path.is_file())):
        raise UserError(f"output_dir {training_args.output_dir} must be on a disk that all machines share")


def _try_to_write(output_dir: Path) -> None:
    """Raise `OSError` where `output_dir` cannot be made or written to, before hours of work are to go there."""
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    handle, name = tempfile.mkstemp(prefix=".writable.", suffix=".tmp", dir=there)
    os.close(handle)
    os.unlink(name)


def _refuse_other_run(output_dir: Path, run: dict[str, Any]) -> None:
    try:
        held = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output_dir / RUN_FILE} is damaged; choose another --output_dir") from None
    _refuse_difference(f"output_dir {output_dir} holds", held, run["identity"], "choose another --output_dir")
    if (output_dir / INDEX_FILE).exists():
        raise UserError(f"output_dir {output_dir} holds this run, finished; choose another --output_dir to repeat it")


def _refuse_difference(what: str, held: dict[str, Any] | None, wanted: dict[str, Any], way_out: str) -> None:
    held = held or {}
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise UserError(
                f"{what} another run: its {name} is {held.get(name)!r}, this one's {wanted.get(name)!r}; {way_out}"
            )


def _model_fingerprint(directory: str | Path) -> str:
    """Return a hash of what tells one model's files from another's, without reading all of the weights.

    Of a weight file that is its size, and its first and last MiB: the names and shapes, and some of the numbers.
    """
    fingerprint = hashlib.sha256((Path(directory) / "config.json").read_bytes())
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            fingerprint.update(f"{path.name} {size}".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            fingerprint.update(file.read())
    return fingerprint.hexdigest()


def _sha256(name: str, path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{name} {path}: no such file; make it with `python entrypoints/data/reformat_datasets.py` "
            "(see the README, Data)"
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
