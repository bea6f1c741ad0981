"""A local stand-in of the hub: the HTTP interface that a push uses, with a record of all requests."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

USER, TOKEN = "ada", "hf_right"
LARGE = (".safetensors", ".gguf", ".bin", ".png")  # files in LFS


@dataclass
class Repository:
    visibility: str | None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The server's repositories, and every request as method and path."""

    url: str = ""
    owners: set[str] = field(default_factory=lambda: {USER, "guild"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refused_uploads: int | None = None
    """Status of the answer to uploads, if they are refused."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run the stand-in on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def oid_of(path: str, data: bytes) -> str:
    """Return the hub's id of a file's content: LFS's SHA-256, or git's id of a blob."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self._body()
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return
        for prefix, handle in self._routes().items():
            if path.startswith(prefix):
                handle(path.removeprefix(prefix), body)
                return
        self._of_a_repository(path.removeprefix("/"), body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815 - names of http.server

    def _routes(self) -> dict[str, Callable[[str, bytes], None]]:
        return {
            "/api/whoami-v2": lambda _, body: self._send(200, {"type": "user", "name": USER}),
            "/api/validate-yaml": lambda _, body: self._send(200, {"errors": [], "warnings": []}),
            "/api/repos/create": self._create,
            "/api/models/": self._api,
            "/api/spaces/": self._api,
            "/api/buckets": lambda _, body: self._send(403, {"error": "this token may not make buckets"}),
            "/lfs/": self._upload,
        }

    def _create(self, _: str, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked["organization"] or USER
        name = f"{owner}/{asked['name']}"
        if owner not in self.hub.owners:
            self._send(403, {"error": f"You don't have the rights to create a model under {owner}"})
            return
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository(asked.get("visibility")))
        self._send(status, {"url": f"{self.hub.url}/{name}", "name": name})

    def _api(self, rest: str, body: bytes) -> None:
        name, what = "/".join(rest.split("/")[:2]), rest.split("/")[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif what[:1] == ["tree"]:
            files = repository.files.items()
            self._send(200, [{"type": "file", "path": p, "size": len(b), "oid": oid_of(p, b)} for p, b in files])
        elif what[:1] == ["preupload"]:
            asked = [file["path"] for file in json.loads(body)["files"]]
            self._send(200, {"files": [self._mode(repository, path) for path in asked]})
        elif what[:1] == ["variables"]:  # of Spaces, as the next one
            self._send(200, {})
        elif what[:1] == ["runtime"]:
            self._send(200, {"stage": "RUNNING", "hardware": {"current": None, "requested": None}, "gcTimeout": None})
        elif what[:1] == ["commit"]:
            self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
        else:
            self._send(200, {"id": name, "sha": f"{len(repository.commits):040x}", "siblings": []})

    def _mode(self, repository: Repository, path: str) -> dict[str, Any]:
        there = {"oid": oid_of(path, repository.files[path])} if path in repository.files else {}
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, **there}

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for value in (line["value"] | {"key": line["key"]} for line in lines):
            match value["key"]:
                case "header":
                    repository.commits.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.hub.uploads[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        oid = f"{len(repository.commits):040x}"
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _of_a_repository(self, path: str, body: bytes) -> None:
        if path.endswith(".git/info/lfs/objects/batch"):
            self._send(200, {"transfer": "basic", "objects": list(map(self._place, json.loads(body)["objects"]))})
            return
        name, file = path.split("/resolve/main/")
        data = self.hub.repositories[name].files[file]
        headers = {"ETag": f'"{oid_of(file, data)}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        self._send_bytes(200, data, headers)

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.uploads:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}

    def _upload(self, oid: str, body: bytes) -> None:
        if self.hub.refused_uploads:
            self._send(self.hub.refused_uploads, {"error": "no room"})
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.uploads[oid] = body
        self._send(200, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
