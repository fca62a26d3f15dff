"""Quality against computation skipped: runs that differ in their seed alone put together, and methods compared.

A row is a checkpoint, or one that is set to another share: `model` (None where there is one), `method`, `target` (the
share of the decoder layers' parameters that was to be skipped), `seed`, and `ours`, the numbers that were measured
(`results_table.py`). Methods land near their target and not on it, and static ones leave out whole layers: to compare
them, each seed's numbers are taken linearly between its own measured points, the dense model being the first of them.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .plots import LABELS, pareto_of

Row = Mapping[str, Any]
Curve = list[tuple[float, float]]

PANELS = (("skipped", "loss_increase"), ("skipped_in_use", "agreement"), ("forward", "loss_increase"))
"""What the figure shows: by parameters, and by measured time."""
DENSE = {"skipped": 0.0, "skipped_in_use": 0.0, "forward": 1.0, "loss_increase": 0.0, "agreement": 1.0, "foreign": 0.0}
"""The dense model beside itself."""


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Return `mean` and `stderr` over seeds; of a single one no error is known."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error}


def put_together(rows: Sequence[Row], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return a record for each model, method and target: what they share, `seeds`, and each metric over the seeds."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"], row["target"]), []).append(row)
    records = []
    for (model, method, target), members in groups.items():
        record: dict[str, Any] = {"model": model, "method": method, "target": target}
        record["seeds"] = sorted(row["seed"] for row in members)
        for metric in metrics:
            values = [row["ours"][metric] for row in members if row["ours"].get(metric) is not None]
            if values:
                record[metric] = over_seeds(values)
        records.append(record)
    return sorted(records, key=lambda record: (record["model"] or "", record["method"], record["target"]))


def between(curve: Curve, at: float) -> float | None:
    """Return a curve's value, between its points; None outside them."""
    for (low, at_low), (high, at_high) in itertools.pairwise(sorted(curve)):
        if low <= at <= high:
            return at_low + (at_high - at_low) * ((at - low) / (high - low) if high > low else 0.0)
    return None


def compared(rows: Sequence[Row], x: str, y: str, places: Sequence[float]) -> list[dict[str, Any]]:
    """Return `y` of each method where `x` is equal.

    Args:
        rows: of all methods and seeds.
        x, y: metrics, such as `skipped` and `loss_increase`.
        places: values of `x`.

    Returns:
        A record for each model and method that reaches one of the places: `model`, `method`, and by place `mean` and
        `stderr` over the seeds that reach it.
    """
    curves: dict[tuple, dict[int, Curve]] = {}
    for row in rows:
        ours = row["ours"]
        if ours.get(x) is not None and ours.get(y) is not None:
            of_seeds = curves.setdefault((row["model"], row["method"]), {})
            of_seeds.setdefault(row["seed"], [(DENSE[x], DENSE[y])]).append((ours[x], ours[y]))
    records = []
    for (model, method), of_seeds in sorted(curves.items(), key=lambda item: (item[0][0] or "", item[0][1])):
        found = {place: [between(curve, place) for curve in of_seeds.values()] for place in places}
        reached = {place: [value for value in values if value is not None] for place, values in found.items()}
        at = {place: over_seeds(values) for place, values in reached.items() if values}
        if at:
            records.append({"model": model, "method": method, "at": at})
    return records


def frontier_table(
    rows: Sequence[Row], metrics: Sequence[str], wanted: Mapping[str, Any], published: Sequence[Mapping[str, Any]]
) -> str:
    """Return the tables in Markdown: all that was measured, the comparisons, and what others have published.

    Args:
        rows: of all methods and seeds.
        metrics: columns.
        wanted: `at_skipped` and `at_speed`, where methods are compared.
        published: rows of other methods, each with `method`, `skipped` and `of_dense` in percent, and `source`.
    """
    records = put_together(rows, metrics)
    shown = [metric for metric in metrics if any(metric in record for record in records)]
    heads = ["", "target", "seeds", *(LABELS.get(metric, metric) for metric in shown)]
    lines = _lines(heads, [[_name(r), f"{r['target']:g}", str(len(r["seeds"])), *_cells(r, shown)] for r in records])
    for x, places, meaning in (
        ("skipped", wanted["at_skipped"], "at equal parameters skipped, of the same held-out rows"),
        ("forward", wanted["at_speed"], "at equal measured time of a forward, dense over routed"),
    ):
        found = compared(rows, x, "loss_increase", places)
        if found:
            body = [[_name(r), *(_figure(r["at"].get(place)) for place in places)] for r in found]
            lines += ["", f"Loss above dense {meaning}:", "", *_lines(["", *(f"{place:g}" for place in places)], body)]
    if published:
        body = [[row["method"], f"{row['skipped']}%", f"{row['of_dense']}%", row["source"]] for row in published]
        heads = ["published", "parameters skipped", "of the dense accuracy", "source"]
        lines += ["", *_lines(heads, body)]
    return "\n".join(lines) + "\n"


def frontier_figure(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the value of a `pareto` figure with the `PANELS` that were measured, None where none was."""
    metrics = {name for panel in PANELS for name in panel}
    records = put_together(rows, sorted(metrics))
    panels = []
    for x, y in PANELS:
        points = [
            {"name": _name(record), x: record[x]["mean"], y: record[y]["mean"], f"{y}_stderr": record[y]["stderr"]}
            for record in records
            if x in record and y in record
        ]
        if points:
            panels.append(pareto_of(points, x, y))
    return {"panels": panels} if panels else None


def _name(record: Row) -> str:
    return " ".join(part for part in (record["model"], record["method"]) if part)


def _cells(record: Row, metrics: Sequence[str]) -> list[str]:
    return [_figure(record.get(metric)) for metric in metrics]


def _figure(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return "-"
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.3f}"
    return f"{value['mean']:.3f}{error}"


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
