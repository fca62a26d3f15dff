"""The server as a user has it: started by the launcher, asked by the `openai` client, watched, stopped."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.serve
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Served:
    """A server in a process of its own.

    Args:
        checkpoint: what it serves.
        folder: for its log.
        options: further arguments.
    """

    def __init__(self, checkpoint, folder, *options):
        self.port, self.log = free_port(), folder / "server.log"
        command = [sys.executable, "-m", "router_tuning_vllm.serve", str(checkpoint), "--enforce-eager"]
        command += ["--port", str(self.port), "--max-model-len", "1024", "--served-model-name", "tiny", *options]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOG_STATS_INTERVAL": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 900
        while "try it" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    @property
    def url(self):
        return f"http://localhost:{self.port}"

    def metrics(self):
        """Return name with labels -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def metric(self, name, label=""):
        (value,) = [value for key, value in self.metrics().items() if key.startswith(name + "{") and label in key]
        return value

    def idle(self):
        """Wait until nothing is computed any more."""
        deadline = time.monotonic() + 120
        while self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") > 0:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint, smollm2_dir):
    """A tiny routed checkpoint with SmolLM2's tokenizer and three capacities."""
    import shutil

    capacities = [{"capacity": share, "threshold": [level] * 3} for share, level in ((0.3, 0.7), (0.9, 0.3))]
    folder = make_checkpoint("llama", "block_sequence", vocab_size=49152, capacities=capacities)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    served = Served(checkpoint, tmp_path_factory.mktemp("server"))
    yield served
    if served.process.poll() is None:
        os.killpg(served.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def test_the_printed_request_works(server):
    (line,) = [line for line in server.log.read_text().splitlines() if line.startswith("curl ")]
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] is not None


def test_chat_streaming_and_logprobs_say_the_same(client):
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert all(each.logprob <= 0 for each in whole.choices[0].logprobs.content)


def test_a_bad_request_is_answered_with_400_and_the_server_goes_on(client):
    from openai import BadRequestError

    for more, words in (
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"vllm_xargs": {"capacity": 0.1}}}, "0.3 to 0.9"),
        ({"extra_body": {"vllm_xargs": {"capacity": "half"}}}, "capacity"),
    ):
        with pytest.raises(BadRequestError, match=words):
            client.chat.completions.create(messages=MESSAGES, **(GREEDY | more))
    assert client.chat.completions.create(messages=MESSAGES, **GREEDY).choices


def test_a_request_has_the_capacity_that_it_asks_for(client, server):
    def executed(capacity):
        before = server.metrics()
        for number in range(4):
            messages = [{"role": "user", "content": f"{number} " * (7 + number)}]
            body = {"vllm_xargs": {"capacity": capacity}}
            client.chat.completions.create(messages=messages, extra_body=body, **GREEDY)
        server.idle()
        after = server.metrics()
        seen, executed = (
            sum(after[key] - before[key] for key in after if key.startswith(name + "{"))
            for name in ("vllm:routing_inputs_total", "vllm:routing_inputs_executed_total")
        )
        return executed / seen

    assert executed(0.3) < executed(0.9)


def test_the_share_executed_is_in_metrics_and_log(client, server):
    client.chat.completions.create(messages=MESSAGES, **GREEDY)
    server.idle()
    metrics = server.metrics()
    for layer in ("1", "3", "4"):
        seen = server.metric("vllm:routing_inputs_total", f'layer="{layer}"')
        executed = server.metric("vllm:routing_inputs_executed_total", f'layer="{layer}"')
        share = server.metric("vllm:routing_share_executed", f'layer="{layer}"')
        assert seen > 0
        assert share == pytest.approx(executed / seen)
    assert 0 < server.metric("vllm:routing_share_executed", 'layer="all"') < 1
    assert sum(key.startswith("vllm:routing_share_executed{") for key in metrics) == 4
    time.sleep(2.5)
    assert re.search(r"Routed inputs executed: [01]\.\d+ of all; by layer 1: ", server.log.read_text())


def test_a_client_that_goes_away_leaves_nothing_behind(client, server):
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, **(GREEDY | {"max_tokens": 900}))
    next(iter(stream))
    stream.close()
    server.idle()
    client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert server.metric("vllm:routing_requests_remembered") <= 2


def test_what_can_not_be_served_is_one_line(checkpoint, server, capsys, tmp_path):
    from router_tuning_vllm.serve import main

    speculative = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    for options, words in (
        (["--port", str(server.port)], f"port {server.port} is in use"),
        (["--port", "70000"], "--port 70000"),
        (["--capacity", "0.1"], "0.3 to 0.9"),
        (["--capacity", "lots"], "--capacity"),
        (["--pipeline-parallel-size", "2"], "pipeline parallelism"),
        (["--speculative-config", speculative], "speculative decoding"),
        (["--enable-lora"], "--merge_lora"),
        (["--quantization", "fp8"], "quantization"),
        (["--hf-overrides", '{"routing_capcity": 0.5}'], "routing_capcity"),
        (["--no-such-option"], "--no-such-option"),
    ):
        port = [] if "--port" in options else ["--port", str(free_port())]
        assert main([str(checkpoint), *options, *port]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: "), (options, last)
        assert words in last, (options, last)


@pytest.mark.slow
def test_a_thousand_requests_some_of_whose_clients_go_away(server):
    """No error, no leak, and the answers are those that prompts have when they are served alone."""
    import aiohttp
    import psutil

    words = re.findall(r"\w+", (ROOT / "README.md").read_text())
    prompts = [" ".join(words[(n * k) % len(words)] for k in range(1, 2 + n * 7 % 90)) for n in range(1000)]
    family = psutil.Process(server.process.pid).children(recursive=True)
    memory, remembered, answers = [], [], {}

    async def ask(session, number, alone=False):
        body = {"model": "tiny", "prompt": prompts[number], "max_tokens": 4 + number % 13, "temperature": 0}
        body |= {"logprobs": 2, "ignore_eos": True, "stream": number % 20 == 7 and not alone}
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            if body["stream"]:
                await response.content.readany()
                return None  # and away
            return (await response.json())["choices"][0]

    async def worker(session, numbers):
        for number in numbers:
            answers[number] = await ask(session, number)
            if number % 100 == 99:
                memory.append(sum(process.memory_info().rss for process in family))
                remembered.append(server.metric("vllm:routing_requests_remembered"))

    async def everything():
        timeout = aiohttp.ClientTimeout(total=3600)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            numbers = iter(range(1000))
            await asyncio.gather(*(worker(session, numbers) for _ in range(32)))
            server.idle()
            return {number: await ask(session, number, alone=True) for number in range(3, 1000, 40)}

    alone = asyncio.run(everything())
    assert len(answers) == 1000
    assert max(memory[5:]) - memory[4] < 30e6
    assert max(remembered) <= 2 * 256
    for number, expected in alone.items():
        found = answers[number]
        if found is None or found["text"] == expected["text"]:
            continue
        pairs = zip(found["logprobs"]["tokens"], expected["logprobs"]["tokens"], strict=True)
        first = next(place for place, (a, b) in enumerate(pairs) if a != b)
        best, second = sorted(expected["logprobs"]["top_logprobs"][first].values(), reverse=True)[:2]
        assert best - second < 1e-4, f"prompt {number} is answered otherwise among others, and not by rounding"


def test_sigterm_while_it_answers_ends_it(client, server):
    """The last one: it stops the server."""
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, **(GREEDY | {"max_tokens": 900}))
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) in (0, 143, -signal.SIGTERM)
    # where the answer outlasts the server's grace, uvicorn reports that it was cancelled
    tracebacks = server.log.read_text().split("Traceback (most recent call last):")[1:]
    assert all("CancelledError" in traceback for traceback in tracebacks), tracebacks
