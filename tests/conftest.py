"""What every test may rely on: no hub, few threads, fixed seeds, and the embedded model as a fixture.

The environment is set before torch, transformers or datasets are imported, and subprocesses inherit it.
"""

import os
import random
import sys
from pathlib import Path

import pytest

from utils.io.launched import leave_other_launches

leave_other_launches()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models lose time with many threads, and several test processes on one machine lose more.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct with real weights and its tokenizer; fetched and converted once, then from the cache."""
    from utils.model.base_models import resolve_base_model
    from utils.model.embedded_model import EMBEDDED_MODEL

    return resolve_base_model(EMBEDDED_MODEL)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    # A test module that uses one of these has imported it by now; the others need not wait for the import.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
