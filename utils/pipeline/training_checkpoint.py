"""What a run goes on from: small `checkpoint-N` folders, with all but the frozen backbone.

A checkpoint holds routers, substitutes (and whatever else trains), optimizer, scheduler, the capacity control's state,
random states, the Trainer's state, which has the position in the data, and a manifest. One process writes it into a
folder of another name that is then renamed, so what is called `checkpoint-N` was whole when it was written; the
manifest's hashes show whether it still is. It loads into any number of processes, with or without DeepSpeed.

With a trained backbone under DeepSpeed the engine writes files of its own, a part from each process, which load into as
many processes only.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from utils.io.errors import UserError
from utils.io.files import atomic_file, write_json
from utils.model.checkpoint import (
    ROUTERS_FILE,
    SUBSTITUTES_FILE,
    load_routers,
    load_substitutes,
    router_name,
    save_routers,
    save_substitutes,
    substitute_parameters,
    whole_parameters,
)
from utils.model.lora import Adapter, adapter_of, load_adapter

from .optimizer_state import gather_optimizer_state, restore_optimizer_state
from .processes import check_engine, from_every_process

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
"""What the checkpoint's files are, and of which run."""
UNFINISHED = ".unfinished"
"""Folder in the output directory where a checkpoint is while it is written, and an old one while it is removed."""
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
CONTROL_FILE = "capacity_control.pt"
"""What the capacity control goes on from."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the training checkpoints in `output_dir`, the oldest first."""
    found = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest training checkpoint in `output_dir` that isn't damaged, or None; warns of those that are."""
    there = checkpoints(output_dir)
    for path in reversed(there):
        problem = damage(path)
        if problem is None:
            return str(path)
        logger.warning("%s is damaged (%s): looking for the one before", path, problem)
    if there:
        logger.warning("no checkpoint in %s is whole: starting from the beginning", output_dir)
    return None


def damage(checkpoint: str | Path) -> str | None:
    """Return what is wrong with the files of a training checkpoint, or None where they are as they were written."""
    try:
        files = read_manifest(checkpoint)["files"]
        for name, expected in files.items():
            if _sha256(Path(checkpoint, name)) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    return None


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """Return `files` (name -> SHA-256), `run` (the run's identity) and `parts` (processes it loads into, or None)."""
    return json.loads(Path(checkpoint, MANIFEST_FILE).read_text(encoding="utf-8"))


class TrainingCheckpoints:
    """The part of a Trainer that writes and reads checkpoints; mixed in before `Trainer`.

    Attributes:
        run_identity: what the result follows from; written into every checkpoint.
        capacity_control: has a state that training goes on from; None where there is none.
    """

    run_identity: dict[str, Any] | None = None
    capacity_control: Any = None
    _staging: Path | None = None
    _gathered: dict[str, Any] | None = None

    @property
    def _in_one_piece(self) -> bool:
        """Whether the main process writes everything: not where a large optimizer state is spread over processes."""
        return not self.is_deepspeed_enabled or any(not p.requires_grad for p in self.model.parameters())

    def router_state(self) -> dict[str, torch.Tensor]:
        """Return contract name -> float32 router weight on the CPU; every process must call it."""
        return self._whole({router_name(layer): router.weight for layer, router in self.model.router_modules().items()})

    def substitute_state(self) -> dict[str, torch.Tensor]:
        """Return contract name -> float32 tensor of the substitutes on the CPU; every process must call it."""
        return self._whole(substitute_parameters(self.model))

    def _whole(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = dict(parameters)
        if self.is_deepspeed_enabled and self.optimizer is not None:
            from deepspeed.utils import safe_get_full_fp32_param

            # the optimizer's float32 copy: under bf16 the engine rounds the module's own, under ZeRO-3 it's in parts
            trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
            full = {name: safe_get_full_fp32_param(parameter) for name, parameter in trained.items()}
            values |= {name: value for name, value in full.items() if value is not None}
        with whole_parameters(value for value in values.values() if isinstance(value, torch.nn.Parameter)):
            return {name: value.detach().float().cpu().clone() for name, value in values.items()}

    def adapter(self) -> Adapter | None:
        """Return the LoRA adapter that is trained, or None; every process must call it."""
        if not self.args.use_lora:
            return None
        if self.is_deepspeed_enabled and self.optimizer is not None:
            from deepspeed.utils import safe_get_full_fp32_param

            return adapter_of(self.model, safe_get_full_fp32_param)
        return adapter_of(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the routers into a training checkpoint; with a trained backbone, all weights."""
        if not self.args.router_only:
            super().save_model(output_dir, _internal_call)
        routers = self._gathered["routers"] if self._gathered else self.router_state()
        substitutes = self._gathered["substitutes"] if self._gathered else self.substitute_state()
        adapter = self._gathered["adapter"] if self._gathered else self.adapter()
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_routers(directory / ROUTERS_FILE, routers, self.model.config.mod_settings)
            if substitutes:
                save_substitutes(directory / SUBSTITUTES_FILE, substitutes, self.model.config.mod_settings)
            if adapter is not None:
                adapter.save(directory)
            if self.capacity_control is not None:
                _save(self.capacity_control.state_dict(), directory / CONTROL_FILE)

    @torch.no_grad()
    def set_parameter(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Give a parameter another value; every process must call it."""
        if self.is_deepspeed_enabled and self.optimizer is not None and parameter.requires_grad:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value.to(self.args.device))
        with whole_parameters([parameter]):
            parameter.copy_(value)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.args.router_only:
            model = model if model is not None else self.model
            load_routers(model, resume_from_checkpoint)
            if model.substitute_modules():
                load_substitutes(model, resume_from_checkpoint)
            if self.args.use_lora:
                load_adapter(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint; where it can't be written, every process ends with the same error.

        Raises:
            UserError: no space, no permission and the like; earlier checkpoints are as they were.
        """
        output_dir = Path(self._get_output_dir(trial))
        final = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        in_one_piece, problem = self._in_one_piece, None
        agree = in_one_piece  # else the engine's own calls are in between, in which the others would wait for this one
        try:
            self._gathered = self._gather() if in_one_piece else None
            self._staging = output_dir / UNFINISHED
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
                self._staging.mkdir(parents=True)
            if not in_one_piece:
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                agree = True
            elif self.args.should_save:
                super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._put_in_place(self._staging / final.name, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = _writing_problem(error)
            if not agree:  # this process ends at once, and the launcher or the broken connection ends the others
                self._end_with(final, [problem])
        finally:
            if self.args.should_save:
                shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
            self._staging = self._gathered = None
        self._end_with(final, from_every_process(self.args, problem))

    def _end_with(self, final: Path, problems: list[str | None]) -> None:
        problem = next((problem for problem in problems if problem), None)
        if problem:
            last = checkpoints(final.parent)
            way_out = f"; then the same command goes on from {last[-1].name}" if last else ""
            raise UserError(f"{final} could not be written: {problem}; make room, or let it be written to{way_out}")

    def _put_in_place(self, staged: Path, final: Path) -> None:
        files = {p.relative_to(staged).as_posix(): _sha256(p) for p in sorted(staged.rglob("*")) if p.is_file()}
        parts = None if self._in_one_piece else self.args.world_size
        write_json(staged / MANIFEST_FILE, {"files": files, "run": self.run_identity, "parts": parts})
        if final.exists():
            shutil.rmtree(final)  # a damaged one
        os.replace(staged, final)
        if self.args.save_total_limit:
            for old in checkpoints(final.parent)[: -self.args.save_total_limit]:
                os.replace(old, staged.parent / old.name)  # never half there under its own name

    def _gather(self) -> dict[str, Any]:
        """Collect on the main process what the others hold of a checkpoint; every process must call it."""
        self.store_flos()
        name = content = problem = None
        try:
            with tempfile.TemporaryDirectory(prefix="random-state-") as folder:
                super()._save_rng_state(folder)
                (path,) = Path(folder).iterdir()
                name, content = path.name, path.read_bytes()
        except (OSError, RuntimeError) as error:
            problem = _writing_problem(error)
        random_states = from_every_process(self.args, (name, content, problem))
        problem = next((problem for _, _, problem in random_states if problem), None)
        if problem:
            raise OSError(problem)
        return {
            "routers": self.router_state(),
            "substitutes": self.substitute_state(),
            "adapter": self.adapter(),
            "optimizer": gather_optimizer_state(self.model, self.optimizer, self.args.should_save),
            "random_states": {name: content for name, content, _ in random_states},
        }

    def store_flos(self):
        if self._gathered is None:  # else the main process is by itself, and this was done
            super().store_flos()

    def _save_rng_state(self, output_dir):
        if self._gathered is None:
            super()._save_rng_state(output_dir)
            return
        for name, content in self._gathered["random_states"].items():
            with atomic_file(Path(output_dir, name), "wb") as file:
                file.write(content)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self._gathered is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        for name, value in (
            (OPTIMIZER_FILE, self._gathered["optimizer"]),
            (SCHEDULER_FILE, self.lr_scheduler.state_dict()),
        ):
            _save(value, Path(output_dir, name))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not self._in_one_piece:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_FILE, SCHEDULER_FILE)
        )
        restore_optimizer_state(self.model, self.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.is_deepspeed_enabled and self._in_one_piece and resume_from_checkpoint:
            self._load_from_checkpoint(resume_from_checkpoint)  # before the engine takes its copy of the weights
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        else:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint and self.capacity_control is not None:
            # now that the routers are where they stay; an engine that loads its own files comes by here too
            state = torch.load(Path(resume_from_checkpoint, CONTROL_FILE), map_location="cpu", weights_only=True)
            self.capacity_control.load_state_dict(state)
        check_engine(self.args, self.model_wrapped, self.is_deepspeed_enabled)
        return prepared

    def _run_epoch(self, *, train_dataloader, epoch, **kwargs):
        # a checkpoint of the last step leaves nothing to train; Trainer would make one step more (transformers 5.23)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # accelerate doesn't reach the sampler where it skips to where a run left off (1.15)
        sampler = train_dataloader.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        if hasattr(sampler.sampler, "set_epoch"):
            sampler.sampler.set_epoch(epoch)
        super()._run_epoch(train_dataloader=train_dataloader, epoch=epoch, **kwargs)


def _save(value: Any, path: Path) -> None:
    content = io.BytesIO()  # by way of memory: torch hides what went wrong with a file
    torch.save(value, content)
    with atomic_file(path, "wb") as file:
        file.write(content.getbuffer())


def _writing_problem(error: OSError | RuntimeError | SafetensorError) -> str:
    """Return what kept a file from being written; raises the error again if it isn't of that kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return " ".join(str(error).split())
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):  # torch's way to say so
        return "is the disk full?"
    if "onnection closed by peer" in str(error) or "onnection reset by peer" in str(error):
        return "another process of the run has ended, and said why"
    raise error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
