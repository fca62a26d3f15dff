"""Downloads against a small hub on this machine: what arrives is checked, resumed, recorded, or a clear error."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BIG = b'[{"id": "a", "conversations": []}]' * 700_000  # the client keeps what has arrived in pieces of 10 MB
SMALL = b'{"instruction": "a", "output": "b"}\n'


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that a download needs."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        if path == f"/api/datasets/team/set/revision/{COMMIT}":
            return self.send(json.dumps({"id": "team/set", "sha": COMMIT, "siblings": self.listing()}).encode())
        if path.startswith("/api/datasets/team/set/"):
            return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        prefix = f"/datasets/team/set/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self.server.files:
            return self.send_file(self.server.files[path.removeprefix(prefix)])
        return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def listing(self):
        entries = []
        for name, data in self.server.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": name, "size": len(data), "blobId": blob}
            if len(data) > 1000:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
            entries.append(entry)
        return entries

    def send_file(self, data):
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        data = self.server.damage(data)
        wanted = self.headers.get("Range")
        if not wanted or self.command == "HEAD":
            return self.send(data, 200, headers)
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.send(data[start:], 206, headers)

    def send(self, data, status=200, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            whole = len(data) < 1000 or self.server.breaks == 0
            self.server.breaks -= not whole
            self.wfile.write(data if whole else data[: len(data) // 2])
            self.close_connection = not whole


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {"rows.json": BIG, "data/train-0.jsonl": SMALL, "README.md": b"# set"}
    server.seen = []
    server.breaks = 0
    server.damage = lambda data: data
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "hub.yaml"
    path.write_text(f"made:\n  repo: team/set\n  revision: {COMMIT}\n  files: [rows.json, 'data/train-*']\n")
    return path


def download(tmp_path, port, *arguments, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")}
    script = ROOT / "entrypoints" / "data" / "download_datasets.py"
    command = [sys.executable, str(script), "--raw_data_root", str(tmp_path / "raw"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment | variables, timeout=120, cwd="/")


def error_line(done):
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_files_arrive_are_checked_and_are_not_fetched_twice(hub, config, tmp_path):
    done = download(tmp_path, hub.server_port, "--config", config)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "raw" / "made"
    assert (made / "rows.json").read_bytes() == BIG
    assert (made / "data" / "train-0.jsonl").read_bytes() == SMALL
    assert not (made / "README.md").exists()
    record = json.loads((made / "download.json").read_text())
    assert record["commit"] == COMMIT
    assert record["files"]["rows.json"] == {"bytes": len(BIG), "hash": hashlib.sha256(BIG).hexdigest()}

    hub.seen.clear()
    assert download(tmp_path, hub.server_port, "--config", config).returncode == 0
    assert not [path for _, path, _ in hub.seen if "/resolve/" in path]

    (made / "rows.json").write_bytes(BIG[:-5] + b"xxxx]")  # the size alone is right
    assert download(tmp_path, hub.server_port, "--config", config).returncode == 0
    assert (made / "rows.json").read_bytes() == BIG


def test_an_interrupted_download_goes_on_where_it_stopped(hub, config, tmp_path):
    hub.breaks = 1
    done = download(tmp_path, hub.server_port, "--config", config)
    if done.returncode:  # depending on its version the hub client tries again by itself
        assert "error: made: " in done.stderr
        assert download(tmp_path, hub.server_port, "--config", config).returncode == 0
    assert (tmp_path / "raw" / "made" / "rows.json").read_bytes() == BIG
    assert any(start not in (None, "bytes=0-") for _, path, start in hub.seen if path.endswith("rows.json"))


def test_what_arrives_damaged_is_an_error_and_gets_no_name(hub, config, tmp_path):
    hub.damage = lambda data: data[:-4] + b"!!!!"
    assert "does not have the hash" in error_line(download(tmp_path, hub.server_port, "--config", config))
    assert not (tmp_path / "raw" / "made" / "rows.json").exists()
    assert not (tmp_path / "raw" / "made" / "download.json").exists()


def test_without_a_connection_the_error_is_clear_and_quick(config, tmp_path):
    start = time.monotonic()
    error = error_line(download(tmp_path, 9, "--config", config))
    assert "the hub cannot be reached" in error
    assert "huggingface.co/datasets/team/set" in error
    assert time.monotonic() - start < 20
    assert "HF_HUB_OFFLINE is set" in error_line(download(tmp_path, 9, "--config", config, HF_HUB_OFFLINE="1"))


def test_what_the_hub_does_not_have_is_named(hub, config, tmp_path):
    text = config.read_text()
    config.write_text(text.replace("rows.json", "row.json"))
    assert "no file row.json" in error_line(download(tmp_path, hub.server_port, "--config", config))
    config.write_text(text.replace(COMMIT, "f" * 40))
    assert "no revision ffff" in error_line(download(tmp_path, hub.server_port, "--config", config))
    config.write_text(text.replace("team/set", "team/none"))
    assert "does not exist" in error_line(download(tmp_path, hub.server_port, "--config", config))
    config.write_text("made: rows.json")
    assert str(config) in error_line(download(tmp_path, hub.server_port, "--config", config))
    config.write_text(text)
    done = download(tmp_path, hub.server_port, "--config", config, "--datasets", "mad")
    assert "did you mean 'made'" in error_line(done)


def test_the_hub_has_an_entry_for_every_dataset_that_can_be_reformatted():
    from utils.data.download import read_hub_datasets
    from utils.data.formats import SOURCES

    table = read_hub_datasets(ROOT / "configs" / "data" / "hub_datasets.yaml")
    assert [*table, "generic"] == list(SOURCES)
    for name, source in table.items():
        assert source.files[0] == SOURCES[name].file or source.files[0].endswith(".parquet")
        assert source.revision == "main" or len(source.revision) == 40
