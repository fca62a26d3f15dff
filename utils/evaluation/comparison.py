"""Routed runs over capacities and seeds beside static dropping at the capacity that they reached.

A run is a line of JSON: `name`, `kind` (`routed`, `hinge`, a baseline as `cosine`, `greedy`, ...), `granularity`,
`target`, `seed`, `settings` (whatever else was varied: name -> value), `capacity`, `loss`, `loss_increase` over the
dense model on the same held-out rows, where they were measured the figures of use (`use.py`), and where tasks were
evaluated `average` and `average_dense`, in percent.

Static dropping leaves out whole layers, so its capacities are few; between two of them its loss is taken linearly.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .use import FIGURES

Line = dict[str, Any]

STATIC = ("cosine", "greedy")
"""Baselines that skip the same layers for every input: they are one curve for both levels of a granularity."""
BESIDE = ("skipped_in_use", "flops_saved_512", "flops_saved_2048", "average")
"""What else is put together of runs; `skipped` is that of the held-out rows."""
NEAR = 0.05
"""Distance of a capacity from its target within which settings are compared by their loss alone."""


def static_curve(lines: Iterable[Line], kind: str, granularity: str) -> list[tuple[float, float]]:
    """Return capacity and increase of the loss of a static baseline, by rising capacity, with the dense model last."""
    target = granularity.rsplit("_", 1)[0]
    points = {
        (line["capacity"], line["loss_increase"])
        for line in lines
        if line["kind"] == kind and line["granularity"].rsplit("_", 1)[0] == target
    }
    return sorted(points | {(1.0, 0.0)}) if points else []


def increase_at(curve: Sequence[tuple[float, float]], capacity: float) -> float | None:
    """Return a curve's increase of the loss at a capacity, between its points; None outside them."""
    for (low, at_low), (high, at_high) in itertools.pairwise(curve):
        if low <= capacity <= high:
            share = (capacity - low) / (high - low) if high > low else 0.0
            return at_low + share * (at_high - at_low)
    return None


def summarize(lines: Sequence[Line]) -> list[Line]:
    """Put runs that differ in their seed alone together.

    Returns:
        In the order of the first run of each: what they share, `seeds`, and for `capacity`, `loss_increase`, the
        figures of use, `average`, `average_change` (over dense) and `of_cosine`, `of_greedy` (the increase over that
        baseline's at the same capacity) the mean, the smallest and the largest; numbers that no run has are left out.
    """
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    groups: dict[str, list[Line]] = {}
    for line in lines:
        shared = {name: line[name] for name in ("kind", "granularity", "target", "settings")}
        numbers = {name: line.get(name) for name in ("capacity", "loss_increase", *FIGURES, *BESIDE)}
        if line.get("average") is not None and line.get("average_dense") is not None:
            numbers["average_change"] = line["average"] - line["average_dense"]
        for kind in STATIC:
            key = kind, line["granularity"]
            if key not in curves:
                curves[key] = static_curve(lines, *key)
            static = increase_at(curves[key], line["capacity"])
            if line["kind"] not in STATIC and static:
                numbers[f"of_{kind}"] = line["loss_increase"] / static
        groups.setdefault(repr(shared), []).append(shared | {"seed": line["seed"], "numbers": numbers})
    summaries = []
    for members in groups.values():
        first = members[0]
        summary = {name: first[name] for name in ("kind", "granularity", "target", "settings")}
        summary["seeds"] = sorted({member["seed"] for member in members})
        for name in {name: None for member in members for name in member["numbers"]}:
            values = [member["numbers"][name] for member in members if member["numbers"].get(name) is not None]
            if values:
                summary[name] = {"mean": math.fsum(values) / len(values), "min": min(values), "max": max(values)}
        summaries.append(summary)
    return summaries


COLUMNS = (
    ("capacity", "held-out capacity", "{:.3f}"),
    ("skipped", "skipped", "{:.3f}"),
    ("flops_saved_512", "FLOPs saved at 512", "{:.3f}"),
    ("flops_saved_2048", "at 2048", "{:.3f}"),
    ("loss_increase", "loss above dense", "{:+.3f}"),
    ("of_cosine", "of cosine's", "{:.2f}"),
    ("of_greedy", "of greedy's", "{:.2f}"),
    ("agreement", "agreement", "{:.3f}"),
    ("executed", "executed in use", "{:.3f}"),
    ("skipped_in_use", "skipped in use", "{:.3f}"),
    ("foreign", "foreign (nats)", "{:.2f}"),
    ("average", "average (%)", "{:.1f}"),
    ("average_change", "over dense", "{:+.1f}"),
)


def comparison_table(summaries: Sequence[Line]) -> str:
    """Return summaries as a Markdown table: means, and in brackets the smallest and the largest of several seeds."""
    varied = list({name: None for summary in summaries for name in summary["settings"]})
    shown = [column for column in COLUMNS if any(column[0] in summary for summary in summaries)]
    heads = ["granularity", "", *varied, "target", "seeds", *(head for _, head, _ in shown)]
    rows = [heads, ["---"] * len(heads)]
    for summary in sorted(summaries, key=_order):
        cells = [f"`{summary['granularity']}`", summary["kind"]]
        cells += [str(summary["settings"].get(name, "")) for name in varied]
        cells += [f"{summary['target']:g}", str(len(summary["seeds"]))]
        cells += [_cell(summary.get(name), form) for name, _, form in shown]
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def best_of(summaries: Sequence[Line]) -> list[Line]:
    """Return what `plots.pareto_of` draws: for each way to skip and each target the settings of least loss.

    Settings that end far from their target (`NEAR`) are drawn only where all do: to skip nothing costs nothing.

    Returns:
        `name` and `granularity` (of static dropping, `attn` for both levels), and the means of `capacity`,
        `loss_increase` and, where tasks were evaluated, `average`.
    """

    def rank(summary: Line) -> tuple[bool, float]:
        off = abs(summary["capacity"]["mean"] - summary["target"])
        return off > NEAR, summary["loss_increase"]["mean"]

    best: dict[tuple[str, str, float], Line] = {}
    for summary in summaries:
        granularity = summary["granularity"]
        granularity = granularity.rsplit("_", 1)[0] if summary["kind"] in STATIC else granularity
        place = granularity, summary["kind"], summary["target"]
        if place not in best or rank(summary) < rank(best[place]):
            best[place] = summary
    names = ("capacity", "loss_increase", "average")
    return [
        {"name": kind, "granularity": granularity, **{name: one[name]["mean"] for name in names if name in one}}
        for (granularity, kind, _), one in best.items()
    ]


def _order(summary: Line) -> tuple:
    return summary["granularity"], summary["kind"] != "routed", summary["kind"], -summary["target"]


def _cell(value: dict[str, float] | None, form: str) -> str:
    if value is None:
        return "-"
    mean, low, high = (form.format(value[name]) for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"
