"""Figures are drawn from JSON, hold what it says, and look the same without colour."""

import json
import runpy
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from utils.evaluation.plots import (
    KINDS,
    draw_experts,
    draw_layers,
    draw_pareto,
    draw_serving,
    pareto_of,
    read_figure,
    save_figure,
)
from utils.io.errors import UserError

HISTORY = [{"step": step, "task_loss": 2.0 - step / 10, "capacity": 1 - step / 20} for step in range(1, 6)]
POINTS = [("dense", 1.0, 69.7), ("attn", 1.21, 69.4), ("mlp", 1.06, 61.8), ("block", 1.26, 61.3)]
VALUES = {
    "layers": {"one": {"3": 0.25, "4": 1.0}, "two": {"3": 0.5, "4": 0.0}},
    "experts": {"assigned": [4, 8, 0, 4], "executed": [2, 8, 0, 1]},
    "series": {
        **{"x_label": "layers", "y_label": "%", "dense": 70.0},
        "series": [{"name": "a", "x": [0, 4], "y": [70, 69], "stderr": [1, 1]}, {"name": "b", "x": [0], "y": [70]}],
    },
    "pareto": {"x_label": "speed", "y_label": "%", "points": [{"name": name, "x": x, "y": y} for name, x, y in POINTS]},
    "training": {"run": [*HISTORY, {"train_loss": 1.0}]},
    "serving": {
        "loads": [
            {
                **{"load": {"name": name}, "executed": 0.5},
                "figures": {
                    figure: {"ratio": {"median": ratio, "low": ratio - 0.05, "high": ratio + 0.02}}
                    for figure in ("processor_time", "median_ttft_ms", "median_e2el_ms")
                },
            }
            for name, ratio in (("prefill of 480", 0.8), ("32 at a time", 0.85))
        ]
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_is_written_twice_alike_without_colour(kind, tmp_path):
    png, svg = save_figure(kind, VALUES[kind], tmp_path / "figure", title="A title")
    assert [path.name for path in (png, svg)] == ["figure.png", "figure.svg"]
    pixels = np.asarray(Image.open(png).convert("RGB")).astype(int)
    assert np.ptp(pixels, axis=-1).max() == 0  # grey everywhere
    assert len(np.unique(pixels)) > 2
    assert "A title" in "".join(ElementTree.parse(svg).getroot().itertext())
    again = save_figure(kind, VALUES[kind], tmp_path / "again", title="A title")
    assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]


def test_bars_are_the_share_skipped_and_the_tokens_over_the_mean_assigned():
    axes = Figure().subplots()
    draw_layers(axes, VALUES["layers"])
    assert [bar.get_height() for bar in axes.patches] == [75.0, 0.0, 50.0, 100.0]
    axes = Figure().subplots()
    draw_experts(axes, VALUES["experts"])
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, 0.0, 1.0, 0.5, 2.0, 0.0, 0.25]


def test_bars_of_servers_are_the_routed_ones_over_the_dense_ones():
    axes = Figure().subplots()
    draw_serving(axes, VALUES["serving"])
    assert [bar.get_height() for bar in axes.patches] == [0.8, 0.85] * 3


def test_the_front_joins_what_nothing_beats():
    axes = Figure().subplots()
    draw_pareto(axes, VALUES["pareto"])
    assert list(axes.lines[0].get_ydata(orig=True)) == [61.3, 69.4, 69.7]
    axes = Figure().subplots()
    draw_pareto(axes, VALUES["pareto"] | {"less_is_better": True})
    assert list(axes.lines[0].get_ydata(orig=True)) == [61.3]


GRID = [
    {"name": "routed", "granularity": "attn_token", "capacity": 0.9, "loss_increase": 0.0, "average": 52.0},
    {"name": "routed", "granularity": "attn_token", "capacity": 0.5, "loss_increase": 0.3, "average_stderr": 2.0},
    {"name": "cosine", "granularity": "attn_token", "capacity": 0.5, "loss_increase": 0.8, "average": None},
]


def test_measurements_are_a_line_for_each_method(tmp_path):
    value = pareto_of(GRID, "capacity", "loss_increase")
    assert (value["x_label"], value["y_label"]) == ("capacity", "loss above dense")
    axes = Figure().subplots()
    draw_pareto(axes, value)
    assert axes.get_legend_handles_labels()[1] == ["routed", "cosine"]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert lines == [([0.5, 0.9], [0.3, 0.0]), ([0.5], [0.8])]
    more = pareto_of([*GRID, GRID[0] | {"granularity": "attn_sequence"}], "capacity", "average")
    assert [one["name"] for one in more["series"]] == ["attn_token, routed", "attn_sequence, routed"]
    with pytest.raises(UserError, match="no record has both speed and average"):
        pareto_of(GRID, "speed", "average")
    pixels = np.asarray(Image.open(save_figure("pareto", value, tmp_path / "f")[0]).convert("RGB")).astype(int)
    assert np.ptp(pixels, axis=-1).max() == 0


def test_panels_stand_side_by_side(tmp_path):
    paths = save_figure(
        "pareto", {"panels": [VALUES["pareto"], VALUES["pareto"] | {"y_label": "other"}]}, tmp_path / "f"
    )
    text = "".join(ElementTree.parse(paths[1]).getroot().itertext())
    assert text.count("speed") == 2
    assert "other" in text
    assert paths[0].stat().st_size < 100_000


def test_the_command_reads_what_other_commands_write_and_refuses_the_rest(tmp_path, repository, monkeypatch, capsys):
    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_code:
            runpy.run_path(str(repository / "entrypoints/evaluation/plot.py"), run_name="__main__")
        return exit_code.value.code, capsys.readouterr()

    (tmp_path / "results.json").write_text(
        json.dumps({"held_out": {"routed": {"eval_capacity/layer_3": 0.5, "eval_loss": 1.0}}})
    )
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (tmp_path / "empty.json").write_text("{}")
    for kind, name in (("layers", "results.json"), ("training", "trainer_state.json")):
        code, printed = start(kind, tmp_path / name, "--output", tmp_path / kind)
        assert code == 0, printed.err
        assert printed.out.splitlines() == [str(tmp_path / f"{kind}.png"), str(tmp_path / f"{kind}.svg")]
    (tmp_path / "grid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in GRID))
    code, printed = start("pareto", tmp_path / "grid.jsonl", "--y", "average", "--output", tmp_path / "grid")
    assert code == 0, printed.err
    assert "average (%)" in "".join(ElementTree.parse(tmp_path / "grid.svg").getroot().itertext())
    for kind in ("training", "series"):
        code, printed = start(kind, tmp_path / "empty.json", "--output", tmp_path / "x")
        assert code == 1
        assert f"not what {kind} is drawn from" in printed.err
        assert len(printed.err.splitlines()) == 1
    code, printed = start("layers", tmp_path / "nowhere.json", "--output", tmp_path / "x")
    assert code == 1
    assert "nowhere.json" in printed.err
    assert not list(tmp_path.glob("x*"))


def test_experts_of_an_evaluation_are_summed_over_its_tasks():
    tasks = [{"3": {"assigned": [1, 2], "executed": [1, 0]}, "4": {"assigned": [9, 9], "executed": [9, 9]}}] * 2
    evaluation = {"rows": {"routed": {str(n): {"capacity": {"experts": task}} for n, task in enumerate(tasks)}}}
    assert read_figure("experts", [("e", evaluation)]) == {"assigned": [2, 4], "executed": [2, 0]}
    assert read_figure("experts", [("e", evaluation)], layer=4)["executed"] == [18, 18]
    with pytest.raises(UserError, match="layer 7 routes no experts; those that do are 3, 4"):
        read_figure("experts", [("e", evaluation)], layer=7)


def test_a_log_without_loss_is_refused(tmp_path):
    with pytest.raises(UserError, match="no task_loss and capacity"):
        save_figure("training", {"run": [{"step": 1}]}, tmp_path / "x")
