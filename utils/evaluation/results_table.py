"""What the runs of a table of the paper came to, beside the paper's numbers: a table in Markdown and a figure.

Everything is read from the files that training, evaluation and benchmark have left in the runs' folders.
"""

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from utils.io.errors import UserError
from utils.io.files import read_json
from utils.model.checkpoint import complete_config, make_settings, read_config
from utils.model.costs import REPORTED_LENGTHS, capacity_to_skip
from utils.model.lora import holds_adapter

from .comparison import STATIC, best_of, comparison_table, summarize
from .frontier import frontier_figure, frontier_table
from .plots import LABELS, pareto_of, read_figure
from .reproduction import Plan, Run, Step
from .use import FIGURES

BUDGET = ("skipped", *(f"flops_saved_{length}" for length in REPORTED_LENGTHS))
"""What a capacity saves, on held-out rows."""

SEED = 233
"""Of every training and baseline that names no other: the commands' default."""


def collect(plan: Plan, failed: Sequence[str] = ()) -> dict[str, Any]:
    """Gather what the runs' files say.

    Args:
        failed: names of runs that did not come to their end.

    Returns:
        `title`, `scale`, `rows` (each with `name`, `ours` and `paper`: metric -> number, and the `seed` and `command`
        of its checkpoint), `dense`, `left_out`, `failed`, and the `versions` and the `machine` that this is.

    Raises:
        UserError: a run lacks one of the shares that the table wants it to be set to.
    """
    rows = []
    dense: dict[str, float] = {}
    for run in plan.runs:
        measured, base = _numbers(run.folder)
        measured |= {"dense": base["average"]} if "average" in base else {}
        dense = base | dense
        shown = {"name": run.name, "ours": measured, "paper": run.entry.get("paper", {}), "x": run.entry.get("x")}
        rows.append(shown | {"seed": _seed(run), "command": _command(run)})
    compared = plan.config.get("compare", False)
    if "frontier" in plan.config:
        rows = [row for run in plan.runs for row in _frontier_rows(run)]
    return {
        "title": plan.config["title"],
        "scale": plan.description,
        "metrics": list(dict.fromkeys([*plan.config["metrics"], *BUDGET, *map(in_table, FIGURES)])),
        "rows": rows,
        "frontier": plan.config.get("frontier"),
        "published": plan.config.get("published", []),
        "lines": [line for run in plan.runs if (line := _line(run))] if compared else [],
        "dense": {"ours": dense, "paper": plan.config.get("paper_dense", {})},
        "left_out": list(plan.left_out),
        "failed": list(failed),
        "versions": {package: version(package) for package in ("torch", "transformers", "lm_eval")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}",
    }


def markdown(result: dict[str, Any], command: str) -> str:
    """Return the table, ours beside the paper's, with what it was made by; columns without a number are left out."""
    # where the runs have several bases, each row has its own
    bases = [] if "dense" in result["metrics"] else [{"name": "dense", **result["dense"]}]
    rows = [*bases, *result["rows"]]
    both = [(metric, who) for metric in result["metrics"] for who in ("ours", "paper")]
    columns = [(metric, who) for metric, who in both if any(metric in row[who] for row in rows)]
    heads = ["", *(f"{LABELS.get(metric, metric)}, {who}" for metric, who in columns)]
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    lines = [f"# {result['title']}", "", result["scale"], ""]
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in result["rows"]} or {SEED}))
    lines += [f"Made by `{command}`; seed {seeds}; {versions}; {result['machine']}.", ""]
    if result["frontier"]:
        lines += frontier_table(result["rows"], result["metrics"], result["frontier"], result["published"]).splitlines()
    elif result["lines"]:
        lines += comparison_table(summarize(result["lines"])).splitlines()
    else:
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in rows:
            lines.append("| " + " | ".join([row["name"], *(_cell(row[who], metric) for metric, who in columns)]) + " |")
    if result["left_out"]:
        lines += ["", f"Not made here: {', '.join(result['left_out'])}."]
    if result["failed"]:
        lines += ["", f"**Failed**: {', '.join(result['failed'])}."]
    return "\n".join(lines) + "\n"


def figure_of(plan: Plan, result: dict[str, Any]) -> tuple[str, Any] | None:
    """Return kind and value of the plan's figure for `plots.save_figure`; None where it has none or lacks numbers."""
    if result["lines"]:
        records = best_of(summarize(result["lines"]))
        measured = [y for y in ("loss_increase", "average") if any(y in record for record in records)]
        return "pareto", {"panels": [pareto_of(records, "capacity", y) for y in measured]}
    if result["frontier"]:
        value = frontier_figure(result["rows"])
        return None if value is None else ("pareto", value)
    wanted = plan.config.get("figure")
    if not wanted:
        return None
    if wanted["kind"] == "layers":
        shares = {row["name"]: row["ours"].get("layers") for row in result["rows"]}
        shares = {name: value for name, value in shares.items() if value}
        return ("layers", shares) if shares else None
    if wanted["kind"] == "experts":
        evaluations = [_read(run.folder / "evaluation.json") for run in plan.runs]
        whole = [value for value in evaluations if value]
        return ("experts", read_figure("experts", [("", whole[0])])) if whole else None
    if wanted["kind"] == "pareto":
        panels = [_speed_panel(result, y) for y in wanted["y"]]
        panels = [panel for panel in panels if len(panel["points"]) > 1]
        return ("pareto", {"panels": panels}) if panels else None
    if wanted["kind"] == "methods":  # a line for each: what was reached, which is not quite what was asked for
        rows = [*result["rows"], {"name": "dense", **result["dense"]}]
        records = [{"name": row["name"].split()[0], **row["ours"]} for row in rows if wanted["x"] in row["ours"]]
        for record in records:
            if wanted.get("label") in record:
                record["label"] = f"{record[wanted['label']]:.2f}"
        measured = [y for y in wanted["y"] if any(y in record for record in records)]
        return ("pareto", {"panels": [pareto_of(records, wanted["x"], y) for y in measured]}) if measured else None
    rows = [row for row in result["rows"] if wanted["y"] in row["ours"]]
    series: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = re.split(r"[ ,]", row["name"])[0] if wanted.get("by_first_word") else "routed"
        one = series.setdefault(name, {"name": name, "x": [], "y": []})
        one["x"].append(row["x"])
        one["y"].append(row["ours"][wanted["y"]])
    value = {
        "x_label": wanted["x_label"],
        "y_label": LABELS.get(wanted["y"], wanted["y"]),
        "series": list(series.values()),
    }
    return ("series", value | {"dense": result["dense"]["ours"].get(wanted["y"])}) if series else None


def _speed_panel(result: dict[str, Any], y: str) -> dict[str, Any]:
    """Return quality against measured speed, of all runs that have both, and of the dense model."""
    rows = [*result["rows"], {"name": "dense", **result["dense"]}]
    points = [
        {"name": row["name"], "x": row["ours"]["speed"], "y": row["ours"][y], "stderr": row["ours"].get(f"{y}_stderr")}
        for row in rows
        if {"speed", y} <= row["ours"].keys()
    ]
    labels = {"x_label": "speed relative to dense", "y_label": LABELS.get(y, y)}
    return labels | {"points": points, "less_is_better": y.startswith("loss")}


def _numbers(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what a run's files say of it, and of its dense base, if they say anything of that."""
    ours: dict[str, Any] = {}
    dense: dict[str, float] = {}
    report = _read(folder / "checkpoint/results.json")
    if report:
        held_out = report["held_out"]
        ours |= _held_out(held_out["routed"])
        dense |= {"loss": held_out["dense"]["dense_loss"], "capacity": 1.0}
        ours["loss_increase"] = ours["loss"] - dense["loss"]
        prefix = "eval_capacity/layer_"
        routed = held_out["routed"].items()
        if report.get("use"):
            ours |= _use(report["use"])
            dense |= {"agreement": 1.0, "executed": 1.0, "foreign": 0.0}  # of itself, with itself
        if report.get("forward_tokens_per_second"):
            ours["forward"] = report["forward_tokens_per_second"]["ratio"]
            dense["forward"] = 1.0
        ours["layers"] = {name.removeprefix(prefix): share for name, share in routed if name.startswith(prefix)}
    evaluation = _read(folder / "evaluation.json")
    if evaluation:
        for name, numbers in (("routed", ours), ("dense", dense)):
            numbers |= {task: 100 * result["value"] for task, result in evaluation["rows"].get(name, {}).items()}
            means = [mean for mean in evaluation["averages"].get(name, []) if mean]
            for mean in means:
                key = mean["name"].replace(" ", "_").lower()
                numbers[key] = 100 * mean["value"]
                if mean["stderr"] is not None:
                    numbers[f"{key}_stderr"] = 100 * mean["stderr"]
    benchmark = _read(folder / "benchmark.json")
    if benchmark:
        columns = benchmark["cells"][-1]["columns"]
        seconds = {name: _generation_seconds(columns[name]) for name in ("dense", "tuned")}
        ours["speed"] = seconds["dense"] / seconds["tuned"]
        for phase in ("prefill", "decode"):
            if phase in columns["tuned"]:
                ours[phase] = (
                    columns["dense"][phase]["seconds"]["median"] / columns["tuned"][phase]["seconds"]["median"]
                )
        ours["kv_saved"] = 100 * (1 - columns["tuned"]["kv_bytes"] / columns["dense"]["kv_bytes"])
        dense |= {"speed": 1.0, "kv_saved": 0.0}
    if holds_adapter(folder / "checkpoint"):  # without its routing it is the adapted model, and not the dense base
        return {name: value for name, value in ours.items() if name != "loss_increase"}, {}
    return ours, dense


def _frontier_rows(run: Run) -> list[dict[str, Any]]:
    """Return a run's rows as `frontier.py` takes them: one for each share that its checkpoint was measured at."""
    measured, _ = _numbers(run.folder)
    report = _read(run.folder / "checkpoint/results.json")
    if report is None:
        return []
    fields, made = run.entry["environment"], _made_by(run)
    target = made.environment.get("TARGET_SKIPPED", fields.get("TARGET_SKIPPED"))
    granularity = made.environment.get("GRANULARITY", fields.get("GRANULARITY"))
    static = run.entry.get("baseline") in STATIC and granularity is None
    row = {
        "name": run.name,
        "model": run.entry.get("model_name"),
        "method": run.entry["kind"] if static else f"{run.entry['kind']} {granularity}",
        "seed": fields.get("SEED", SEED),
        "paper": {},
        "command": _command(run),
    }
    rows = [row | {"target": float(target), "ours": measured}]
    if run.entry.get("skipped"):
        config = read_config(run.folder / "checkpoint")
        settings = make_settings(config)
        for share in run.entry["skipped"]:
            found = report["capacities"].get(str(capacity_to_skip(complete_config(config, settings), settings, share)))
            if found is None:
                raise UserError(
                    f"{run.folder}/checkpoint: not calibrated for {share} skipped; --skipped of its training"
                )
            ours = _held_out(found["held_out"]) | _use(found.get("use", {}))
            ours["loss_increase"] = ours["loss"] - report["held_out"]["dense"]["dense_loss"]
            ours |= {"forward": found["forward_ratio"]} if "forward_ratio" in found else {}
            rows.append(row | {"target": share, "ours": ours})
    return rows


def _use(use: dict[str, Any]) -> dict[str, float | None]:
    """Return those of the figures of use that were measured, and their errors."""
    return {
        key: use[name][of]
        for name in FIGURES
        if name in use
        for key, of in ((in_table(name), "mean"), (f"{in_table(name)}_stderr", "stderr"))
    }


def _held_out(routed: dict[str, float]) -> dict[str, float]:
    """Return loss, capacity and what it skips on held-out rows, of a run's results; older ones lack the last."""
    names = {"loss": "eval_loss", "capacity": "eval_capacity", **{name: f"eval_{name}" for name in BUDGET}}
    return {name: routed[key] for name, key in names.items() if key in routed}


def in_table(figure: str) -> str:
    """Return what a figure of use is called in a table, where `skipped` is that of the held-out rows."""
    return "skipped_in_use" if figure == "skipped" else figure


def _made_by(run: Run) -> Step:
    """Return the step that makes a run's checkpoint."""
    (made,) = (step for step in run.steps if step.kind in ("train", "baseline"))
    return made


def _command(run: Run) -> str:
    """Return the command that makes a run's checkpoint, on whatever machine: where it lies is left open."""
    return _made_by(run).text.replace(str(run.folder), run.folder.name)


def _seed(run: Run) -> int:
    return run.entry.get("environment", {}).get("SEED", SEED)


def _line(run: Run) -> dict[str, Any] | None:
    """Return a run as `comparison.py` takes it, with how it was made; None where it isn't done."""
    ours, dense = _numbers(run.folder)
    if "loss_increase" not in ours:
        return None
    fields, made = run.entry["environment"], _made_by(run)
    arguments = [*run.entry.get("train_arguments", ()), *run.entry.get("baseline_arguments", ())]
    shown = {field: value for field, value in fields.items() if field not in ("GRANULARITY", "TARGET_CAPACITY", "SEED")}
    return {
        "name": run.name,
        "kind": run.entry["kind"],
        "granularity": fields["GRANULARITY"],
        "target": fields["TARGET_CAPACITY"],
        "seed": _seed(run),
        "settings": {"with": " ".join([*(f"{field}={value}" for field, value in shown.items()), *map(str, arguments)])},
        **{name: ours.get(name) for name in ("capacity", "loss", "loss_increase", "average", "average_stderr")},
        **{name: ours.get(name) for name in (*map(in_table, FIGURES), *BUDGET)},
        "average_dense": dense.get("average"),
        "seconds": (_read(made.record) or {}).get("seconds"),
        "command": _command(run),
    }


def _generation_seconds(column: dict[str, Any]) -> float:
    """Return what a whole generation takes, as the paper's speed counts it: prefill and decode."""
    return sum(column[phase]["seconds"]["median"] for phase in ("prefill", "decode") if phase in column)


def _cell(numbers: dict[str, Any], metric: str) -> str:
    value, error = numbers.get(metric), numbers.get(f"{metric}_stderr")
    if value is None:
        return "-"
    form = ".3f" if abs(value) < 10 else ".1f"
    text = f"{value:.2f}x" if metric in ("speed", "forward") else f"{value:{form}}"
    return text if error is None else f"{text} ± {error:{form}}"


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
