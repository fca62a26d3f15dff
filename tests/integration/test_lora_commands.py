"""LoRA with routers, by the real commands on a tiny model: train, merge, evaluate, and over two processes."""

import json
import sys

import pytest
import torch
from commands import run
from launches import LINUX, launcher
from safetensors.torch import load_file

LORA = ("--use_lora", "true", "--lora_rank", 4, "--router_learning_rate", 2e-2)
FILES = ("adapter_model.safetensors", "routers.safetensors")


@pytest.fixture(scope="module")
def with_lora(workplace, finetune):
    """A finished run with LoRA."""
    finetune(workplace / "lora", *LORA)
    return workplace / "lora"


def build(repository, *arguments):
    return run(sys.executable, repository / "entrypoints/checkpoint/build_mod_checkpoint.py", *arguments, check=False)


def test_the_output_merges_and_trains_on_only_when_merged(with_lora, workplace, repository, finetune):
    from utils.model.checkpoint import load_mod_model

    assert json.loads((with_lora / "results.json").read_text())["dense_is"] == "adapted"
    arguments = ("--ckpt_root", workplace / "ckpt", "--folder_name", "merged", "--merge_lora", with_lora)
    result = build(repository, *arguments)
    assert result.stdout.strip() == str(workplace / "ckpt/merged"), result.stderr
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        one, other = (load_mod_model(path)(ids).logits for path in (with_lora, workplace / "ckpt/merged"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for name in ("routers.safetensors", "substitutes.safetensors"):
        kept, merged = (load_file(path / name) for path in (with_lora, workplace / "ckpt/merged"))
        assert kept.keys() == merged.keys()
        assert all(tensor.any() and tensor.equal(merged[key]) for key, tensor in kept.items())
    for more, message in (((), "is there already"), (("--mod_n", 2), "exclude each other")):
        refused = build(repository, *arguments, *more)
        assert refused.returncode == 1
        assert message in refused.stderr
    refused = finetune(workplace / "on", "--model_name_or_path", with_lora, check=False)
    assert refused.returncode == 1
    assert "--merge_lora" in refused.stderr


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("way", ["ddp", "deepspeed_zero1", "deepspeed_zero2"])
def test_two_processes_train_the_same_adapter_and_routers(with_lora, workplace, finetune, way):
    finetune(workplace / f"lora-{way}", *LORA, launcher=launcher(way), DS_ACCELERATOR="cpu")
    for name in FILES:
        one, other = load_file(with_lora / name), load_file(workplace / f"lora-{way}" / name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=2e-5)  # Adam divides by small gradients


@pytest.mark.slow
def test_unmodified_lm_eval_applies_the_adapter(with_lora, workplace, repository, tmp_path):
    """The same scores from the output with its adapter beside the weights, and from the merged checkpoint."""
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "Is ice cold?", "choices": ["yes", "no"], "label": 0}\n'
        '{"question": "Is fire wet?", "choices": ["yes", "no"], "label": 1}\n'
    )
    (tmp_path / "tiny_task.yaml").write_text(
        "task: tiny_task\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {tmp_path}/rows.jsonl\n"
        'validation_split: validation\ndoc_to_text: "{{question}}"\ndoc_to_target: label\n'
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    build(repository, "--ckpt_root", tmp_path, "--folder_name", "merged", "--merge_lora", with_lora)
    scores = {}
    for name, directory in (
        ("lora", with_lora),
        ("merged", tmp_path / "merged"),
        ("without", workplace / "ckpt/tiny-mod"),
    ):
        run(
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "tiny_task", "--include_path", tmp_path),
            *("--model_args", f"pretrained={directory},trust_remote_code=True", "--device", "cpu"),
            *("--batch_size", 1, "--output_path", tmp_path / f"out-{name}", "--log_samples"),
            cwd=tmp_path,
            HF_MODULES_CACHE=str(tmp_path / "modules"),
            HF_DATASETS_CACHE=str(tmp_path / "datasets"),
        )
        (samples,) = (tmp_path / f"out-{name}").rglob("samples_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        scores[name] = [float(response[0]) for row in rows for response in row["filtered_resps"]]
    assert len(scores["lora"]) == 4
    assert scores["lora"] == pytest.approx(scores["merged"], abs=1e-3)
    assert scores["lora"] != pytest.approx(scores["without"], abs=1e-2)
