"""A small Hugging Face Hub on 127.0.0.1, for driving the real client.

It keeps repositories in memory and answers what `huggingface_hub` asks on the plain (not Xet) path: creating a
repository, listing, uploading large files, committing and downloading. Large files come from a second port, as they
come from another host in reality.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"


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

    @property
    def oid(self) -> str:
        return self.sha256 if self.large else self.git_hash

    def listing(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"size": len(self.content), "oid": self.git_hash, "blobId": self.git_hash}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, File]]] = field(default_factory=list)

    def commit(self, files: dict[str, File]) -> str:
        merged = {**(self.commits[-1][1] if self.commits else {}), **files}
        sha = hashlib.sha1(f"{id(self)}/{len(self.commits)}".encode()).hexdigest()
        self.commits.append((sha, merged))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, File]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubServer:
    """The server: `with HubServer() as hub`, then `hub.url`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.commits_posted = 0
        self.before_commit: Callable[[Repo], None] = lambda repo: None
        self.after_commit: Callable[[Repo], None] = lambda repo: None
        self.damaged: set[str] = set()
        self.cdn_is_full = False
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
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Content_Length", str(len(content))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def respond(self) -> None:
        self.state = self.server.state
        self.path = unquote(urlsplit(self.path).path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.requests.append((self.server.url, f"{self.command} {self.path}", self.token))
        self.route()

    def route(self) -> None:
        raise NotImplementedError

    do_GET = do_HEAD = do_POST = do_PUT = respond


class _CdnHandler(_Handler):
    def route(self) -> None:
        oid = self.path.rpartition("/")[2]
        if self.command == "PUT" and self.state.cdn_is_full:
            self.answer(413)
        elif self.command == "PUT":
            self.state.large[oid] = self.body
            self.answer(200, ETag=f'"{oid}"')
        elif oid not in self.state.large:
            self.answer(404)
        else:
            content = self.state.large[oid]
            if oid in self.state.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(200, content)


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
        _sha, files = repo.at(revision) or repo.commits[-1]
        self.answer(200, [{"type": "file", "path": path, **file.listing()} for path, file in files.items()])

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
                entry["actions"] = {"upload": {"href": f"{self.state.cdn.url}/{entry['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, repo_id: str, **_: str) -> None:
        if not self.may_write():
            return
        self.state.before_commit(repo)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.commits[-1][0]:
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        self.state.commits_posted += 1
        sha = repo.commit({item["value"]["path"]: self.committed(item) for item in operations})
        self.state.after_commit(repo)
        self.answer(200, {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}"})

    def committed(self, item: dict[str, Any]) -> File:
        if item["key"] == "lfsFile":
            return File(self.state.large[item["value"]["oid"]], large=True)
        return File(base64.b64decode(item["value"]["content"]), large=False)

    def resolve(self, repo: Repo, revision: str, path: str, **_: str) -> None:
        if repo.gated and self.token is None:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            return
        sha, files = repo.at(revision) or repo.commits[-1]
        if (file := files.get(path)) is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        elif file.large:
            self.answer(
                302,
                Location=f"{self.state.cdn.url}/{file.sha256}",
                X_Repo_Commit=sha,
                X_Linked_Etag=f'"{file.sha256}"',
                X_Linked_Size=str(len(file.content)),
            )
        else:
            content = b"" if self.command == "HEAD" else file.content
            headers = {"X_Repo_Commit": sha, "ETag": f'"{file.git_hash}"', "Content_Length": str(len(file.content))}
            self.answer(200, content, **headers)


def _wants_private(wanted: dict[str, Any]) -> bool:
    return wanted.get("visibility") == "private" or bool(wanted.get("private"))


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", _HubHandler.create),
    (r"POST /api/validate-yaml", _HubHandler.validate),
    (rf"GET /api/models/{_REPO}(/revision/(?P<revision>.+))?", _HubHandler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _HubHandler.tree),
    (rf"POST /api/models/{_REPO}/preupload/.+", _HubHandler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _HubHandler.batch),
    (rf"POST /api/models/{_REPO}/commit/.+", _HubHandler.commit),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _HubHandler.resolve),
]
