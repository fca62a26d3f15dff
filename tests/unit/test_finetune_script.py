"""What `scripts/finetune_mod.sh` makes of the machine and the environment, by the command that it would run."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NODES = {"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "10.0.0.1", "PORT": "29500"}


@pytest.fixture
def dry_run(tmp_path):
    """Run the script on a machine with so many GPUs, and return what it printed on stderr."""

    def run(gpus: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        smi = programs / "nvidia-smi"
        smi.write_text(
            "#!/bin/bash\n" + "".join(f"echo 'GPU {i}: one'\n" for i in range(gpus)) + f"exit {not gpus:d}\n"
        )
        smi.chmod(0o755)
        (tmp_path / "data.jsonl").touch()
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        hidden = {"CUDA_VISIBLE_DEVICES", "NUM_PROCESSES", "ACCELERATE_CONFIG"}
        return subprocess.run(
            ["bash", ROOT / "scripts/finetune_mod.sh"],
            env={name: value for name, value in os.environ.items() if name not in hidden}
            | {"PATH": path, "DRY_RUN": "1", "TORCH_BUILD": "cpu", "TRAIN_FILE": str(tmp_path / "data.jsonl")}
            | {"OUTPUT_DIR": str(tmp_path / "out"), **environment},
            capture_output=True,
            text=True,
        )

    return run


def options(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The options of the printed command."""
    assert result.returncode == 0, result.stderr
    words = result.stderr.strip().splitlines()[-1].split()
    return {name: value for name, value in pairwise(words) if name.startswith("--")}


@pytest.mark.parametrize(
    ("gpus", "environment", "config", "processes", "batch"),
    [
        (0, {}, "cpu", 1, (8, 4)),
        (0, {"NUM_PROCESSES": "4"}, "ddp", 4, (8, 2)),
        (1, {}, "gpu", 1, (64, 1)),
        (4, {}, "ddp", 4, (64, 1)),
        (4, {"CUDA_VISIBLE_DEVICES": "2"}, "gpu", 1, (64, 1)),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu", 1, (8, 4)),
        (8, {**NODES, "MACHINE_RANK": "1"}, "ddp_multinode", 16, (64, 1)),
        (0, NODES, "ddp_multinode", 2, (8, 4)),
        (4, {"ACCELERATE_CONFIG": "configs/accelerate/deepspeed_zero2.yaml"}, "deepspeed_zero2", 4, (64, 1)),
    ],
)
def test_config_and_processes_follow_from_what_is_there(
    dry_run, monkeypatch, gpus, environment, config, processes, batch
):
    monkeypatch.chdir(ROOT)
    command = options(dry_run(gpus, **environment))
    assert Path(command["--config_file"]).stem == config
    assert int(command["--num_processes"]) == processes
    assert (int(command["--global_batch_size"]), int(command["--per_device_train_batch_size"])) == batch
    assert ("--use_cpu" in command) == (config == "cpu" or gpus == 0)
    assert command["--num_machines"] == environment.get("NUM_MACHINES", "1")
    assert command["--machine_rank"] == environment.get("MACHINE_RANK", "0")
    assert command.get("--main_process_ip") == environment.get("MAIN_PROCESS_IP")


@pytest.mark.parametrize(
    ("gpus", "environment", "message"),
    [
        (0, {**NODES, "NUM_PROCESSES": "1"}, "NUM_PROCESSES=1: too few for NUM_MACHINES=2"),
        (0, {**NODES, "MACHINE_RANK": "2"}, "MACHINE_RANK=2: the machines are numbered 0 to 1"),
        (0, {"NUM_MACHINES": "2"}, "needs MAIN_PROCESS_IP, PORT and OUTPUT_DIR"),
        (0, {"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0"),
        (2, {"NUM_PROCESSES": "3"}, "there are 2 GPUs"),
        (0, {"ACCELERATE_CONFIG": "nowhere.yaml"}, "ACCELERATE_CONFIG=nowhere.yaml: no such file"),
    ],
)
def test_what_cannot_be_launched_is_one_line(dry_run, gpus, environment, message):
    result = dry_run(gpus, **environment)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("name", "meant"),
    [("TARGET_CAPCITY", "TARGET_CAPACITY"), ("GRANULARIY", "GRANULARITY"), ("MAX_SEQ_LEN", "MAX_SEQ_LENGTH")],
)
def test_a_misspelt_field_is_refused_with_what_was_meant(dry_run, name, meant):
    result = dry_run(**{name: "3"})
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"error: {name} is set, which is no field: did you mean {meant}?"


def test_fields_arrive_where_they_are_set_and_other_variables_are_left_alone(dry_run):
    fields = {"GRADIENT_SCALE": "0.7", "WARMUP": "0.2", "WEIGHT_DECAY": "0.1", "LEARNING_RATE": "0.01"}
    passed = {"--gradient_scale": "0.7", "--warmup_steps": "0.2", "--weight_decay": "0.1", "--learning_rate": "0.01"}
    others = {"SM_OUTPUT_DIR": "x", "CI_RUNNER_NAME": "x", "TRAIN_FILE_OLD": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert passed.items() <= options(dry_run(**fields, **others)).items()
    assert not passed.keys() & options(dry_run()).keys()


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_when_to_use_it_and_how(path):
    text = path.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.endswith("bash scripts/finetune_mod.sh") for line in header)
    config = yaml.safe_load(text)
    if config["distributed_type"] == "DEEPSPEED":
        assert (ROOT / config["deepspeed_config"]["deepspeed_config_file"]).is_file()
        assert config["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
