"""CUDA devices, simulated: real values on the CPU, in tensors whose `device` says `cuda:N`.

Within `simulated_gpus()` operators refuse tensors of different devices, as CUDA does, and three things are counted:
kernels (operators that compute something on a device), host synchronisations (whatever makes the program wait for the
device: reading values back, results whose shape depends on values, copies from pageable memory), and copies between
devices. `torch.cuda`'s sync debug mode, events, memory counters and graphs do what the real ones do, as far as their
callers can tell: a graph records the operators of a capture, refuses those that synchronise, and runs them again on the
same memory. Speed means nothing here, and neither do kernels' own limits.

A torch without CUDA can't handle devices of that name, so tensors are of a Python backend, and devices are
renamed between it and the program. Tensors are wrappers, so `Module.to` would untie tied weights: `place` doesn't.
"""

import contextlib
import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState, PartialState
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import Trainer, TrainingArguments

aten = torch.ops.aten
ROOT = str(Path(__file__).resolve().parents[2])
CPU = torch.device("cpu")
BACKEND = "simulated"
DEVICE_OF, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__

READS_VALUES = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
"""Operators that hand values, or a shape that depends on them, to the host."""
TAKE_CPU_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COMPUTE_NOTHING = ("detach", "alias", "lift", "_unsafe_view", "empty", "_reshape_alias")


class DeviceMismatchError(RuntimeError):
    """Tensors of different devices met in one operator."""


class SynchronisedError(RuntimeError):
    """The program waited for the device where that was forbidden."""


@dataclass
class Events:
    """What happened on the devices.

    Args:
        kernels: operator -> how often it computed something on a device.
        syncs: what and where -> how often the program waited for a device.
        copies: copies between two devices.
        bytes: of the tensors on devices, now; `peak_bytes` the most so far.
    """

    kernels: Counter = field(default_factory=Counter)
    syncs: Counter = field(default_factory=Counter)
    copies: int = 0
    bytes: int = 0
    peak_bytes: int = 0
    sync_mode: str = "default"
    recording: "list | None" = None

    def clear(self) -> None:
        """Count from zero again, but for memory."""
        self.kernels.clear()
        self.syncs.clear()
        self.copies = 0

    def synchronise(self, what: str) -> None:
        """Note that the program waited for a device; raise where that is forbidden."""
        where = _caller()
        if self.recording is not None:
            raise SynchronisedError(f"{what} while a graph is captured, {where}")
        if self.sync_mode == "error":
            raise SynchronisedError(f"{what} in sync debug mode, {where}")
        self.syncs[f"{what} {where}"] += 1

    def launch(self, name: str) -> None:
        """Note a kernel."""
        self.kernels[name] += 1

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is released."""
        size = storage.nbytes()
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.bytes -= size


EVENTS = Events()


class _Backend(_DummyBackendModule):
    """What torch asks of a backend; the rest is done in `_run`."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, *_) -> None:
        pass


_backend = _Backend()
_backend.__name__ = "simulated_cpu"  # transformers asks every device's module for its name
_setup_privateuseone_for_python_backend(BACKEND, backend_module=_backend)


class SimulatedTensor(torch.Tensor):
    """A tensor that says it is on a device, and keeps its values in `values`, on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
            requires_grad=False,
        )
        made.values, made.place = values, device
        storage = values.untyped_storage()
        if not getattr(storage, "_simulated", False):
            storage._simulated = True
            EVENTS.hold(storage)
        return made

    def __repr__(self, **_):
        return f"SimulatedTensor({self.values!r}, {self.place})"

    def __deepcopy__(self, memo):
        return SimulatedTensor(self.values.clone(), self.place).requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _caller() -> str:
    """Return where the program is: its innermost line outside torch, and the innermost one of this repository."""
    innermost = own = None
    frame = sys._getframe(1)
    while frame is not None and own is None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name:
            place = f"{name.rpartition('site-packages/')[2].removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
            innermost = innermost or place
            own = place if name.startswith(f"{ROOT}/utils") else None
        frame = frame.f_back
    return " <- ".join(dict.fromkeys(filter(None, (innermost, own))))


def _device(given) -> torch.device:
    """Return the backend's device for a `cuda` one, and any other as it is."""
    with torch._C.DisableTorchFunction():
        device = torch.device("cpu" if given is None else given)
        return torch.device(BACKEND, device.index or 0) if device.type in ("cuda", BACKEND) else device


def _shown(device: torch.device) -> torch.device:
    """Return the device as a program is to see it."""
    with torch._C.DisableTorchFunction():
        return torch.device("cuda", device.index) if device.type == BACKEND else device


def _renamed(tree):
    """Name the backend's devices in a call's arguments that has `cuda` ones."""

    def rename(leaf):
        is_cuda = isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.startswith("cuda"))
        return _device(leaf) if is_cuda else leaf

    return tree_map(rename, tree)


def _place(tensor: torch.Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, SimulatedTensor) else CPU


def _values(tree):
    return tree_map(lambda leaf: leaf.values if isinstance(leaf, SimulatedTensor) else leaf, tree)


def _wrapped(tree, device: torch.device):
    def wrap(leaf):
        is_plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, SimulatedTensor)
        return SimulatedTensor(leaf, device) if is_plain else leaf

    return tree_map(wrap, tree)


@functools.cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _computes(func) -> bool:
    makes_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
    return not makes_view and not any(word in func.__name__ for word in COMPUTE_NOTHING)


def _run(func, args, kwargs):
    """Run one operator as a device would, or on the CPU where it has to do with none."""
    if _is_composite(func):
        with _Dispatch():
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func.__name__.startswith(("pin_memory", "_pin_memory")):
        return args[0]
    if func.__name__.startswith("is_pinned"):
        return True
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    places = {leaf.place for leaf in tensors if isinstance(leaf, SimulatedTensor)}
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    if func is aten._to_copy.default:
        return _to(*args, **kwargs)
    target = _device(kwargs["device"]) if kwargs.get("device") is not None else next(iter(places), CPU)
    if not places and target.type != BACKEND:
        return func(*args, **kwargs)
    if len(places) > 1:
        raise DeviceMismatchError(f"{func} was given tensors on {', '.join(sorted(map(str, places)))}, {_caller()}")
    if places:
        _check_host_tensors(func, args, tensors)
    if func in READS_VALUES:
        EVENTS.synchronise(func.__name__)
    if func is aten._fused_sdp_choice.default:
        return 0  # the kernel that is made of others
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": CPU, "pin_memory": None} if "pin_memory" in kwargs else {**kwargs, "device": CPU}
    if target.type == BACKEND and _computes(func):
        EVENTS.launch(func.__name__)
    plain_args, plain_kwargs = _values(args), _values(kwargs)
    if func is aten.histc.default and not plain_args[0].is_floating_point():  # a CPU has none for integers
        result = func(plain_args[0].float(), *plain_args[1:], **plain_kwargs).to(plain_args[0].dtype)
    else:
        result = func(*plain_args, **plain_kwargs)
    _record(func, plain_args, plain_kwargs, result)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            return func(*args, **kwargs)  # the wrapper's own shape
    written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written and func._schema.returns:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        back = [given[a.name] for a in written if a.name in given]
        if len(back) == len(func._schema.returns):
            return back[0] if len(back) == 1 else tuple(back)
    return _wrapped(result, target) if target.type == BACKEND else result


def _check_host_tensors(func, args, tensors) -> None:
    """Refuse tensors of the CPU, but for single values and, where it is indexed with, at the price of a copy."""
    if func in TAKE_CPU_INDICES:
        if not isinstance(args[0], SimulatedTensor):
            raise DeviceMismatchError(f"{func}: indices on a device, but what is indexed is not, {_caller()}")
        for index in args[1]:
            if isinstance(index, SimulatedTensor) and index.dtype in (torch.bool, torch.uint8):
                EVENTS.synchronise("indexing with a mask")
            elif isinstance(index, torch.Tensor) and not isinstance(index, SimulatedTensor) and index.dim() > 0:
                EVENTS.synchronise("indexing with what is on the host")
        return
    for tensor in tensors:
        if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0:
            raise DeviceMismatchError(f"{func} was given {list(tensor.shape)} on the CPU, {_caller()}")


def _transfer(target: torch.device, source: torch.device, non_blocking: bool, shape) -> None:
    if target == source:
        if target.type == BACKEND:
            EVENTS.launch("copy")
    elif target.type == "cpu":
        EVENTS.synchronise(f"reading {list(shape)} back")
    elif source.type == "cpu":
        if not non_blocking and 0 not in shape:
            EVENTS.synchronise(f"sending {list(shape)}")
    else:
        EVENTS.copies += 1


def _copy(target, source, non_blocking=False):
    _transfer(_place(target), _place(source), non_blocking, source.shape)
    plain = _values((target, source))
    aten.copy_.default(*plain)
    if isinstance(target, SimulatedTensor):
        _record(aten.copy_.default, plain, {}, plain[0])
    return target


def _to(source, device=None, non_blocking=False, pin_memory=None, **kwargs):
    target = _device(device) if device is not None else _place(source)
    _transfer(target, _place(source), non_blocking, source.shape)
    result = aten._to_copy.default(_values(source), **kwargs)
    if target.type != BACKEND:
        return result
    _record(aten._to_copy.default, (_values(source),), kwargs, result)
    return SimulatedTensor(result, target)


def _record(func, args, kwargs, result) -> None:
    if EVENTS.recording is not None:
        EVENTS.recording.append((func, args, kwargs, result))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What doesn't reach the dispatcher as it would on a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to or "device" in kwargs:
            args, kwargs = _renamed(args), _renamed(kwargs)
        if func == DEVICE_OF:
            return _shown(func(*args, **kwargs))
        if func == IS_CUDA:
            return isinstance(args[0], SimulatedTensor)
        if func in (torch.tensor, torch.as_tensor) and _device(kwargs.get("device")).type == BACKEND:
            kwargs = dict(kwargs)
            device, wants_grad = _device(kwargs.pop("device")), kwargs.pop("requires_grad", False)
            made = func(*args, **kwargs)
            _transfer(device, CPU, False, made.shape)
            return SimulatedTensor(made, device).requires_grad_(wants_grad)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], SimulatedTensor):
            EVENTS.synchronise(func.__name__)
            return func(args[0].values.detach(), *args[1:], **kwargs)
        if func is torch.Tensor.backward:  # activations may be computed again in it
            with self:
                ones = (torch.ones_like(args[0]),)
                return _engine_run_backward((args[0],), ones, False, False, (), True, accumulate_grad=True)
        attention = func is torch.nn.functional.scaled_dot_product_attention
        if attention and isinstance(args[0], SimulatedTensor) and not args[0].requires_grad:
            return self._one_kernel(func, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _one_kernel(func, args, kwargs):
        """Run attention as the one kernel that it is on a device."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {_place(tensor) for tensor in tensors}
        if len(places) > 1:
            raise DeviceMismatchError(f"attention was given tensors on {places}, {_caller()}")
        EVENTS.launch("attention")
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            plain_args, plain_kwargs = _values(args), _values(kwargs)
            result = func(*plain_args, **plain_kwargs)
        _record(func, plain_args, plain_kwargs, result)
        return SimulatedTensor(result, places.pop())


class Graph:
    """A captured sequence of operators, in place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operators: list = []

    def replay(self) -> None:
        """Run them again, on the memory that they were captured with."""
        with torch.no_grad():
            for func, args, kwargs, result in self.operators:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        """Forget them."""
        self.operators.clear()


@contextlib.contextmanager
def _capture(graph: Graph, **_) -> Iterator[None]:
    EVENTS.recording = graph.operators
    try:
        yield
    finally:
        EVENTS.recording = None


class _Event:
    """Of the clock; time doesn't pass on these devices, but every kernel takes a microsecond."""

    def __init__(self, **_):
        self.at = 0

    def record(self, *_):
        self.at = EVENTS.kernels.total()

    def elapsed_time(self, end: "_Event") -> float:
        return (end.at - self.at + 1) / 1000

    def synchronize(self):
        pass


class _Stream:
    """There is but one."""

    def wait_stream(self, *_):
        pass


def _set_sync_mode(mode) -> None:
    EVENTS.sync_mode = {0: "default", 1: "warn", 2: "error"}.get(mode, mode)


def _reset_peak(*_) -> None:
    EVENTS.peak_bytes = EVENTS.bytes


def place(module: torch.nn.Module, device_of: Callable[[str], str] = lambda name: "cuda:0") -> torch.nn.Module:
    """Put a module's parameters and buffers on devices, in place; tied ones stay tied, to where the first one is.

    Args:
        device_of: name of a parameter or buffer -> its device.
    """
    done: dict[int, torch.nn.Parameter] = {}
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is None or isinstance(parameter, SimulatedTensor):
                continue
            if id(parameter) not in done:
                moved = SimulatedTensor(parameter.data, _device(device_of(f"{prefix}.{name}".removeprefix("."))))
                done[id(parameter)] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
            part._parameters[name] = done[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, SimulatedTensor):
                part._buffers[name] = SimulatedTensor(buffer, _device(device_of(f"{prefix}.{name}".removeprefix("."))))
    return module


class _Align(AlignDevicesHook):
    """accelerate's own hook, of a module that is where it belongs already."""

    def init_hook(self, module):
        self.input_device = self.execution_device
        return module


def split_at(model: torch.nn.Module, first: int) -> torch.nn.Module:
    """Put a causal language model's layers from `first` on, and all that follows them, on a second device, in place.

    With the hooks that accelerate attaches for such a `device_map`; rotary embeddings are at the end, as there.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    second = [*decoder.layers[first:], decoder.norm, decoder.rotary_emb, head]
    if head.weight is decoder.embed_tokens.weight:  # tied weights are on one device
        second.append(decoder.embed_tokens)
    there = {id(tensor) for part in second for tensor in [*part.parameters(), *part.buffers()]}
    names = {name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if id(tensor) in there}
    place(model, lambda name: "cuda:1" if name in names else "cuda:0")
    for part in [decoder.embed_tokens, *decoder.layers, decoder.norm, decoder.rotary_emb, head]:
        device = torch.device("cuda", int(any(part is each for each in second)))
        add_hook_to_module(part, _Align(device, skip_keys=model._skip_keys_device_placement))
    hook = _Align(torch.device("cuda", 0), io_same_device=True, skip_keys=model._skip_keys_device_placement)
    add_hook_to_module(model, hook)
    return model


def real(tree):
    """Return tensors as ordinary ones, on the CPU."""
    return _values(tree)


@contextlib.contextmanager
def trainer_on_gpu() -> Iterator[None]:
    """Let Hugging Face's Trainer take the first device for its own within the block."""

    def device(arguments) -> torch.device:
        arguments._setup_devices  # noqa: B018 - makes the state that holds the device
        PartialState._shared_state["device"] = torch.device("cuda", 0)
        return torch.device("cuda", 0)

    try:
        with (
            patch.object(TrainingArguments, "device", property(device)),
            patch.object(Trainer, "_move_model_to_device", lambda self, model, device: place(model)),
        ):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def simulated_gpus(count: int = 1) -> Iterator[Events]:
    """Have `count` CUDA devices within the block; yields what happens on them."""
    EVENTS.__init__()
    _generator = torch.Generator  # draws are made on the CPU
    capable = SimpleNamespace(name="simulated", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=1)
    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda *_: "simulated",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: capable,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (80 * 2**30 - EVENTS.bytes, 80 * 2**30),
        "memory_allocated": lambda *_: EVENTS.bytes,
        "max_memory_allocated": lambda *_: EVENTS.peak_bytes,
        "reset_peak_memory_stats": _reset_peak,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
        "manual_seed_all": lambda seed: None,
        "set_sync_debug_mode": _set_sync_mode,
        "get_sync_debug_mode": lambda: {"default": 0, "warn": 1, "error": 2}[EVENTS.sync_mode],
        "Event": _Event,
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda *_: _Stream(),
        "CUDAGraph": Graph,
        "graph": _capture,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(torch, "Generator", lambda device=None: _generator()))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # a backend in Python has no threads
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch())
        yield EVENTS
