"""An optimizer's state by the names of its parameters, whole, whichever engine holds it and in however many parts.

DeepSpeed's own checkpoints have one file for each process and load only into as many processes under the same stage.
What routers need is kilobytes: it is put together here, written by one process, and loads into any number of them, with
or without DeepSpeed. A trained backbone is too large for that and keeps the engine's own files.
"""

from typing import Any

import torch
from torch import nn

State = dict[str, dict[str, Any]]
MASTER = "master"
"""Key of a parameter's own float32 value, which is there only where the model itself computes in less."""


def gather_optimizer_state(model: nn.Module, optimizer: Any, wanted: bool = True) -> State:
    """Return parameter name -> the optimizer's values for it, tensors on the CPU; every process must call it.

    Args:
        model: the model itself, not the engine around it.
        optimizer: a torch optimizer, Accelerate's wrapper of one, or of DeepSpeed's.
        wanted: False on processes that have no use for it.
    """
    partitioned = _partitioned(optimizer)
    if partitioned is None:
        if not wanted:
            return {}
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {names[p]: {key: _on_cpu(value) for key, value in s.items()} for p, s in optimizer.state.items()}

    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine_state = next(iter(partitioned.optimizer.state.items()), None)
    if engine_state is None:
        return {}
    flat, values = engine_state
    _link_state(partitioned)
    state: State = {}
    for name, parameter in _trained(model):
        state[name] = {
            key: _on_cpu(safe_get_full_optimizer_state(parameter, key) if _has_shape(value, flat) else value)
            for key, value in values.items()
        }
        if parameter.dtype != torch.float32:
            state[name][MASTER] = _on_cpu(safe_get_full_fp32_param(parameter))
    return state


def restore_optimizer_state(model: nn.Module, optimizer: Any, state: State) -> None:
    """Give an optimizer that has not made a step the state that `gather_optimizer_state` returned, part by part.

    Arguments are as there; the learning rate is not part of it. Every process must call it.
    """
    partitioned = _partitioned(optimizer)
    if partitioned is None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        values = {
            index: {key: value for key, value in state[name].items() if key != MASTER}
            for index, name in enumerate(order)
            if name in state
        }
        optimizer.load_state_dict(optimizer.state_dict() | {"state": values})
        return
    if not state:
        return

    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    sample = {key: value for key, value in next(iter(state.values())).items() if key != MASTER}
    # the state of the parts is made at the first step (deepspeed 0.19): make it now, to have something to fill
    for flat in _parts(partitioned):
        partitioned.optimizer.state[flat] = {
            key: torch.zeros_like(flat) if _is_whole(value) else _copy(value) for key, value in sample.items()
        }
    _link_state(partitioned)
    for name, parameter in _trained(model):
        device = parameter.device
        for key, value in state[name].items():
            if key == MASTER:
                safe_set_full_fp32_param(parameter, value.to(device))
            elif _is_whole(value):
                safe_set_full_optimizer_state(parameter, value.to(device), key)


def _partitioned(optimizer: Any) -> Any:
    """Return DeepSpeed's ZeRO optimizer behind Accelerate's wrapper, or None where there is none."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if _parts(inner) is not None else None


def _parts(partitioned: Any) -> Any:
    """Return this process's flat float32 parts, by the names that stages 1 and 2, and stage 3, have for them."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(partitioned, name):
            return getattr(partitioned, name)
    return None


def _link_state(partitioned: Any) -> None:
    """Let each parameter find its part of the optimizer's state.

    Stages 1 and 2 do so once, when the first group has made its first step and the others have no state yet
    (deepspeed 0.19).
    """
    if hasattr(partitioned, "_lazy_init_hp_params_optimizer_state"):
        partitioned._hp_optimizer_states_linked = False
        partitioned._lazy_init_hp_params_optimizer_state()


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _has_shape(value: Any, flat: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape


def _is_whole(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if torch.is_tensor(value) else value


def _copy(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
