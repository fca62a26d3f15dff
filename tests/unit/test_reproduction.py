"""Plans of the paper's tables: what a step is, when it is done, and what is collected of it."""

import json
import runpy
import shutil
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from utils.evaluation.plots import save_figure
from utils.evaluation.reproduction import Changes, Plan, Run, Step, make_plan, run_plan, run_step, unique_steps, varied
from utils.evaluation.results_table import SEED, collect, figure_of, markdown
from utils.io.errors import UserError
from utils.model.configuration_mod import MoDSettings
from utils.model.costs import capacity_to_skip
from utils.pipeline.arguments import RECIPES

CONFIGS = Path(__file__).resolve().parents[2] / "configs/reproduce"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "scales")

FRONTIER_RANDOM = "random target_skipped=0.4 seed=2"


def plan_of(name, scale, tmp_path, **options):
    return make_plan(name, scale, CONFIGS, tmp_path, **options)


def test_every_table_and_figure_has_a_config_and_a_script(repository):
    expected = {f"table{n}" for n in (2, 3, 5, 6, 7, 8)} | {f"figure{n}" for n in range(2, 9)} | {"grid", "frontier"}
    assert set(NAMES) == expected
    assert {path.stem for path in (repository / "scripts/reproduce").glob("*.sh")} == expected | {"all"}


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_planned_or_named_as_left_out(name, scale, tmp_path):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    plan = plan_of(name, scale, tmp_path)
    models = config.get("models", {}).get(scale, [None])
    names = [run["name"] for entry in config["runs"] for run in varied(entry)]
    names = list(dict.fromkeys(" ".join(filter(None, (model, run))) for model in models for run in names))
    assert sorted([*(run.name for run in plan.runs), *plan.left_out]) == sorted(names)
    assert len({step.makes for step in plan.steps}) == len(plan.steps)
    for run in plan.runs:
        kinds = [step.kind for step in run.steps]
        assert kinds[:2] == ["data", "build"]
        assert kinds[3:] == run.entry.get("measure", config["measure"])
        for step in run.steps:
            if step.kind == "train":
                assert step.environment["OUTPUT_DIR"] == str(run.folder / "checkpoint")
                assert step.environment["FOLDER_NAME"].startswith("smollm2-") or scale == "paper"
            if step.kind in ("train", "baseline"):
                assert str(run.steps[0].makes) in step.text  # it trains on the rows that were made for it
        assert " " not in str(run.folder.relative_to(tmp_path))


def plan_all(scale, tmp_path, **options):
    return {name: plan_of(name, scale, tmp_path, **options) for name in NAMES}


def test_what_tables_have_in_common_is_done_once(tmp_path):
    plans = plan_all("small", tmp_path)
    folders = {(name, run.name): run.folder for name, plan in plans.items() for run in plan.runs}
    shared = [
        *(("table2", "attn_sequence"), ("table5", "smollm2-135m"), ("table6", "alpaca"), ("table8", "routers")),
        *(("figure3", "routed 50%"), ("figure4", "attn_sequence"), ("figure5", "14 layers"), ("figure7", "300")),
        ("figure6", "smollm2, 14 layers"),
    ]
    assert len({folders[key] for key in shared}) == 1
    assert folders["table2", "mlp_token"] == folders["table3", "router_tuning"]
    assert folders["table7", "smollm2_moe"] == folders["figure8", "smollm2_moe"]
    assert folders["figure2", "routed"] == folders["figure3", "routed 25%"]
    steps = unique_steps(list(plans.values()))
    assert len({step.text for step in steps}) == len(steps)
    # one folder is one training, in whatever words it is described
    for scale in ("small", "paper"):
        made = {}
        for plan in plan_all(scale, tmp_path).values():
            for step in plan.steps:
                assert made.setdefault(step.makes, step.text) == step.text


def test_another_training_or_number_format_is_another_folder(tmp_path):
    changes = [Changes(), Changes(dtype="bfloat16"), Changes(dtype="float32"), Changes(max_train_samples=8)]
    for name, run in (("table2", "mlp_token"), ("table7", "smollm2_moe_expert_drop")):
        folders = [plan_of(name, "small", tmp_path, only=[run], changes=change).runs[0].folder for change in changes]
        assert len(set(folders)) == (4 if name == "table2" else 3)  # no rows train the drop of experts
    measured_on = [Changes(), Changes(limit=3)]
    plans = [plan_of("table2", "small", tmp_path, only=["mlp_token"], changes=change) for change in measured_on]
    assert plans[0].runs[0].folder == plans[1].runs[0].folder


def test_rows_items_and_data_can_be_set_for_all_runs(tmp_path):
    changes = Changes(max_train_samples=8, limit=3, data_dir=Path("/d"), dtype="bfloat16")
    plan = plan_of("table2", "small", tmp_path, only=["mlp_token"], changes=changes)
    train, evaluate, benchmark = (step for step in plan.steps if step.kind in ("train", "evaluate", "benchmark"))
    assert train.environment["MAX_TRAIN_SAMPLES"] == "8"
    assert train.environment["GRANULARITY"] == "mlp_token"
    assert evaluate.text.endswith("--dtype bfloat16 --limit 3 --data_dir /d")
    assert all(step.text.count("--dtype bfloat16") == 1 for step in (train, evaluate, benchmark))
    assert len(plan.left_out) == 5
    made_with = " In bfloat16. This one was made with 8 rows and 3 items of each task only."
    assert made_with in collect(plan)["scale"]


@pytest.mark.parametrize(
    ("name", "scale", "run"),
    [
        *(("figure2", "small", "layer_drop"), ("table3", "paper", "random"), ("table7", "paper", "olmoe_expert_drop")),
        *(("frontier", "small", "greedy_linear target_skipped=0.2"), ("frontier", "small", FRONTIER_RANDOM)),
    ],
)
def test_a_baseline_is_made_by_a_command_that_takes_its_arguments(name, scale, run, tmp_path, repository, monkeypatch):
    plan = plan_of(name, scale, tmp_path, only=[run])
    (step,) = (step for step in plan.steps if step.kind == "baseline")
    _, script, *arguments = step.command
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parsed = runpy.run_path(str(repository / script))["parse_arguments"]()
    assert Path(parsed.output_dir) == step.makes.parent
    wanted = step_environment(plan, run)
    if name == "frontier":
        assert (parsed.capacity, parsed.skipped, parsed.substitute) == (None, wanted["TARGET_SKIPPED"], "linear")
    else:
        assert (parsed.capacity, parsed.substitute) == (float(wanted.get("TARGET_CAPACITY", 0.5)), "none")


def step_environment(plan, run):
    """What a training of this run would be set to."""
    (chosen,) = (one for one in plan.runs if one.name == run)
    return plan.config.get("environment", {}) | chosen.entry.get("environment", {})


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
    return Step("train", (sys.executable, "-c", code), tmp_path / "run" / makes, 1)


def plan_of_steps(tmp_path, *steps):
    """One run for each step."""
    runs = tuple(Run(f"run{number}", {}, tmp_path, (step,)) for number, step in enumerate(steps))
    return Plan("table2", {}, "", "", runs, (), tmp_path)


def test_a_step_is_done_once_and_never_passes_for_another(tmp_path):
    code = "open('run/made.txt', 'a').write('x')"
    said = []
    for _ in range(2):
        plan = plan_of_steps(tmp_path, python_step(tmp_path, code))
        assert run_plan(plan, tmp_path, {}, {}, said.append) == []
    assert (tmp_path / "run/made.txt").read_text() == "x"
    assert [text.split(": ")[1][:11] for text in said] == ["about 1 min", "done before"]
    changed = python_step(tmp_path, code)
    record = json.loads(changed.record.read_text())
    assert record["code"] == changed.code
    changed.record.write_text(json.dumps(record | {"code": "another"}))
    with pytest.raises(UserError, match="was made by other code"):
        run_plan(plan_of_steps(tmp_path, changed), tmp_path, {}, {}, said.append)
    with pytest.raises(UserError, match="was made by another command"):
        python_step(tmp_path, code + " # changed").is_done()


def test_two_reproductions_at_once_do_a_step_once(tmp_path):
    code = "import time; time.sleep(0.5); open('run/made.txt', 'a').write('x')"
    said = []

    def reproduce():
        run_plan(plan_of_steps(tmp_path, python_step(tmp_path, code)), tmp_path, {}, {}, said.append)

    both = [threading.Thread(target=reproduce) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert (tmp_path / "run/made.txt").read_text() == "x"
    assert sorted(text.split(": ")[1][:11] for text in said) == ["about 1 min", "done before", "waiting for"]


def test_a_failed_run_stops_no_other_and_is_not_tried_again(tmp_path):
    bad = python_step(tmp_path, "open('tried', 'a').write('x'); raise SystemExit(3)", makes="bad.txt")
    good = python_step(tmp_path, "open('run/made.txt', 'w')")
    plan = plan_of_steps(tmp_path, bad, good, bad)
    failed = {}
    assert run_plan(plan, tmp_path, {}, failed, print) == ["run0", "run2"]
    assert run_plan(plan, tmp_path, {}, failed, print) == ["run0", "run2"]
    assert list(failed) == [bad.makes]
    assert "failed with exit code 3" in failed[bad.makes]
    assert (tmp_path / "tried").read_text() == "x"
    assert good.makes.exists()


def test_a_step_is_given_the_machines_variables_and_no_exported_setting_of_a_training(tmp_path):
    made = tmp_path / "made"
    show = f"import json, os; open({str(made)!r}, 'w').write(json.dumps(dict(os.environ)))"
    step = Step("train", (sys.executable, "-c", show), made, 1.0, {"SEED": "3"})
    run_step(step, tmp_path, {"TARGET_CAPACITY": "0.3", "SEED": "4", "NUM_PROCESSES": "2"})
    seen = json.loads(made.read_text())
    assert (seen["SEED"], seen["NUM_PROCESSES"]) == ("3", "2")
    assert "TARGET_CAPACITY" not in seen


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "pass"])
def test_a_step_that_fails_or_makes_nothing_is_an_error(code, tmp_path):
    step = python_step(tmp_path, code)
    with pytest.raises(UserError, match="failed with exit code"):
        run_step(step, tmp_path, {})
    assert not step.is_done()


USE = {
    "agreement": {"mean": 0.75, "stderr": 0.02},
    "executed": {"mean": 0.5, "stderr": None},
    "foreign": {"mean": 0.25, "stderr": 0.0625},
    "prompts": 39,
    "max_new_tokens": 40,
}


def write_files(folder, loss, piqa, seconds, **report):
    """What the three commands leave behind."""
    files = {
        "checkpoint/results.json": {
            "held_out": {
                "dense": {"dense_loss": 1.5},
                "routed": {"eval_loss": loss, "eval_capacity": 0.5, "eval_capacity/layer_3": 0.5},
            },
            **report,
        },
        "evaluation.json": {
            "rows": {"dense": {"piqa": {"value": 0.7}}, "routed": {"piqa": {"value": piqa}}},
            "averages": {
                "dense": [
                    {"name": "average", "value": 0.7, "stderr": 0.02},
                    {"name": "without RTE", "value": 0.7, "stderr": None},
                ],
                "routed": [{"name": "average", "value": piqa, "stderr": 0.02}, None],
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
    routed, token = plan.runs
    write_files(routed.folder, loss=1.6, piqa=0.65, seconds=1.6)
    write_files(token.folder, loss=1.7, piqa=0.6, seconds=1.0)
    result = collect(plan, failed=["mlp_token"])
    first, second = result["rows"]
    assert first["ours"]["speed"] == 1.25
    assert first["ours"]["kv_saved"] == 25
    assert second["ours"]["average"] == 60
    assert result["dense"]["ours"] == {
        **{"loss": 1.5, "capacity": 1.0, "piqa": 70.0, "average": 70.0, "average_stderr": 2.0, "without_rte": 70.0},
        **{"speed": 1.0, "kv_saved": 0.0},
    }
    lines = markdown(result, "bash x.sh").splitlines()
    head = "average (%), ours | average (%), paper | speed, ours | speed, paper | capacity, ours | held-out loss, ours"
    assert f"|  | {head} |" in lines  # the paper has no capacity and no loss
    assert "| attn_sequence | 65.0 ± 2.0 | 69.4 | 1.25x | 1.21x | 0.500 | 1.600 |" in lines
    assert "| dense | 70.0 ± 2.0 | 69.7 | 1.00x | 1.00x | 1.000 | 1.500 |" in lines
    assert lines[4].startswith("Made by `bash x.sh`; seed 233; torch ")
    assert lines[-3].startswith("Not made here: attn_token")
    assert lines[-1] == "**Failed**: mlp_token."
    kind, value = figure_of(plan, result)
    assert kind == "pareto"
    loss, average = value["panels"]
    assert (loss["less_is_better"], average["less_is_better"]) == (True, False)
    assert {point["name"]: (point["x"], point["y"]) for point in loss["points"]} == {
        **{"attn_sequence": (1.25, 1.6), "mlp_token": (2.0, 1.7), "dense": (1.0, 1.5)},
    }
    assert {point["name"]: (point["y"], point["stderr"]) for point in average["points"]} == {
        **{"attn_sequence": (65.0, 2.0), "mlp_token": (60.0, 2.0), "dense": (70.0, 2.0)},
    }


def test_figures_of_use_have_columns_where_a_run_has_them(tmp_path):
    plan = plan_of("table2", "small", tmp_path, only=["attn_sequence", "mlp_token"])
    write_files(plan.runs[0].folder, loss=1.6, piqa=0.65, seconds=1.6, use=USE)
    write_files(plan.runs[1].folder, loss=1.7, piqa=0.6, seconds=1.0)
    lines = markdown(collect(plan), "bash x.sh").splitlines()
    head = "| agreement, ours | executed in use, ours | foreign (nats a token), ours |"
    assert any(line.startswith("|  | ") and line.endswith(head) for line in lines)
    ends = {line.split(" | ")[0]: line.split(" | ")[-3:] for line in lines if line.startswith("| ")}
    assert ends["| attn_sequence"] == ["0.750 ± 0.020", "0.500", "0.250 ± 0.062 |"]
    assert ends["| mlp_token"] == ["-", "-", "- |"]
    assert ends["| dense"] == ["1.000", "1.000", "0.000 |"]
    grid = plan_of("grid", "small", tmp_path, only=["task_loss"])
    write_files(grid.runs[0].folder, loss=1.8, piqa=0.6, seconds=1.0, use=USE)
    table = markdown(collect(grid), "bash x.sh")
    assert "| agreement | executed in use | foreign (nats) |" in table
    assert "| 0.750 | 0.500 | 0.25 |" in table


def frontier_results(folder, loss, skipped, forward, agreement=0.9, at=()):
    """What a training or a baseline leaves behind that the frontier reads; `at` is further capacities."""

    def of(loss, skipped, agreement):
        use = {
            name: {"mean": value, "stderr": 0.01} for name, value in (("agreement", agreement), ("skipped", skipped))
        }
        routed = {"eval_loss": loss, "eval_capacity": 1 - skipped, "eval_skipped": skipped}
        return {"held_out": {"dense": {"dense_loss": 2.0}, "routed": routed}, "use": use}

    result = of(loss, skipped, agreement)
    result["forward_tokens_per_second"] = {"dense": 100.0, "routed": 100.0 * forward, "ratio": forward}
    result["capacities"] = {}
    for capacity, (other_loss, other_skipped, ratio) in dict(at).items():
        other = of(other_loss, other_skipped, agreement)
        result["capacities"][str(capacity)] = {
            "held_out": other["held_out"]["routed"],
            "use": other["use"],
            "forward_ratio": ratio,
        }
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint/results.json").write_text(json.dumps(result))


FRONTIER_ROUTED = [f"routed granularity=attn_mlp_token target_skipped=0.2 seed={seed}" for seed in (233, 1)]


def test_the_frontier_has_a_row_for_each_share_and_puts_seeds_together(tmp_path, repository):
    plan = plan_of("frontier", "small", tmp_path, only=[*FRONTIER_ROUTED, "greedy target_skipped=0.2"])
    static, *routed = plan.runs
    config = json.loads((repository / "ckpt/smollm2-135m-mod/config.json").read_text())
    config["mod"] |= {"granularity": "attn_mlp_token"}
    settings = MoDSettings.from_dict(config["mod"])
    shares = routed[0].entry["skipped"]
    capacities = {share: capacity_to_skip(config, settings, share) for share in shares}
    for run, above in zip(routed, (0.1, 0.3), strict=True):
        (trained,) = (step for step in run.steps if step.kind == "train")
        assert trained.environment["TARGET_SKIPPED"] == "0.2"
        assert "TARGET_CAPACITY" not in trained.environment
        assert trained.text.count("--skipped 0.05 0.1 0.15 0.25 0.4") == 1
        at = {capacities[share]: (2.0 + above * share, share, 1 + share) for share in shares}
        frontier_results(run.folder, 2.0 + 0.2 * above, 0.2, 1.2, at=at)
        (run.folder / "checkpoint/config.json").write_text(json.dumps(config))
    frontier_results(static.folder, 2.3, 0.3, 1.25, agreement=0.5)
    result = collect(plan)
    assert len(result["rows"]) == 1 + 2 * 6
    table = markdown(result, "bash x.sh")
    assert "| routed attn_mlp_token | 0.1 | 2 | 0.100 ± 0.000 | 0.100 ± 0.000 | 0.020 ± 0.010 |" in table
    assert "| greedy | 0.2 | 1 | 0.300 | 0.300 | 0.300 |" in table
    # at equal parameters, between the dense model and what was measured
    assert "| greedy | 0.050 | 0.100 | 0.150 | 0.200 | 0.250 | - |" in table
    assert "| routed attn_mlp_token | 0.010 ± 0.005 | 0.020 ± 0.010 |" in table
    assert "| greedy | 0.060 | 0.120 | 0.240 |" in table  # at equal time
    assert "| SkipGPT, with adapters | 26.9% | 100.2% | arXiv 2506.04179, Llama-3.1-8B |" in table
    kind, value = figure_of(plan, result)
    assert [(panel["x_label"], panel["y_label"]) for panel in value["panels"]] == [
        ("parameters skipped", "loss above dense"),
        ("skipped in use", "agreement"),
        ("forward speed (dense is 1)", "loss above dense"),
    ]
    points = {one["name"]: one["points"] for one in value["panels"][0]["series"]}["routed attn_mlp_token"]
    assert len(points) == 6
    assert points[-1]["stderr"] == pytest.approx(0.4 * 0.1)
    save_figure(kind, value, tmp_path / "figure", title=plan.config["title"])
    assert (tmp_path / "figure.png").exists()


def test_a_share_that_a_run_was_not_calibrated_for_is_named(tmp_path, repository):
    plan = plan_of("frontier", "small", tmp_path, only=FRONTIER_ROUTED[:1])
    (run,) = plan.runs
    frontier_results(run.folder, 2.1, 0.2, 1.2)
    shutil.copy(repository / "ckpt/smollm2-135m-mod/config.json", run.folder / "checkpoint")
    with pytest.raises(UserError, match=r"not calibrated for 0\.05 skipped"):
        collect(plan)


def test_at_the_papers_scale_the_frontier_is_of_two_models(tmp_path):
    plan = plan_of("frontier", "paper", tmp_path)
    assert {run.entry["model_name"] for run in plan.runs} == {"llama-3.1-8b", "mistral-7b"}
    for run in plan.runs:
        build = next(step for step in run.steps if step.kind == "build").text
        assert ("meta-llama/Llama-3.1-8B" in build) is run.name.startswith("llama-3.1-8b ")
        if run.entry["kind"] == "routed":
            assert [step.kind for step in run.steps[3:]] == ["evaluate", "benchmark"]


def test_several_runs_at_a_time_do_each_step_once(tmp_path):
    shared = python_step(tmp_path, "import time; time.sleep(0.3); open('run/made.txt', 'a').write('x')")
    bad = python_step(tmp_path, "raise SystemExit(3)", makes="bad.txt")
    plan = plan_of_steps(tmp_path, shared, bad, shared)
    assert run_plan(plan, tmp_path, {}, {}, lambda text: None, jobs=2) == ["run1"]
    assert (tmp_path / "run/made.txt").read_text() == "x"


def test_an_adapted_model_without_its_routing_is_not_the_dense_base(tmp_path):
    plan = plan_of("table8", "small", tmp_path)
    for run, loss in zip(plan.runs, (1.6, 1.3, 1.4), strict=True):
        write_files(run.folder, loss=loss, piqa=0.65, seconds=1.6)
        if "lora" in run.name:
            (run.folder / "checkpoint/adapter_config.json").write_text("{}")
    result = collect(plan)
    assert [row["ours"].get("loss_increase") for row in result["rows"]] == [pytest.approx(0.1), None, None]
    assert result["dense"]["ours"]["loss"] == 1.5
    alone = collect(plan_of("table8", "small", tmp_path, only=["lora"]))
    assert alone["dense"]["ours"] == {}


def test_rows_of_the_sample_are_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collect(plan_of("table2", "small", tmp_path))["scale"].endswith("Trained on the embedded sample.")
    (tmp_path / "data/reformatted/alpaca").mkdir(parents=True)
    plan = plan_of("table2", "small", tmp_path)
    assert "embedded sample" not in collect(plan)["scale"]
    assert plan.steps[0].makes == Path("data/reformatted/alpaca/data.jsonl")


def test_what_is_written_is_small_and_names_no_path_of_the_machine(tmp_path, repository, monkeypatch):
    arguments = ["table2", "--scale", "small", "--limit", "3", "--data_dir", str(tmp_path / "items")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    program = runpy.run_path(str(repository / "entrypoints/evaluation/reproduce.py"))
    plan = plan_of("table2", "small", tmp_path)
    for number, run in enumerate(plan.runs):
        write_files(run.folder, loss=1.6 + number / 10, piqa=0.65, seconds=1.6 + number / 5)
    table = program["write"](plan, [], tmp_path / "kept", program["parse_arguments"]())
    assert "Made by `bash scripts/reproduce/table2.sh --scale small --limit 3 --data_dir FOLDER`" in table
    assert "![figure](figure.png)" in table
    files = {path.name: path for path in (tmp_path / "kept").iterdir()}
    assert files.keys() == {"table.md", "result.json", "figure.json", "figure.png", "figure.svg"}
    assert all(path.stat().st_size < 100_000 for path in files.values())
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in files.values())


def test_the_seed_that_a_table_names_is_the_one_of_its_runs(tmp_path, repository):
    assert f'SEED="${{SEED:-{SEED}}}"' in (repository / "scripts/finetune_mod.sh").read_text()
    for scale in ("small", "paper"):
        for name, plan in plan_all(scale, tmp_path).items():
            assert name in ("grid", "frontier") or not any(
                "SEED=" in step.text or "--seed" in step.text for step in plan.steps
            )


def test_figures_of_layers_and_series(tmp_path):
    plan = plan_of("figure4", "small", tmp_path)
    write_files(plan.runs[0].folder, loss=1.6, piqa=0.65, seconds=1.6)
    assert figure_of(plan, collect(plan)) == ("layers", {"attn_sequence": {"3": 0.5}})
    plan = plan_of("figure3", "small", tmp_path / "empty")
    assert figure_of(plan, collect(plan)) is None
    for number, run in enumerate(plan.runs):
        write_files(run.folder, loss=1.6 + number, piqa=0.65, seconds=1.6)
    kind, value = figure_of(plan, collect(plan))
    assert kind == "pareto"
    loss, average = value["panels"]
    assert [(one["name"], [(point["x"], point["y"]) for point in one["points"]]) for one in loss["series"]] == [
        ("routed", [(0.5, 1.6), (0.5, 2.6), (0.5, 3.6)]),  # over the capacity that was reached
        ("dropped", [(0.5, 4.6), (0.5, 5.6), (0.5, 6.6)]),
        ("dense", [(1.0, 1.5)]),
    ]
    assert {point["stderr"] for one in average["series"] for point in one["points"]} == {2.0}
    plan = plan_of("figure6", "small", tmp_path / "layers")
    for run in plan.runs:
        write_files(run.folder, loss=1.6, piqa=0.65, seconds=1.6)
    kind, value = figure_of(plan, collect(plan))
    assert kind == "series"
    assert [(one["name"], one["x"]) for one in value["series"]] == [("smollm2", [4, 14, 24])]


def test_a_grid_has_a_run_for_each_choice(tmp_path):
    plan = plan_of("grid", "small", tmp_path)
    assert len({run.folder for run in plan.runs}) == len(plan.runs)
    by_name = {run.name: run for run in plan.runs}
    train = by_name["routed granularity=attn_token target_capacity=0.9 seed=2"].steps[-1]
    wanted = {"GRANULARITY": "attn_token", "TARGET_CAPACITY": "0.9", "SEED": "2"}
    assert wanted.items() <= train.environment.items()
    assert "published_corner learning_rate=1e-5 gradient_scale=0" in by_name
    # tables and the grid share runs
    table = plan_of("table2", "small", tmp_path, only=["attn_token"])
    assert table.runs[0].folder == by_name["routed granularity=attn_token target_capacity=0.5"].folder


def test_a_grid_compares_its_runs_and_writes_them_line_by_line(tmp_path):
    names = ["routed granularity=attn_token target_capacity=0.75", "cosine target_capacity=0.75", "task_loss"]
    plan = plan_of("grid", "small", tmp_path, only=names)
    for run, loss in zip(plan.runs, (1.6, 2.0, 1.8), strict=True):
        write_files(run.folder, loss=loss, piqa=0.6, seconds=1.0)
    result = collect(plan)
    assert [line["loss_increase"] for line in result["lines"]] == pytest.approx([0.1, 0.5, 0.3])
    table = markdown(result, "the command")
    assert (
        "| `attn_token` | task_loss | --distillation_weight 0 | 0.75 | 1 | 0.500 | +0.300 | 0.60 | 60.0 | -10.0 |"
        in table
    )
    assert "| `attn_token` | routed |  | 0.75 | 1 | 0.500 | +0.100 | 0.20 | 60.0 | -10.0 |" in table
    kind, value = figure_of(plan, result)
    save_figure(kind, value, tmp_path / "figure")
    assert [panel["y_label"] for panel in value["panels"]] == ["loss above dense", "average (%)"]


def test_a_baseline_has_the_seed_that_is_asked_for(tmp_path):
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "scales.yaml").write_text((CONFIGS / "scales.yaml").read_text())
    run = {
        "name": "random",
        "baseline": "random",
        "environment": {"GRANULARITY": "attn_token"},
        "vary": {"SEED": [1, 2]},
    }
    (configs / "one.yaml").write_text(yaml.safe_dump({"title": "", "metrics": [], "measure": [], "runs": [run]}))
    runs = make_plan("one", "small", configs, tmp_path).runs
    assert ["--seed 1" in runs[0].steps[-1].text, "--seed 2" in runs[1].steps[-1].text] == [True, True]
    assert runs[0].folder != runs[1].folder
