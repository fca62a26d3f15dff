"""Plans of the paper's tables: what a step is, when it is done, and what is collected of it."""

import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from utils.evaluation.reproduction import Step, collect, figure_of, make_plan, markdown, run_folder, run_plan, run_step
from utils.io.errors import UserError
from utils.pipeline.arguments import RECIPES

CONFIGS = Path(__file__).resolve().parents[2] / "configs/reproduce"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "scales")


def plan_of(name, scale, tmp_path, **options):
    return make_plan(name, scale, CONFIGS, tmp_path, **options)


def test_every_table_and_figure_has_a_config_and_a_script(repository):
    expected = {f"table{n}" for n in (2, 3, 5, 6, 7, 8)} | {f"figure{n}" for n in range(2, 9)}
    assert set(NAMES) == expected
    assert {path.stem for path in (repository / "scripts/reproduce").glob("*.sh")} == expected


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_planned_or_named_as_left_out(name, scale, tmp_path):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    plan = plan_of(name, scale, tmp_path)
    names = [run["name"] for run in config["runs"]]
    assert [run["name"] for run in plan.runs] + plan.left_out == sorted(
        names, key=lambda run: (run in plan.left_out, names.index(run))
    )
    assert len({step.makes for step in plan.steps}) == len(plan.steps)
    for run in plan.runs:
        kinds = {step.kind for step in plan.steps if step.run == run["name"]}
        assert kinds & {"train", "baseline"} or (not kinds and run["paper_only"])
    for step in plan.steps:
        if step.kind == "train":
            assert step.environment["OUTPUT_DIR"].startswith(str(tmp_path / name / scale))
            assert " " not in step.environment["OUTPUT_DIR"]
            assert step.environment["FOLDER_NAME"].startswith("smollm2-") or scale == "paper"


def test_rows_items_and_data_can_be_set_for_all_runs(tmp_path):
    plan = plan_of("table2", "small", tmp_path, only=["mlp_token"], max_train_samples=8, limit=3, data_dir=Path("/d"))
    train, evaluate = (step for step in plan.steps if step.kind in ("train", "evaluate"))
    assert train.environment["MAX_TRAIN_SAMPLES"] == "8"
    assert train.environment["GRANULARITY"] == "mlp_token"
    assert evaluate.text.endswith("--limit 3 --data_dir /d")
    assert len(plan.left_out) == 5
    assert collect(plan)["scale"].endswith("This one was made with 8 rows and 3 items of each task only.")


@pytest.mark.parametrize(
    ("name", "scale", "run"),
    [("figure2", "small", "layer_drop"), ("table3", "paper", "random"), ("table7", "paper", "olmoe_expert_drop")],
)
def test_a_baseline_is_made_by_a_command_that_takes_its_arguments(name, scale, run, tmp_path, repository, monkeypatch):
    plan = plan_of(name, scale, tmp_path, only=[run])
    (step,) = (step for step in plan.steps if step.kind == "baseline")
    _, script, *arguments = step.command
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parsed = runpy.run_path(str(repository / script))["parse_arguments"]()
    assert Path(parsed.output_dir) == step.makes.parent
    share = parsed.share if name == "table7" else 1 - parsed.capacity
    assert share == 1 - float(step_environment(plan, run).get("TARGET_CAPACITY", 0.5))


def step_environment(plan, run):
    """What a training of this run would be set to."""
    (chosen,) = (one for one in plan.runs if one["name"] == run)
    return plan.config.get("environment", {}) | chosen.get("environment", {})


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_one_that_a_training_knows(name):
    for run in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["runs"]:
        given = run.get("train_arguments", [])
        assert all(recipe in RECIPES for option, recipe in pairwise(given) if option == "--recipe")


@pytest.mark.parametrize(
    ("name", "runs", "message"),
    [("tabel2", [], "did you mean 'table2'"), ("table2", ["mlp_tokn"], "did you mean 'mlp_token'")],
)
def test_unknown_names_suggest_the_nearest(name, runs, message, tmp_path):
    with pytest.raises(UserError, match=message):
        plan_of(name, "small", tmp_path, only=runs)


def python_step(tmp_path, code, makes="made.txt"):
    return Step("run", "train", (sys.executable, "-c", code), tmp_path / "run" / makes, 1)


def test_a_step_is_done_once_and_never_passes_for_another(tmp_path):
    code = "open('run/made.txt', 'a').write('x')"
    plan = plan_of("table2", "small", tmp_path)
    said = []
    for _ in range(2):
        run_plan(
            type(plan)(plan.config, plan.scale, [], [], [python_step(tmp_path, code)], tmp_path),
            *(tmp_path, {}, said.append),
        )
    assert (tmp_path / "run/made.txt").read_text() == "x"
    assert [text.split(": ")[1][:11] for text in said] == ["about 1 min", "done before"]
    with pytest.raises(UserError, match="was made by another command"):
        python_step(tmp_path, code + " # changed").is_done()


def test_a_step_is_given_the_machines_variables_and_no_exported_setting_of_a_training(tmp_path):
    made = tmp_path / "made"
    show = f"import json, os; open({str(made)!r}, 'w').write(json.dumps(dict(os.environ)))"
    step = Step("a", "train", (sys.executable, "-c", show), made, 1.0, {"SEED": "3"})
    run_step(step, tmp_path, {"TARGET_CAPACITY": "0.3", "SEED": "4", "NUM_PROCESSES": "2"})
    seen = json.loads(made.read_text())
    assert (seen["SEED"], seen["NUM_PROCESSES"]) == ("3", "2")
    assert "TARGET_CAPACITY" not in seen


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "pass"])
def test_a_step_that_fails_or_makes_nothing_is_an_error(code, tmp_path):
    step = python_step(tmp_path, code)
    with pytest.raises(UserError, match="run, train: failed"):
        run_step(step, tmp_path, {})
    assert not step.is_done()


def write_files(folder, loss, piqa, seconds):
    """What the three commands leave behind."""
    files = {
        "checkpoint/results.json": {
            "held_out": {
                "dense": {"dense_loss": 1.5},
                "routed": {"eval_loss": loss, "eval_capacity": 0.5, "eval_capacity/layer_3": 0.5},
            }
        },
        "evaluation.json": {
            "rows": {"dense": {"piqa": {"value": 0.7}}, "routed": {"piqa": {"value": piqa}}},
            "averages": {
                "dense": [{"name": "average", "value": 0.7}, {"name": "without RTE", "value": 0.7}],
                "routed": [{"name": "average", "value": piqa}, None],
            },
        },
        "benchmark.json": {
            "cells": [
                {
                    "columns": {
                        name: {
                            "kv_bytes": kv,
                            "prefill": {"seconds": {"median": time}},
                            "decode": {"seconds": {"median": time}},
                        }
                        for name, kv, time in (("dense", 100, 2.0), ("tuned", 75, seconds))
                    }
                }
            ]
        },
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))


def test_what_is_collected_stands_beside_the_papers(tmp_path):
    plan = plan_of("table2", "small", tmp_path, only=["attn_sequence", "mlp_token"])
    write_files(plan.folder / "attn_sequence", loss=1.6, piqa=0.65, seconds=1.6)
    write_files(plan.folder / "mlp_token", loss=1.7, piqa=0.6, seconds=1.0)
    result = collect(plan)
    first, second = result["rows"]
    assert first["ours"]["speed"] == 1.25
    assert first["ours"]["kv_saved"] == 25
    assert second["ours"]["average"] == 60
    assert result["dense"]["ours"] == {
        **{"loss": 1.5, "capacity": 1.0, "piqa": 70.0, "average": 70.0, "without_rte": 70.0},
        **{"speed": 1.0, "kv_saved": 0.0},
    }
    lines = markdown(result, "bash x.sh").splitlines()
    assert "| attn_sequence | 65.0 | 69.4 | 1.25x | 1.21x | 0.500 | - | 1.600 | - |" in lines
    assert "| dense | 70.0 | 69.7 | 1.00x | 1.00x | 1.000 | - | 1.500 | - |" in lines
    assert "Made by `bash x.sh`." in lines[2]
    assert lines[-1].startswith("Not at this scale: attn_token")
    kind, value = figure_of(plan, result)
    assert kind == "pareto"
    assert value["less_is_better"]
    assert {point["name"]: (point["x"], point["y"]) for point in value["points"]} == {
        **{"attn_sequence": (1.25, 1.6), "mlp_token": (2.0, 1.7), "dense": (1.0, 1.5)},
    }


def test_without_held_out_rows_capacity_is_the_evaluations(tmp_path):
    plan = plan_of("table7", "small", tmp_path, only=["smollm2_moe_expert_drop"])
    rows = {"piqa": {"value": 0.6, "capacity": {"capacity": 0.7}}, "rte": {"value": 0.5, "capacity": {"capacity": 0.8}}}
    folder = plan.folder / "smollm2_moe_expert_drop"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"rows": {"routed": rows}, "averages": {}}))
    (row,) = collect(plan)["rows"]
    assert row["ours"]["capacity"] == pytest.approx(0.75)
    assert "loss" not in row["ours"]


def test_what_only_the_paper_has_is_said_to_be_so(tmp_path):
    plan = plan_of("table3", "small", tmp_path)
    lines = markdown(collect(plan), "bash x.sh").splitlines()
    assert "| dlo | - | 60.5 | - | - | - | - |" in lines
    assert lines[-1].endswith("no code for it here: dlo, skip_transformer.")


def test_figures_of_layers_and_series(tmp_path):
    plan = plan_of("figure4", "small", tmp_path)
    write_files(plan.folder / "attn_sequence", loss=1.6, piqa=0.65, seconds=1.6)
    assert figure_of(plan, collect(plan)) == ("layers", {"attn_sequence": {"3": 0.5}})
    plan = plan_of("figure3", "small", tmp_path)
    assert figure_of(plan, collect(plan)) is None
    for number, run in enumerate(plan.runs):
        write_files(run_folder(plan.folder, run["name"]), loss=1.6 + number, piqa=0.65, seconds=1.6)
    kind, value = figure_of(plan, collect(plan))
    assert kind == "series"
    assert [(one["name"], one["x"]) for one in value["series"]] == [
        ("routed", [0.125, 0.25, 0.5]),
        ("dropped", [0.125, 0.25, 0.5]),
    ]
    assert value["dense"] == 1.5
