"""Engines in the process of the tests, tiny routed checkpoints to serve, and real servers.

`bash scripts/test.sh --tier serve` runs these tests in an environment with vLLM; without one they are not collected.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_engine*.py", "test_server*.py"]

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, so that its model can be looked at
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    OMP_NUM_THREADS="1",
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))  # the tiny models of the other tests


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """Return a function that saves a tiny routed checkpoint with random routers, each once, and returns its folder."""
    from model_zoo import add_routers, make_base, randomize_routers, randomize_substitutes

    root = tmp_path_factory.mktemp("checkpoints")

    def make(architecture="llama", granularity="block_token", substitute=True, kv_heads=1, vocab_size=256, **settings):
        parts = (architecture, granularity, substitute, kv_heads, vocab_size, *settings)
        name = "-".join(map(str, parts))
        if (root / name).exists():
            return root / name
        fields = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
        fields |= {"max_position_embeddings": 1024, "sliding_window": None}
        fields |= {"vocab_size": vocab_size, "num_key_value_heads": kv_heads}
        if architecture == "qwen3":
            fields["head_dim"] = 32
        if architecture.startswith("qwen"):
            fields |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 6}
        if substitute:
            settings["substitute"] = {"kind": "linear", "rank": 8}
        model = add_routers(make_base(architecture, **fields), granularity, **settings)
        randomize_routers(model, scale=0.2)
        if substitute:
            randomize_substitutes(model, scale=0.1)
        model.save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture
def engine():
    """Return a function that starts an engine in this process, and its routed model; all are gone after the test."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    started = []

    def start(checkpoint, **options):
        options = {"max_model_len": 512, "enforce_eager": True, **options}
        llm = LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True, **options)
        started.append(llm)
        return llm, llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    yield start
    started.clear()
    cleanup_dist_env_and_memory()


@pytest.fixture
def project_models():
    """Return a function that loads a checkpoint with the project's own code, in float32 and in float64."""
    import json

    import torch

    from utils.model import modeling_mod

    def load(checkpoint):
        name = json.loads((Path(checkpoint) / "config.json").read_text())["architectures"][0]
        classes = getattr(modeling_mod, name)
        return [classes.from_pretrained(checkpoint, dtype=dtype).eval() for dtype in (torch.float32, torch.float64)]

    return load
