"""A small Hub on loopback: what huggingface_hub asks for when it pushes and downloads models, on the standard library.

Commits are kept in memory. A test can make it slow, and make it refuse commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER = "tester"  # whose repositories are, where none is named
LFS = (".safetensors", ".pt", ".pth", ".png")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]  # all of the branch, after it
    changed: set[str] = field(default_factory=set)

    @property
    def sha(self) -> str:
        listing = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(self.files.items()))
        return hashlib.sha1(f"{self.message}{listing}".encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})

    def head(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


class HubServer:
    """`with HubServer() as server:`; server.url is the HF_ENDPOINT, server.token the one it takes.

    delay: seconds that an upload of a file takes. refuse: branch and message of a commit -> whether it is refused.
    """

    token = "hf_TheSecretOfTheseTests"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.delay = 0.0
        self.refuse: Callable[[str, str], bool] = lambda branch, message: False
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def commits(self, repo: str, branch: str = "main") -> list[Commit]:
        """Those of a test, the oldest first."""
        return self.repos[f"{OWNER}/{repo}"].branches[branch][1:]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    # ---- routes

    def do_POST(self) -> None:
        body, path = self.body(), unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if found := re.fullmatch(rf"/{REPO}\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body)["objects"])
        found = re.fullmatch(rf"/api/models/{REPO}/(?P<verb>preupload|commit|branch)/(?P<branch>.+)", path)
        if not found or found["repo"] not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repo, branch = self.hub.repos[found["repo"]], found["branch"]
        if found["verb"] == "branch":
            known = branch in repo.branches
            repo.branches.setdefault(branch, list(repo.branches["main"][:1]))
            return self.answer(409 if known else 200, {})
        if branch not in repo.branches:
            return self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if found["verb"] == "commit":
            return self.commit(found["repo"], branch, [json.loads(line) for line in body.splitlines()])
        files = [
            {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular"}
            for f in json.loads(body)["files"]
        ]
        return self.answer(200, {"files": files})

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.rpartition("/")[2]
        time.sleep(self.hub.delay)
        whole = hashlib.sha256(data).hexdigest() == oid
        if whole:
            self.hub.objects[oid] = data
        self.answer(200 if whole else 400, {})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            return self.file(found)
        found = re.fullmatch(rf"/api/models/{REPO}(/(?P<verb>revision|tree)/(?P<revision>[^/]+))?(/.*)?", path)
        commit = self.visible(found["repo"], found["revision"] or "main") if found else None
        if not found or commit is None:
            return self.answer(404, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
        if found["verb"] == "tree":
            assert parse_qs(urlsplit(self.path).query).get("recursive") == ["true"] or not commit.files
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in commit.files.items()
            ]
            return self.answer(200, entries)
        names = [{"rfilename": name} for name in commit.files]
        repo = {"id": found["repo"], "sha": commit.sha, "siblings": names, "tags": []}
        return self.answer(200, {**repo, "private": self.hub.repos[found["repo"]].private})

    do_HEAD = do_GET

    # ---- what they do

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        known = name in self.hub.repos
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos.setdefault(name, Repo(private))
        self.answer(409 if known else 200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, content: str) -> None:
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(front[1]) if front else None
        fine = isinstance(data, dict) and all(r.get("results") for r in data.get("model-index", []))
        self.answer(200 if fine else 400, {"warnings": [], "errors": [] if fine else [{"message": "bad metadata"}]})

    def batch(self, objects: list[dict[str, Any]]) -> None:
        found = [
            {**o, "authenticated": True}
            | ({} if o["oid"] in self.hub.objects else {"actions": {"upload": {"href": f"{self.hub.url}/{o['oid']}"}}})
            for o in objects
        ]
        self.answer(200, {"transfer": "basic", "objects": found})

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        message = lines[0]["value"]["summary"]
        if self.hub.refuse(branch, message):
            return self.answer(403, {"error": "The Hub is closed today"})
        with self.hub.lock:
            commits = self.hub.repos[name].branches[branch]
            files, changed = dict(commits[-1].files), set()
            for line in lines[1:]:
                value = line["value"]
                path = value["path"]
                data = base64.b64decode(value["content"]) if line["key"] == "file" else self.hub.objects[value["oid"]]
                if line["key"] == "lfsFile" and len(data) != value["size"]:
                    return self.answer(400, {"error": f"{path} is of another size"})
                files[path] = data
                changed.add(path)
            commits.append(Commit(message, files, changed))
        url = f"{self.hub.url}/{name}/commit/{commits[-1].sha}"
        return self.answer(200, {"success": True, "commitOid": commits[-1].sha, "commitUrl": url})

    def visible(self, name: str, revision: str) -> Commit | None:
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return None
        return repo.head(revision)

    def file(self, found: re.Match[str]) -> None:
        commit = self.visible(found["repo"], found["revision"])
        if commit is None:
            return self.answer(404, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"})
        data = commit.files.get(found["file"])
        if data is None:
            return self.answer(404, {"error": "No entry"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit.sha}
        return self.answer(200, data, headers)

    # ---- HTTP

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
