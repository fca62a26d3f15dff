"""Which device a command runs on. A GPU that is there and can't be used is an error, no reason to take the CPU."""

import os
import subprocess

from .errors import UserError


def choose_device(asked: str | None = None) -> str:
    """Return the device to run on: what was asked for, or `cuda` where the machine has a GPU, or `cpu`.

    Args:
        asked: `cpu`, `cuda`, `cuda:1` and the like; None for whatever there is.

    Raises:
        UserError: there is no such device, or a GPU is there that torch can't use; the message says why.
    """
    import torch

    if asked is not None:
        try:
            kind = torch.device(asked).type
        except RuntimeError:
            kind = None
        if kind not in ("cpu", "cuda"):
            raise UserError(f"device {asked!r} is not one of cpu, cuda, cuda:0, cuda:1 and so on")
        if kind == "cpu":
            return asked
    visible = visible_gpus()
    if asked is None and not torch.cuda.is_available() and not visible:
        return "cpu"
    device = asked or f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    reason = _why_unusable(device)
    if reason is None:
        return asked or "cuda"
    if asked is not None and not visible and not torch.cuda.is_available():
        reason = f"this machine has no GPU, or CUDA_VISIBLE_DEVICES hides it; {reason}"
    way_out = "hide it with CUDA_VISIBLE_DEVICES= (nothing) to run on the CPU"
    raise UserError(f"{device}: torch cannot use the GPU: {reason}; mend that, or {way_out}")


def visible_gpus() -> int:
    """Return how many GPUs `nvidia-smi` lists that `CUDA_VISIBLE_DEVICES` does not hide."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    there = sum(line.startswith("GPU ") for line in listed.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or there == 0:
        return there
    return sum(name.strip()[:1].isalnum() for name in chosen.split(","))  # -1 hides all


def _why_unusable(device: str) -> str | None:
    """Return why a kernel on the device fails, in one line, or None where it runs."""
    import torch

    if torch.version.cuda is None and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} is a build without CUDA (another comes with `rm -rf .venv; TORCH_BUILD=cuda "
            "bash scripts/setup_env.sh`)"
        )
    try:
        if float(torch.ones(2, device=device).mul(2).sum()) == 4.0:
            return None
    except (RuntimeError, AssertionError) as error:  # of the driver's version, the card's age, a card in use
        return " ".join(str(error).split())[:300]
    return "a kernel gave a wrong result"
