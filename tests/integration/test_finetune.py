"""The real commands on a tiny random model with a real tokenizer: train, reload elsewhere, evaluate, refuse."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import run
from rounding import rounding
from safetensors.torch import load_file

from utils.io.errors import UserError

ROUTERS = "routers.safetensors"
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any("router" in module for module in sys.modules)
directory, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
batch = tokenizer("What is the capital of France?", return_tensors="pt")
with torch.no_grad():
    torch.save(model(**batch).logits, out)
"""


class TestARun:
    def test_prints_the_table_and_the_output_directory_last(self, trained):
        directory, result = trained
        lines = result.stdout.strip().splitlines()
        assert lines[-1] == str(directory)
        for word in ("held-out loss", "forward tokens/s", "capacity", "layer"):
            assert any(line.startswith(word) for line in lines)
        assert "step 3/3: loss" in result.stderr

    def test_output_is_a_checkpoint_with_the_bases_weights_linked(self, trained, workplace):
        directory, _ = trained
        config = json.loads((directory / "config.json").read_text())
        base = json.loads((workplace / "base/config.json").read_text())
        ours = {"model_type": "mod_llama", "architectures": ["MoDLlamaForCausalLM"]}
        assert {name: config[name] for name in base} == base | ours
        assert config["mod"]["granularity"] == "attn_sequence"
        assert config["mod"]["layers"] == [2, 3, 4]
        assert config["mod"]["target_capacity"] == 0.5
        assert config["mod"]["sequence_pooling"] == "prompt"
        assert os.path.samefile(directory / "base.safetensors", workplace / "base/model.safetensors")
        routers = load_file(directory / ROUTERS)
        assert {name: (str(t.dtype), tuple(t.shape)) for name, t in routers.items()} == {
            f"model.layers.{i}.router.weight": ("torch.float32", (1, 16)) for i in (2, 3, 4)
        }
        assert all(tensor.any() for tensor in routers.values())

    def test_records_arguments_versions_and_results(self, trained):
        directory, _ = trained
        recorded = json.loads((directory / "run.json").read_text())
        assert recorded["identity"]["learning_rate"] == 1e-2
        assert recorded["versions"]["transformers"]
        results = json.loads((directory / "results.json").read_text())
        assert 0 <= results["held_out"]["routed"]["eval_capacity"] <= 1

    def test_logs_capacity_of_every_layer_to_tensorboard(self, trained):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (run_directory,) = (trained[0] / "runs").iterdir()
        accumulator = EventAccumulator(str(run_directory))
        accumulator.Reload()
        assert {f"train/capacity/layer_{i}" for i in (2, 3, 4)} | {
            f"train/{name}" for name in ("loss", "task_loss", "mod_loss", "capacity")
        } <= set(accumulator.Tags()["scalars"])

    def test_output_loads_without_the_repository_with_the_same_logits(self, trained, tmp_path):
        from transformers import AutoTokenizer

        from utils.model.checkpoint import load_mod_model

        run(
            *(sys.executable, "-I", "-c", RELOAD, trained[0], tmp_path / "logits.pt"),
            cwd=tmp_path,
            HF_MODULES_CACHE=str(tmp_path / "modules"),
        )
        model = load_mod_model(trained[0]).eval()
        batch = AutoTokenizer.from_pretrained(trained[0].parent / "base")(
            "What is the capital of France?", return_tensors="pt"
        )
        with torch.no_grad():
            expected = model(**batch).logits
        bound = rounding(expected, terms=1000)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=bound)

    def test_unmodified_lm_eval_evaluates_the_output(self, trained, tmp_path):
        questions = [
            {"question": "Is ice cold?", "choices": ["yes", "no"], "label": 0},
            {"question": "Is fire wet?", "choices": ["yes", "no"], "label": 1},
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        (tmp_path / "tiny_task.yaml").write_text(
            "task: tiny_task\ndataset_path: json\noutput_type: multiple_choice\n"
            f"dataset_kwargs:\n  data_files:\n    validation: {tmp_path}/rows.jsonl\n"
            'validation_split: validation\ndoc_to_text: "{{question}}"\ndoc_to_target: label\n'
            "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
        )
        result = run(
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "tiny_task", "--include_path", tmp_path),
            *("--model_args", f"pretrained={trained[0]},trust_remote_code=True", "--device", "cpu"),
            *("--batch_size", 1),
            cwd=tmp_path,
            HF_MODULES_CACHE=str(tmp_path / "modules"),
            HF_DATASETS_CACHE=str(tmp_path / "datasets"),
        )
        assert "tiny_task" in result.stdout
        assert "acc" in result.stdout

    def test_trained_routers_start_another_run(self, trained, workplace, finetune):
        finetune(workplace / "again", "--router_dir", trained[0], "--learning_rate", 1e-12)
        before, after = load_file(trained[0] / ROUTERS), load_file(workplace / "again" / ROUTERS)
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)

    def test_a_dense_base_and_a_trained_backbone_give_a_checkpoint_too(self, workplace, finetune):
        from utils.model.checkpoint import load_mod_model

        directory = workplace / "full"
        finetune(
            *(directory, "--model_name_or_path", workplace / "base", "--granularity", "mlp_token"),
            *("--mod_n", 2, "--router_only", "false", "--max_steps", 2),
        )
        assert not os.path.samefile(directory / "base.safetensors", workplace / "base/model.safetensors")
        model = load_mod_model(directory)
        assert model.config.mod["layers"] == [3, 4]
        base = load_file(workplace / "base/model.safetensors")["model.norm.weight"]
        assert not torch.equal(model.model.norm.weight, base)


def test_a_run_that_was_killed_goes_on_when_the_command_is_given_again(workplace, finetune, trained):
    directory = workplace / "killed"
    shutil.copytree(trained[0], directory)
    (directory / "model.safetensors.index.json").unlink()
    (directory / ROUTERS).unlink()
    shutil.rmtree(directory / "checkpoint-3")
    result = finetune(directory)
    assert "going on from" in result.stderr
    assert "checkpoint-2" in result.stderr
    whole, resumed = load_file(trained[0] / ROUTERS), load_file(directory / ROUTERS)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_measured_has_its_checkpoint_and_goes_on_measuring(workplace, finetune, trained):
    directory = workplace / "killed-measuring"
    shutil.copytree(trained[0], directory)
    (directory / "results.json").unlink()
    result = finetune(directory)
    assert "checkpoint-3" in result.stderr
    losses = [
        json.loads((path / "results.json").read_text())["held_out"]["routed"]["eval_loss"]
        for path in (trained[0], directory)
    ]
    assert losses[1] == pytest.approx(losses[0])
    whole, again = load_file(trained[0] / ROUTERS), load_file(directory / ROUTERS)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("capacity_control", ["budget", "hinge"])
def test_a_prompt_that_leaves_no_room_for_an_answer_costs_no_training(workplace, finetune, tmp_path, capacity_control):
    short = shutil.copytree(workplace / "base", tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 160}
    (short / "config.json").write_text(json.dumps(config))
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"Yes, {number} is fine."}]}
        for number, text in enumerate(("Is it? " * 30, "Is it?") * 20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model_name_or_path", short, "--train_file", tmp_path / "rows.jsonl", "--mod_n", 3)
    result = finetune(tmp_path / "out", *arguments, hinge=capacity_control == "hinge")
    assert "left out: longer than" in result.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert 0 < results["use"]["prompts"] < 7
    assert (tmp_path / "out/capacities.png").exists() == (capacity_control == "budget")
    assert (tmp_path / "out/capacities.svg").exists() == (capacity_control == "budget")


def test_a_regression_does_not_take_the_place_of_trained_routers_unseen(trained):
    from entrypoints.finetune.finetune_mod import prepare_model
    from utils.model.checkpoint import make_settings, read_config

    model_args = SimpleNamespace(dtype="float32", attn_implementation="sdpa", router_dir=None)
    training_args = SimpleNamespace(capacity_control="regression", router_only=True, use_lora=False)
    settings = make_settings(read_config(trained[0]))
    with pytest.raises(UserError, match="holds trained routers, and capacity_control regression makes new ones"):
        prepare_model(model_args, training_args, trained[0], settings)


class TestMistakes:
    """One clear line on stderr, a non-zero exit code, and nothing left under the output's name."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--granularity", "attn_sequense"], "did you mean 'attn_sequence'?"),
            (["--max_use_prompts", "-1"], "max_use_prompts -1 must not be negative"),
            (["--mod_n", "9"], "it runs from 1 to 6"),
            (["--target_capacity", "1.5"], "target_capacity 1.5 must be above 0 and at most 1"),
            (["--train_file", "nowhere.jsonl"], "train_file nowhere.jsonl: no such file"),
            (["--model_name_or_path", "./nowhere"], "./nowhere"),
            (["--capacity_control", "budget", "--router_dir", "ckpt"], "router_dir ckpt: no such file"),
            (["--learning_rate", "-1"], "learning_rate -1.0"),
            (["--gradient_scale", "nan"], "gradient_scale nan"),
            (["--capacity_control", "regression", "--router_dir", "."], "router_dir: capacity_control regression"),
            (["--weight_decay", "-1"], "weight_decay -1.0"),
            (["--num_train_epochs", "0"], "num_train_epochs 0.0"),
            (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size 0"),
            (["--granulairty", "attn_token"], "did you mean '--granularity'?"),
            (["--bf16", "maybe"], "maybe"),
            (["--train_sampling_strategy", "lenght"], "group_by_length"),
            (["--gradient_accumulation_steps", "4"], "is 64 here"),
            (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
            (["--report_to", "nonsense"], "tensorboard"),
            (["--resume_from_checkpoint", "ckpt"], "not a whole checkpoint: manifest.json is missing"),
            (["--global_batch_size", "6", "--per_device_train_batch_size", "4"], "4 or 8 would"),
        ],
    )
    def test_wrong_argument(self, workplace, repository, tmp_path, monkeypatch, capfd, arguments, message):
        entrypoint = repository / "entrypoints/finetune/finetune_mod.py"
        command = [
            *(entrypoint, "--model_name_or_path", workplace / "ckpt/tiny-mod", "--use_cpu", "true"),
            *("--train_file", workplace / "data/alpaca/data.jsonl", "--output_dir", tmp_path / "out", *arguments),
        ]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        monkeypatch.chdir(workplace)
        with pytest.raises(SystemExit) as exit_code:  # in this process: importing everything anew takes seconds
            runpy.run_path(str(entrypoint), run_name="__main__")
        assert exit_code.value.code == 1
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert "usage" not in error
        (line,) = [line for line in error.splitlines() if line.startswith("error:")]
        assert message in line
        assert not (tmp_path / "out").exists()

    def test_a_mistake_ends_the_script_in_one_line(self, repository, tmp_path):
        """Also through the launcher, with two processes."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        script = ("bash", repository / "scripts/finetune_mod.sh")
        for environment, message in (
            ({"NUM_PROCESSES": "2"}, "target_capacity 2.0"),
            ({"TARGET_CAPACITY": "2"}, "TARGET_CAPACITY=2"),
            ({"TRAIN_FILE": "nowhere"}, "TRAIN_FILE=nowhere"),
            ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two"),
            ({"DATA_TYPE": "alpacca"}, "DATA_TYPE=alpacca"),
        ):
            environment = {"FOLDER_NAME": "smollm2-135m-mod", "OUTPUT_DIR": str(tmp_path / "out"), **environment}
            result = run(*script, "--target_capacity", "2", cwd=tmp_path, check=False, PATH=path, **environment)
            assert result.returncode != 0
            assert "Traceback" not in result.stderr
            (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
            assert message in line

    def test_output_directory_of_another_run_or_of_this_one_finished(self, finetune, trained):
        before = (trained[0] / ROUTERS).read_bytes()
        for arguments, message in (
            (["--seed", "7"], "holds another run: its seed is 42, this one's 7"),
            ([], "holds this run, finished"),
        ):
            result = finetune(trained[0], *arguments, check=False)
            assert result.returncode == 1
            assert message in result.stderr
        assert (trained[0] / ROUTERS).read_bytes() == before

    def test_output_directory_with_other_files(self, finetune, tmp_path):
        (tmp_path / "letter.txt").write_text("dear")
        result = finetune(tmp_path, check=False)
        assert result.returncode == 1
        assert "holds other files" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def build(repository, *arguments):
    return run(sys.executable, repository / "entrypoints/checkpoint/build_mod_checkpoint.py", *arguments, check=False)


class TestBuildMistakes:
    def test_a_base_that_lacks_a_weight_or_has_an_unknown_one_is_refused_by_name(self, repository, workplace, tmp_path):
        from safetensors.torch import save_file

        weights = load_file(workplace / "base/model.safetensors")
        lacking = {name: t for name, t in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
        for name, tensors, message in (
            ("lacking", lacking, "lacks the weight model.layers.1.mlp.up_proj.weight"),
            ("unknown", weights | {"extra.weight": torch.zeros(1)}, "has the unknown weight extra.weight"),
            (
                "shape",
                weights | {"model.norm.weight": torch.zeros(3)},
                "model.norm.weight has shape [3], expected [16]",
            ),
        ):
            directory = tmp_path / name
            shutil.copytree(workplace / "base", directory)
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
            result = build(
                repository, "--folder_name", "x", "--ckpt_root", tmp_path / "ckpt", "--base_model", directory
            )
            assert result.returncode == 1
            assert message in result.stderr
            assert "Traceback" not in result.stderr
        assert not (tmp_path / "ckpt/x").exists()

    def test_a_base_that_is_not_the_variants_is_refused(self, repository, workplace, tmp_path):
        (tmp_path / "mistral-7b-mod").mkdir()
        config = repository / "ckpt/mistral-7b-mod/config.json"
        shutil.copy(config, tmp_path / "mistral-7b-mod")
        arguments = ("--folder_name", "mistral-7b-mod", "--ckpt_root", tmp_path, "--base_model", workplace / "base")
        result = build(repository, *arguments)
        assert result.returncode == 1
        assert "not a base for mistral-7b-mod" in result.stderr
        assert (tmp_path / "mistral-7b-mod/config.json").read_bytes() == config.read_bytes()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model_type": "gpt2"}, "model type 'gpt2' is not supported"),
            ({"num_hidden_layers": "six"}, "num_hidden_layers is 'six'"),
            ({"num_attention_heads": 0}, "config.json"),
        ],
    )
    def test_a_config_no_model_can_be_made_of(self, repository, workplace, tmp_path, fields, message):
        shutil.copytree(workplace / "base", tmp_path / "base")
        config = json.loads((tmp_path / "base/config.json").read_text()) | fields
        (tmp_path / "base/config.json").write_text(json.dumps(config))
        arguments = ("--folder_name", "x", "--ckpt_root", tmp_path, "--base_model", tmp_path / "base")
        result = build(repository, *arguments)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert message in result.stderr

    def test_a_checkpoint_is_not_built_twice_unless_asked(self, repository, workplace):
        arguments = ("--folder_name", "tiny-mod", "--ckpt_root", workplace / "ckpt", "--base_model", workplace / "base")
        result = build(repository, *arguments)
        assert result.returncode == 1
        assert "--overwrite" in result.stderr

    def test_a_new_folder_needs_a_base(self, repository, tmp_path):
        result = build(repository, "--folder_name", "mine", "--ckpt_root", tmp_path)
        assert result.returncode == 1
        assert "needs --base_model" in result.stderr
