"""A server on this machine with the parts of the hub that uploads and downloads use.

The paths and fields are those that huggingface_hub sends and reads. It holds models in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0" * 40


@dataclass
class Repository:
    """A model on the server: its visibility, its files and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by name.
        objects: contents of large files, by SHA-256.
        tokens: tokens that requests to the interface had; None for a request without one.
        refused: status of the answer to every commit, for example 403; 0 to take them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refused = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        path = self._begin()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if repository := self._repository(found[1]):
                names = [{"rfilename": name} for name in sorted(repository.files)]
                self._json({
                    "id": found[1], "sha": SHA, "private": repository.private, "siblings": names,
                })  # fmt: skip
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            if repository := self._repository(found[1]):
                self._json([
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                    for name, data in sorted(repository.files.items())
                ])  # fmt: skip
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if repository := self._repository(found[1]):
                self._file(repository.files.get(found[2]))
        elif path == "/api/whoami-v2":
            token = {"displayName": "a token", "role": "write", "createdAt": "2026-01-01"}
            self._json({"type": "user", "name": "me", "auth": {"accessToken": token}})
        else:
            self._missing("")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self._begin(), self._body()
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            private = given.get("private") or given.get("visibility") == "private"  # by version
            self.server.repositories.setdefault(name, Repository(bool(private)))
            self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            self._json({
                "files": [
                    {
                        "path": file["path"], "shouldIgnore": False, "oid": None,
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    }
                    for file in json.loads(body)["files"]
                ]
            })  # fmt: skip
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({
                "transfer": "basic",
                "objects": [
                    each | {"actions": {"upload": {"href": f"{self.server.url}/put/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ],
            })  # fmt: skip
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            if self.server.refused:
                self._send(self.server.refused, b'{"error": "not allowed"}')
            else:
                self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._missing("")

    def do_PUT(self) -> None:
        data = self._body()  # its address is the permission, so it has no token
        assert hashlib.sha256(data).hexdigest() == self.path.removeprefix("/put/")
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self._send(200, b"")

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                repository.files[value["path"]] = self.server.objects[value["oid"]]
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{SHA}", "commitOid": SHA})

    def _begin(self) -> str:
        """The path, after the request's token was noted."""
        token = self.headers.get("Authorization")
        self.server.tokens.add(token and token.removeprefix("Bearer "))
        return self.path.partition("?")[0]

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:
            self._missing("RepoNotFound")
        return found

    def _file(self, data: bytes | None) -> None:
        if data is None:
            self._missing("EntryNotFound")
        else:
            self._send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": SHA})

    def _json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
