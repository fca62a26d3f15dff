"""A hub of models on this machine: the part of its interface that downloads and uploads of small files need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_user"
LARGE = 2000
"""Files above this many bytes are large ones, which the hub redirects to another server."""


class Hub(ThreadingHTTPServer):
    """Models by name.

    Attributes:
        models: name -> file name -> content.
        gated: names of models that only who has `TOKEN` may read.
        cuts: how many of the next large files end midway.
        seen: method, path and byte range of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cuts = 0
        self.seen: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def resolved(self) -> list[str]:
        """Return the names of the files whose content was asked for."""
        return [path.rpartition("/")[2] for method, path, _ in self.seen if method == "GET" and "/api/" not in path]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub within the block."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(("POST", path, None))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.models.setdefault(name, {})
            return self.send_json({"url": f"{self.server.address}/{name}"})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.send_json({"files": files})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            return self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self.refuse(404, "EntryNotFound")

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[0] == "large":
            return self.send_file(bytes.fromhex(parts[1]).decode(), parts[2])
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.models:
                return self.refuse(401, "RepoNotFound")
            if len(parts) > 4 and parts[-1] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            held = self.server.models[name].items()
            if "tree" in parts:
                return self.send_json([_entry(file, data) for file, data in held])
            files = [{"rfilename": file, "size": len(data)} for file, data in held]
            gated = "manual" if name in self.server.gated else False
            return self.send_json({"id": name, "sha": COMMIT, "siblings": files, "gated": gated, "private": False})
        if len(parts) >= 5 and parts[2] == "resolve":
            name, file = "/".join(parts[:2]), "/".join(parts[4:])
            if name in self.server.gated:
                sent = self.headers.get("Authorization")
                if sent != f"Bearer {TOKEN}":
                    return self.refuse(401 if sent is None else 403, "GatedRepo")
            if file not in self.server.models.get(name, {}):
                return self.refuse(404, "EntryNotFound")
            data = self.server.models[name][file]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            if len(data) <= LARGE:
                return self.send(data, headers=headers)
            # another host, as the real one's: a client does not follow it when it asks for headers
            where = f"http://localhost:{self.server.server_port}/large/{name.encode().hex()}/{file}"
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": headers["ETag"], "Location": where}
            return self.send(b"", 302, headers)
        return self.refuse(404, "RepoNotFound")

    def send_file(self, name, file):
        data = self.server.models[name][file]
        wanted = self.headers.get("Range")
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.command == "GET" and self.server.cuts > 0
        self.server.cuts -= cut
        self.send(data[start:], 206 if wanted else 200, headers, cut)

    def send_json(self, value):
        self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def refuse(self, status, code):
        self.send(
            json.dumps({"error": "refused"}).encode(), status, {"X-Error-Code": code, "X-Error-Message": "refused"}
        )

    def send(self, data, status=200, headers=None, cut=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut


def _entry(name: str, data: bytes) -> dict[str, object]:
    """Return a file as a listing has it."""
    entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) > LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
