"""A stand-in of the Hugging Face Hub: repositories in memory behind a local HTTP server, for uploads and downloads."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

COMMIT = "0" * 39 + "1"


class Hub:
    """What the server has, and what it was asked.

    Attributes:
        repositories: {"org/name": {file: content}}.
        requests: "METHOD path" of all requests, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.port = 0
        self.refusing = 0  # status of all answers to writing; 0 for none

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repository: str, folder: Path) -> None:
        """Takes the files of a folder."""
        self.repositories[repository] = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, body: bytes = b"{}", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _absent(self, kind: str) -> None:
            self._send(404, X_Error_Code=kind, X_Error_Message=f"{kind} of the stand-in")

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_HEAD(self) -> None:  # the names that http.server calls
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.requests.append(f"{self.command} {path}")
            parts = path.removeprefix("api/models/").split("/")
            repository = "/".join(parts[:2])
            files = hub.repositories.get(repository)
            if files is None:
                return self._absent("RepoNotFound")
            if path.startswith("api/models/"):
                return self._describe(repository, files, parts[2:])
            name = "/".join(parts[4:])
            if name not in files:
                return self._absent("EntryNotFound")
            tag = hashlib.sha1(files[name]).hexdigest()
            return self._send(200, files[name], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

        def _describe(self, repository: str, files: dict[str, bytes], rest: list[str]) -> None:
            if rest[:1] == ["tree"]:
                listed: Any = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            else:
                listed = {
                    "id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": [],
                    "siblings": [{"rfilename": name} for name in files],
                }  # fmt: skip
            self._send(200, json.dumps(listed).encode(), Content_Type="application/json")

        def do_POST(self) -> None:
            path, body = self.path.partition("?")[0].strip("/"), self._body()
            hub.requests.append(f"POST {path}")
            if hub.refusing:
                return self._send(hub.refusing)
            if path == "api/repos/create":
                told = json.loads(body)
                name = f"{told.get('organization') or 'me'}/{told['name']}"
                hub.repositories.setdefault(name, {})
                return self._send(200, json.dumps({"url": f"{hub.address}/{name}", "name": name}).encode())
            if path == "api/validate-yaml":
                return self._send(200, b'{"errors": [], "warnings": []}')
            repository = "/".join(path.split("/")[2:4])
            if "/preupload/" in f"/{path}/":
                asked = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]
                return self._send(200, json.dumps({"files": modes}).encode())
            for line in body.splitlines():  # a commit
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    hub.repositories[repository][entry["value"]["path"]] = content
                if entry["key"] == "deletedFile":
                    del hub.repositories[repository][entry["value"]["path"]]
            address = f"{hub.address}/{repository}/commit/{COMMIT}"
            made = {"commitUrl": address, "commitOid": COMMIT, "hookOutput": "", "success": True}
            return self._send(200, json.dumps(made).encode())

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """A running stand-in."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(hub_address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub, which reads its settings when it is imported, ask another server."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub_address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
