"""A hub on this machine: serves a folder as `owner/name`, with range requests, and remembers what was asked for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
HUB_ID = "owner/name"


class LocalHub(ThreadingHTTPServer):
    """`sent` counts the bytes of each file that went over the wire."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.sent: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: LocalHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - its name in http.server
        """Says nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{HUB_ID}"):
            files = sorted(each for each in self.server.folder.iterdir() if each.is_file())
            sizes = [(each.name, each.stat().st_size) for each in files]
            document: object = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes]
            if "/tree/" not in path:
                siblings = [{"rfilename": name, "size": size} for name, size in sizes]
                document = {"id": HUB_ID, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(json.dumps(document).encode(), "application/json", 200, with_body=with_body)
            return
        found = re.fullmatch(rf"/{HUB_ID}/resolve/[^/]+/(.+)", path)
        file = self.server.folder / found[1] if found else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = file.read_bytes(), 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content, status = content[int(asked[1]) : int(asked[2]) + 1], 206
        if with_body:
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(content)
        self._send(content, hashlib.sha256(file.read_bytes()).hexdigest(), status, with_body=with_body)

    def _send(self, content: bytes, tag: str, status: int, *, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """Serves within the context."""
    with LocalHub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
