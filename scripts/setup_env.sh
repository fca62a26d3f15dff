#!/usr/bin/env bash
# Finds or makes the Python environment; every other script sources this one.
#
#   source scripts/setup_env.sh   sets up, then puts the environment's `python` first on PATH
#   bash scripts/setup_env.sh     sets up and prints the environment's folder
#
# The active environment is used where it has every package of requirements.txt at its version. Otherwise .venv at the
# root of the repository is, and is made on the first call: from PyPI, on Linux without a GPU with the CPU build of
# torch. Later calls only compare a file. A .venv whose installation was interrupted is made anew.
#
#   PYTHON           the Python (3.11 or newer) to make .venv with
#   TORCH_BUILD      auto (default: by whether there is an NVIDIA GPU), cpu or cuda
#   TORCH_INDEX_URL  where to look for the CPU build when pip's own sources do not have it

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
  # Sourced: all work is done in a process of its own, so that the caller's shell options stay as they are.
  _environment="$(bash "${BASH_SOURCE[0]}")" || return 1
  if [[ -f "$_environment/pyvenv.cfg" ]]; then
    export VIRTUAL_ENV="$_environment"
  fi
  unset PYTHONHOME
  export PATH="$_environment/bin:$PATH"
  if ! nvidia-smi -L >/dev/null 2>&1; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" # else DeepSpeed warns at every start that it found no GPU
  fi
  # DeepSpeed compiles its extensions here. In the shared default folder a build that was killed, in whatever project,
  # leaves a lock that hangs every later start.
  _root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_root/.cache/torch_extensions}"
  unset _environment _root
  return 0
fi

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
requirements="$root/requirements.txt"
venv="$root/.venv"
installed="$venv/.installed" # what .venv was made from; written last
unfinished="$root/.cache/setup.unfinished" # there while .venv is not whole; outside it, as making it clears it
torch_index="${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}"

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# torch_build: prints cpu (the build that only CPU wheels carry) or default (what PyPI has for this platform).
torch_build() {
  case "${TORCH_BUILD:-auto}" in
    cpu) echo cpu ;;
    cuda) echo default ;;
    auto)
      # The default build runs without a GPU too: where machines with and without one share .venv, it stays.
      if [[ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]] || nvidia-smi -L >/dev/null 2>&1 ||
        grep -q '^# torch build: default' "$installed" 2>/dev/null; then
        echo default
      else
        echo cpu
      fi
      ;;
    *) die "TORCH_BUILD=${TORCH_BUILD}: allowed are auto, cpu and cuda" ;;
  esac
}

# has_requirements PYTHON: succeeds where PYTHON has every requirement at its version. Reads metadata only: no imports.
has_requirements() {
  "$1" - "$requirements" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version

from packaging.requirements import Requirement

lines = (line.split("#")[0].strip() for line in open(sys.argv[1], encoding="utf-8"))
wanted = [Requirement(line) for line in lines if line]
ok = sys.version_info >= (3, 11) and all(
    package.specifier.contains(version(package.name), prereleases=True)
    for package in wanted
    if package.marker is None or package.marker.evaluate()
)
sys.exit(not ok)
PYTHON
}

is_cpu_build() {
  "$1" -c 'import sys; from importlib.metadata import version; sys.exit(not version("torch").endswith("+cpu"))'
}

# active_python: prints the `python` of the active environment, with shims and the like resolved.
active_python() {
  local python
  for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" python; do
    if [[ -n "$python" ]] && command -v "$python" >/dev/null 2>&1; then
      "$python" -c 'import os, sys; print(os.path.join(sys.prefix, "bin", "python"))' 2>/dev/null && return 0
    fi
  done
  return 1
}

# find_python: prints a Python that can make .venv. The user's `python3` comes first, if it is a version that the
# tests have run with; a newer one only where there is nothing else, since pinned packages may lack wheels for it.
find_python() {
  local newest candidate version found=""
  if [[ -n "${PYTHON:-}" ]]; then
    version="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
      die "PYTHON=$PYTHON does not run"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      die "PYTHON=$PYTHON is Python $version; 3.11 or newer is needed"
    command -v "$PYTHON"
    return
  fi
  for newest in 13 99; do
    for candidate in python3 python python3.13 python3.12 python3.11; do
      version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
      if ! "$candidate" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $newest))"; then
        [[ "$newest" == 13 ]] || found+=" $candidate is $version;"
      elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        [[ "$newest" == 13 ]] || found+=" $candidate ($version) cannot make environments (install python$version-venv);"
      else
        command -v "$candidate"
        return
      fi
    done
  done
  die "Python 3.11 or newer is needed, and none was found:${found:- there is no python3 on PATH;} install one, or set" \
    "PYTHON to it"
}

# run_pip ARGUMENT...: pip of .venv, with its output on stderr and an unreachable index given up after seconds.
run_pip() {
  "$venv/bin/python" -m pip --disable-pip-version-check "$@" --retries 1 --timeout 15 >&2
}

install_torch_cpu() {
  local wanted
  wanted="torch==$1+cpu"
  say "installing $wanted (200 MB)"
  # pip's own sources first: where they have the build, no further index is asked. What torch needs comes with the
  # other requirements: with --extra-index-url here, pip would look for each of them in that index too.
  if run_pip install --dry-run --no-deps --quiet "$wanted" 2>/dev/null; then
    run_pip install --no-deps "$wanted" || die "pip could not install $wanted (its messages are above)"
  elif ! run_pip install --no-deps --extra-index-url "$torch_index" "$wanted"; then
    die "cannot install $wanted: neither pip's own sources nor $torch_index have it; check the network, set" \
      "TORCH_INDEX_URL to a mirror of that index, or TORCH_BUILD=cuda to take the much larger build from PyPI"
  fi
}

# verify_torch VERSION BUILD: imports torch and checks that it is the one that was wanted.
verify_torch() {
  "$venv/bin/python" - "$1" "$2" >&2 <<'PYTHON'
import sys

import torch

version, build = sys.argv[1:]
if torch.__version__.split("+")[0] != version or (build == "cpu" and torch.version.cuda is not None):
    sys.exit(f"error: wanted torch {version} ({build} build), .venv has {torch.__version__}")
print(f"setup: torch {torch.__version__} works; CUDA " + ("available" if torch.cuda.is_available() else "not available"))
PYTHON
}

# make_venv BUILD: makes .venv, or brings one that is whole up to a changed requirements.txt.
make_venv() {
  local build="$1" python version
  version="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$requirements")"
  if [[ -e "$unfinished" ]]; then
    say "an earlier installation was interrupted: making .venv anew"
    rm -rf "$venv"
  fi
  if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$(find_python)"
    say "making $venv with $python (once; a few minutes)"
    touch "$unfinished"
    "$python" -m venv --clear "$venv" || die "$python cannot make an environment in $venv"
  fi
  touch "$unfinished"
  if [[ "$build" == cpu ]]; then
    install_torch_cpu "$version"
  elif grep -q '^# torch build: cpu' "$installed" 2>/dev/null; then
    say "replacing the CPU build of torch" # it satisfies torch==VERSION too, so pip would keep it
    run_pip uninstall --yes torch || die "pip could not remove the CPU build of torch"
  fi
  say "installing requirements.txt"
  run_pip install -r "$requirements" ||
    die "pip could not install requirements.txt into $venv (its messages are above); check the network and try again"
  if [[ "$build" == default ]] && nvidia-smi -L >/dev/null 2>&1 && is_cpu_build "$venv/bin/python"; then
    say "note: there is a GPU, but pip's own sources offer a CPU build of torch, and pip took that"
  fi
  verify_torch "$version" "$build" || die "torch does not work in $venv; remove that folder and try again"
  what_is_wanted "$build" >"$unfinished"
  mv "$unfinished" "$installed"
  say "done: $venv"
}

# what_is_wanted BUILD: prints what a finished .venv was made from.
what_is_wanted() {
  printf '# torch build: %s\n' "$1"
  cat "$requirements"
}

venv_is_ready() {
  [[ -x "$venv/bin/python" && ! -e "$unfinished" ]] && what_is_wanted "$1" | cmp -s - "$installed"
}

main() {
  local python build
  if python="$(active_python)" && [[ ! "$(dirname "$python")" -ef "$venv/bin" ]] && has_requirements "$python"; then
    if nvidia-smi -L >/dev/null 2>&1 && is_cpu_build "$python"; then
      say "note: there is a GPU, but the active environment's torch is a CPU build ($python)"
    fi
    dirname "$(dirname "$python")"
    return
  fi
  build="$(torch_build)"
  if ! venv_is_ready "$build"; then
    mkdir -p "$root/.cache"
    (
      # Of several set-ups at once one does the work. Without `flock` (macOS) they are not kept apart.
      if command -v flock >/dev/null 2>&1; then
        flock --nonblock 9 || {
          say "waiting for another set-up"
          flock 9
        }
      fi
      venv_is_ready "$build" || make_venv "$build"
    ) 9>"$root/.cache/setup.lock"
  fi
  echo "$venv"
}

main
