"""The figures, drawn from JSON and from nothing else, as PNG and SVG.

Series differ by marker, dash and hatch as well as by their shade of grey, so that a print without colour is enough.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.io.errors import UserError
from utils.io.files import atomic_file

STYLES = (("black", "o", "-"), ("dimgrey", "s", "--"), ("grey", "^", ":"), ("darkgrey", "D", "-."))
HATCHES = ("", "///", "...", "xxx")
SETTINGS = {"svg.hashsalt": "router-tuning", "svg.fonttype": "none", "font.size": 10, "axes.axisbelow": True}


def draw_layers(axes: Axes, runs: dict[str, dict[str, float]]) -> None:
    """Draw the share of inputs that each layer skipped, side by side for several runs (Figure 4).

    Args:
        runs: name -> routed layer -> share executed.
    """
    layers = sorted({int(layer) for shares in runs.values() for layer in shares})
    width = 0.8 / len(runs)
    for number, (name, shares) in enumerate(runs.items()):
        skipped = [100 * (1 - shares[str(layer)]) if str(layer) in shares else np.nan for layer in layers]
        places = np.arange(len(layers)) + (number - (len(runs) - 1) / 2) * width
        fill = str(0.35 + 0.6 * number / max(1, len(runs)))
        axes.bar(places, skipped, width, label=name, color=fill, hatch=HATCHES[number % 4], edgecolor="black")
    axes.set(xlabel="layer", ylabel="inputs that skip it (%)", ylim=(0, 100))
    axes.set_xticks(range(len(layers)), layers)


def draw_experts(axes: Axes, experts: dict[str, list[float]]) -> None:
    """Draw assigned and executed tokens of each expert of a layer, over the mean of the assigned (Figure 8).

    Args:
        experts: `assigned` and `executed`, tokens of each expert.
    """
    mean = sum(experts["assigned"]) / len(experts["assigned"])
    for name, color, hatch in (("assigned", "white", "///"), ("executed", "0.35", "")):
        values = np.asarray(experts[name]) / mean
        axes.bar(range(len(values)), values, 0.9, label=name, color=color, edgecolor="black", hatch=hatch)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="expert", ylabel="tokens / mean of the assigned")


def draw_series(axes: Axes, value: dict[str, Any]) -> None:
    """Draw quality against something that was varied (Figures 5, 6 and 7).

    Args:
        value: `x_label`, `y_label`, optionally `dense` (a level line), and `series`: each with `name`, `x`, `y` and
            optionally `stderr`.
    """
    for number, series in enumerate(value["series"]):
        color, marker, dash = STYLES[number % len(STYLES)]
        axes.errorbar(
            series["x"],
            series["y"],
            yerr=series.get("stderr"),
            label=series["name"],
            color=color,
            marker=marker,
            linestyle=dash,
            capsize=2,
        )
    if value.get("dense") is not None:
        axes.axhline(value["dense"], color="black", linewidth=0.8, linestyle=(0, (1, 3)), label="dense")
    axes.set(xlabel=value["x_label"], ylabel=value["y_label"])


def draw_pareto(axes: Axes, value: dict[str, Any]) -> None:
    """Draw quality against measured speed, each point named, those that no other beats joined.

    Args:
        value: `x_label`, `y_label`, and `points`: each with `name`, `x`, `y` and optionally `stderr`; more is better
            on both axes, unless `less_is_better` is set for y.
    """
    sign = -1 if value.get("less_is_better") else 1
    points = sorted(value["points"], key=lambda point: (-point["x"], -sign * point["y"]))
    front: list[dict[str, Any]] = []
    for point in points:
        if not front or sign * point["y"] > sign * front[-1]["y"]:
            front.append(point)
    axes.plot([p["x"] for p in front], [p["y"] for p in front], color="black", linewidth=1, drawstyle="steps-post")
    middle = (points[0]["x"] + points[-1]["x"]) / 2
    for number, point in enumerate(points):
        color, marker, _ = STYLES[number % len(STYLES)]
        axes.errorbar(
            point["x"], point["y"], yerr=point.get("stderr"), color=color, marker=marker, linestyle="", capsize=2
        )
        right = point["x"] > middle  # where a name would run out of the figure
        axes.annotate(
            point["name"],
            (point["x"], point["y"]),
            (-6 if right else 6, 5),
            textcoords="offset points",
            fontsize=8,
            ha="right" if right else "left",
        )
    axes.margins(0.15)
    axes.set(xlabel=value["x_label"], ylabel=value["y_label"])


def draw_training(axes: Axes, runs: dict[str, list[dict[str, float]]]) -> None:
    """Draw task loss and capacity over the steps of training runs.

    Args:
        runs: name -> the log of the run (`log_history` of `trainer_state.json`).
    """
    below = axes.twinx()
    for number, (name, history) in enumerate(runs.items()):
        color, _, _ = STYLES[number % len(STYLES)]
        logged = [entry for entry in history if "task_loss" in entry and "capacity" in entry]
        if not logged:
            raise UserError(f"{name}: its log has no task_loss and capacity")
        steps = [entry["step"] for entry in logged]
        axes.plot(steps, [entry["task_loss"] for entry in logged], color=color, label=f"loss, {name}")
        axes.plot([], [], color=color, linestyle=":", label=f"capacity, {name}")
        below.plot(steps, [entry["capacity"] for entry in logged], color=color, linestyle=":")
    axes.set(xlabel="step", ylabel="task loss (nats a token)")
    below.set(ylabel="capacity (share executed)", ylim=(0, 1.05))


KINDS: dict[str, Callable[[Axes, Any], None]] = {
    "layers": draw_layers,
    "experts": draw_experts,
    "series": draw_series,
    "pareto": draw_pareto,
    "training": draw_training,
}
"""Kind of figure -> what draws it."""


def read_figure(kind: str, values: Sequence[tuple[str, Any]], layer: int | None = None) -> Any:
    """Turn files that commands have written into what a figure is drawn from.

    Args:
        kind: one of `KINDS`.
        values: name and content of each file: of `results.json` of a training run or the JSON of an evaluation for
            `layers`, `trainer_state.json` for `training`, the JSON of an evaluation or of `expert_load.py` for
            `experts`, and of one file as it is for the others.
        layer: whose experts are drawn; default the first routed one.

    Raises:
        UserError: a file is of another kind.
    """
    try:
        if kind == "layers":
            return {name: shares for file, value in values for name, shares in _layer_shares(file, value).items()}
        if kind == "training":
            return {name: value["log_history"] for name, value in values}
        if kind == "experts" and len(values) == 1 and "rows" in values[0][1]:
            rows = values[0][1]["rows"]["routed"].values()
            return _experts_of([row["capacity"]["experts"] for row in rows], layer)
        if kind == "experts" and len(values) == 1 and "experts" in values[0][1]:
            return _experts_of([values[0][1]["experts"]], layer)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{', '.join(name for name, _ in values)}: not what {kind} is drawn from: {error!r}") from None
    if len(values) != 1:
        raise UserError(f"{kind} is drawn from one file, and {len(values)} were given")
    return values[0][1]


def save_figure(kind: str, value: Any, path: Path, title: str | None = None) -> list[Path]:
    """Draw a figure and write it as PATH.png and PATH.svg; the same value gives the same bytes.

    Raises:
        UserError: the value is not what that kind is drawn from.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        try:
            KINDS[kind](axes, value)
        except UserError:
            raise
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{path}: not what {kind} is drawn from: {error!r}") from None
        axes.grid(True, color="0.9")
        if title:
            axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        paths = [path.with_name(path.name + end) for end in (".png", ".svg")]
        for target, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
            with atomic_file(target, "wb") as file:
                figure.savefig(file, format=target.suffix[1:], dpi=200, metadata=metadata)
    return paths


def _experts_of(counted: list[dict[str, Any]], layer: int | None) -> dict[str, list[float]]:
    """Return the tokens of each expert of a layer, over all that was counted."""
    chosen = str(layer) if layer is not None else next(iter(counted[0]))
    if chosen not in counted[0]:
        raise UserError(f"layer {layer} routes no experts; those that do are {', '.join(counted[0])}")
    kinds = ("assigned", "executed")
    return {
        kind: [sum(tokens) for tokens in zip(*(one[chosen][kind] for one in counted), strict=True)] for kind in kinds
    }


def _layer_shares(file: str, value: dict[str, Any]) -> dict[str, dict[str, float]]:
    if "held_out" in value:  # of a training run
        prefix = "eval_capacity/layer_"
        routed = value["held_out"]["routed"]
        return {file: {name.removeprefix(prefix): s for name, s in routed.items() if name.startswith(prefix)}}
    if "rows" in value:  # of an evaluation
        return {task: result["capacity"]["layers"] for task, result in value["rows"]["routed"].items()}
    return value
