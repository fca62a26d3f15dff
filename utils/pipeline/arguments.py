"""The command line of `finetune_mod.py`: three dataclasses, a help text on every field."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from utils.io.devices import choose_device
from utils.io.errors import UserError, suggest
from utils.model.configuration_mod import EXPERT_GRANULARITY, SEQUENCE_POOLINGS, SUBSTITUTES

from .processes import check_accelerate_variables, deepspeed_was_asked_for, prepare_deepspeed, zero_stage

CAPACITY_CONTROLS = ("budget", "regression", "hinge")

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "capacity_control": None,  # by the granularity
        "capacity_scope": "global",
        "distillation_weight": 1.0,
        "calibration_rows": 64,
        "gradient_scale": 0.3,
        "substitute": "linear",
        "sequence_pooling": "prompt",
    },
    "paper": {
        "capacity_control": "hinge",
        "capacity_scope": "layer",
        "distillation_weight": 0.0,
        "calibration_rows": 0,
        "gradient_scale": 0.1,
        "learning_rate": 1e-4,
        "substitute": "none",
        "sequence_pooling": "all",
    },
}
"""What arguments are where they are not given."""


@dataclass
class ModelArguments:
    """Which model is routed, and how."""

    model_name_or_path: str = field(
        metadata={"help": "MoD checkpoint, dense base model directory, or the hub name of a dense base model."}
    )
    mod_n: int | None = HfArg(
        default=None,
        aliases=["--mindskip_n"],
        help="Number of routed layers, the deepest ones but for the very last. Default: the checkpoint's, or half of "
        "a dense model's layers (the paper's 16 of 32).",
    )
    granularity: str | None = field(
        default=None,
        metadata={
            "help": "What is gated, and for what unit: attn_sequence, attn_token, mlp_sequence, mlp_token, "
            "block_sequence or block_token; attn_mlp_sequence or attn_mlp_token, with a router for each of the two; in "
            "mixtures of experts also expert_token. Default: the checkpoint's, or attn_sequence (the paper's best)."
        },
    )
    router_dir: str | None = field(
        default=None, metadata={"help": "Start from these routers: a routers.safetensors, or a directory that has one."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the backbone: float32, bfloat16, or auto (bfloat16 where it is frozen and on a GPU)."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention of transformers: sdpa, eager or flash_attention_2."}
    )
    save_base: str = field(
        default="link",
        metadata={"help": "How the base's weights get into the output: link (where the file system allows) or copy."},
    )

    def __post_init__(self):
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _choice("attn_implementation", self.attn_implementation, ("sdpa", "eager", "flash_attention_2"))
        _choice("save_base", self.save_base, ("link", "copy"))


@dataclass
class DataArguments:
    """What it is trained and measured on."""

    train_file: str = field(metadata={"help": "Conversations, in one of the shapes that the README lists under Data."})
    eval_file: str | None = field(
        default=None, metadata={"help": "Held-out rows in the same format. Default: taken out of train_file."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many rows, drawn at random. Default: all."}
    )
    max_eval_samples: int = field(
        default=64, metadata={"help": "Hold out, or read from eval_file, at most this many rows."}
    )
    max_use_prompts: int = field(
        default=16,
        metadata={"help": "Prompts of held-out rows that dense and routed model answer at the end; 0: none."},
    )
    max_seq_length: int = field(default=2048, metadata={"help": "Cut rows to this many tokens (the paper's 2048)."})
    chat_format: str = field(
        default="auto", metadata={"help": "How messages become text: auto, template (the tokenizer's own) or tags."}
    )
    max_dropped: float = field(
        default=0.5,
        metadata={
            "help": "Share of the rows that may be left out because the chat template refuses them, or cutting leaves "
            "nothing to learn; a tenth is warned of."
        },
    )
    tokenized_cache_dir: str | None = field(
        default=None, metadata={"help": "Keep tokenized rows here for the next run. Default: they are not kept."}
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples", "max_seq_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        if self.max_use_prompts < 0:
            raise UserError(
                f"max_use_prompts {self.max_use_prompts} must not be negative; 0 measures no figures of use"
            )
        if not 0.0 <= self.max_dropped <= 1.0:
            raise UserError(f"max_dropped {self.max_dropped} must lie between 0 and 1")


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """Hugging Face's `TrainingArguments` with the routers' own, and with defaults for router-tuning."""

    recipe: str = field(
        default="default",
        metadata={
            "help": "What the other arguments are where they are not given. default: capacity_control by the "
            "granularity, distillation_weight 1 (0 where the backbone trains), calibration_rows 64, substitute "
            "linear, sequence_pooling prompt. paper: "
            "capacity_control hinge with capacity_scope layer, distillation_weight 0, calibration_rows 0, substitute "
            "none, sequence_pooling all, learning_rate 1e-4 and gradient_scale 0.1 (of the paper's grid)."
        },
    )
    capacity_control: str | None = field(
        default=None,
        metadata={
            "help": "What drives capacity to its target. budget: sampled gates, a price for executing that follows "
            "the loss, a shift of all thresholds; over all layers, processes and the accumulation window. regression: "
            "routers predict what skipping costs, and skip below one price. hinge: Eq. 10. Default: the recipe's, and "
            "there regression for sequences, budget for tokens, for experts and for a trained backbone."
        },
    )
    capacity_scope: str | None = field(
        default=None,
        metadata={
            "help": "Of the hinge. layer: each layer in each micro-batch, as published; global: each sequence over "
            "all layers. Default: global, the paper's recipe layer."
        },
    )
    distillation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Share of the loss, from 0 to 1, that is the KL divergence from the dense model at the supervised "
            "tokens; the rest is the task's loss. Default: the recipe's."
        },
    )
    distillation_every: int = field(
        default=1,
        metadata={
            "help": "Learn from the divergence at every so many-th supervised token of a row, which saves the logits "
            "of the others; the logged losses are of these tokens too."
        },
    )
    calibration_rows: int | None = field(
        default=None,
        metadata={
            "help": "Set aside this many of the training rows, at most one in eight, and after training set the "
            "thresholds so that they execute the target capacity. 0: thresholds stay. Default: the recipe's."
        },
    )
    capacities: list[float] = field(
        default_factory=lambda: [0.5, 0.75, 0.9],
        metadata={
            "help": "Capacities to calibrate besides target_capacity: what one checkpoint can be set to, and between."
        },
    )
    skipped: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Instead of capacities: shares of the decoder layers' parameters to calibrate for, each as "
            "target_skipped counts them."
        },
    )
    regression_rows: int = field(
        default=1000,
        metadata={
            "help": "Rows that a regression learns from, at most; the others are left out. Time grows with their cube, "
            "memory with rows x routed layers x hidden size x 4 bytes."
        },
    )
    sequence_pooling: str | None = field(
        default=None,
        metadata={
            "help": "Tokens whose mean decides for a sequence in training, calibration and evaluation: prompt (those "
            "before the first supervised one: what generation sees), or all (published). Default: prompt, the paper's "
            "recipe all."
        },
    )
    router_init: str = field(
        default="zero",
        metadata={
            "help": "Where routers start. zero (published): all layers alike. importance: the less a layer changes the "
            "residual stream (cosine similarity), the nearer its start to skipping; without effect on regression, "
            "which has no start."
        },
    )
    substitute: str | None = field(
        default=None,
        metadata={
            "help": "What a skipped branch returns: linear, a low-rank linear map of its input, fitted to the branch "
            "before training and trained with the routers; or none, as published. Default: the recipe's."
        },
    )
    substitute_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of these maps, from 1 to the hidden size. Default: the hidden size over 12 for attention, "
            "over 9 for MLP and experts, over 8 for blocks."
        },
    )
    substitute_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the substitutes; 0 leaves them as fitted. Default: 3.5 / hidden size."
        },
    )
    gradient_scale: float | None = field(
        default=None,
        metadata={
            "help": "Weight lambda of the hinge (Eq. 9); 0 switches it off. Default: 0.3, the paper's recipe 0.1."
        },
    )
    target_capacity: float | None = HfArg(
        default=None,
        aliases=["--mod_capacity", "--mindskip_capacity"],
        help="Share of inputs to execute over all routed layers; where attention and MLP are routed apart, inputs "
        "count by what skipping them saves. The hinge pushes down to it and no further (Eq. 10). Default: 0.5, the "
        "paper's.",
    )
    target_skipped: float | None = field(
        default=None,
        metadata={
            "help": "Instead of target_capacity: share of the decoder layers' parameters that is not to be computed "
            "with for a token, on average; those of substitutes count against it."
        },
    )
    budget_length: int | None = field(
        default=None,
        metadata={
            "help": "Let target_skipped, and where attention and MLP are routed apart the capacity, count the "
            "operations of a prefill of so many tokens instead of parameters. Default: the checkpoint's, or parameters."
        },
    )
    router_only: bool = field(
        default=True,
        metadata={
            "help": "Train the routers and nothing else; False trains the backbone as well, or with --use_lora its "
            "adapters only."
        },
    )
    global_batch_size: int = field(
        default=64,
        metadata={"help": "Sequences in an optimizer step, over all processes; accumulation steps follow from it."},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate. Default: 1.5 / hidden size with the budget, 0.5 / hidden size with the hinge, "
            "as an Adam step moves a logit by about the rate times the hidden size. With a trained backbone, or with "
            "LoRA, it is theirs and not the routers': 2e-5, or 1e-4."
        },
    )
    router_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the routers where not only they train. Default: as above."},
    )
    use_lora: bool = field(
        default=False,
        metadata={"help": "Train LoRA adapters (peft) together with the routers; the backbone is frozen."},
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The adapters' output is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Probability of dropping an adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules with an adapter. Default: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj."},
    )
    lora_layers: str = field(
        default="all",
        metadata={
            "help": "Layers with adapters: all, or routed ones only, which leaves the layers below without a backward, "
            "as without LoRA."
        },
    )
    warmup_steps: float | None = field(
        default=None,
        metadata={
            "help": "Steps, or below 1 the share of steps, in which the learning rate rises. Default: 0.1 with the "
            "budget, 0.25 with the hinge: there routers start on the threshold, where the smallest step flips a whole "
            "layer, and small first steps let them come back."
        },
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training rows."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Sequences in a micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Sequences in an evaluation batch."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimizer steps."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_steps: float = field(
        default=0.1, metadata={"help": "Save a checkpoint every so many optimizer steps, or below 1 this share of all."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep this many checkpoints, the last ones."})
    report_to: str | None = field(
        default="tensorboard",
        metadata={"help": "Where logs go besides the terminal: none, all, or an installed one."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "random, sequential, or group_by_length (less padding)."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Let DDP look for weights without a gradient in every step; routers and backbone all have one."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN out of the logged loss, at the price of a device sync a step."}
    )

    def __post_init__(self):
        check_accelerate_variables()
        self._resolve_recipe()
        self._check()
        self._check_lora()
        if self.use_lora:
            self.router_only = True  # the backbone is frozen, whichever of the two was meant
        deepspeed = deepspeed_was_asked_for()
        zero3 = zero_stage() == 3
        on_gpu = not self.use_cpu and choose_device() == "cuda"
        if deepspeed and self.bf16 and not zero3:
            raise UserError("bf16: DeepSpeed's would round the routers, which stay float32; leave --bf16 out")
        if on_gpu and ((zero3 and self.router_only) or (not self.router_only and not deepspeed)):
            # ZeRO-3 holds all weights in one dtype: the routers' float32 copy is in the optimizer, and is what is saved
            # A trained backbone has float32 weights and is computed in bfloat16
            self.bf16 = True
        # before super(), which hands the numbers on to DeepSpeed
        steps = accumulation_steps(
            self.global_batch_size, self.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
        )
        if self.gradient_accumulation_steps not in (1, steps):
            raise UserError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} follows from the batch sizes, and is "
                f"{steps} here; leave it out, or change --global_batch_size or --per_device_train_batch_size"
            )
        self.gradient_accumulation_steps = steps
        super().__post_init__()
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError("activation_checkpointing_kwargs: use_reentrant loses the gradient of the capacity loss")

    def choose_learning_rate(self, hidden_size: int) -> None:
        """Set the learning rates, where none were given, for a model of this width."""
        default = (1.5 if self.capacity_control == "budget" else 0.5) / hidden_size
        if self.use_lora or not self.router_only:
            if self.router_learning_rate is None:
                self.router_learning_rate = default
            default = 1e-4 if self.use_lora else 2e-5
        if self.learning_rate is None:
            self.learning_rate = default
        if self.substitute != "none" and self.substitute_learning_rate is None:
            self.substitute_learning_rate = 3.5 / hidden_size

    def _resolve_recipe(self) -> None:
        """Fill in what the recipe says for what was not given."""
        _choice("recipe", self.recipe, tuple(RECIPES))
        if self.distillation_weight is None and (self.use_lora or not self.router_only):
            self.distillation_weight = 0.0  # the teacher would be the backbone that trains
        optional = {*RECIPES[self.recipe], "learning_rate", "warmup_steps"}
        self._given = {name for name in optional if getattr(self, name) is not None}
        changed = ("weight_decay", "regression_rows", "router_init")
        self._given |= {name for name in changed if getattr(self, name) != _default(name)}
        for name, value in RECIPES[self.recipe].items():
            of_routers = name == "learning_rate" and (self.use_lora or not self.router_only)
            field_name = "router_learning_rate" if of_routers else name
            if getattr(self, field_name) is None:
                setattr(self, field_name, value)
        if self.capacity_control is not None:
            _choice("capacity_control", self.capacity_control, CAPACITY_CONTROLS)
        if self.warmup_steps is None:
            self.warmup_steps = 0.25 if self.capacity_control == "hinge" else 0.1

    def suit_model(self, hidden_size: int, granularity: str) -> None:
        """Set what depends on the model: the control for its granularity, the learning rate for its width.

        Raises:
            UserError: the granularity can't be trained with the control that was asked for.
        """
        frozen = self.router_only and not self.use_lora
        if self.capacity_control is None:
            sequence = granularity.endswith("_sequence") and frozen
            self.capacity_control = "regression" if sequence else "budget"
        control = self.capacity_control
        if granularity == EXPERT_GRANULARITY and self.router_init != "zero":
            raise UserError(f"router_init {self.router_init} is for attention, MLP and block, not for {granularity}")
        if control == "regression" and not (granularity.endswith("_sequence") and frozen):
            raise UserError("capacity_control regression is for routers of sequences on a frozen backbone; use budget")
        if control != "hinge" and self.mixed_precision == "fp16":
            raise UserError(
                f"fp16: its loss scale would enter what capacity_control {control} measures; take --bf16 true"
            )
        if control == "regression" and self.max_steps <= 0 and self.num_train_epochs != 1.0:
            raise UserError(
                f"num_train_epochs {self.num_train_epochs:g} must be 1 with capacity_control regression, which "
                "measures each row once; or take --capacity_control budget"
            )
        self.choose_learning_rate(hidden_size)

    def without_effect(self) -> list[str]:
        """Return the names of arguments that were given and change nothing under the control; after `suit_model`."""
        control = self.capacity_control
        idle = () if control == "hinge" else ("gradient_scale", "capacity_scope")
        of_steps = ("learning_rate", "warmup_steps", "weight_decay", "router_init")
        idle += of_steps if control == "regression" else ("regression_rows",)
        return [name for name in idle if name in self._given]

    def _check(self) -> None:
        """Raise `UserError` for what `TrainingArguments` would accept, or refuse with a traceback much later."""
        if self.target_skipped is not None:
            if self.target_capacity is not None:
                raise UserError(
                    f"target_capacity {self.target_capacity} and target_skipped {self.target_skipped}: both say how "
                    "much is to be skipped; give one of the two"
                )
            if not 0.0 < self.target_skipped < 1.0:
                raise UserError(f"target_skipped {self.target_skipped} must lie between 0 and 1")
        elif self.target_capacity is None:
            self.target_capacity = 0.5
        for share in self.skipped:
            if not 0.0 < share < 1.0:
                raise UserError(f"skipped {share} must lie between 0 and 1")
        if self.budget_length is not None and self.budget_length < 1:
            raise UserError(f"budget_length {self.budget_length} must be at least 1")
        target = [self.target_capacity] if self.target_skipped is None else []  # the other follows from the model
        for name, given in (("target_capacity", target), ("capacities", self.capacities)):
            for capacity in given:
                if not 0.0 < capacity <= 1.0:
                    raise UserError(f"{name} {capacity} must be above 0 and at most 1")
        if not 0.0 <= self.distillation_weight <= 1.0:
            raise UserError(f"distillation_weight {self.distillation_weight} must lie between 0 and 1")
        if self.distillation_every < 1:
            raise UserError(f"distillation_every {self.distillation_every} must be at least 1")
        if self.regression_rows < 2:
            raise UserError(f"regression_rows {self.regression_rows} must be at least 2")
        if self.calibration_rows < 0:
            raise UserError(f"calibration_rows {self.calibration_rows} must not be negative")
        _choice("capacity_scope", self.capacity_scope, ("layer", "global"))
        _choice("substitute", self.substitute, ("none", *SUBSTITUTES))
        for name in ("substitute_rank", "substitute_learning_rate"):
            if getattr(self, name) is not None and self.substitute == "none":
                raise UserError(f"{name} needs --substitute linear")
        if self.substitute_rank is not None and self.substitute_rank < 1:
            raise UserError(f"substitute_rank {self.substitute_rank} must lie between 1 and the hidden size")
        _choice("router_init", self.router_init, ("zero", "importance"))
        _choice("sequence_pooling", self.sequence_pooling, SEQUENCE_POOLINGS)
        if not (math.isfinite(self.gradient_scale) and self.gradient_scale >= 0.0):
            raise UserError(f"gradient_scale {self.gradient_scale} must be a number that is not negative")
        for name in ("learning_rate", "router_learning_rate", "substitute_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise UserError(f"{name} {value} must be a number that is not negative")
        if not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0.0):
            raise UserError(f"num_train_epochs {self.num_train_epochs} must be a number above 0")
        if self.per_device_eval_batch_size < 1:
            raise UserError(f"per_device_eval_batch_size {self.per_device_eval_batch_size} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} must lie between 0 and {2**32 - 1}")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise UserError(
                f"save_total_limit {self.save_total_limit} must be at least 2: one is kept as one is written"
            )
        _choice("train_sampling_strategy", self.train_sampling_strategy, ("group_by_length", "random", "sequential"))
        _choice("report_to", self.report_to or "none", ("none", "all", *get_available_reporting_integrations()))
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor is not supported: it would train on labels that are not shifted")
        if not self.average_tokens_across_devices:
            raise UserError("average_tokens_across_devices must be left on: the loss is the mean over all processes")
        if self.load_best_model_at_end or self.metric_for_best_model or self.save_strategy == "best":
            raise UserError("load_best_model_at_end and metric_for_best_model are not supported: the last routers stay")
        if self.auto_find_batch_size:
            raise UserError(
                "auto_find_batch_size is not supported: it would change the global batch; lower "
                "--per_device_train_batch_size, which doesn't"
            )
        if self.save_only_model:
            raise UserError("save_only_model is not supported: no run could go on from such a checkpoint")
        if self.save_on_each_node:
            raise UserError("save_on_each_node is not supported: output_dir is one for all machines, on a shared disk")
        if self.push_to_hub:
            raise UserError("push_to_hub is not supported: upload the output directory with `hf upload`")

    def _check_lora(self) -> None:
        """Raise `UserError` for what contradicts itself in who trains how."""
        if self.router_learning_rate is not None and self.router_only and not self.use_lora:
            raise UserError("router_learning_rate: only routers train here, at --learning_rate; give that one")
        _choice("lora_layers", self.lora_layers, ("all", "routed"))
        if self.lora_rank < 1:
            raise UserError(f"lora_rank {self.lora_rank} must be at least 1")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0.0):
            raise UserError(f"lora_alpha {self.lora_alpha} must be a number above 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"lora_dropout {self.lora_dropout} must be at least 0 and below 1")
        if self.use_lora and zero_stage() == 3:
            raise UserError("use_lora does not work under ZeRO-3, which has the weights in parts; ZeRO-1 and 2 do")
        for option in fields(self):
            given = option.name.startswith("lora_") and getattr(self, option.name) != option.default
            if given and not self.use_lora:
                raise UserError(f"{option.name} needs --use_lora true")


def _default(name: str) -> Any:
    return next(option.default for option in fields(RouterTrainingArguments) if option.name == name)


def accumulation_steps(global_batch_size: int, per_device_batch_size: int, processes: int) -> int:
    """Return the micro-batches of an optimizer step; raises `UserError` where the batch doesn't divide."""
    if min(global_batch_size, per_device_batch_size) < 1:
        raise UserError(
            f"global_batch_size {global_batch_size} and per_device_train_batch_size {per_device_batch_size} "
            "must be at least 1"
        )
    together = per_device_batch_size * processes
    if global_batch_size % together:
        lower, upper = global_batch_size // together * together, -(-global_batch_size // together) * together
        working = " or ".join(str(size) for size in (lower, upper) if size)
        smaller = math.gcd(per_device_batch_size, global_batch_size // processes)
        smaller = f", or {smaller} sequences each" if global_batch_size % processes == 0 else ""
        raise UserError(
            f"global_batch_size {global_batch_size} does not divide into {processes} processes of "
            f"{per_device_batch_size} sequences (per_device_train_batch_size); {working} would{smaller}"
        )
    return global_batch_size // together


class _Parser(HfArgumentParser):
    """Ends with one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `--help` lists all arguments")


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, RouterTrainingArguments]:
    """Read the command line.

    Raises:
        UserError: an option is unknown (the message names the nearest) or missing, or a value is wrong.
    """
    prepare_deepspeed()
    parser = _Parser(
        (ModelArguments, DataArguments, RouterTrainingArguments),
        prog="finetune_mod.py",
        description="Router-tune a pretrained model: train a router in each routed layer, nothing else.",
        allow_abbrev=False,
    )
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:  # TrainingArguments' own checks
        raise UserError(str(error)) from None
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{suggest(unknown[0], known)}; `--help` lists all arguments")
    return tuple(groups)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} {value!r} is not one of {', '.join(allowed)}{suggest(value, allowed)}")
