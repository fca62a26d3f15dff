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
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from utils.io.code import digest_of_code
from utils.io.errors import UserError
from utils.io.files import write_json
from utils.io.locks import LOCK_FILES
from utils.model.base_identity import digest, identify_model
from utils.model.checkpoint import INDEX_FILE, ROUTERS_FILE, read_routers, read_substitutes

from .processes import from_every_process, on_each_machine, on_main_process
from .training_checkpoint import UNFINISHED, damage, last_whole_checkpoint, read_manifest

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
"""What came of a run; the last that it writes."""
BY_CONTENT = ("model_name_or_path", "train_file", "eval_file", "router_dir")
"""Model and data arguments that count by what lies there: they are recorded, and may change."""
RESULT_NEUTRAL = frozenset(
    (
        *(
            "tokenized_cache_dir",
            "max_use_prompts",
            "save_base",
            "output_dir",
            "resume_from_checkpoint",
            "run_name",
            "project",
            "debug",
        ),
        # how the work is shared out
        *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "local_rank"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "torch_empty_cache_steps", "use_cpu", "accelerator_config"),
        *("parallelism_config", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed"),
        # what is said, measured on the way, and kept
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
        *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics"),
        *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
        *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "do_train", "do_eval"),
        *("do_predict", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
        *("enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        *("hub_revision", "restore_callback_states_from_checkpoint"),
    )
)
"""Arguments that leave the result as it is; all others, and what a newer transformers adds, are part of a run."""
CODE = ("utils/data", "utils/model", "utils/pipeline", "entrypoints/finetune/finetune_mod.py")
"""Code that the result follows from."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "tokenizers")


def describe_run(
    model_args: Any, data_args: Any, training_args: TrainingArguments, model_dir: str | Path
) -> dict[str, Any]:
    """Return what `run.json` holds: `identity` (what the result follows from), all arguments, versions."""
    identity = {
        option.name: getattr(arguments, option.name)
        for arguments in (model_args, data_args, training_args)
        for option in dataclasses.fields(arguments)
        if option.name not in RESULT_NEUTRAL
    }
    identity |= {f"model_{part}": digest(value) for part, value in identify_model(model_dir).items()}
    for name, path in (("train_file", data_args.train_file), ("eval_file", data_args.eval_file)):
        if path:
            identity[f"{name}_sha256"] = _sha256(name, Path(path))
    if model_args.router_dir:
        identity["router_dir_sha256"] = _routers_sha256(Path(model_args.router_dir))
    identity |= {"mixed_precision": training_args.mixed_precision, "device": training_args.device.type}
    identity |= {f"{name} version": number for name, number in installed_versions().items()}
    identity["code_sha256"] = digest_of_code(*CODE)
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
    _refuse_unlike_machines([run["identity"] for run in runs])
    return runs[0]


def agree_on_rows(training_args: TrainingArguments, run: dict[str, Any], tokenized: Sequence[Dataset]) -> None:
    """Add the rows, as they have become tokens, to what `run` is; they follow from more than files and arguments.

    Args:
        tokenized: rows with `input_ids` and `labels`, as `tokenize_dataset` returns them.

    Raises:
        UserError: the machines have other rows each.
    """
    rows = on_each_machine(training_args, lambda: {"rows_sha256": _rows_sha256(tokenized)})
    _refuse_unlike_machines(rows)
    run["identity"] |= rows[0]


def installed_versions() -> dict[str, str | None]:
    """Return package -> version for what a result may depend on; None where it isn't installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def check_output_directory(training_args: TrainingArguments, run: dict[str, Any]) -> None:
    """Refuse an output directory that `run` can't be written to; leaves nothing behind that wasn't there.

    Raises:
        UserError: it holds another run (the message names what differs), a finished one, or other files.
        OSError: it cannot be written to.
    """
    output_dir = Path(training_args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; choose another --output_dir")
    if (output_dir / RUN_FILE).is_file():
        _refuse_other_run(output_dir, run)
    elif output_dir.is_dir() and any(not _is_passing(path) for path in output_dir.iterdir()):
        raise UserError(f"output_dir {output_dir} holds other files; choose another --output_dir")
    _try_to_write(output_dir)


def checkpoint_to_resume(training_args: TrainingArguments, run: dict[str, Any]) -> str | None:
    """Return the checkpoint that `run` goes on from, or None to start; leaves nothing behind that wasn't there.

    Raises:
        UserError: `check_output_directory` refuses the directory; the checkpoint is another run's, damaged, or for
            another number of processes.
        OSError: the directory cannot be written to.
    """
    check_output_directory(training_args, run)
    output_dir = Path(training_args.output_dir)
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


def _is_passing(path: Path) -> bool:
    return path.match(".*.tmp") or path.match(LOCK_FILES)


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
    if (output_dir / INDEX_FILE).exists() and (output_dir / RESULTS_FILE).exists():
        raise UserError(f"output_dir {output_dir} holds this run, finished; choose another --output_dir to repeat it")


def _refuse_difference(what: str, held: dict[str, Any] | None, wanted: dict[str, Any], way_out: str) -> None:
    held = held or {}
    for name in sorted(held.keys() | wanted.keys()):
        not_known_yet = name == "rows_sha256" and name not in wanted
        if name not in BY_CONTENT and not not_known_yet and held.get(name) != wanted.get(name):
            raise UserError(
                f"{what} another run: its {name} is {held.get(name)!r}, this one's {wanted.get(name)!r}; {way_out}"
            )


def _refuse_unlike_machines(identities: Sequence[dict[str, Any]]) -> None:
    for number, identity in enumerate(identities):
        for name, value in identity.items():
            if name not in BY_CONTENT and value != identities[0].get(name):
                raise UserError(
                    f"machine {number} has another {name} than machine 0: {value!r}, not {identities[0].get(name)!r}; "
                    "give every machine the same arguments, files, code and packages"
                )


def _rows_sha256(tokenized: Sequence[Dataset]) -> str:
    value = hashlib.sha256()
    for rows in tokenized:
        for name in ("input_ids", "labels", "length"):
            for chunk in rows.data.column(name).chunks:
                value.update((chunk if name == "length" else chunk.flatten()).to_numpy(zero_copy_only=False).tobytes())
    return value.hexdigest()


def _routers_sha256(path: Path) -> str:
    if not path.is_file() and not (path / ROUTERS_FILE).is_file() and not (path / "config.json").is_file():
        raise UserError(f"router_dir {path}: no such file; name a {ROUTERS_FILE}, or a directory that has one")
    value = hashlib.sha256()
    for tensors, metadata in (read_routers(path), read_substitutes(path)):
        value.update(json.dumps(sorted(metadata.items())).encode())
        for name in sorted(tensors):
            value.update(name.encode() + tensors[name].float().numpy().tobytes())
    return value.hexdigest()


def _sha256(name: str, path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{name} {path}: no such file; make it with `python entrypoints/data/reformat_datasets.py` "
            "(see the README, Data)"
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
