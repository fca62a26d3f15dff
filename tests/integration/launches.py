"""Launches of the training command with several processes, as the tests start them."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ROUTERS, SUBSTITUTES = "routers.safetensors", "substitutes.safetensors"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed and gloo launches are tested on Linux")
BOUND = 2e-6
"""Largest difference of a router's weight between ways to run the same three steps in float32; weights are about 0.02.

The sums are the same but for their order, and Adam divides by gradients that may be small.
"""
RATE_OF_MAPS = 22
"""How many times faster substitutes learn in these runs, and drift apart, than routers."""


def launcher(way: str, processes: int = 2, port: int = 0, config: Path | None = None, machine: tuple = ()) -> list:
    """The command that precedes the training script: `way` is the name of a config in configs/accelerate."""
    config = config or ROOT / f"configs/accelerate/{way}.yaml"
    command = [sys.executable, ROOT / "entrypoints/launch.py", "--config_file", config]
    return [*command, "--num_processes", processes, "--main_process_port", port, *machine]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def logged_losses(directory: Path) -> list[float]:
    """The losses of all steps."""
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_result(expected: Path, directory: Path, bound: float = BOUND) -> None:
    """Compare routers, substitutes, losses and held-out measures of two finished runs."""
    for file, limit in ((ROUTERS, bound), (SUBSTITUTES, RATE_OF_MAPS * bound)):
        one, other = load_file(expected / file), load_file(directory / file)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=limit)
    assert logged_losses(directory) == pytest.approx(logged_losses(expected), rel=1e-5)
    results = [json.loads((path / "results.json").read_text())["held_out"] for path in (expected, directory)]
    for kind, name in (("dense", "dense_loss"), ("routed", "eval_loss"), ("routed", "eval_capacity")):
        assert results[0][kind][name] == pytest.approx(results[1][kind][name], rel=1e-4)


def assert_same_routers(expected: Path, directory: Path) -> None:
    """Compare the routers of two finished runs to the bit."""
    one, other = load_file(expected / ROUTERS), load_file(directory / ROUTERS)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
