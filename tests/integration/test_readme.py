"""Every command of the READMEs runs, in a copy of the repository with tiny data and a tiny base model.

What needs a GPU, the hub or many minutes is run as far as it goes without: `DRY_RUN=1`, `--help`, or its arguments
checked by the program itself.
"""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import run

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("", "scripts", "utils/pipeline", "utils/model", "utils/evaluation", "data", "configs/reproduce")
README = "\n".join((ROOT / place / "README.md").read_text(encoding="utf-8") for place in PLACES)
LINES = [
    line.split(" #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
COMMANDS = list(dict.fromkeys(line for line in LINES if line))
NAMED_PATHS = sorted(set(re.findall(r"`((?:entrypoints|scripts|configs|utils|ckpt|tests)/[\w./-]*)`", README)))
DRY_RUN = "scripts/finetune_mod.sh"
MIXTURE = "smollm2-moe-mod"
ARGUMENTS_ONLY = {  # command -> what is added so that it ends after its arguments were understood
    "bash scripts/test.sh": "--collect-only -q tests/unit/test_house_rules.py",
    "bash scripts/data/download.sh": "--help",
    "bash scripts/evaluate.sh path/to/output --tasks piqa openbookqa --limit 200": "--help",  # its data is on the hub
    # each has a test of its own
    "python entrypoints/checkpoint/publish.py path/to/output OWNER/NAME --base_model "
    "HuggingFaceTB/SmolLM2-135M-Instruct": "--help",
    "python entrypoints/checkpoint/build_mod_checkpoint.py --folder_name from-hub-mod --routers OWNER/NAME": "--help",
    "bash scripts/serve.sh path/to/output": "--help",
    "python entrypoints/evaluation/harness.py run --model mod --model_args pretrained=path/to/output --tasks piqa "
    "--batch_size 16": "--help",
    "python entrypoints/checkpoint/build_mod_checkpoint.py --folder_name merged-mod "
    "--merge_lora path/to/output": "--help",
    "python entrypoints/checkpoint/recalibrate.py path/to/output --capacity 0.9 --output_dir outputs/at-0.9": "--help",
    "python entrypoints/evaluation/use.py path/to/output --show": "--help",
    "python entrypoints/finetune/benchmark_step.py ckpt/smollm2-135m-mod --train_file "
    "data/sample/reformatted/alpaca/data.jsonl": "--help",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory, repository, workplace):
    """The repository as a user has it: no environment, no weights; with a base model at `path/to/base`."""
    root = tmp_path_factory.mktemp("readme") / "repository"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".venv-serve", ".cache", "__pycache__", "*.safetensors", "outputs", "raw", "*.pt"
    )
    shutil.copytree(repository, root, ignore=ignored)
    for name in ("ckpt/smollm2-135m-mod", "data/reformatted", "data/mixed"):
        for path in (root / name).glob("*"):
            if path.name != "config.json":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(root / "data/sample/alpaca", root / "data/raw/alpaca")
    rows = '[{"type": "a", "query": "1+1?", "original_question": "1+1?", "response": "2"}]'
    (root / "data/raw/meta_math_qa").mkdir()
    (root / "data/raw/meta_math_qa/MetaMathQA-395K.json").write_text(rows)
    shutil.copytree(workplace / "base", root / "path/to/base")
    shutil.copytree(workplace / "ckpt/tiny-mod", root / "path/to/output")
    log = [{"step": step, "task_loss": 2.0, "capacity": 1.0} for step in (1, 2)]
    (root / "path/to/output/trainer_state.json").write_text(json.dumps({"log_history": log}))
    return root


def start(copy, command, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return run("bash", "-c", command, cwd=copy, PATH=path, **environment)


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["bash scripts/finetune_mod.sh", "bash scripts/test.sh"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lm_eval" not in c])
def test_command(copy, command):
    if command == "FOLDER_NAME=my-mod bash scripts/finetune_mod.sh":
        result = start(copy, command, MAX_TRAIN_SAMPLES="16", MAX_SEQ_LENGTH="160", OUTPUT_DIR="out")
        assert result.stdout.strip().splitlines()[-1] == "out"
    elif DRY_RUN in command:
        (copy / "data/mixed").mkdir(exist_ok=True)
        (copy / "data/mixed/data.jsonl").touch()
        result = start(copy, command, DRY_RUN="1")
        assert result.stderr.strip().splitlines()[-1].startswith("+ python ")
    elif command == "bash scripts/data/mix.sh":  # the default mix wants five sets
        start(copy, f"bash scripts/data/reformat.sh && {command} --portions alpaca=1 meta_math_qa=2")
    elif command.startswith("python entrypoints/data/mix_datasets.py"):
        start(copy, f"bash scripts/data/reformat.sh && {command}")
    elif MIXTURE in command:
        (build,) = (word for word in COMMANDS if "--upcycle" in word)
        if not (copy / f"ckpt/{MIXTURE}").exists():
            start(copy, build.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "path/to/base"))
        if command != build:
            start(copy, command)
    else:
        start(copy, f"{command} {ARGUMENTS_ONLY.get(command, '')}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lm_eval" in c])
def test_lm_eval_understands_its_arguments(copy, command):
    from lm_eval.tasks import TaskManager

    arguments = shlex.split(command)
    assert arguments[0] == "lm_eval"
    values = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert set(values["--tasks"].split(",")) <= set(TaskManager().all_tasks)
    # its data is on the hub; test_finetune.py runs the harness on local data
    result = start(copy, "lm_eval run --help")
    for option in values:
        assert option in result.stdout


def test_python_code(copy):
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    result = start(copy, f"python -c {shlex.quote(code + 'print(tuple(output.router_gates.shape))')}")
    assert result.stdout.strip().splitlines()[-1] == "(3, 1)"


def test_the_first_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("place", PLACES)
def test_links_and_pictures_are_there(place):
    text = (ROOT / place / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (ROOT / place / link).exists(), link


@pytest.mark.parametrize("path", NAMED_PATHS)
def test_paths_that_are_named_exist(repository, path):
    assert (repository / path).exists()


@pytest.mark.slow
def test_the_main_job_with_nothing_configured(copy, tmp_path):
    """A real pretrained model, real text, the defaults; the table and the output directory at the end."""
    fresh = tmp_path / "repository"
    shutil.copytree(copy, fresh, ignore=shutil.ignore_patterns("raw", "reformatted", "mixed", "out", "my-mod"))
    result = start(fresh, COMMANDS[0], OUTPUT_DIR=str(tmp_path / "out"), OMP_NUM_THREADS="2")
    assert result.stdout.strip().splitlines()[-1] == str(tmp_path / "out")
    assert "using the embedded sample" in result.stderr
    from utils.model.checkpoint import load_mod_model

    model = load_mod_model(tmp_path / "out")
    assert any(torch.any(router.weight != 0) for router in model.router_modules().values())
