"""A checkpoint with substitutes that was calibrated for several capacities, as every command that runs it takes it."""

import json
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from lm_eval.api.registry import get_model

from utils.evaluation.harness import identify_base, identify_routing
from utils.evaluation.lm_eval_model import MoDLM, choose_pool
from utils.io.errors import UserError
from utils.model.checkpoint import read_settings, write_checkpoint
from utils.model.configuration_mod import MoDSettings

LAYERS = (2, 3, 4)
COMMANDS = {
    "generate": ("inference/generate.py", "--prompt", "Hi", "--max_new_tokens", 2),
    "use": ("evaluation/use.py", "--max_prompts", 2, "--max_new_tokens", 3),
    "benchmark": ("evaluation/benchmark.py", "--grid", "1x12", "--decode_tokens", 0, "--repeats", 1),
    "routing_report": ("evaluation/routing_report.py",),
    "evaluate": ("evaluation/evaluate.py", "--tasks", "piqa", "--limit", 2),
}


def write(directory, base, seed=1):
    """Write a checkpoint that keeps nothing at capacity 0.25, everything at 1, and some by its own thresholds."""
    table = [
        {"capacity": capacity, "threshold": [threshold] * 3} for capacity, threshold in ((0.25, 1 - 1e-6), (1.0, 1e-6))
    ]
    settings = MoDSettings(
        *("attn_sequence", LAYERS, (0.5,) * 3, 0.5),
        substitute={"kind": "linear", "rank": 2},
        capacities=table,
        sequence_pooling="prompt",
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down": (2, 16), "up": (16, 2), "bias": (16,)}
    write_checkpoint(
        directory,
        base,
        settings,
        {f"model.layers.{layer}.router.weight": torch.randn(1, 16, generator=generator) for layer in LAYERS},
        substitutes={
            f"model.layers.{layer}.substitute.{name}": torch.randn(shape, generator=generator)
            for layer in LAYERS
            for name, shape in shapes.items()
        },
    )
    return directory


@pytest.fixture(scope="module")
def checkpoint(workplace):
    return write(workplace / "many-capacities", workplace / "base")


@pytest.fixture
def command(repository, tmp_path, monkeypatch, capfd, caplog):
    """Runs one of `COMMANDS` in this process; returns its exit code, what it printed, and what it logged."""
    (tmp_path / "text.txt").write_text("The lamp is lit.\n")
    rows = [{"goal": "To dry a wet book,", "sol1": "open it.", "sol2": "wet it.", "label": n} for n in range(2)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "use": ("--output", tmp_path / "use.json"),
        "benchmark": ("--output", tmp_path / "benchmark.json"),
        "routing_report": ("--text", tmp_path / "text.txt", "--output", tmp_path / "report.html"),
        "evaluate": ("--output_dir", tmp_path / "out", "--data_dir", tmp_path, "--output", tmp_path / "evaluate.json"),
    }

    def start(name, checkpoint, *arguments):
        program, *own = COMMANDS[name]
        program = repository / "entrypoints" / program
        given = [program, checkpoint, "--device", "cpu", *own, *more.get(name, ()), *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in given])
        with pytest.raises(SystemExit) as exit_code:
            runpy.run_path(str(program), run_name="__main__")
        printed, logged = capfd.readouterr(), caplog.text
        caplog.clear()
        return exit_code.value.code, printed.out, logged + printed.err

    return start


@pytest.mark.parametrize(("capacity", "executed"), [("0.25", 0.0), pytest.param("1", 1.0, marks=pytest.mark.slow)])
def test_every_command_runs_at_another_capacity(command, checkpoint, tmp_path, capacity, executed):
    def written(name):
        return json.loads((tmp_path / f"{name}.json").read_text())

    for name in ("generate", "use", "benchmark", "routing_report"):
        code, out, error = command(name, checkpoint, "--capacity", capacity)
        assert code == 0, error
        if name == "generate":
            assert f"{executed:.2f}  of the routed layers" in out
    (found,) = written("use")["checkpoints"].values()
    assert found["use"]["executed"]["mean"] == executed
    assert found["target_capacity"] == float(capacity)
    assert written("benchmark")["cells"][0]["columns"]["tuned"]["share_executed"] == executed
    assert written("benchmark")["routing"]["target_capacity"] == float(capacity)
    assert f"many-capacities-at-{capacity}" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize(
    ("capacity", "message"),
    [("0.2", "capacity 0.2 is outside what the routers were calibrated for, 0.25 to 1.0"), ("0", "must be a number")],
)
def test_a_capacity_that_there_is_not_is_one_line_before_anything_is_loaded(
    command, checkpoint, tmp_path, name, capacity, message
):
    without_weights = tmp_path / "mod"
    lost = ("base*",) if name != "evaluate" else ()  # which looks for a base of this name first
    shutil.copytree(checkpoint, without_weights, ignore=shutil.ignore_patterns(*lost))
    code, out, error = command(name, without_weights, "--capacity", capacity)
    assert code == 1
    assert not out
    (line,) = error.strip().splitlines()
    assert line.startswith(f"error: {without_weights}: capacity {float(capacity)}")
    assert message in line


def test_a_dense_model_and_one_that_was_not_calibrated_have_none_to_set(command, workplace):
    for name, directory, message in (
        ("evaluate", "base", "a dense model routes nothing, so it has no capacity to set"),
        ("generate", "base", "a dense model routes nothing, so it has no capacity to set"),
        ("use", "ckpt/tiny-mod", "calibrated for none but their own; recalibrate.py gives others"),
    ):
        code, _, error = command(name, workplace / directory, "--capacity", "0.75")
        assert code == 1
        assert message in error.strip().splitlines()[-1]
    code, _, error = command("benchmark", workplace / "ckpt/tiny-mod", "--capacity", "0.75", "--mod_n", "2")
    assert code == 2
    assert "--capacity sets trained routers" in error


def test_evaluations_at_several_capacities_are_kept_apart_and_say_what_was_decided_on(command, checkpoint, tmp_path):
    def evaluated(*arguments):
        code, out, error = command("evaluate", checkpoint, *arguments)
        assert code == 0, error
        return json.loads((tmp_path / "evaluate.json").read_text()), out, error

    capacities = {}
    for capacity, executed in (("0.25", 0.0), ("1", 1.0)):
        result, out, error = evaluated("--capacity", capacity)
        assert result["rows"]["routed"]["piqa"]["capacity"]["capacity"] == executed
        assert result["target_capacity"] == float(capacity)
        assert result["pool"] == "context", "what the checkpoint was calibrated for"
        assert "decided on the context alone" in out
        assert error.count("done before") == (0 if capacity == "0.25" else 1), "of the dense base alone"
        capacities[capacity] = result["rows"]["routed"]["piqa"]
        assert (
            f"--model mod --batch_size 8 --model_args pretrained={checkpoint},pool=context,capacity={float(capacity)}"
            in (result["lm_eval"]["piqa"])
        )
    result, _, error = evaluated("--capacity", "0.25")
    assert error.count("done before") == 2
    assert result["rows"]["routed"]["piqa"] == capacities["0.25"]
    result, out, error = evaluated("--pool", "all")
    assert "decided on context and continuation" in out
    assert error.count("done before") == 1
    assert result["target_capacity"] == 0.5
    assert "--model hf" in result["lm_eval"]["piqa"]


def test_the_harness_model_takes_capacity_and_pool_from_its_arguments(checkpoint):
    def make(arguments):
        return get_model("mod").create_from_arg_string(f"pretrained={checkpoint}{arguments}", {"device": "cpu"})

    own = make("")
    assert own._pools_context
    assert not make(",pool=all")._pools_context
    for arguments, executed in ((",capacity=0.25", 0.0), (",capacity=1", 1.0)):
        model = make(arguments)
        gates = model.model(torch.arange(5, 15)[None]).router_gates
        assert gates.mean() == executed
    for arguments, message in ((",capacity=0.2", "outside what"), (",capacity=much", "must be a number")):
        with pytest.raises(UserError, match=message):
            make(arguments)
    with pytest.raises(UserError, match="set by its `set_capacity`"):
        MoDLM(own.model, own.tokenizer, capacity=1.0)


@pytest.mark.parametrize(("pooling", "pool"), [("prompt", "context"), ("all", "all"), (None, "all")])
def test_the_pool_is_what_the_checkpoint_was_calibrated_for_unless_it_is_given(pooling, pool):
    settings = MoDSettings("attn_sequence", (1,), sequence_pooling=pooling)
    assert choose_pool(settings, None) == pool
    assert [choose_pool(settings, given) for given in ("all", "context")] == ["all", "context"]


def test_substitutes_are_of_the_routing_and_not_of_the_base(checkpoint, workplace, tmp_path):
    other = write(tmp_path / "other", workplace / "base", seed=2)
    shutil.copy(checkpoint / "routers.safetensors", other / "routers.safetensors")
    assert identify_base(checkpoint) == identify_base(other) == identify_base(workplace / "ckpt/tiny-mod")
    one, two = (identify_routing(path, read_settings(path), "all") for path in (checkpoint, other))
    assert one["routing"] != two["routing"]
    assert json.loads(json.dumps(one)) == one
    between, nearer = (identify_routing(checkpoint, read_settings(checkpoint, share), "all") for share in (0.5, 0.6))
    assert between["routing"] != nearer["routing"]
    own = read_settings(checkpoint)
    assert identify_routing(checkpoint, replace(own, capacities=None, sequence_pooling=None), "all") == one
