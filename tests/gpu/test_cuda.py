"""What only a CUDA device can show: sparse equals dense on its kernels, and the training command's defaults there."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from utils.model.checkpoint import build_mod_checkpoint, load_mod_model, make_settings, read_config
from utils.model.configuration_mod import GRANULARITIES

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("dtype", "bound", "margin"),
    [(torch.float32, 1e-3, 1e-5), (torch.float16, 0.05, 5e-3), (torch.bfloat16, 0.25, 3e-2)],
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sparse_equals_dense_and_routers_stay_float32(base_dir, granularity, dtype, bound, margin):
    settings = make_settings(read_config(base_dir), mod_n=4, granularity=granularity)
    model = load_mod_model(base_dir, settings, dtype=dtype).cuda().eval()
    for router in model.router_modules().values():
        torch.nn.init.normal_(router.weight, std=0.1)
        assert router.weight.dtype == torch.float32
    tokens = torch.randint(0, 512, (8, 33), device="cuda")
    mask = torch.ones_like(tokens)
    mask[:3, :7] = 0
    with torch.no_grad():
        sparse = model(tokens, attention_mask=mask, execution="sparse", use_cache=False)
        dense = model(tokens, attention_mask=mask, execution="dense", use_cache=False)
    assert sparse.logits.device.type == dense.logits.device.type == "cuda"
    assert sparse.logits.dtype == dense.logits.dtype == dtype
    # rounding depends on the rows that are computed together, so near its threshold a score may fall to either side
    threshold = model.config.mod_settings.threshold
    near = (dense.router_scores - threshold).abs() <= margin
    flipped = sparse.router_gates != dense.router_gates
    assert not (flipped & ~near).any()
    assert near.float().mean() < 0.5  # else this would say little
    assert 0 < sparse.router_gates.mean() < 1
    # places and rows that decided alike; of a row with another decision somewhere nothing is known
    alike = ~flipped.movedim(1, 0).flatten(1).any(dim=1)
    difference = (sparse.logits - dense.logits).float().abs()[mask.bool() & alike[:, None]]
    assert alike.any()
    assert difference.max() <= bound


def test_the_training_command_uses_the_gpu_and_bfloat16(base_dir, repository, smollm2_dir, tmp_path):
    settings = make_settings(read_config(smollm2_dir), mod_n=4)
    build_mod_checkpoint(smollm2_dir, tmp_path / "checkpoint", settings)
    rows = ["--raw_data_root", repository / "data/sample", "--save_path", tmp_path / "data", "--datasets", "alpaca"]
    train = [
        *("--model_name_or_path", tmp_path / "checkpoint", "--train_file", tmp_path / "data/alpaca/data.jsonl"),
        *("--output_dir", tmp_path / "out", "--max_train_samples", 16, "--max_eval_samples", 4),
        *("--global_batch_size", 8, "--per_device_train_batch_size", 8, "--max_seq_length", 128),
    ]
    for command in (["data/reformat_datasets.py", *rows], ["finetune/finetune_mod.py", *train]):
        command = [sys.executable, str(repository / "entrypoints" / command[0]), *map(str, command[1:])]
        subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"})
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["identity"]["device"] == "cuda"
    assert all(router.dtype == torch.float32 for router in load_file(tmp_path / "out/routers.safetensors").values())
