"""The device a command takes: what there is, what was asked for, and never the CPU in place of a GPU that is there."""

import os

import pytest
import torch
from simulated_gpu import simulated_gpus

from utils.io import devices
from utils.io.devices import choose_device, visible_gpus
from utils.io.errors import UserError
from utils.pipeline.arguments import RouterTrainingArguments


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """An `nvidia-smi` that lists two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/bash\necho 'GPU 0: one'\necho 'GPU 1: other'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: 0)


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0,1", 2), ("1", 1), ("", 0), ("-1", 0), ("GPU-a1b2", 1)])
def test_gpus_that_are_hidden_do_not_count(two_gpus, monkeypatch, visible, count):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == count


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can use a GPU")
class TestWithoutCUDA:
    def test_without_a_gpu_it_is_the_cpu(self, no_gpu):
        assert choose_device() == "cpu"
        assert choose_device("cpu") == "cpu"

    def test_a_gpu_that_torch_cannot_use_is_refused_with_the_reason(self, two_gpus, monkeypatch):
        for asked in (None, "cuda", "cuda:1"):
            with pytest.raises(UserError, match=r"build without CUDA.*CUDA_VISIBLE_DEVICES="):
                choose_device(asked)
        assert choose_device("cpu") == "cpu"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_device() == "cpu"

    def test_a_gpu_that_is_asked_for_and_not_there_is_refused(self, no_gpu):
        with pytest.raises(UserError, match=r"cuda: .*this machine has no GPU"):
            choose_device("cuda")

    def test_training_does_not_go_to_the_cpu_in_silence(self, two_gpus, tmp_path):
        with pytest.raises(UserError, match="torch cannot use the GPU"):
            RouterTrainingArguments(output_dir=str(tmp_path))
        RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", ""])
def test_what_is_no_device_is_named(name):
    with pytest.raises(UserError, match="is not one of cpu, cuda"):
        choose_device(name)


def test_a_gpu_that_works_is_taken(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with simulated_gpus(2):
        assert choose_device() == "cuda"
        assert choose_device("cuda:1") == "cuda:1"


def test_a_gpu_whose_kernels_fail_is_refused_with_what_it_said(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(torch, "ones", fail)
    with simulated_gpus(), pytest.raises(UserError, match="no kernel image is available for execution"):
        choose_device()
