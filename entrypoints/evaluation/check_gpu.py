#!/usr/bin/env python3
"""Check on a device what was worked out without one; `scripts/check_gpu.sh` starts it.

    bash scripts/check_gpu.sh
    bash scripts/check_gpu.sh path/to/checkpoint --pieces numbers waits --device cpu

Each finding is a figure and the bound that it has to keep, or says why it could not be measured here. They are printed
as they come, and written as JSON. The exit code is 1 when a bound was missed.
"""

import argparse
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.io.devices import choose_device
from utils.io.errors import UserError, run_command

PIECES = ("numbers", "waits", "memory", "decode", "collective", "resume")
SAMPLE = ROOT / "data/sample/alpaca/alpaca_data.json"
CLOSE = 1e-3
"""How far routers may lie apart after a kill and a resume on a GPU, whose sums are in no fixed order."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="MoD checkpoint that is trained a little, and decodes")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for what that can show (cuda)")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES, help="what is checked (everything)")
    parser.add_argument(
        "--shape", type=Path, default=ROOT / "ckpt/llama3-8b-instruct-mod", help="folder whose config.json memory is of"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of the row that memory is of, and of contexts (2048)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="of decode (1 8 64)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], help="of the numbers")
    parser.add_argument("--train_rows", type=int, default=64, help="rows of the training that is killed (64)")
    parser.add_argument("--output", type=Path, help="JSON file (outputs/check_gpu/TIME.json)")
    arguments = parser.parse_args()
    for name in ("tokens", "train_rows"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    return arguments


def main() -> int:
    """Run the pieces, print and write what they find."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import torch
    import transformers

    from utils.evaluation.device_checks import Finding
    from utils.io.files import dated_name, write_json

    device = torch.device(choose_device(arguments.device))
    on_gpu = device.type == "cuda"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    machine = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "versions": versions | {"transformers": transformers.__version__},
    }
    print(json.dumps(machine), flush=True)
    findings = []
    for piece in arguments.pieces:
        start = time.monotonic()
        for finding in globals()[f"check_{piece}"](arguments, device):
            findings.append(finding)
            figure = "-" if finding.figure is None else f"{finding.figure:.4g}"
            bound = "" if finding.bound is None else f" (at most {finding.bound:.4g})"
            print(f"{'ok  ' if finding.passed else 'MISS'} {finding.name}: {figure}{bound} {finding.note}", flush=True)
        findings.append(Finding(f"seconds of {piece}", time.monotonic() - start))
    output = arguments.output or ROOT / "outputs/check_gpu" / dated_name("check", ".json")
    missed = [finding.name for finding in findings if not finding.passed]
    write_json(output, {**machine, "missed": missed, "findings": [finding.to_dict() for finding in findings]})
    print(output)
    return 1 if missed else 0


def check_numbers(arguments, device):
    """Sparse execution against the specification, on tiny models."""
    from utils.evaluation.device_checks import check_numbers as check

    return check(device, arguments.dtypes)


def check_waits(arguments, device):
    """A training micro-step and a decode step wait for nothing."""
    import torch

    from utils.evaluation.device_checks import Finding, check_decode_waits, tiny_model, waits
    from utils.pipeline.batches import SupervisedBatches
    from utils.pipeline.customized_trainer import freeze_backbone
    from utils.pipeline.step_benchmark import StepBenchmark

    ids = torch.ones(2, 24, dtype=torch.int64)
    batch = SupervisedBatches(lambda rows: {"input_ids": ids, "attention_mask": ids, "labels": ids})([])
    for granularity in ("attn_sequence", "block_token"):
        model = tiny_model(granularity, torch.float32, "sdpa", device)
        freeze_backbone(model)
        steps = StepBenchmark(model, batch)
        for name in ("ours", "default_recipe"):
            steps.steps[name]()
            waited, note = waits(device, steps.steps[name])
            yield Finding(f"waits in a training micro-step, {granularity} {name}", waited, 0.0, note)
    yield from check_decode_waits(device)


def check_memory(arguments, device):
    """The peak of a training step at a real shape, beside what was worked out."""
    from utils.evaluation.device_checks import Finding
    from utils.evaluation.timing import peak_memory
    from utils.model.checkpoint import make_settings, read_config
    from utils.pipeline.memory import Step, micro_step, model_of, step_bytes

    config = read_config(arguments.shape)
    settings = make_settings(config)
    step = Step(rows=1, tokens=arguments.tokens)
    worked_out = step_bytes(config, settings, step)["activations"]
    model = model_of(config, settings, step, device)
    run = micro_step(model, step)
    run()
    peak = peak_memory(device, run)
    note = f"{peak / 1e9:.3f} GB, worked out {worked_out / 1e9:.3f} GB"
    yield Finding(
        f"activations of a training step, {arguments.shape.name}, to what was worked out", peak / worked_out, 1.1, note
    )


def check_decode(arguments, device):
    """Decode steps beside the dense base."""
    import torch

    from utils.evaluation.device_checks import check_decode_speed
    from utils.model.checkpoint import load_mod_model

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_mod_model(arguments.checkpoint, dtype=dtype).to(device).eval()
    return check_decode_speed(model, arguments.batches, arguments.tokens)


def check_collective(arguments, device):
    """A collective of one process: the library is there and works."""
    import torch
    import torch.distributed as dist

    from utils.evaluation.device_checks import Finding

    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            values = torch.arange(4.0, device=device)
            dist.all_reduce(values)
            yield Finding(
                f"all_reduce over {backend} is off by", float((values.cpu() - torch.arange(4.0)).abs().max()), 0.0
            )
        finally:
            dist.destroy_process_group()


def check_resume(arguments, device):
    """The training command, killed after its first checkpoint and started again, beside one that was left alone."""
    from safetensors.torch import load_file

    from utils.evaluation.device_checks import Finding

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train(arguments, device, folder / "whole").wait()
        process = train(arguments, device, folder / "killed")
        while process.poll() is None and not list((folder / "killed").glob("checkpoint-*/manifest.json")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        train(arguments, device, folder / "killed").wait()
        try:
            routers = [load_file(folder / name / "routers.safetensors") for name in ("whole", "killed")]
        except FileNotFoundError as error:
            raise UserError(f"the training command left no routers: {error}") from None
        difference = max(float((routers[0][name] - routers[1][name]).abs().max()) for name in routers[0])
        scale = max(float(weight.abs().max()) for weight in routers[0].values())
        note = "" if killed else "it had ended before it could be killed"
        yield Finding(
            "routers after a kill and a resume, difference to their largest weight", difference / scale, CLOSE, note
        )
        identity = json.loads((folder / "killed/run.json").read_text())["identity"]
        yield Finding("training on another device", float(identity["device"] != device.type), 0.0, identity["device"])


def train(arguments, device, output_dir) -> subprocess.Popen:
    """Start a short training; its output goes where this command's errors go."""
    command = [
        *(sys.executable, ROOT / "entrypoints/finetune/finetune_mod.py", "--model_name_or_path", arguments.checkpoint),
        *("--train_file", SAMPLE, "--output_dir", output_dir, "--max_train_samples", arguments.train_rows),
        *("--max_eval_samples", 4, "--max_seq_length", 128, "--global_batch_size", 8, "--max_use_prompts", 0),
        *("--per_device_train_batch_size", 8, "--save_steps", 1, "--calibration_rows", 0, "--report_to", "none"),
        *("--use_cpu", str(device.type == "cpu").lower(), "--substitute", "none", "--capacity_control", "hinge"),
    ]
    return subprocess.Popen([str(part) for part in command], stdout=sys.stderr, env=os.environ.copy())


if __name__ == "__main__":
    run_command(main)
