"""A hub for tests: what the hub's client asks for, served from a directory by a thread."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
LARGE = (".safetensors", ".bin", ".pth", ".gguf")


class Hub:
    """One model, at one commit.

    Attributes:
        directory: Its files.
        gets: The files that were asked for, in order.
        status: Answer everything about the model with this status (and its header's code).
        code: The hub's own code of an error.
        cut: File -> bytes after which the connection breaks, once.
        spoiled: Files that arrive with a byte changed.
        sizes: File -> the size that is claimed.
    """

    def __init__(self, directory: Path, model: str = "owner/model") -> None:
        self.directory, self.model = directory, model
        self.gets: list[str] = []
        self.tokens: set[str | None] = set()
        self.status, self.code = 200, ""
        self.cut: dict[str, int] = {}
        self.spoiled: set[str] = set()
        self.sizes: dict[str, int] = {}
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> list[Path]:
        return sorted(p for p in self.directory.rglob("*") if p.is_file())

    def entry(self, path: Path) -> dict[str, Any]:
        """What the hub says of a file."""
        data = path.read_bytes()
        size = self.sizes.get(path.name, len(data))
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, Any] = {"size": size, "git": git}
        if path.suffix in LARGE:
            found["sha256"] = hashlib.sha256(data).hexdigest()
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.tokens.add(self.headers.get("Authorization"))
        api, files = f"/api/models/{hub.model}", f"/{hub.model}/resolve/"
        if hub.status != 200 or not path.startswith((api, files)):
            status = hub.status if hub.status != 200 else 404
            self._send(status, b"{}", {"X-Error-Code": hub.code or "RepoNotFound"})
        elif path.startswith(api):
            self._describe(path.removeprefix(api))
        else:
            revision, _, name = path.removeprefix(files).partition("/")
            self._file(revision, name, head=head)

    def _describe(self, rest: str) -> None:
        hub = self.hub
        revision = rest.rpartition("/")[2] or "main"
        if revision not in ("main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        entries = {str(p.relative_to(hub.directory)): hub.entry(p) for p in hub.files()}
        if rest.startswith("/tree/"):
            tree = []
            for name, entry in entries.items():
                one = {"type": "file", "oid": entry["git"], "size": entry["size"], "path": name}
                if "sha256" in entry:
                    one["lfs"] = _lfs(entry, "oid")
                tree.append(one)
            self._send(200, json.dumps(tree).encode())
            return
        siblings = []
        for name, entry in entries.items():
            one = {"rfilename": name, "size": entry["size"], "blobId": entry["git"]}
            if "sha256" in entry:
                one["lfs"] = _lfs(entry, "sha256")
            siblings.append(one)
        content = {"id": hub.model, "sha": COMMIT, "private": False, "siblings": siblings}
        self._send(200, json.dumps(content).encode())

    def _file(self, revision: str, name: str, *, head: bool) -> None:
        hub, path = self.hub, self.hub.directory / name
        if revision not in ("main", COMMIT) or not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        entry, data = hub.entry(path), path.read_bytes()
        etag = entry.get("sha256") or entry["git"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "sha256" in entry:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if head:
            self._send(200, data, headers, body=False)
            return
        hub.gets.append(name)
        if name in hub.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        first, status = 0, 200
        if asked := self.headers.get("Range"):
            first, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        part = data[first:]
        self._send(status, part, headers, cut=hub.cut.pop(name, None))

    def _send(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        body: bool = True,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body or self.command == "HEAD":
            return
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


def _lfs(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {key: entry["sha256"], "size": entry["size"], "pointerSize": 130}
