"""What a checkpoint is, without running it: from its `config.json`, the headers of its files and its run's report."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from utils.io.errors import UserError
from utils.model.checkpoint import (
    INDEX_FILE,
    ROUTER_NAME,
    SUBSTITUTE_NAME,
    complete_config,
    is_mod,
    make_settings,
    read_config,
    weight_map,
)
from utils.model.configuration_mod import MoDSettings, Place, place_name, report_key
from utils.model.costs import BYTES, capacity_of, capacity_weights, number_of_experts, savings, skipped_share

from .use import FIGURES, text_of

CALIBRATED = "what it was calibrated for"
_POOLED = {
    "prompt": "; a sequence is decided on its prompt alone",
    "all": "; a sequence is decided on prompt and answer, in generation on the prompt",
}


def inspect_checkpoint(
    directory: str | Path, lengths: Sequence[int], batch: int = 1, capacity: float | None = None
) -> dict[str, Any]:
    """Read what there is to know of a checkpoint; reads headers of weights, never weights.

    Args:
        directory: a MoD checkpoint, or one of `ckpt/` that is not built yet.
        lengths: prompt lengths in tokens that savings are given for.
        batch: sequences whose KV memory is counted.
        capacity: share of inputs executed; default what the training run measured, else its target, else 0.5.

    Returns:
        `base_model`, `granularity`, `layers`, `threshold` (layer -> number, or one for each expert), `routers`,
        `substitute` (`kind`, `ranks` by layer, `bytes` and `share` of the file), `capacities` (those that it was
        calibrated for), `trained` (what the run measured), `savings` and the like; None where there is none of it.
        The savings are less what substitutes cost.

    Raises:
        UserError: the directory is not a MoD checkpoint.
    """
    directory = Path(directory)
    config = read_config(directory)
    if not is_mod(config):
        raise UserError(
            f"{directory}: a dense {config['model_type']} model, without routing to describe; make a checkpoint of it "
            "with `python entrypoints/checkpoint/build_mod_checkpoint.py`"
        )
    settings = make_settings(config)
    config = complete_config(config, settings)
    measured = _measured(directory, settings.places)
    given, source = capacity, "as given"
    if given is None and measured is None:
        given, source = settings.target_capacity, _aim(settings)
        if given is None:
            given, source = 0.5, "the paper's, as none was trained for"
    shares = dict.fromkeys(settings.places, given)
    if given is None:
        shares = {place: measured["layers"][report_key(place)] for place in settings.places}
    dtype = _dtype(config)
    try:
        costs = {length: savings(config, settings, length, shares, dtype) for length in lengths}
        if not all(cost["flops"] > 0 and cost["kv_bytes"] > 0 for cost in costs.values()):
            raise ValueError("its layers compute nothing")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: no costs follow from its config.json: {error}") from None
    return {
        "checkpoint": str(directory),
        "base_model": settings.base_model,
        "architecture": config["model_type"].removeprefix("mod_"),
        "granularity": settings.granularity,
        "num_hidden_layers": config["num_hidden_layers"],
        "layers": list(settings.layers),
        "threshold": {report_key(place): settings.threshold_of(place) for place in settings.places},
        "target_capacity": settings.target_capacity,
        "target_is": _aim(settings),
        "capacities": settings.capacities and [entry["capacity"] for entry in settings.capacities],
        "sequence_pooling": settings.sequence_pooling,
        "trained": measured,
        "routers": _routers(directory, config, settings),
        "substitute": _substitute(directory, config, settings),
        "dtype": dtype,
        "savings": {
            "capacity": capacity_of(shares, capacity_weights(config, settings)),
            "skipped": skipped_share(config, settings, shares),
            "capacity_from": source if given is not None else "measured on held-out rows of the training run",
            "batch": batch,
            "lengths": {
                length: {name: batch * value for name, value in cost.items()} for length, cost in costs.items()
            },
        },
    }


def describe_checkpoint(facts: dict[str, Any]) -> str:
    """Return what `inspect_checkpoint` found as text."""
    routers, saved, substitute, capacities = (
        facts[name] for name in ("routers", "savings", "substitute", "capacities")
    )
    layers = facts["layers"]
    lines = [
        f"checkpoint   {facts['checkpoint']}",
        f"base         {facts['base_model'] or 'not named'} ({facts['architecture']}, {facts['dtype']})",
        f"granularity  {facts['granularity']}",
        f"layers       {len(layers)} of {facts['num_hidden_layers']}: {' '.join(map(str, layers))}",
        f"target       {'none' if facts['target_capacity'] is None else facts['target_capacity']}"
        + ("" if facts["target_capacity"] is None else f", {facts['target_is']}"),
        "capacities   "
        + ("no others" if capacities is None else f"{' '.join(map(str, capacities))} and between, {CALIBRATED}")
        + _POOLED.get(facts["sequence_pooling"], ""),
        f"routers      {routers['parameters']} parameters, {routers['bytes'] / 1024:.1f} KiB"
        + ("" if routers["share"] is None else f", {100 * routers['share']:.4f}% of the model")
        + ("" if routers["built"] else "; the weights are not built yet"),
        f"substitute   {_describe_substitute(substitute)}",
        "",
    ]
    trained = facts["trained"]
    if trained is None:
        lines.append("capacity     no report of a training run here")
    else:
        lines.append(
            f"capacity     {trained['capacity']:.3f} measured on {trained['rows']} held-out rows, "
            f"loss {trained['loss']:.4f} (dense {trained['dense_loss']:.4f})"
        )
        if trained["use"]:
            use = trained["use"]
            figures = ", ".join(f"{name} {text_of(use[name])}" for name in FIGURES if name in use)
            lines.append(f"use          {figures}, measured in generation on {trained['use']['prompts']} prompts")
        for capacity, found in trained["at_others"].items():
            used = "" if found["executed"] is None else f", {found['executed']:.3f} in generation"
            measured = f"{found['capacity']:.3f} on held-out rows{used}, measured; loss {found['loss']:.4f}"
            lines.append(f"  set to {capacity}: {measured}")
    shares = trained["layers"] if trained else {}
    thresholds, width = facts["threshold"], 7 if len(facts["threshold"]) == len(layers) else 9
    lines.append("  layer      " + "".join(f"{name:>{width}}" for name in thresholds))
    lines.append("  threshold  " + "".join(f"{_mean(each):>{width}.3g}" for each in thresholds.values()))
    if shares:
        lines.append("  executed   " + "".join(f"{shares[name]:>{width}.2f}" for name in thresholds))
    lines += [
        "",
        f"saved by arithmetic at capacity {saved['capacity']:.3f} ({saved['capacity_from']}), batch {saved['batch']}"
        + ("" if substitute is None else ", less what the substitutes cost"),
        f"  skipped    {saved['skipped']:.1%} of the decoder layers' parameters for a token",
        f"  {'tokens':>8}{'prefill':>12}{'saved':>12}{'':>8}{'KV':>12}{'saved':>12}{'':>8}",
    ]
    for length, cost in saved["lengths"].items():
        lines.append(
            f"  {length:>8}{_flops(cost['flops']):>12}{_flops(cost['flops_saved']):>12}"
            f"{cost['flops_saved'] / cost['flops']:>8.1%}{_bytes(cost['kv_bytes']):>12}"
            f"{_bytes(cost['kv_bytes_saved']):>12}{cost['kv_bytes_saved'] / cost['kv_bytes']:>8.1%}"
        )
    return "\n".join(lines)


def _aim(settings: MoDSettings) -> str:
    """Say what the target capacity is; never a measurement."""
    calibrated = [entry["capacity"] for entry in settings.capacities or ()]
    return CALIBRATED if settings.target_capacity in calibrated else "what training aimed at"


def _measured(directory: Path, places: tuple[Place, ...]) -> dict[str, Any] | None:
    """Return what the training run found on its held-out rows, None where there is no report."""
    path = directory / "results.json"
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        held_out, use = report["held_out"], report.get("use")
        routed = held_out["routed"]
        return {
            "rows": held_out["rows"],
            "loss": routed["eval_loss"],
            "dense_loss": held_out["dense"]["dense_loss"],
            "capacity": routed["eval_capacity"],
            "layers": {report_key(place): routed[f"eval_capacity/layer_{place_name(place)}"] for place in places},
            "use": use and {name: use[name] for name in _in_use(use)},
            "at_others": {
                capacity: {
                    "capacity": found["held_out"]["eval_capacity"],
                    "loss": found["held_out"]["eval_loss"],
                    "executed": found["use"]["executed"]["mean"] if "use" in found else None,
                }
                for capacity, found in report.get("capacities", {}).items()
            },
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the report of a training run of this checkpoint: {error!r}") from None


def _in_use(use: dict[str, Any]) -> list[str]:
    """Return what is reported of the figures of use; older runs lack what is skipped."""
    return [name for name in (*FIGURES, "prompts", "max_new_tokens") if name != "skipped" or name in use]


def _routers(directory: Path, config: dict[str, Any], settings: Any) -> dict[str, Any]:
    built, share = _is_built(directory), None
    if built:
        elements = {name: count for name, (count, _) in _sizes(directory).items()}
        routers = sum(count for name, count in elements.items() if ROUTER_NAME.match(name))
        share = routers / sum(elements.values())
    else:
        rows = number_of_experts(config) if settings.target == "expert" else 1
        routers = rows * config["hidden_size"] * len(settings.places)
    return {"parameters": routers, "bytes": 4 * routers, "share": share, "built": built}


def _substitute(directory: Path, config: dict[str, Any], settings: MoDSettings) -> dict[str, Any] | None:
    """Return what stands in for skipped branches, its bytes as they are saved, and their share of all weights'."""
    if settings.substitute is None:
        return None
    ranks = {report_key(place): settings.substitute_rank(place) for place in settings.places}
    size, share = 4 * sum(config["hidden_size"] * (2 * rank + 1) for rank in ranks.values()), None
    if _is_built(directory):
        bytes_of = {name: size for name, (_, size) in _sizes(directory).items()}
        size = sum(each for name, each in bytes_of.items() if SUBSTITUTE_NAME.match(name))
        share = size / sum(bytes_of.values())
    return {"kind": settings.substitute["kind"], "ranks": ranks, "bytes": size, "share": share}


def _describe_substitute(substitute: dict[str, Any] | None) -> str:
    if substitute is None:
        return "none: a skipped branch returns nothing"
    low, high = min(substitute["ranks"].values()), max(substitute["ranks"].values())
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    share = "" if substitute["share"] is None else f", {substitute['share']:.2%} of the checkpoint's"
    return f"{substitute['kind']}, {rank}, {_bytes(substitute['bytes'])}{share}"


def _is_built(directory: Path) -> bool:
    """Tell whether a checkpoint's weights are there."""
    return any((directory / name).is_file() for name in (INDEX_FILE, "model.safetensors"))


def _sizes(directory: Path) -> dict[str, tuple[int, int]]:
    """Return tensor name -> number of elements and bytes, for all tensors of a checkpoint."""
    sizes = {}
    for path in sorted({directory / name for name in weight_map(directory).values()}):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_slice(name)
                    count = math.prod(tensor.get_shape())
                    bits = re.match(r"[A-Z]+(\d+)", tensor.get_dtype())  # as F32, BF16, F8_E4M3; BOOL takes a byte
                    sizes[name] = count, count * (int(bits[1]) if bits else 8) // 8
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    return sizes


def _mean(threshold: float | Sequence[float]) -> float:
    """Return a layer's threshold, of experts with one for each their mean."""
    return sum(threshold) / len(threshold) if isinstance(threshold, list | tuple) else threshold


def _dtype(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in BYTES else "float32"


def _flops(value: float) -> str:
    return _scaled(value, 1000, ("", "K", "M", "G", "T", "P", "E")) + "FLOP"


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")) + "B"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if value < base:
            return f"{value:.1f} {unit}" if unit else f"{value:.0f} "
        value /= base
    return f"{value:.1f} {units[-1]}"
