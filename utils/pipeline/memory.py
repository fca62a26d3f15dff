"""What a training step takes of a GPU, worked out before it starts, and which configuration would fit where it doesn't.

Weights, gradients and optimizer state follow from the number of parameters and from how ZeRO divides them; what is kept
for the backward is counted, by a step of the model at its real shapes on the meta device. CUDA's own context, its
libraries and what fragmentation loses come on top: `OVERHEAD`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from utils.io.errors import UserError
from utils.model.allocation import peak_of_shapes
from utils.model.checkpoint import add_substitutes, meta_model
from utils.model.configuration_mod import MoDSettings

from .distillation import DenseTeacher, distilled_nll
from .losses import next_token_nll
from .processes import zero_offloads, zero_stage
from .substitutes import default_rank

OVERHEAD = 1.0e9
"""Bytes of a CUDA context, and of what its libraries set aside."""
ZERO_CONFIGS = {
    1: "configs/accelerate/deepspeed_zero1.yaml",
    2: "configs/accelerate/deepspeed_zero2.yaml",
    3: "configs/accelerate/deepspeed_zero3.yaml",
}


@dataclass(frozen=True)
class Step:
    """What a training step's memory follows from.

    Args:
        rows, tokens: of a micro-batch.
        processes: that share optimizer state, gradients and weights, as far as the stage of ZeRO divides them.
        zero_stage: 0 without DeepSpeed.
        checkpointing: activations are computed again in the backward.
        train_backbone: all weights train, not only routers and substitutes.
        distilled: the dense model's states are computed beside.
        substitute: what skipped branches return, as in `MoDSettings`, or None.
    """

    rows: int
    tokens: int
    processes: int = 1
    zero_stage: int = 0
    checkpointing: bool = False
    train_backbone: bool = False
    distilled: bool = True
    substitute: Mapping[str, Any] | None = None


def step_bytes(config: dict[str, Any], settings: MoDSettings, step: Step) -> dict[str, float]:
    """Return what each process takes of its GPU in a training step, in bytes: the parts, whose sum is the peak.

    Args:
        config: the base's `config.json`.
        settings: what is routed.
        step: of the training.

    Returns:
        `weights`, `gradients`, `optimizer` and `activations`; the last has what is kept for the backward and what both
        directions need besides. A frozen backbone is in bfloat16. A trained one has float32 weights; it is computed in
        bfloat16, under DeepSpeed in float32, but for ZeRO-3.
    """
    model = model_of(config, settings, step)
    added = [*model.router_modules().values(), *model.substitute_modules().values()]
    small = sum(parameter.numel() for module in added for parameter in module.parameters())
    backbone = sum(parameter.numel() for parameter in model.parameters()) - small
    activations = count_step(model, step)
    parts = step.processes
    if not step.train_backbone:
        held = 2 * backbone / (parts if step.zero_stage == 3 else 1)
        return {
            "weights": held + 4 * small,
            "gradients": 4 * small,
            "optimizer": 8 * small / (parts if step.zero_stage else 1),
            "activations": activations,
        }
    trained = backbone + small
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers)
    if step.zero_stage == 3:  # bfloat16, beside the optimizer's own float32; two layers are gathered at a time
        weights, gradients, optimizer = 2 * trained / parts + 4 * largest, 2 * trained / parts, 12 * trained / parts
    elif step.zero_stage:  # DeepSpeed's optimizer has a copy of the weights of its own
        weights, gradients = 4 * trained, 4 * trained / (parts if step.zero_stage == 2 else 1)
        optimizer = 12 * trained / parts
    else:  # autocast keeps what it has rounded until the step ends
        weights, gradients, optimizer = 6 * trained, 4 * trained, 8 * trained
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations}


def model_of(
    config: dict[str, Any], settings: MoDSettings, step: Step, device: torch.device | str = "meta"
) -> torch.nn.Module:
    """Return the model of a step, untrained and with what trains set; on another device than `meta` of random weights.

    Args:
        config, settings, step: as `step_bytes` takes them.
        device: where it is made.
    """
    from .customized_trainer import freeze_backbone

    model = meta_model(config, settings)
    model.to(torch.float32 if step.train_backbone and step.zero_stage in (1, 2) else torch.bfloat16)
    if step.substitute is not None and settings.substitute is None:
        add_substitutes(model, dict(step.substitute))
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        decoder = model.get_decoder()  # its buffers were made without values
        decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(device)
    model.train()
    if not step.train_backbone:
        freeze_backbone(model)
    if step.checkpointing:
        model.activation_checkpointing_enable()
    return model


def micro_step(model: torch.nn.Module, step: Step) -> Callable[[], None]:
    """Return a call that runs a micro-batch's forward and backward, on the device of the model."""
    device = next(model.parameters()).device
    ids = torch.zeros(step.rows, step.tokens, dtype=torch.int64, device=device)
    targets = torch.zeros(step.rows * (step.tokens - 1), dtype=torch.int64, device=device)
    teacher = DenseTeacher(model) if step.distilled else None
    head = model.get_output_embeddings()

    def run() -> None:
        outputs = model(ids, states_at=targets, use_cache=False)
        if teacher is None:
            loss = next_token_nll(outputs.states, head, targets)
        else:
            loss, *_ = distilled_nll(outputs.states, teacher.states(ids, targets), head, targets, 1.0)
        (loss + outputs.router_scores.mean() + outputs.router_gates.mean()).backward()

    return run


def count_step(model: torch.nn.Module, step: Step) -> int:
    """Return the bytes that a micro-batch's forward and backward take at most, beyond weights and gradients.

    Args:
        model: of `model_of`, on the meta device.
        step: of the training.
    """
    run = micro_step(model, step)
    peak_of_shapes(run)  # gradients are there afterwards, as from an accumulation's second micro-batch on
    return peak_of_shapes(run)


def refuse_what_cannot_fit(
    config: dict[str, Any], settings: MoDSettings, step: Step, memory: float, device: str
) -> None:
    """Raise `UserError` where a step can't fit, with the arithmetic and a configuration that would.

    Args:
        config, settings, step: as `step_bytes` takes them.
        memory: bytes of the GPU.
        device: its name, for the message.
    """
    parts = step_bytes(config, settings, step)
    if sum(parts.values()) + OVERHEAD <= memory:
        return
    fitting = next((text for text, other in _others(step) if _fits(config, settings, other, memory)), None)
    way_out = fitting or "nothing fits on so few GPUs: take more of them"
    raise UserError(
        f"router_only false does not fit on {device} of {_gb(memory)} GB: {_arithmetic(parts)}, with {step.rows} x "
        f"{step.tokens} tokens, {step.processes} process(es), {_name(step)}; {way_out}; or train adapters "
        "(--use_lora true) or the routers alone (--router_only true)"
    )


def _fits(config, settings, step: Step, memory: float) -> bool:
    return sum(step_bytes(config, settings, step).values()) + OVERHEAD <= memory


def _others(step: Step):
    """Yield what else can be tried, what costs least first, with how it is asked for."""
    stages = [step.zero_stage, *(stage for stage in (1, 2, 3) if stage > step.zero_stage and step.processes > 1)]
    for rows in sorted({step.rows, 1}, reverse=True):
        for stage in stages:
            for checkpointing in sorted({step.checkpointing, True}):
                other = replace(step, rows=rows, zero_stage=stage, checkpointing=checkpointing)
                if other != step:
                    yield _asked_for(step, other), other


def _asked_for(step: Step, other: Step) -> str:
    changed = []
    if other.zero_stage != step.zero_stage:
        changed.append(f"ACCELERATE_CONFIG={ZERO_CONFIGS[other.zero_stage]}")
    if other.rows != step.rows:
        changed.append(f"--per_device_train_batch_size {other.rows}")
    if other.checkpointing != step.checkpointing:
        changed.append("--activation_checkpointing true")
    return f"it does with {' and '.join(changed)}"


def _name(step: Step) -> str:
    stage = f"ZeRO-{step.zero_stage}" if step.zero_stage else "no ZeRO"
    return stage + (", activation checkpointing" if step.checkpointing else "")


def _arithmetic(parts: Mapping[str, float]) -> str:
    terms = " + ".join(f"{name} {_gb(size)}" for name, size in parts.items())
    return f"{terms} = {_gb(sum(parts.values()))} GB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def check_memory(training_args: Any, config: dict[str, Any], settings: MoDSettings, tokens: int) -> None:
    """Raise `UserError` where a trained backbone cannot fit on this process's GPU.

    What is kept in the host's memory is not looked into, and neither is a run without a GPU.

    Args:
        training_args: `RouterTrainingArguments`.
        config: the model's `config.json`.
        settings: what is routed.
        tokens: of the longest row.
    """
    device = training_args.device
    if training_args.router_only or device.type != "cuda" or zero_offloads():
        return
    card = torch.cuda.get_device_properties(device)
    step = step_of(training_args, settings, config["hidden_size"], tokens, zero_stage())
    refuse_what_cannot_fit(config, settings, step, card.total_memory, card.name)


def step_of(training_args: Any, settings: MoDSettings, hidden_size: int, tokens: int, zero_stage: int) -> Step:
    """Return the step of a run.

    Args:
        training_args: `RouterTrainingArguments`.
        settings: what is routed.
        hidden_size: of the model.
        tokens: of the longest row.
        zero_stage: 0 without DeepSpeed.
    """
    substitute = None
    if training_args.substitute != "none" and settings.substitute is None:
        rank = training_args.substitute_rank or default_rank(hidden_size, settings.target)
        substitute = {"kind": training_args.substitute, "rank": rank}
    return Step(
        rows=training_args.per_device_train_batch_size,
        tokens=tokens,
        processes=training_args.world_size,
        zero_stage=zero_stage,
        checkpointing=bool(training_args.activation_checkpointing),
        train_backbone=not training_args.router_only,
        distilled=bool(training_args.distillation_weight),
        substitute=substitute,
    )
