"""A hub on this machine: as much of its HTTP interface as huggingface_hub and datasets ask for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(.*))?"
)
_FILE = re.compile(r"(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """Repositories, and what was asked for.

    Attributes:
        repositories: folder of each "models/OWNER/NAME" and "datasets/OWNER/NAME".
        gated: names that answer 403 to everybody.
        fetched: paths of the files whose content was asked for.
    """

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)
    endpoint: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        """What sends a process here, with a cache of its own."""
        names = ("http_proxy", "https_proxy", "all_proxy")
        proxies = {name: "" for low in names for name in (low, low.upper())}
        return {**proxies, "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)}


def _entry(folder: Path, file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    oid = hashlib.sha1(content).hexdigest()
    path = file.relative_to(folder).as_posix()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


def _tree(folder: Path) -> list[dict[str, Any]]:
    """Every file and folder, as the hub lists them."""
    return [
        _entry(folder, path)
        if path.is_file()
        else {"type": "directory", "path": path.relative_to(folder).as_posix(), "oid": "0" * 40}
        for path in sorted(folder.rglob("*"))
    ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", X_Error_Code=code)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if found := _API.fullmatch(path):
            kind, name, what, revision, below = found.groups()
        elif found := _FILE.fullmatch(path):
            kind, what, (_, name, revision, below) = (
                found[1] or "/models",
                "resolve",
                found.groups(),
            )
            kind = kind[1:]
        else:
            self._error(404, "EntryNotFound")
            return
        name = f"{kind}/{name}"
        if name in self.hub.gated:
            self._error(403, "GatedRepo")
        elif name not in self.hub.repositories:
            self._error(404, "RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self._error(404, "RevisionNotFound")
        elif what == "resolve":
            self._file(self.hub.repositories[name], below)
        else:
            self._listing(name, what, below, body)

    do_HEAD = do_POST = do_GET

    def _file(self, folder: Path, file: str) -> None:
        if not (folder / file).is_file():
            self._error(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.hub.fetched.append(file)
        etag = f'"{_entry(folder, folder / file)["oid"]}"'
        self._send(200, (folder / file).read_bytes(), ETag=etag, X_Repo_Commit=COMMIT)

    def _listing(self, name: str, what: str | None, below: str, body: bytes) -> None:
        tree = _tree(self.hub.repositories[name])
        if what == "tree":
            inside = f"{below[1:]}/" if below else ""
            self._json([entry for entry in tree if entry["path"].startswith(inside)])
        elif what == "paths-info":
            wanted = json.loads(body)["paths"]
            self._json([entry for entry in tree if entry["path"] in wanted])
        else:
            files = [{"rfilename": e["path"]} for e in tree if e["type"] == "file"]
            self._json({"id": name.partition("/")[2], "sha": COMMIT, "siblings": files})


@contextmanager
def serve(repositories: dict[str, Path], *gated: str) -> Iterator[Hub]:
    """A hub with these repositories, while the block runs."""
    hub = Hub(repositories, set(gated))
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
