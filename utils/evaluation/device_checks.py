"""What a device has to show of inference: the specification's numbers, no waiting, and speed beside a bound.

Each check returns findings: a name, a figure and the bound that it has to keep. They run on any device, so that they
are known to work before there is a GPU; what only a GPU can tell says so where it is left out.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from utils.model.configuration_mod import ALL_GRANULARITIES, EXPERT_GRANULARITY, MoDLlamaConfig, MoDMixtralConfig
from utils.model.modeling_mod import MoDLlamaForCausalLM
from utils.model.modeling_moe_mod import MoDMixtralForCausalLM

from .benchmark import BOUNDS, CheckFailedError, check_columns
from .columns import make_columns
from .timing import Stopwatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
LAYERS = (1, 3, 4)
MARGIN = 1.10
"""How many times a dense step's time a routed one may take where nothing says that it saves."""


@dataclass
class Finding:
    """What one check found.

    Args:
        name: of the check.
        figure: what was measured; None where it was not.
        bound: what it may be at most.
        note: why it was not measured, or what is to be known of it.
    """

    name: str
    figure: float | None
    bound: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure keeps the bound; what was left out, with a reason, fails nothing."""
        return self.figure is None or self.bound is None or self.figure <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self) | {"passed": self.passed}


def tiny_model(granularity: str, dtype: torch.dtype, attention: str, device: torch.device) -> torch.nn.Module:
    """Return a random routed model of six layers, in evaluation mode, whose routers keep some of their inputs."""
    fields = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "mod": {"granularity": granularity, "layers": list(LAYERS), "substitute": {"kind": "linear", "rank": 8}},
    }
    torch.manual_seed(0)
    if granularity == EXPERT_GRANULARITY:
        model = MoDMixtralForCausalLM(MoDMixtralConfig(num_local_experts=4, num_experts_per_tok=2, **fields))
    else:
        model = MoDLlamaForCausalLM(MoDLlamaConfig(**fields))
    with torch.no_grad():
        for module in (*model.router_modules().values(), *model.substitute_modules().values()):
            for parameter in module.parameters():
                parameter.normal_(std=0.1)
    model.config._attn_implementation = attention
    return model.to(dtype).to(device).eval()


def check_numbers(
    device: torch.device, dtypes: Iterable[str] = DTYPES, attentions: Iterable[str] = ATTENTIONS
) -> list[Finding]:
    """Compare sparse execution with the dense specification: prefill, decode, padding and beams.

    The figure is the largest difference of logits, relative to the largest logit, where the decisions are the same;
    these may differ only where a score is as near to its threshold as rounding explains.
    """
    findings = []
    token_ids = torch.randint(1, 512, (400,), generator=torch.Generator().manual_seed(1))
    for attention in attentions:
        if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            findings.append(Finding(f"numbers {attention}", None, note="flash_attn is not installed"))
            continue
        for dtype in dtypes:
            if attention == "flash_attention_2" and dtype == "float32":
                continue  # it has no such kernel
            for granularity in ALL_GRANULARITIES:
                name = f"numbers {granularity} {dtype} {attention}"
                model = tiny_model(granularity, DTYPES[dtype], attention, device)
                try:
                    worst = check_columns(make_columns(model, 0.5), token_ids, length=24)
                    findings.append(Finding(name, worst, BOUNDS[DTYPES[dtype]]))
                except CheckFailedError as error:
                    findings.append(Finding(name, float("inf"), BOUNDS[DTYPES[dtype]], str(error)))
                if model.device.type != device.type or model.dtype != DTYPES[dtype]:
                    findings.append(Finding(f"{name}: place", 1.0, 0.0, f"{model.device}, {model.dtype}"))
                findings.append(_check_beams(model, token_ids, name))
    return findings


@torch.no_grad()
def _check_beams(model: torch.nn.Module, token_ids: torch.Tensor, name: str) -> Finding:
    """Compare beam search: the share of rows that differ; rounding may decide between beams in low precision."""
    tokens = token_ids[:24].view(3, 8).to(model.device)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    sparse, dense = (model.generate(tokens, execution=execution, **options) for execution in ("sparse", "dense"))
    differ = float((sparse != dense).any(dim=1).float().mean())
    return Finding(f"{name}: beams that differ", differ, 0.0 if model.dtype == torch.float32 else 1.0)


@torch.no_grad()
def check_decode_waits(device: torch.device) -> list[Finding]:
    """Decode with a GPU's sync debug mode on "error": by sequence sparse, by token masked."""
    findings = []
    for granularity in ALL_GRANULARITIES:
        if granularity == EXPERT_GRANULARITY:
            continue
        execution = "sparse" if granularity.endswith("sequence") else "dense"
        model = tiny_model(granularity, torch.float32, "sdpa", device)
        tokens = torch.ones(3, 8, dtype=torch.int64, device=device)
        cache = model(tokens[:, :6], execution=execution, use_cache=True).past_key_values
        model(tokens[:, 6:7], past_key_values=cache, execution=execution)
        step = partial(model, tokens[:, 7:], past_key_values=cache, execution=execution)
        waited, note = waits(device, step)
        findings.append(Finding(f"waits in a decode step, {granularity} {execution}", waited, 0.0, note))
    return findings


def waits(device: torch.device, call: Callable[[], Any]) -> tuple[float | None, str]:
    """Return 1.0 and where, if a call waits for the device, else 0.0; None where it is no GPU."""
    if device.type != "cuda":
        return None, "only a GPU can be waited for"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        return 0.0, ""
    except RuntimeError as error:
        return 1.0, " ".join(str(error).split())[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def check_decode_speed(
    model: torch.nn.Module, batches: Iterable[int] = (1, 8, 64), context: int = 2048, steps: int = 16
) -> list[Finding]:
    """Time decode steps with half of the inputs skipped beside the dense base.

    On a GPU each also runs with a static cache and in one graph, where its cache may be one.

    Args:
        model: a routed model, on its device.
        batches: numbers of sequences.
        context: tokens before.
        steps: that are timed.

    Returns:
        For each batch milliseconds of a step, the ratio of the fastest routed to the fastest dense one, and that of the
        bytes which they have to read, below which no implementation gets.
    """
    columns = {column.name: column for column in make_columns(model, 0.5)}
    stopwatch, findings = Stopwatch(model.device), []
    for batch in batches:
        where = f"decode, batch {batch}, context {context}"
        tokens = torch.ones(batch, context, dtype=torch.int64, device=model.device)
        best, read = {}, {}
        for name in ("dense", "random"):
            for static in (False, True) if model.device.type == "cuda" else (False,):
                what = f"{where}: {name}{', static cache in a graph' if static else ''}, ms a step"
                try:
                    taken, share = _time_decode(columns[name], tokens, static, steps, stopwatch)
                except (ValueError, RuntimeError) as error:  # a cache that is refused, a graph that can't be made
                    findings.append(Finding(what, None, note=" ".join(str(error).split())[:300]))
                    continue
                findings.append(Finding(what, taken))
                best[name] = min(best.get(name, taken), taken)
                read[name] = _bytes_read(columns[name].model, batch, context, share)
        bound = read["random"] / read["dense"]
        note = f"{bound:.3f} by the bytes that are read"
        findings.append(Finding(f"{where}: routed to dense", best["random"] / best["dense"], MARGIN, note))
    return findings


def _time_decode(column, tokens: torch.Tensor, static: bool, steps: int, stopwatch: Stopwatch) -> tuple[float, float]:
    """Return the milliseconds of a decode step after `tokens`, and the share of the routed inputs that is executed."""
    model, cache = column.model, column.make_cache()
    if static:
        room = tokens.shape[1] + steps + 8
        cache = StaticCache(config=model.config, max_cache_len=room)
    output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    gates = getattr(output, "router_gates", None)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True) if static else model

    def run(count: int) -> None:
        for _ in range(count):
            step(tokens[:, :1], past_key_values=cache, use_cache=True)

    run(3)
    taken = 1000 * stopwatch.time(lambda: run(steps)) / steps
    return taken, 1.0 if gates is None else float(gates.mean())


def _bytes_read(model: torch.nn.Module, batch: int, context: int, share: float) -> float:
    """Return the bytes that a decode step reads: weights of what some row executes, keys and values of what attends."""
    config, decoder = model.config, model.get_decoder()
    settings = getattr(config, "mod_settings", None)
    pair = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * model.dtype.itemsize
    weights = float(model.get_output_embeddings().weight.nbytes)
    keys = 0.0
    for index, layer in enumerate(decoder.layers):
        routed = settings is not None and index in settings.layers
        for name, part in (("attn", layer.self_attn), ("mlp", layer.mlp)):
            gated = routed and (settings.target in ("block", "attn_mlp") or name in settings.target)
            size = sum(parameter.nbytes for parameter in part.parameters())
            some_row = 1 - (1 - share) ** batch if gated else 1.0
            weights += some_row * size
            if name == "attn":
                keys += batch * context * pair * (share if gated else 1.0)
    return weights + keys
