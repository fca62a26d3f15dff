"""The figures, drawn from JSON and from nothing else, as PNG and SVG.

Series differ by marker, dash and hatch as well as by their shade of grey, so that a print without colour is enough.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from utils.io.errors import UserError
from utils.io.files import atomic_file

COLORS, MARKERS, DASHES = ("black", "dimgrey", "darkgrey"), "os^DvPX<>*h", ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "xxx")
SETTINGS = {"svg.hashsalt": "router-tuning", "svg.fonttype": "none", "font.size": 10, "axes.axisbelow": True}


def draw_layers(axes: Axes, runs: dict[str, dict[str, float]]) -> None:
    """Draw the share of inputs that each layer skipped, side by side for several runs (Figure 4).

    Args:
        runs: name -> routed layer -> share executed; of two routers in a layer, such as `15.attn`, each branch is drawn
            by itself.
    """
    runs = {name: of for run, shares in runs.items() for name, of in _by_branch(run, shares).items()}
    layers = sorted({int(layer) for shares in runs.values() for layer in shares})
    width = 0.8 / len(runs)
    for number, (name, shares) in enumerate(runs.items()):
        skipped = [100 * (1 - shares[str(layer)]) if str(layer) in shares else np.nan for layer in layers]
        places = np.arange(len(layers)) + (number - (len(runs) - 1) / 2) * width
        fill = str(0.35 + 0.6 * number / max(1, len(runs)))
        axes.bar(places, skipped, width, label=name, color=fill, hatch=HATCHES[number % 4], edgecolor="black")
    axes.set(xlabel="layer", ylabel="inputs that skip it (%)", ylim=(0, 100))
    axes.set_xticks(range(len(layers)), layers)


def _by_branch(run: str, shares: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return name of a run, with its branch where layers have two routers -> routed layer -> share executed."""
    apart: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        layer, _, branch = str(name).partition(".")
        apart.setdefault(f"{run}, {branch}".lstrip(", ") if branch else run, {})[layer] = share
    return apart


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
        color, marker, dash = _style(number)
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
    """Draw quality against what it costs: speed, or the share executed.

    Args:
        value: `x_label`, `y_label`, and either `points`, each with `name`, `x`, `y` and optionally `stderr`, where
            each is named and those that no other beats are joined (more is better on both axes, unless
            `less_is_better` is set for y); or `series`, each with `name` for the legend and such `points`, which are
            joined in the order of x and have, instead of a name, optionally a `label` beside them.
    """
    for number, series in enumerate(value.get("series", ())):
        color, marker, dash = _style(number)
        points = sorted(series["points"], key=lambda point: point["x"])
        x, y = ([point[axis] for point in points] for axis in ("x", "y"))
        errors = [point.get("stderr") or 0.0 for point in points]
        axes.errorbar(
            *(x, y, errors if any(errors) else None),
            **{"label": series["name"], "color": color, "marker": marker, "linestyle": dash, "capsize": 2},
        )
        for point in points:
            if "label" in point:
                place = (point["x"], point["y"])
                axes.annotate(point["label"], place, (5, 4), textcoords="offset points", fontsize=8, color=color)
                axes.margins(0.1)
    if "points" in value:
        _draw_front(axes, value["points"], -1 if value.get("less_is_better") else 1)
    axes.set(xlabel=value["x_label"], ylabel=value["y_label"])


def _draw_front(axes: Axes, points: Sequence[dict[str, Any]], sign: int) -> None:
    """Draw points with their names, and join those that no other beats."""
    points = sorted(points, key=lambda point: (-point["x"], -sign * point["y"]))
    front: list[dict[str, Any]] = []
    for point in points:
        if not front or sign * point["y"] > sign * front[-1]["y"]:
            front.append(point)
    axes.plot([p["x"] for p in front], [p["y"] for p in front], color="black", linewidth=1, drawstyle="steps-post")
    middle = (points[0]["x"] + points[-1]["x"]) / 2
    for number, point in enumerate(points):
        color, marker, _ = _style(number)
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


def draw_training(axes: Axes, runs: dict[str, list[dict[str, float]]]) -> None:
    """Draw task loss and capacity over the steps of training runs.

    Args:
        runs: name -> the log of the run (`log_history` of `trainer_state.json`).
    """
    below = axes.twinx()
    for number, (name, history) in enumerate(runs.items()):
        color, _, _ = _style(number)
        logged = [entry for entry in history if "task_loss" in entry and "capacity" in entry]
        if not logged:
            raise UserError(f"{name}: its log has no task_loss and capacity")
        steps = [entry["step"] for entry in logged]
        axes.plot(steps, [entry["task_loss"] for entry in logged], color=color, label=f"loss, {name}")
        axes.plot([], [], color=color, linestyle=":", label=f"capacity, {name}")
        below.plot(steps, [entry["capacity"] for entry in logged], color=color, linestyle=":")
    axes.set(xlabel="step", ylabel="task loss (nats a token)")
    below.set(ylabel="capacity (share executed)", ylim=(0, 1.05))


LABELS: dict[str, str] = {
    "dense": "dense average (%)",
    "average": "average (%)",
    "without_rte": "without RTE (%)",
    "loss": "held-out loss",
    "loss_increase": "loss above dense",
    "capacity": "capacity",
    "agreement": "agreement",
    "executed": "executed in use",
    "skipped": "parameters skipped",
    "skipped_in_use": "skipped in use",
    "flops_saved_512": "FLOPs saved at 512",
    "flops_saved_2048": "FLOPs saved at 2048",
    "foreign": "foreign (nats a token)",
    "speed": "speed",
    "forward": "forward speed (dense is 1)",
    "prefill": "prefill (dense is 1)",
    "decode": "decode (dense is 1)",
    "kv_saved": "KV memory saved (%)",
}
"""Number of a run -> what it is called in tables and figures."""


def draw_serving(axes: Axes, value: dict[str, Any]) -> None:
    """Draw what a routed server takes, over what its dense base does, for each load; bars span the repeats.

    Args:
        value: the JSON of `scripts/benchmark_serving.sh`: `loads`, each with `load`, `executed` and `figures`.
    """
    loads = value["loads"]
    titles = {"processor_time": "processor time", "median_ttft_ms": "time to first token", "median_e2el_ms": "latency"}
    width = 0.8 / len(titles)
    for number, (name, title) in enumerate(titles.items()):
        ratios = [load["figures"][name]["ratio"] for load in loads]
        middles = np.asarray([ratio["median"] for ratio in ratios])
        spans = [middles - [ratio["low"] for ratio in ratios], [ratio["high"] for ratio in ratios] - middles]
        places = np.arange(len(loads)) + (number - (len(titles) - 1) / 2) * width
        fill, hatch = str(0.35 + 0.6 * number / len(titles)), HATCHES[number % 4]
        axes.bar(places, middles, width, yerr=spans, label=title, color=fill, hatch=hatch, edgecolor="black", capsize=2)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    names = [f"{load['load']['name']}\n({load['executed']:.2f} executed)" for load in loads]
    axes.set_xticks(range(len(loads)), names, fontsize=7)
    axes.set(ylabel="routed over dense")


KINDS: dict[str, Callable[[Axes, Any], None]] = {
    "layers": draw_layers,
    "experts": draw_experts,
    "series": draw_series,
    "pareto": draw_pareto,
    "training": draw_training,
    "serving": draw_serving,
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


def pareto_of(records: Sequence[dict[str, Any]], x: str, y: str) -> dict[str, Any]:
    """Turn measurements into a `pareto` figure: a line for each method, and each granularity where there are several.

    Args:
        records: each with `name` (the method), numbers, and where there are several `granularity`; those that lack
            `x` or `y` are left out. What `label` says, if there is one, stands beside the point.
        x, y: which numbers, such as `capacity` and `loss_increase`; `{y}_stderr` is drawn where it is there.

    Raises:
        UserError: none has both.
    """
    series: dict[str, list[dict[str, Any]]] = {}
    several = len({record.get("granularity") for record in records}) > 1
    for record in records:
        if record.get(x) is not None and record.get(y) is not None:
            name = f"{record['granularity']}, {record['name']}" if several else record["name"]
            point = {"x": record[x], "y": record[y], "stderr": record.get(f"{y}_stderr")}
            point |= {"label": record["label"]} if "label" in record else {}
            series.setdefault(name, []).append(point)
    if not series:
        raise UserError(f"no record has both {x} and {y}")
    labels = {"x_label": LABELS.get(x, x), "y_label": LABELS.get(y, y)}
    return labels | {"series": [{"name": name, "points": points} for name, points in series.items()]}


def save_figure(kind: str, value: Any, path: Path, title: str | None = None) -> list[Path]:
    """Draw a figure and write it as PATH.png and PATH.svg; the same value gives the same bytes.

    Args:
        kind: one of `KINDS`.
        value: what it is drawn from, or `{"panels": [...]}` with several such values, drawn side by side.
        path: without an ending.
        title: above it.

    Raises:
        UserError: the value is not what that kind is drawn from.
    """
    with matplotlib.rc_context(SETTINGS):
        panels = value["panels"] if isinstance(value, dict) and "panels" in value else [value]
        figure = Figure(figsize=(6.4 if len(panels) == 1 else 4.8 * len(panels), 4.0), layout="constrained")
        labelled: dict[str, Any] = {}  # panels have one legend in common
        try:
            for axes, one in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
                KINDS[kind](axes, one)
                axes.grid(True, color="0.9")
                labelled |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        except UserError:
            raise
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{path}: not what {kind} is drawn from: {error!r}") from None
        if labelled:
            figure.legend(
                labelled.values(), labelled, loc="outside lower center", ncols=min(4, len(labelled)), fontsize=8
            )
        if title:
            figure.suptitle(title, fontsize=12)
        paths = [path.with_name(path.name + end) for end in (".png", ".svg")]
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
        with atomic_file(paths[0], "wb") as file:
            Image.open(drawn).convert("L").save(file, format="PNG", optimize=True)  # no color: a third of the bytes
        with atomic_file(paths[1], "wb") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
    return paths


def _style(number: int) -> tuple[str, str, str]:
    """Return color, marker and dash of a series; the first eleven have markers of their own."""
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]


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
