"""What a shell's environment says of processes that nobody started, and who says an error where there are several."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.io.launched import OF_LAUNCHERS, leave_other_launches

ROOT = Path(__file__).resolve().parents[2]
READERS = (
    *("torch/distributed/distributed_c10d.py", "torch/distributed/rendezvous.py", "torch/distributed/device_mesh.py"),
    *("torch/distributed/elastic/agent/server/*.py", "accelerate/*.py", "accelerate/utils/*.py", "transformers/*.py"),
    *("transformers/integrations/*.py", "transformers/distributed/*.py", "deepspeed/*.py", "deepspeed/comm/*.py"),
    *("deepspeed/utils/*.py", "lm_eval/models/huggingface.py", "lm_eval/*.py"),
)
NUMBERS_A_PROCESS = re.compile(
    r"""["']([A-Z][A-Z0-9_]*_)?(?P<end>RANK|WORLD_SIZE|LOCALRANKID|LOCALNRANKS|COMM_WORLD_\w+|MASTER_(?:ADDR|PORT))["']"""
)

SHELLS = {
    "torchrun": {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1"},
    "in a worker of torchrun": {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    "MPICH": {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "MVAPICH": {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
    "Slurm": {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"},
    "Kubeflow": {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1"},
    "a launch of ours": {"ROUTER_TUNING_LAUNCHER": "1", "ROUTER_TUNING_PROCESSES": "2", "LOCAL_RANK": "1"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
}
"""Shells that ask for one process, and what they have set."""


def sources():
    """The files of the libraries that ask the environment which of several processes this is."""
    for pattern in READERS:
        package, _, rest = pattern.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None and package == "deepspeed":  # Linux only
            continue
        yield from Path(spec.submodule_search_locations[0]).glob(rest)


def test_every_variable_that_a_library_numbers_processes_by_is_known():
    files = list(sources())
    found = {match[0].strip("\"'") for file in files for match in NUMBERS_A_PROCESS.finditer(file.read_text("utf-8"))}
    assert found >= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MPI_LOCALRANKID"}
    assert not {name for name in found if not OF_LAUNCHERS.fullmatch(name)}


def as_command(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as the `main` of a command, from a shell with that environment."""
    command = f"import os, sys\nfrom utils.io.errors import *\ndef main():\n    {code}\nrun_command(main)"
    return subprocess.run(
        ["bash", "-c", '"$@"; exit $?', "bash", sys.executable, "-c", command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_single_process_is_single_in_any_shell_and_says_what_it_ignores(shell):
    done = as_command("import json; print(json.dumps(dict(os.environ)))", **SHELLS[shell])
    assert done.returncode == 0, done.stderr
    assert not SHELLS[shell].keys() & json.loads(done.stdout).keys()
    (line,) = done.stderr.splitlines()
    assert "this is one process: ignoring" in line
    assert sorted(SHELLS[shell])[0] in line


@pytest.mark.parametrize("shell", SHELLS)
def test_the_error_of_a_single_process_is_said_in_any_shell(shell):
    done = as_command("raise UserError('a mistake')", **SHELLS[shell])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: a mistake"


def test_variables_that_number_no_process_are_left_alone(monkeypatch):
    for name in ("SLURM_JOB_ID", "ACCELERATE_USE_CPU", "PAGERANK", "MY_RANK", "OMPI_MCA_btl"):
        monkeypatch.setenv(name, "1")
    assert leave_other_launches() == []


WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from utils.io.errors import UserError, run_command
def main():
    rank = int(os.environ["RANK"])
    assert os.environ["WORLD_SIZE"] == "2"
    if {where}:
        {what}
    time.sleep({wait})
run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "what", "code", "line"),
    [
        ("rank == 0", "raise UserError('of the first')", 1, "error: of the first"),
        ("rank == 1", "raise UserError('of the second')", 1, "error: of the second"),
        ("rank == 1", "raise OSError(28, 'No space left on device', 'there')", 1, "error: there: No space left"),
        ("True", "raise UserError('of both')", 1, "error: of both"),
        ("rank == 1", "os.kill(os.getpid(), 9)", 137, "error: a training process was killed by SIGKILL"),
    ],
)
def test_whichever_process_of_a_launch_fails_one_line_says_so(tmp_path, where, what, code, line):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), where=where, what=what, wait=1 if where == "True" else 30))
    launch = [sys.executable, ROOT / "entrypoints/launch.py", "--config_file", ROOT / "configs/accelerate/ddp.yaml"]
    done = subprocess.run(
        [*launch, "--num_processes", "2", "--main_process_port", "0", script],
        env=os.environ | SHELLS["torchrun"] | SHELLS["Kubeflow"],  # the launcher is one process in any shell too
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert [each for each in done.stderr.splitlines() if each.startswith("error: ")] == [
        each for each in done.stderr.splitlines() if each.startswith(line)
    ]
    assert sum(each.startswith(line) for each in done.stderr.splitlines()) == 1
