"""A stand-in for the Hugging Face hub: the few requests of its protocol that uploads and downloads of small files need.

It keeps every file in its answers' commits, and never asks for the transfer of large files (LFS), which is the hub
library's own business.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """``files`` by (repository, path), ``created`` what was asked of new repositories, ``commits`` their messages.

    ``refuse`` holds beginnings of request paths that are answered with 403; ``tokens`` are those that came;
    ``downloads`` are the paths of files that were fetched.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.created: list[dict] = []
        self.commits: list[str] = []
        self.refuse: list[str] = []
        self.tokens: set[str | None] = set()
        self.downloads: set[str] = set()
        self.gate = threading.Event()  # commits wait for it
        self.gate.set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            known = [(one["organization"], one["name"]) for one in self.server.created]
            status = 409 if (wanted["organization"], wanted["name"]) in known else 200
            self.server.created.append(wanted)
            self._answer({"url": f"{self.server.endpoint}/{wanted['organization']}/{wanted['name']}"}, status)
        elif re.fullmatch(r"/api/\w+/[^/]+/[^/]+/preupload/main", self.path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif found := re.fullmatch(r"/api/\w+/([^/]+/[^/]+)/commit/main", self.path):
            self.server.gate.wait(30)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.commits.append(line["value"]["summary"])
                else:
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[found[1], line["value"]["path"]] = content
            self._answer(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{self.server.endpoint}/{found[1]}/commit/{COMMIT}",
                }
            )
        else:
            self._answer({"error": f"unknown request {self.path}"}, 404)

    def do_GET(self) -> None:
        if self._refused():
            return
        if re.fullmatch(r"/api/\w+/[^/]+/[^/]+/auth-check(/write)?", self.path):
            self._answer({})
            return
        if found := re.fullmatch(r"/api/models/([^/?]+/[^/?]+)(/revision/[^/?]+)?(\?.*)?", self.path):
            self._answer_about(found[1])
            return
        if found := re.fullmatch(r"/api/models/([^/?]+/[^/?]+)/tree/[^/?]+(\?.*)?", self.path):
            files = [(path, content) for (repo, path), content in self.server.files.items() if repo == found[1]]
            entries = [{"type": "file", "path": path, "size": len(c), "oid": _etag(c)} for path, c in files]
            self._answer(json.dumps(entries).encode())
            return
        found = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        content = found and self.server.files.get((found[1], found[3]))
        if content is None:
            self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.downloads.add(found[3])
        self._answer(content, 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _answer_about(self, repo: str) -> None:
        """What a model is, with the names of its files."""
        names = [path for name, path in self.server.files if name == repo]
        if not names:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        self._answer({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _refused(self) -> bool:
        token = self.headers.get("Authorization")
        if re.match(r"/api/(repos|models|datasets|spaces)/", self.path):
            self.server.tokens.add(token and token.removeprefix("Bearer "))
        refused = any(self.path.startswith(path) for path in self.server.refuse)
        if refused:
            self._answer({"error": "You may not do this"}, 403)
        return refused

    def _answer(self, content: dict | bytes, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub of its own, for as long as it is needed."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.gate.set()
            hub.shutdown()
            thread.join()
