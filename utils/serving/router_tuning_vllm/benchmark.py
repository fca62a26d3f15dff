"""vLLM's own load generator against a routed checkpoint and its dense base in turn, in real servers.

python -m router_tuning_vllm.benchmark path/to/output --output outputs/serving.json

Both servers are up all the time and idle in turn; each load is run on both one after the other, and what is compared
are such pairs. Besides what clients see, the processor time of the process that computes is counted: on a shared CPU
other programs stretch it far less than the clock on the wall.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import VLLM_VERSION
from .check import INDEX_FILE, SINGLE_FILE, CheckpointProblem, check_checkpoint

COMPARED = {
    "processor_time": "processor time of the worker (s)",
    "output_throughput": "answer tokens/s",
    "median_ttft_ms": "time to first token (ms)",
    "median_e2el_ms": "latency (ms)",
}
"""What is compared; each is a median or a sum over a run."""

Pairs = list[tuple[dict[str, float], dict[str, float]]]
"""Figures of the dense and of the routed server, for each repeat."""


@dataclass(frozen=True)
class Load:
    """One run of the load generator: requests, of so many tokens in and out, at a concurrency or at a rate."""

    name: str
    requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int | None = None
    rate: float | None = None


def loads_of(scale: float, rate: float) -> list[Load]:
    """Return the loads, with as many times their requests as `scale` says."""

    def times(requests: int) -> int:
        return max(1, round(requests * scale))

    return [
        Load("prefill of 480", times(8), 480, 1, concurrency=1),
        Load("1 at a time", times(8), 96, 32, concurrency=1),
        Load("8 at a time", times(24), 96, 32, concurrency=8),
        Load("32 at a time", times(64), 96, 32, concurrency=32),
        Load(f"{rate:g} a second", times(24), 96, 32, rate=rate),
    ]


def main() -> int:
    """Measure, print a table, write JSON; its path is the last line."""
    parser = argparse.ArgumentParser(prog="benchmark_serving.sh", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="routed checkpoint")
    parser.add_argument("--capacity", type=float, help="share to execute (the checkpoint's own)")
    parser.add_argument("--execution", choices=("skip", "masked"), help="as of serve.sh")
    parser.add_argument("--text", type=Path, required=True, help="text or JSON that prompts are cut out of")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second of the last load")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs of each load, after one to warm up")
    parser.add_argument("--scale", type=float, default=1.0, help="as many times the requests of each load")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--serve", default="--dtype float32 --enforce-eager", help="vLLM's arguments for both servers, in one word"
    )
    arguments = parser.parse_args()
    try:
        check_checkpoint(arguments.checkpoint)
        if arguments.repeats < 1 or arguments.scale <= 0 or arguments.rate <= 0:
            raise CheckpointProblem("--repeats must be at least 1, and --scale and --rate above 0")
        if not arguments.text.is_file():
            raise CheckpointProblem(f"--text {arguments.text}: no such file")
        return measure(arguments)
    except CheckpointProblem as error:
        print("error:", error, file=sys.stderr)
        return 1


def measure(arguments: argparse.Namespace) -> int:
    """Run all loads on both servers and report."""
    options = arguments.serve.split()
    options += ["--no-enable-prefix-caching"]  # else a repeat would find its prompts computed
    own = []
    for name in ("capacity", "execution"):
        if getattr(arguments, name) is not None:
            own += [f"--{name}", str(getattr(arguments, name))]
    loads = loads_of(arguments.scale, arguments.rate)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        dense = Path(folder) / "dense"
        make_dense(Path(arguments.checkpoint), dense)
        starting = [
            Server("dense", dense, ["vllm.entrypoints.launchers.api_server.entry", "--model", str(dense)], options),
            Server("routed", dense, ["router_tuning_vllm.serve", arguments.checkpoint, *own], options),
        ]
        servers = [stack.enter_context(server) for server in starting]
        prompts = Path(folder) / "prompts.jsonl"
        results = []
        for load in loads:
            write_prompts(arguments.text, dense, load, prompts)
            pairs: Pairs = []
            for repeat in range(arguments.repeats + 1):
                pair = tuple(server.run(load, prompts, Path(folder)) for server in servers)
                if repeat:  # the first one warms up
                    pairs.append(pair)
                print(f"{load.name}: {repeat} of {arguments.repeats}", file=sys.stderr)
            results.append({"load": asdict(load), **summarize(pairs), "pairs": pairs})
    report = {
        "kind": "serving",
        "checkpoint": str(arguments.checkpoint),
        "options": [*own, *options],
        "vllm": VLLM_VERSION,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "loads": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_name(f".{arguments.output.name}.{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(arguments.output)
    print(table(report))
    print(arguments.output)
    return 0


def summarize(pairs: Pairs) -> dict[str, Any]:
    """Return of each figure the medians, and the median, lowest and highest ratio of routed to dense over the pairs."""
    figures = {}
    for name in COMPARED:
        ratios = [routed[name] / dense[name] for dense, routed in pairs if dense[name]]
        figures[name] = {
            "dense": statistics.median(dense[name] for dense, _ in pairs),
            "routed": statistics.median(routed[name] for _, routed in pairs),
            "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)} if ratios else None,
        }
    return {"executed": statistics.fmean(routed["executed"] for _, routed in pairs), "figures": figures}


def table(report: dict[str, Any]) -> str:
    """Return the results as a Markdown table: routed to dense, with the span over repeats."""
    lines = [
        "| load | executed | " + " | ".join(f"{title}: dense, routed, ratio" for title in COMPARED.values()) + " |",
        "|---" * (2 + len(COMPARED)) + "|",
    ]
    for result in report["loads"]:
        cells = [result["load"]["name"], f"{result['executed']:.2f}"]
        for name in COMPARED:
            figure = result["figures"][name]
            ratio = figure["ratio"]
            span = "" if ratio is None else f", {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            cells.append(f"{figure['dense']:.4g}, {figure['routed']:.4g}{span}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_dense(checkpoint: Path, folder: Path) -> None:
    """Make a checkpoint of the dense base: links to the weights, and an index without routers and substitutes."""
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for name in ("mod", "auto_map", "mod_units"):
        config.pop(name, None)
    config["model_type"] = config["model_type"].removeprefix("mod_")
    config["architectures"] = [config["architectures"][0].removeprefix("MoD")]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not (checkpoint / INDEX_FILE).is_file():
        raise CheckpointProblem(f"{checkpoint}: its base's weights are not apart from its routers ({SINGLE_FILE})")
    index = json.loads((checkpoint / INDEX_FILE).read_text(encoding="utf-8"))
    added = {name for name in index["weight_map"] if "router." in name or "substitute." in name}
    kept = {name: place for name, place in index["weight_map"].items() if name not in added}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": kept}), encoding="utf-8")
    for name in set(kept.values()):
        (folder / name).symlink_to((checkpoint / name).resolve())
    for path in checkpoint.glob("*"):
        if path.name.startswith(("token", "special_tokens", "vocab", "merges", "chat_template", "generation_config")):
            shutil.copy(path, folder / path.name)


def write_prompts(text: Path, folder: Path, load: Load, path: Path) -> None:
    """Cut prompts of a load's length out of a text, evenly spread over it, and write them for the load generator."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    spare = len(tokens) - load.input_tokens
    if spare < load.requests:
        raise CheckpointProblem(f"--text {text}: has {len(tokens)} tokens, too few for {load.requests} prompts")
    with path.open("w", encoding="utf-8") as file:
        for number in range(load.requests):
            start = spare * number // load.requests
            prompt = tokenizer.decode(tokens[start : start + load.input_tokens])
            print(json.dumps({"prompt": prompt, "output_tokens": load.output_tokens}), file=file)


class Server:
    """A server in a process of its own, from `__enter__` to `__exit__`.

    Args:
        name: `dense` or `routed`.
        tokenizer: a folder that has it, of a model type that needs no code of its own.
        command: the module that starts it, and its arguments.
        options: vLLM's.
    """

    def __init__(self, name: str, tokenizer: Path, command: list[str], options: list[str]):
        self.name, self.tokenizer = name, str(tokenizer)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "served"]
        self.command = [sys.executable, "-m", *command, *options, *address]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"serving-{self.name}-", suffix=".log", delete=False)
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        while not self._answers():
            if self.process.poll() is not None:
                raise CheckpointProblem(f"the {self.name} server ended while it started; its log is {self.log.name}")
            time.sleep(1)
        return self

    def __exit__(self, *error) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()
        os.unlink(self.log.name)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def processor_time(self) -> float:
        """Return the seconds of processor time of the processes that compute."""
        import psutil

        family = psutil.Process(self.process.pid).children(recursive=True)
        names = {process.pid: " ".join(process.cmdline()) for process in family}
        workers = [process for process in family if "Worker" in names[process.pid]]
        workers = workers or [process for process in family if "EngineCore" in names[process.pid]]
        return sum(sum(process.cpu_times()[:2]) for process in workers)

    def counted(self) -> tuple[float, float]:
        """Return inputs seen and executed by all routers so far."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        names = ("vllm:routing_inputs_total{", "vllm:routing_inputs_executed_total{")
        seen, executed = (sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in names)
        return seen, executed

    def run(self, load: Load, prompts: Path, folder: Path) -> dict[str, float]:
        """Run a load, and return the figures of `COMPARED`, and the share executed."""
        path = folder / "result.json"
        command = [
            *(sys.executable, "-m", "router_tuning_vllm.load", "--backend", "openai", "--base-url", self.url),
            *("--model", "served", "--tokenizer", self.tokenizer),
            *("--dataset-name", "custom", "--dataset-path", str(prompts), "--custom-output-len", "-1"),
            *("--skip-chat-template", "--disable-shuffle", "--num-prompts", str(load.requests)),
            *("--ignore-eos", "--temperature", "0", "--disable-tqdm", "--percentile-metrics", "ttft,tpot,e2el"),
            *("--save-result", "--result-dir", str(folder), "--result-filename", path.name),
            *(("--max-concurrency", str(load.concurrency)) if load.concurrency else ()),
            *(("--request-rate", str(load.rate)) if load.rate else ()),
        ]
        time_before, (seen_before, executed_before) = self.processor_time(), self.counted()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CheckpointProblem(f"the load generator failed: {done.stderr.strip().splitlines()[-1:]}")
        used = self.processor_time() - time_before
        time.sleep(0.2)  # the server reads the counts once it has answered
        seen, executed = self.counted()
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["completed"] != load.requests:
            raise CheckpointProblem(f"{load.requests - result['completed']} of {load.requests} requests failed")
        share = (executed - executed_before) / (seen - seen_before) if seen > seen_before else 1.0
        return {name: result.get(name, 0.0) for name in COMPARED} | {"processor_time": used, "executed": share}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
