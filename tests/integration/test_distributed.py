"""The same command with one process, several, and several machines: the same routers, or one clear line."""

import json
import socket
import threading

import pytest
import torch
from launches import BOUND, LINUX, ROOT, ROUTERS, assert_same_result, free_port, launcher
from safetensors.torch import load_file

pytestmark = LINUX
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "way",
    [
        *("row_by_row", "ddp", "deepspeed_zero1"),
        *(pytest.param(f"deepspeed_{stage}", marks=SLOW) for stage in ("zero2", "zero3", "zero3_offload")),
    ],
)
def test_the_same_routers_and_results_however_the_batch_is_cut(workplace, finetune, trained, way):
    """Neither 21 training rows nor 7 held-out ones divide into batches, nor over processes."""
    if way == "row_by_row":
        finetune(workplace / way, "--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 1)
    else:
        arguments = ("--per_device_eval_batch_size", 2)
        finetune(workplace / way, *arguments, launcher=launcher(way), DS_ACCELERATOR="cpu")
    assert_same_result(trained[0], workplace / way)
    (checkpoint,) = (workplace / way).glob("checkpoint-3")
    assert sum(path.stat().st_size for path in checkpoint.rglob("*")) < 100_000


@SLOW
@pytest.mark.parametrize("granularity", ["attn_token", "mlp_sequence", "block_token"])
@pytest.mark.parametrize("way", ["ddp", "deepspeed_zero3"])
def test_other_granularities(workplace, finetune, tmp_path, way, granularity):
    arguments = ("--granularity", granularity, "--per_device_train_batch_size", 2)
    finetune(tmp_path / "one", *arguments)
    finetune(tmp_path / "other", *arguments, launcher=launcher(way), DS_ACCELERATOR="cpu")
    assert_same_result(tmp_path / "one", tmp_path / "other")


@SLOW
def test_zero3_in_bfloat16_saves_the_float32_routers_of_the_optimizer(workplace, finetune, tmp_path, trained):
    finetune(tmp_path / "out", "--bf16", "true", launcher=launcher("deepspeed_zero3"), DS_ACCELERATOR="cpu")
    routers = load_file(tmp_path / "out" / ROUTERS)
    assert all(weight.dtype == torch.float32 for weight in routers.values())
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in routers.values())


@SLOW
@pytest.mark.parametrize("way", ["ddp_multinode", "deepspeed_zero1", "deepspeed_multinode"])
def test_two_machines_with_one_process_each(workplace, finetune, trained, tmp_path, way):
    port, results = free_port(), {}

    def start(rank):
        machine = ("--num_machines", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1")
        command = launcher(way, port=port, machine=machine)
        results[rank] = finetune(tmp_path / "out", check=False, launcher=command, DS_ACCELERATOR="cpu")

    machines = [threading.Thread(target=start, args=(rank,)) for rank in (0, 1)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert [results[rank].returncode for rank in (0, 1)] == [0, 0], results[0].stderr + results[1].stderr
    assert_same_result(trained[0], tmp_path / "out")


@SLOW
def test_a_trained_backbone_is_sharded_and_gives_the_same_checkpoint(workplace, finetune, tmp_path):
    arguments = ("--router_only", "false", "--learning_rate", 1e-3)
    finetune(tmp_path / "one", *arguments)
    finetune(tmp_path / "zero2", *arguments, launcher=launcher("deepspeed_zero2"), DS_ACCELERATOR="cpu")
    one, other = (load_file(tmp_path / name / "base.safetensors") for name in ("one", "zero2"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=10 * BOUND)


class TestMistakes:
    """One clear line on stderr, a non-zero exit code, and nothing left under the output's name."""

    def refused(self, finetune, directory, message, *arguments, launcher, **environment):
        result = finetune(directory, *arguments, check=False, launcher=launcher, **environment)
        assert result.returncode == 1, result.stderr
        assert "Traceback" not in result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert message in line
        assert not directory.exists()

    @pytest.mark.parametrize(
        ("way", "options", "message"),
        [
            ("nowhere", {}, "nowhere.yaml: no such file"),
            ("ddp", {"processes": 1}, "MULTI_GPU is for two processes or more"),
            ("cpu", {}, "it is for one process"),
            ("ddp", {"processes": 3, "machine": ("--num_machines", 2)}, "does not divide over 2 machines"),
            ("deepspeed_zero1", {"config": ROOT / "configs/deepspeed/zero1.json"}, "not an accelerate config"),
        ],
    )
    def test_a_launch_that_cannot_be(self, finetune, tmp_path, way, options, message):
        self.refused(finetune, tmp_path / "out", message, launcher=launcher(way, **options))

    def test_a_port_in_use(self, finetune, tmp_path):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            self.refused(finetune, tmp_path / "out", f"port {port} is in use", launcher=launcher("ddp", port=port))

    @SLOW
    @pytest.mark.parametrize(
        ("change", "arguments", "message"),
        [
            (("MULTI_GPU", "MULTI_CPU"), (), "2 processes were asked for and 1 started"),
            (("", ""), ("--use_cpu", "false"), "each would train alone"),
        ],
    )
    def test_launches_that_would_train_apart_in_silence(self, finetune, tmp_path, change, arguments, message):
        config = tmp_path / "config.yaml"
        config.write_text((ROOT / "configs/accelerate/ddp.yaml").read_text().replace(*change))
        self.refused(finetune, tmp_path / "out", message, *arguments, launcher=launcher("", config=config))

    @SLOW
    def test_deepspeed_that_would_be_left_out_in_silence(self, finetune, tmp_path):
        result = finetune(
            *(tmp_path / "out",),
            check=False,
            launcher=launcher("deepspeed_zero1"),
            ACCELERATE_USE_CPU="true",
            DS_ACCELERATOR="cpu",
        )
        assert result.returncode == 1
        assert "unset ACCELERATE_USE_CPU" in result.stderr

    @SLOW
    def test_machines_that_disagree_about_their_number_of_processes(self, finetune, tmp_path):
        port, results = free_port(), {}

        def start(rank, processes):
            machine = ("--num_machines", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.1")
            command = launcher("ddp_multinode", processes, port=port, machine=machine)
            results[rank] = finetune(tmp_path / "out", check=False, launcher=command)

        machines = [threading.Thread(target=start, args=(rank, 2 * rank + 2)) for rank in (0, 1)]
        for machine in machines:
            machine.start()
        for machine in machines:
            machine.join()
        for rank, asked in ((0, 2), (1, 4)):
            assert results[rank].returncode == 1
            assert "Traceback" not in results[rank].stderr
            assert f"{asked} processes were asked for and 3 started" in results[rank].stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("granularity", "way"),
    [
        ("attn_sequence", "ddp"),
        pytest.param("attn_token", "ddp", marks=SLOW),
        pytest.param("attn_sequence", "deepspeed_zero1", marks=SLOW),
        pytest.param("attn_token", "deepspeed_zero3", marks=SLOW),
        pytest.param("block_sequence", "deepspeed_zero3", marks=SLOW),
    ],
)
def test_the_default_recipe_gives_the_same_routers_and_thresholds(workplace, finetune, tmp_path, granularity, way):
    arguments = ("--granularity", granularity, "--per_device_train_batch_size", 2)
    finetune(tmp_path / "one", *arguments, hinge=False)
    finetune(tmp_path / "other", *arguments, hinge=False, launcher=launcher(way), DS_ACCELERATOR="cpu")
    assert_same_result(tmp_path / "one", tmp_path / "other", bound=2e-5)  # the rows' sums differ by rounding
    one, other = (json.loads((tmp_path / name / "config.json").read_text())["mod"] for name in ("one", "other"))
    assert other["threshold"] == pytest.approx(one["threshold"], abs=1e-4)
    assert len(set(one["threshold"])) > 1
