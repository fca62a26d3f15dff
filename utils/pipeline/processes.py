"""What the processes of a run agree on: that all are there, what the main one found out, and when to stop.

Several wrong launches train on in silence, each process alone, and end with exit code 0 (accelerate 1.15): `MULTI_CPU`
without a hostfile, `MULTI_GPU` on CPUs without `--use_cpu true`, DeepSpeed with `ACCELERATE_USE_CPU`. So a run compares
what was asked for, which `entrypoints/launch.py` hands on, with what it became.
"""

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

from utils.io.errors import UserError, name_failure
from utils.io.launched import ENGINE_VARIABLE, PROCESSES_VARIABLE

T = TypeVar("T")
ACCELERATE_FLAGS = (
    *("USE_CPU", "DEBUG_MODE", "CPU_AFFINITY", "ENABLE_RICH", "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM"),
    *("DYNAMO_USE_FULLGRAPH", "DYNAMO_USE_DYNAMIC", "DYNAMO_USE_REGIONAL_COMPILATION"),
)
"""Variables of accelerate that say yes or no."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM: a checkpoint was saved, and the same command goes on from it."""


def prepare_deepspeed() -> None:
    """Keep DeepSpeed on CPUs from compiling, for minutes, an operation that only inference uses (deepspeed 0.19)."""
    if deepspeed_was_asked_for() and not torch.cuda.is_available():
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def check_accelerate_variables() -> None:
    """Refuse what accelerate can't read in the environment: by itself it trips over that once all is loaded.

    Raises:
        UserError: names the variable and what is allowed.
    """
    truths = ("true", "yes", "t", "y", "on", "1", "false", "no", "f", "n", "off", "0")
    allowed = dict.fromkeys((f"ACCELERATE_{name}" for name in ACCELERATE_FLAGS), truths)
    allowed["ACCELERATE_MIXED_PRECISION"] = ("no", "bf16", "fp16")
    allowed["ACCELERATE_DYNAMO_BACKEND"] = tuple(backend.lower() for backend in DynamoBackend.list())
    for name, values in allowed.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in values:
            raise UserError(f"{name}={value} in the environment: allowed are {', '.join(values)}; or unset it")
    device = os.environ.get("ACCELERATE_TORCH_DEVICE")
    try:
        torch.device(device or "cpu")
    except RuntimeError:
        raise UserError(f"ACCELERATE_TORCH_DEVICE={device} in the environment: no device of torch; unset it") from None


def deepspeed_was_asked_for() -> bool:
    """Tell whether the launcher was given a DeepSpeed config."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def zero_stage() -> int:
    """Return the ZeRO stage that the launcher was given a DeepSpeed config of, 0 without DeepSpeed.

    Raises:
        UserError: the file can't be read.
    """
    if not deepspeed_was_asked_for():
        return 0
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return int(_zero_config().get("stage", 0))


def zero_offloads() -> bool:
    """Tell whether the DeepSpeed config that the launcher was given keeps weights or optimizer in the host's memory."""
    if not deepspeed_was_asked_for() or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") == "none":
        return False
    return any(name.startswith("offload_") for name in _zero_config())


def _zero_config() -> dict[str, Any]:
    path = os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
        int(config.get("stage", 0))
        return config
    except OSError as error:
        raise UserError(
            f"deepspeed_config_file {path}: {error.strerror}; there are some in configs/deepspeed"
        ) from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"deepspeed_config_file {path}: not a DeepSpeed config") from None


def check_started() -> None:
    """Compare the number of processes that the launcher was asked for with that of those it started.

    Raises:
        UserError: they differ.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    asked = int(os.environ.get(PROCESSES_VARIABLE, started))
    if started != asked:
        raise UserError(
            f"{asked} processes were asked for and {started} started: give every machine the same number of processes "
            "(that of all machines together) and machines, and use a config of configs/accelerate "
            "(MULTI_CPU starts a single process)"
        )


def check_joined(args: TrainingArguments) -> None:
    """Look whether all processes that were started have found each other.

    Raises:
        UserError: each is by itself.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != started:
        raise UserError(
            f"{started} processes were started and each would train alone: on CPUs add --use_cpu true, elsewhere "
            "look at the backend"
        )


def check_engine(args: TrainingArguments, model: Any, deepspeed: bool) -> None:
    """Look whether the model that is about to be trained is in the hands of what was asked for.

    Args:
        model: the model as the trainer has wrapped it.
        deepspeed: whether the trainer runs DeepSpeed.

    Raises:
        UserError: it isn't, and the processes would train apart or without sharding.
    """
    engine = os.environ.get(ENGINE_VARIABLE, "")
    if engine == "DEEPSPEED" and not deepspeed:
        raise UserError("the config asks for DeepSpeed and it isn't running: unset ACCELERATE_USE_CPU")
    if args.world_size > 1 and not deepspeed and not isinstance(model, DistributedDataParallel):
        raise UserError(
            f"{args.world_size} processes were started and nothing joins their gradients: use a config of "
            "configs/accelerate"
        )


def on_main_process(args: TrainingArguments, function: Callable[[], T]) -> T:
    """Run `function` on the main process alone and return its result on every one.

    Raises:
        UserError: on every process, where it or an OSError was raised on the main one.
    """
    result, problem = _attempt(function) if args.process_index == 0 else (None, None)
    if args.world_size > 1:
        shared = [result, problem]
        dist.broadcast_object_list(shared, src=0, device=args.device)
        result, problem = shared
    if problem is not None:
        raise UserError(problem)
    return result


def on_each_machine(args: TrainingArguments, function: Callable[[], T]) -> list[T]:
    """Run `function` on the first process of each machine and return the machines' results on every process.

    Raises:
        UserError: on every process, where it or an OSError was raised on any.
    """
    result, problem = _attempt(function) if args.local_process_index == 0 else (None, None)
    outcomes = from_every_process(args, (args.local_process_index == 0, result, problem))
    for _, _, problem in outcomes:
        if problem is not None:
            raise UserError(problem)
    return [result for first, result, _ in outcomes if first]


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the function's result, or what the user is to be told of its failure."""
    try:
        return function(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, name_failure(error)


def from_every_process(args: TrainingArguments, value: T) -> list[T]:
    """Return what each process gives, in the order of the processes, on every one."""
    if args.world_size == 1:
        return [value]
    values: list[Any] = [None] * args.world_size
    dist.all_gather_object(values, value)
    return values


class Termination(TrainerCallback):
    """Answers SIGTERM during training: every process saves a checkpoint after the same step, and training ends.

    Whether any process has received one travels with the numbers that the processes sum up before each step, so that
    agreeing costs no message of its own, and the device is not waited for.

    Attributes:
        happened: training ended for this reason.
    """

    def __init__(self) -> None:
        self.received = self.happened = False
        self._before: Any = None
        self._agreed = torch.zeros((), dtype=torch.int64)
        self._arrived: torch.cuda.Event | None = None

    def agree(self, count: torch.Tensor) -> None:
        """Take note of how many processes had received the signal before this step; int64 [], on any device."""
        if count.device.type != "cuda":
            self._agreed = count
            return
        self._agreed = torch.zeros((), dtype=torch.int64, pin_memory=True)
        self._agreed.copy_(count, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def on_step_end(self, args, state, control, **kwargs):
        if self._arrived is not None:
            self._arrived.synchronize()  # of the numbers before the step, not of the step
        if self._agreed.item() > 0 or (self.received and args.world_size == 1):
            self.happened = True
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._before)

    def _receive(self, signal_number, frame):
        self.received = True
