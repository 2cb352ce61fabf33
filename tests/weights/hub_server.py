"""A small Hugging Face Hub on 127.0.0.1, for driving the real client.

It keeps repositories in memory and answers what `huggingface_hub` asks: creating a repository or a branch, listing,
uploading large files whole, in parts or through Xet, committing and downloading. Large files come from a second port,
as they come from another host in reality. Any request can be made to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"

# What can happen to a request: an answer of an error, the connection closed before anything is done, or in the middle
# of the answer, or an answer that is complete but too short, or that has one bit wrong, or that is late.
Fault = Literal[403, 404, 429, 500, 503, "drop", "cut", "short", "flip", "late"]
FAULTS: tuple[Fault, ...] = (403, 404, 429, 500, 503, "drop", "cut", "short", "flip", "late")


@dataclass
class File:
    content: bytes
    large: bool

    @property
    def git_hash(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def xet_hash(self) -> str:
        import hf_xet

        with tempfile.NamedTemporaryFile() as file:
            file.write(self.content)
            file.flush()
            return str(hf_xet.hash_files([file.name])[0].hash)

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.git_hash

    def listing(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"size": len(self.content), "oid": self.git_hash, "blobId": self.git_hash}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


Commit = tuple[str, dict[str, File]]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    number: Callable[[], int] = field(default_factory=lambda: count().__next__)

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    def commit(self, files: dict[str, File], branch: str = "main") -> str:
        commits = self.branches.setdefault(branch, self.commits[-1:])
        sha = hashlib.sha1(f"{id(self)}/{self.number()}".encode()).hexdigest()
        commits.append((sha, {**(commits[-1][1] if commits else {}), **files}))
        return sha

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for branch in self.branches.values() for commit in branch if commit[0] == revision), None)


class HubServer:
    """The server: `with HubServer() as hub`, then `hub.url`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.commits_posted = 0
        self.before_commit: Callable[[Repo], None] = lambda repo: None
        self.after_commit: Callable[[Repo], None] = lambda repo: None
        self.damaged: set[str] = set()
        self.cdn_is_full = False
        self.part_size: int | None = None  # where large files are to be sent in parts
        self.xet: Path | None = None  # the folder of a Xet store
        self.faults: dict[int, Fault] = {}  # by number of the request
        self.counted = count()
        self.hub = _Server(_HubHandler, self)
        self.cdn = _Server(_CdnHandler, self)
        self.url = self.hub.url

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.stop()
        self.cdn.stop()

    def add(self, name: str, files: dict[str, bytes], **settings: bool) -> Repo:
        repo = self.repos[name] = Repo(**settings)
        repo.commit({path: File(content, path.endswith(".safetensors")) for path, content in files.items()})
        self.large |= {file.sha256: file.content for file in repo.commits[-1][1].values() if file.large}
        return repo


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler], state: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.state = state
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.connections: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.connections:  # a connection kept alive would survive the server
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or else each answer waits 40 ms
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            return

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = headers.pop("Content_Length", str(len(content)))
        if content and self.fault == "short":
            content = content[: len(content) // 2]
            length = str(len(content))
        elif content and self.fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.fault == "cut" and not content:
            self.hang_up()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.fault == "cut" else content)
        if self.fault == "cut":
            self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send_file(self, content: bytes, **headers: str) -> None:
        """Answer with a file, or the part of it that is asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, content, **headers)
            return
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        self.answer(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", **headers)

    def respond(self) -> None:
        self.state = self.server.state
        self.query = urlsplit(self.path).query
        self.path = unquote(urlsplit(self.path).path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.requests.append((self.server.url, f"{self.command} {self.path}", self.token))
        self.fault = self.state.faults.get(next(self.state.counted))
        if self.fault == "late":
            time.sleep(0.05)
        if self.fault == "drop":
            self.hang_up()
        elif isinstance(self.fault, int):
            self.answer(self.fault, {"error": f"trouble with {self.token}"})
        else:
            self.route()

    def route(self) -> None:
        raise NotImplementedError

    do_GET = do_HEAD = do_POST = do_PUT = respond


class _CdnHandler(_Handler):
    def route(self) -> None:
        oid, _, part = self.path.removeprefix("/").partition("/")
        if self.command == "PUT" and self.state.cdn_is_full:
            self.answer(413)
        elif self.command == "PUT" and part:
            self.state.parts.setdefault(oid, {})[int(part)] = self.body
            self.answer(200, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')
        elif self.command == "PUT":
            self.store(oid, self.body)
        elif self.command == "POST":
            self.complete(oid)
        elif oid not in self.state.large:
            self.answer(404)
        else:
            content = self.state.large[oid]
            if oid in self.state.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_file(content)

    def complete(self, oid: str) -> None:
        parts = self.state.parts.pop(oid, {})
        etags = [{"partNumber": n, "etag": f'"{hashlib.md5(parts[n]).hexdigest()}"'} for n in sorted(parts)]
        if json.loads(self.body)["parts"] == etags:
            self.store(oid, b"".join(parts[n] for n in sorted(parts)))
        else:
            self.answer(400)

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer(400)
            return
        self.state.large[oid] = content
        self.answer(200, ETag=f'"{oid}"')


class _HubHandler(_Handler):
    def route(self) -> None:
        for pattern, action in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.path}"):
                if "repo" not in match.groupdict():
                    action(self)
                elif (repo := self.visible(match["repo"])) is not None:
                    named = match.groupdict()
                    action(self, repo, repo_id=named.pop("repo"), **named)
                return
        self.answer(404)

    def visible(self, name: str) -> Repo | None:
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        return repo

    def may_write(self) -> bool:
        if self.token != WRITER:
            self.answer(403 if self.token else 401, X_Error_Message="You may not write here")
        return self.token == WRITER

    def whoami(self) -> None:
        name = {WRITER: "writer", READER: "reader"}.get(self.token or "")
        self.answer(200, {"type": "user", "name": name}) if name else self.answer(401)

    def create(self) -> None:
        if not self.may_write():
            return
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.state.repos:
            self.answer(409, {"url": f"{self.server.url}/{name}"})
            return
        self.state.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=_wants_private(wanted))
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def info(self, repo: Repo, repo_id: str, revision: str | None) -> None:
        if (found := repo.at(revision or "main")) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        sha, files = found
        siblings = [{"rfilename": path, **file.listing()} for path, file in files.items()]
        self.answer(200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, repo: Repo, revision: str, **_: str) -> None:
        if (found := repo.at(revision)) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        entries = [{"type": "file", "path": path, **file.listing()} for path, file in found[1].items()]
        if self.state.xet:
            for entry in entries:
                if "lfs" in entry:
                    entry["xetHash"] = found[1][entry["path"]].xet_hash
        self.answer(200, entries)

    def branch(self, repo: Repo, name: str, **_: str) -> None:
        if not self.may_write():
            return
        if name in repo.branches:
            self.answer(409, {"error": "Reference already exists"})
            return
        repo.branches[name] = repo.commits[-1:]
        self.answer(200, {})

    def xet_token(self, repo: Repo, kind: str, **_: str) -> None:
        if kind == "write" and not self.may_write():
            return
        store, until = f"local://{self.state.xet}", int(time.time()) + 3600
        headers = {"X_Xet_Cas_Url": store, "X_Xet_Access_Token": "xet", "X_Xet_Token_Expiration": str(until)}
        self.answer(200, {"casUrl": store, "accessToken": "xet", "exp": until}, **headers)

    def preupload(self, repo: Repo, **_: str) -> None:
        if not self.may_write():
            return
        files = repo.commits[-1][1]
        self.answer(
            200,
            {
                "files": [
                    {
                        "path": wanted["path"],
                        "uploadMode": "lfs" if wanted["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": files[wanted["path"]].oid if wanted["path"] in files else None,
                    }
                    for wanted in json.loads(self.body)["files"]
                ]
            },
        )

    def batch(self, repo: Repo, **_: str) -> None:
        if not self.may_write():
            return
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.state.large:
                href = f"{self.state.cdn.url}/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
                if size := self.state.part_size:
                    parts = {str(n): f"{href}/{n}" for n in range(1, ceil(entry["size"] / size) + 1)}
                    entry["actions"]["upload"]["header"] = {"chunk_size": str(size), **parts}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, repo_id: str, branch: str) -> None:
        if not self.may_write():
            return
        self.state.before_commit(repo)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent, newest = header["value"].get("parentCommit"), repo.at(branch)
        if newest is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        answer = {}
        if "create_pr=1" in self.query:
            number = len(repo.branches)
            branch = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
        elif parent is not None and parent != newest[0]:
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        self.state.commits_posted += 1
        sha = repo.commit({item["value"]["path"]: self.committed(item) for item in operations}, branch)
        self.state.after_commit(repo)
        self.answer(200, {**answer, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}"})

    def committed(self, item: dict[str, Any]) -> File:
        if item["key"] == "lfsFile":
            return File(self.state.large[item["value"]["oid"]], large=True)
        return File(base64.b64decode(item["value"]["content"]), large=False)

    def resolve(self, repo: Repo, repo_id: str, revision: str, path: str) -> None:
        if repo.gated and self.token is None:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            return
        if (found := repo.at(revision)) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        sha, files = found
        if (file := files.get(path)) is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        elif file.large:
            self.answer(
                302,
                Location=f"{self.state.cdn.url}/{file.sha256}",
                X_Repo_Commit=sha,
                X_Linked_Etag=f'"{file.sha256}"',
                X_Linked_Size=str(len(file.content)),
                **self.xet_headers(repo_id, sha, file),
            )
        elif self.command == "HEAD":
            length = str(len(file.content))
            self.answer(200, X_Repo_Commit=sha, ETag=f'"{file.git_hash}"', Content_Length=length)
        else:
            self.send_file(file.content, X_Repo_Commit=sha, ETag=f'"{file.git_hash}"')

    def xet_headers(self, repo_id: str, sha: str, file: File) -> dict[str, str]:
        if self.state.xet is None:
            return {}
        token = f"{self.server.url}/api/models/{repo_id}/xet-read-token/{sha}"
        return {"X_Xet_Hash": file.xet_hash, "Link": f'<{token}>; rel="xet-auth"'}


def _wants_private(wanted: dict[str, Any]) -> bool:
    return wanted.get("visibility") == "private" or bool(wanted.get("private"))


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", _HubHandler.whoami),
    (r"POST /api/repos/create", _HubHandler.create),
    (r"POST /api/validate-yaml", _HubHandler.validate),
    (rf"GET /api/models/{_REPO}(/revision/(?P<revision>.+))?", _HubHandler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>.+)", _HubHandler.tree),
    (rf"POST /api/models/{_REPO}/preupload/.+", _HubHandler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _HubHandler.batch),
    (rf"POST /api/models/{_REPO}/commit/(?P<branch>.+)", _HubHandler.commit),
    (rf"POST /api/models/{_REPO}/branch/(?P<name>.+)", _HubHandler.branch),
    (rf"GET /api/models/{_REPO}/xet-(?P<kind>read|write)-token/.+", _HubHandler.xet_token),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _HubHandler.resolve),
]
