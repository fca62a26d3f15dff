"""A tiny model that the commands can train in seconds."""

import shutil
import sys

import pytest
import torch
from commands import run
from transformers import LlamaConfig, LlamaForCausalLM

HINGE = ("--capacity_control", "hinge", "--distillation_weight", "0", "--calibration_rows", "0")
"""What trains in the fewest moves, for tests of everything else."""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, repository, smollm2_dir):
    """A tiny dense base with SmolLM2's tokenizer, its MoD checkpoint, and the embedded sample as data.jsonl."""
    root = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, root / "base" / name)
    run(
        *(sys.executable, repository / "entrypoints/data/reformat_datasets.py", "--datasets", "alpaca"),
        *("--raw_data_root", repository / "data/sample", "--save_path", root / "data"),
        cwd=root,
    )
    run(
        *(sys.executable, repository / "entrypoints/checkpoint/build_mod_checkpoint.py", "--folder_name", "tiny-mod"),
        *("--ckpt_root", root / "ckpt", "--base_model", root / "base", "--mod_n", 3),
        cwd=root,
    )
    return root


@pytest.fixture(scope="session")
def upcycled(workplace, repository):
    """The MoD checkpoint of a tiny mixture of five experts, made of the tiny Llama."""
    run(
        *(sys.executable, repository / "entrypoints/checkpoint/build_mod_checkpoint.py", "--folder_name", "moe-mod"),
        *("--ckpt_root", workplace / "ckpt", "--base_model", workplace / "base", "--mod_n", 3),
        *("--upcycle", 5, "--granularity", "expert_token"),
    )
    return workplace / "ckpt/moe-mod"


@pytest.fixture(scope="session")
def finetune(workplace, repository):
    def start(output_dir, *arguments, check=True, launcher=(sys.executable,), hinge=True, **environment):
        command = [
            *launcher,
            *(repository / "entrypoints/finetune/finetune_mod.py", "--model_name_or_path", workplace / "ckpt/tiny-mod"),
            *("--train_file", workplace / "data/alpaca/data.jsonl", "--output_dir", output_dir, "--use_cpu", "true"),
            *("--max_train_samples", 21, "--max_eval_samples", 7, "--max_seq_length", 160),
            *("--global_batch_size", 8, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2),
            *(HINGE if hinge else ()),
            *arguments,
        ]
        return run(*command, cwd=repository, check=check, **environment)

    return start


@pytest.fixture(scope="session")
def trained(workplace, finetune):
    """A finished run of three steps, the last of them on fewer rows: its directory and what it printed."""
    return workplace / "out", finetune(workplace / "out")
