"""The checks that await a GPU, on a CPU and on a simulated one: they pass where all is right, and fail elsewhere."""

import pytest
import torch
from simulated_gpu import simulated_gpus

from utils.evaluation import device_checks
from utils.evaluation.device_checks import (
    Finding,
    check_decode_speed,
    check_decode_waits,
    check_numbers,
    tiny_model,
    waits,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_finding_passes_within_its_bound_and_where_it_could_not_be_measured():
    assert Finding("a", 1.0, 1.0).passed
    assert not Finding("a", 1.1, 1.0).passed
    assert not Finding("a", float("inf"), 1.0).passed
    assert not Finding("a", float("nan"), 1.0).passed
    assert Finding("a", None, 1.0, "no such kernel").to_dict()["passed"]


def test_numbers_are_those_of_the_specification_on_a_cpu(monkeypatch):
    monkeypatch.setattr(device_checks, "ALL_GRANULARITIES", ("attn_sequence", "expert_token"))
    findings = check_numbers(CPU, ["float32"], ["sdpa", "flash_attention_2"])
    assert [finding.name for finding in findings if not finding.passed] == []
    assert len(findings) == 5
    assert findings[-1].figure is None


def test_wrong_numbers_are_missed(monkeypatch):
    monkeypatch.setattr(device_checks, "ALL_GRANULARITIES", ("mlp_token",))
    monkeypatch.setitem(device_checks.BOUNDS, torch.float32, 0.0)
    assert not all(finding.passed for finding in check_numbers(CPU, ["float32"], ["sdpa"]))


@pytest.mark.slow
def test_numbers_are_those_of_the_specification_on_a_simulated_gpu():
    with simulated_gpus():
        findings = check_numbers(GPU, ["float32"], ["sdpa"])
    assert [(finding.name, finding.note) for finding in findings if not finding.passed] == []


def test_waiting_is_seen_and_a_decode_step_does_none():
    with simulated_gpus():
        values = torch.ones(3, device=GPU)
        assert waits(GPU, values.sum) == (0.0, "")
        figure, note = waits(GPU, values.tolist)
        assert figure == 1.0
        assert note
        assert not torch.cuda.get_sync_debug_mode()
    assert waits(CPU, values.tolist)[0] is None


@pytest.mark.slow
def test_decode_steps_wait_for_nothing_on_a_simulated_gpu():
    with simulated_gpus():
        findings = check_decode_waits(GPU)
    assert [(finding.name, finding.note) for finding in findings if not finding.passed] == []
    assert all(finding.figure == 0.0 for finding in findings)


@pytest.mark.parametrize("granularity", ["block_sequence", "mlp_token"])
def test_decode_is_timed_beside_the_bytes_that_it_reads(granularity):
    model = tiny_model(granularity, torch.float32, "sdpa", CPU)
    findings = check_decode_speed(model, batches=[1, 4], context=8, steps=2)
    assert len(findings) == 6
    assert all(finding.figure > 0 for finding in findings)
    assert "by the bytes" in findings[2].note
