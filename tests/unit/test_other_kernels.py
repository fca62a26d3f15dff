"""The numeric tests of the default tier under other kernels than the machine's own.

torch, oneDNN and MKL choose their kernels by processor, and each sums in an order of its own. A bound that holds on one
processor by luck fails here, and not on somebody else's.
"""

import os
import subprocess
import sys

import pytest

UNVECTORISED = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

FILES = [
    "unit/test_distillation.py",
    "unit/test_experts.py",
    "unit/test_lora.py",
    "unit/test_masked_forward.py",
    "unit/test_mod_gradients.py",
    "unit/test_mod_model_files.py",
    "unit/test_routing_decision.py",
    "unit/test_sparse_forward.py",
    "unit/test_training_step.py",
]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "kernels", "threads"), [("DEFAULT", UNVECTORISED, 2), ("AVX2", AVX2, 1)])
def test_the_numeric_tests_pass_under_other_kernels(repository, tmp_path, capability, kernels, threads):
    environment = {**os.environ, **kernels, "OMP_NUM_THREADS": str(threads)}

    def python(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)

    chosen = python("-c", "import torch; print(torch.backends.cpu.get_cpu_capability())")
    assert chosen.stdout.strip() == capability, chosen
    files = [repository / "tests" / file for file in FILES]
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "tests", *files)
    assert result.returncode == 0, result.stdout[-5000:]
