"""Attention and MLP routed apart, through every command; and what is skipped as the target."""

import json
import sys

import pytest
from commands import run
from safetensors.torch import load_file

from utils.model.checkpoint import read_units

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(1, 13).view(2, 6)
tokens = [model.generate(ids, max_new_tokens=4, do_sample=False, execution=e).tolist() for e in ("dense", "sparse")]
assert tokens[0] == tokens[1]
model.set_capacity(model.config.mod["target_capacity"])
print(list(model(ids).router_gates.shape))
"""


@pytest.fixture(scope="module", params=["attn_mlp_token", "attn_mlp_sequence"])
def routed(request, workplace, finetune):
    """A trained checkpoint, and what its run printed."""
    output = workplace / request.param
    arguments = ("--granularity", request.param, "--target_skipped", 0.2, "--skipped", 0.1, 0.3)
    arguments += ("--max_use_prompts", 2)
    return output, finetune(output, *arguments, "--save_steps", 1, hinge=False)


@pytest.fixture
def command(repository, workplace):
    def start(name, *arguments, check=True):
        return run(sys.executable, repository / "entrypoints" / name, *arguments, cwd=workplace, check=check)

    return start


@pytest.mark.slow
def test_a_run_trains_both_routers_and_says_what_is_skipped(routed):
    output, printed = routed
    mod = json.loads((output / "config.json").read_text())["mod"]
    assert len(mod["threshold"]) == len(mod["substitute"]["rank"]) == 6
    names = {f"model.layers.{layer}.{branch}_router.weight" for layer in (2, 3, 4) for branch in ("attn", "mlp")}
    assert set(load_file(output / "routers.safetensors")) == names
    maps = {name.rsplit(".", 1)[0] for name in load_file(output / "substitutes.safetensors")}
    assert maps == {name.replace("router.weight", "substitute") for name in names}
    assert set(read_units(output)) == {(layer, branch) for layer in (2, 3, 4) for branch in ("attn", "mlp")}
    results = json.loads((output / "results.json").read_text())
    held_out = results["held_out"]["routed"]
    assert {f"eval_capacity/layer_{layer}.{branch}" for layer in (2, 3, 4) for branch in ("attn", "mlp")} <= set(
        held_out
    )
    for found in (held_out, *(of["held_out"] for of in results["capacities"].values())):
        assert 0 <= found["eval_skipped"] < 0.5
        assert {"eval_flops_saved_512", "eval_flops_saved_2048"} <= set(found)
    assert 0 <= results["use"]["skipped"]["mean"] < 0.5
    assert f"target_skipped 0.2 is a capacity of {mod['target_capacity']}" in printed.stderr
    assert "skipped  " in printed.stdout
    assert len(results["capacities"]) == 2
    assert "\nattn   " in printed.stdout


@pytest.mark.slow
def test_every_command_takes_it(routed, command, workplace, tmp_path, repository):
    output, _ = routed
    run(sys.executable, "-c", PLAIN, output, cwd=tmp_path)
    described = command("evaluation/describe.py", output).stdout
    assert "3.attn" in described
    assert "of the decoder layers' parameters for a token" in described
    said = command("inference/generate.py", output, "--prompt", "Hello", "--max_new_tokens", 4)
    assert "3.mlp" in said.stdout + said.stderr
    command("evaluation/use.py", output, "--max_prompts", 2, "--max_new_tokens", 4, "--output", tmp_path / "use.json")
    cell = ("--grid", "2x16", "--decode_tokens", 2, "--repeats", 1, "--threads", 1, "--output", tmp_path / "b.json")
    assert "sparse equals dense" in command("evaluation/benchmark.py", output, *cell).stderr
    (tmp_path / "text.txt").write_text("A text.\n\nAnother one.")
    page = ("--text", tmp_path / "text.txt", "--output", tmp_path / "page.html")
    command("evaluation/routing_report.py", output, *page)
    assert '"4.mlp"' in (tmp_path / "page.html").read_text()
    again = ("--capacity", 0.8, "--output_dir", tmp_path / "again")
    command("checkpoint/recalibrate.py", output, *again)
    assert json.loads((tmp_path / "again/config.json").read_text())["mod"]["target_capacity"] == 0.8
    command("evaluation/describe.py", tmp_path / "again")


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_and_trains_with_lora(workplace, finetune, tmp_path):
    arguments = ("--granularity", "attn_mlp_sequence", "--max_use_prompts", 0, "--use_lora", "true")
    output = tmp_path / "lora"
    finetune(output, *arguments, "--save_steps", 1, "--recipe", "default", hinge=False)
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cosine", "greedy", "random"])
def test_a_baseline_skips_the_share_that_was_asked_for(command, workplace, tmp_path, kind):
    text = ("--train_file", workplace / "data/alpaca/data.jsonl", "--rows", 12, "--max_seq_length", 96)
    given = ("--granularity", "attn_mlp_token", "--skipped", 0.2, "--substitute", "linear", "--max_use_prompts", 0)
    where = ("--model_name_or_path", workplace / "ckpt/tiny-mod", "--output_dir", tmp_path / "out")
    command("checkpoint/build_baseline.py", kind, *where, *text, *given)
    held_out = json.loads((tmp_path / "out/results.json").read_text())["held_out"]["routed"]
    assert held_out["eval_skipped"] == pytest.approx(0.2, abs=0.06)  # of six parts, of which two or three go


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target_skipped", 0.2, "--target_capacity", 0.5), "give one of the two"),
        (
            ("--granularity", "attn_token", "--target_skipped", 0.4),
            "target_skipped 0.4 is out of reach: attn_token in 3 of 6 layers can skip more than 0 and less than 0.",
        ),
        (("--budget_length", 512), "budget_length 512 has no effect on attn_sequence without target_skipped"),
        (("--granularity", "attn_mlp_tokens"), "did you mean 'attn_mlp_token'"),
    ],
)
def test_a_budget_that_cannot_be_is_one_line(finetune, tmp_path, arguments, message):
    done = finetune(tmp_path / "out", *arguments, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert message in line
    assert "Traceback" not in done.stderr
