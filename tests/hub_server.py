"""A stand-in for the Hugging Face Hub on loopback, as strict as the Hub where it matters, that can be told to fail.

The real `huggingface_hub` talks to it through HF_ENDPOINT, which it reads at import: so, from a subprocess. Blobs live on a second
port, as the Hub's do, and a request that brings the user's token there is kept in `leaks`. Large files come by Xet (into a local
store, `casUrl` "local:///folder") or, with HF_HUB_DISABLE_XET=1, by LFS.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FOREVER = float("inf")
_REPO = "(?P<repo>[^/]+/[^/]+?)"
_MODEL = f"/api/models/{_REPO}"
_ROUTES = {  # by the name under which it is logged and can be made to fail
    "whoami": "GET /api/whoami-v2",
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "auth_check": f"GET {_MODEL}/auth-check(?P<write>/write)?",
    "preupload": f"POST {_MODEL}/preupload/(?P<rev>[^/]+)",
    "xet_token": f"GET {_MODEL}/xet-(?P<kind>read|write)-token/(?P<rev>[^/]+)",
    "commit": f"POST {_MODEL}/commit/(?P<rev>[^/]+)",
    "tree": f"GET {_MODEL}/tree/(?P<rev>[^/]+)",
    "info": f"GET {_MODEL}(/revision/(?P<rev>[^/]+))?",
    "batch": rf"POST /{_REPO}\.git/info/lfs/objects/batch",
    "verify": rf"POST /{_REPO}\.git/info/lfs/verify",
    "resolve": f"(GET|HEAD) /{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)",
    "blob": "(GET|PUT) /blobs/(?P<oid>[0-9a-f]{64})",
}


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A file of a commit: its bytes, or for a large one the sha256 of its blob."""

    content: bytes = b""
    sha256: str | None = None
    size: int = 0

    @property
    def pointer(self) -> bytes:
        if self.sha256 is None:
            return self.content
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()


def _about(path: str, entry: Entry) -> dict[str, Any]:
    about = {"rfilename": path, "size": entry.size or len(entry.content), "blobId": entry.git_oid}
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
    return about | ({"lfs": lfs} if entry.sha256 else {})


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return [*self.commits][-1]

    def add(self, files: dict[str, Entry]) -> str:
        seed = f"{len(self.commits)} {sorted((path, entry.git_oid) for path, entry in files.items())}"
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha] = files
        return sha


@dataclass
class Fault:
    kind: str  # "status", "cut" (while the request is read) or "lose" (the work is done, its answer is lost)
    times: float = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=lambda: {"error": "injected"})


class _Reply(Exception):  # noqa: N818 (an answer, not an error)
    """What an endpoint answers with."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        super().__init__(status)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # else the client has gone away
            super().handle_error(request, client_address)


class HubServer:
    """`with HubServer(folder) as hub:` serves at `hub.url` until the end. `users` maps tokens to users."""

    def __init__(self, folder: Path) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.log: list[str] = []
        self.leaks: list[str] = []
        self.bugs: list[str] = []
        self.store = folder / "xet"
        self.store.mkdir(parents=True)
        self.lock = threading.RLock()
        self._servers = [_Server(("127.0.0.1", 0), _handler(self, name)) for name in ("hub", "blobs")]
        self.url, self.blob_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, endpoint: str, kind: str = "status", **fault: Any) -> None:
        """Let `endpoint` ("*": all) fail the next `times` times."""
        self.faults[endpoint] = Fault(kind, **fault)

    def due_fault(self, endpoint: str) -> Fault | None:
        with self.lock:
            fault = self.faults.get(endpoint) or self.faults.get("*")
            if fault is None or fault.times <= 0:
                return None
            fault.times -= 1
            return fault

    def commits(self, repo: str) -> int:
        """Commits after the one that made the repo; 0 where there is none."""
        return len(self.repos[repo].commits) - 1 if repo in self.repos else 0

    def count(self, endpoint: str) -> int:
        return self.log.count(endpoint)

    def make_repo(self, name: str, private: bool) -> None:
        self.repos[name] = Repo(private)
        self.repos[name].add({".gitattributes": Entry(b"*.safetensors filter=lfs\n")})

    def files(self, repo: str) -> dict[str, Entry]:
        return self.repos[repo].commits[self.repos[repo].head]

    # One method for each endpoint; each raises its answer.

    def answer(self, endpoint: str, token: str, groups: dict[str, Any], body: bytes) -> None:
        user = self.users.get(token)
        if endpoint != "blob" and user is None and (token or endpoint not in ("info", "tree", "resolve", "xet_token")):
            raise _Reply(401, {"error": "Invalid username or password."})
        with self.lock:
            getattr(self, endpoint)(user, body, **{k: v and unquote(v) for k, v in groups.items()})

    def _writes(self, user: User | None, namespace: str) -> bool:
        return user is not None and user.role == "write" and namespace in (user.name, *user.orgs)

    def _repo(self, user: User | None, name: str, write: bool = False) -> Repo:
        repo, namespace = self.repos.get(name), name.split("/")[0]
        if repo is None or (repo.private and (user is None or namespace not in (user.name, *user.orgs))):
            # The Hub does not tell a missing repo from a hidden one.
            raise _Reply(401 if user is None else 404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if write and not self._writes(user, namespace):
            raise _Reply(403, {"error": "You don't have write access"}, X_Error_Message="no write access")
        return repo

    def _at(self, repo: Repo, rev: str | None) -> tuple[str, dict[str, Entry]]:
        sha = repo.head if rev in (None, "main") else str(rev)
        if sha not in repo.commits:
            raise _Reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return sha, repo.commits[sha]

    def whoami(self, user: User, body: bytes) -> None:
        orgs = [{"name": name} for name in user.orgs]
        raise _Reply(
            200, {"name": user.name, "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": user.role}}}
        )

    def create(self, user: User, body: bytes) -> None:
        asked = json.loads(body)
        namespace = asked.get("organization") or user.name
        name = f"{namespace}/{asked['name']}"
        if not self._writes(user, namespace):
            raise _Reply(403, {"error": f'You don\'t have the rights to create a model under "{namespace}"'})
        if name in self.repos:
            raise _Reply(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.make_repo(name, private=asked.get("visibility") == "private")
        raise _Reply(200, {"url": f"{self.url}/{name}"})

    def validate(self, user: User, body: bytes) -> None:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        base = re.search(r"^base_model: (.*)$", head[1], re.MULTILINE) if head else None
        if head and (base is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1])):
            raise _Reply(200, {"errors": [], "warnings": []})
        raise _Reply(400, {"errors": [{"message": '"base_model" must be the id of a model'}], "warnings": []})

    def auth_check(self, user: User, body: bytes, repo: str, write: str | None) -> None:
        self._repo(user, repo, write=bool(write))
        raise _Reply(200, {})

    def info(self, user: User | None, body: bytes, repo: str, rev: str | None) -> None:
        found = self._repo(user, repo)
        sha, files = self._at(found, rev)
        about = {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "tags": []}
        raise _Reply(200, about | {"siblings": [_about(path, entry) for path, entry in files.items()]})

    def preupload(self, user: User, body: bytes, repo: str, rev: str) -> None:
        files = self._at(self._repo(user, repo, write=True), rev)[1]
        answers = []
        for asked in json.loads(body)["files"]:
            there = files.get(asked["path"])
            mode = "lfs" if asked["path"].endswith((".safetensors", ".bin")) else "regular"
            oid = None if there is None else there.sha256 or there.git_oid
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise _Reply(200, {"files": answers})

    def xet_token(self, user: User | None, body: bytes, repo: str, kind: str, rev: str) -> None:
        self._repo(user, repo, write=kind == "write")
        url, token, end = f"local://{self.store}", "xet", 4_000_000_000
        headers = {"X_Xet_Cas_Url": url, "X_Xet_Access_Token": token, "X_Xet_Token_Expiration": str(end)}
        raise _Reply(200, {"casUrl": url, "exp": end, "accessToken": token}, **headers)

    def batch(self, user: User, body: bytes, repo: str) -> None:
        self._repo(user, repo, write=True)
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.blobs:
                upload = {"href": f"{self.blob_url}/blobs/{item['oid']}", "header": {}}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/{repo}.git/info/lfs/verify"}}
        raise _Reply(200, {"transfer": "basic", "objects": objects})

    def blob(self, user: None, body: bytes, oid: str) -> None:
        if not body:
            raise _Reply(200, self.blobs[oid]) if oid in self.blobs else _Reply(404)
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Reply(400, {"error": "not the bytes that were announced"})
        self.blobs[oid] = body
        raise _Reply(200)

    def verify(self, user: User, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        raise _Reply(200 if len(self.blobs.get(asked["oid"], b"")) == asked["size"] else 404, {})

    def commit(self, user: User, body: bytes, repo: str, rev: str) -> None:
        found = self._repo(user, repo, write=True)
        head, files = self._at(found, rev)
        files = dict(files)
        for item in map(json.loads, body.decode().splitlines()):
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", head) != head:
                raise _Reply(412, {"error": "A commit has happened since. Please refresh and try again."})
            if item["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.blobs and self.xet_hash(value["oid"]) is None:
                    raise _Reply(400, {"error": f"{value['path']}: its blob was never uploaded"})
                files[value["path"]] = Entry(sha256=value["oid"], size=value["size"])
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        sha = found.add(files)
        raise _Reply(200, {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha})

    def tree(self, user: User | None, body: bytes, repo: str, rev: str) -> None:
        answers = []
        for path, entry in self._at(self._repo(user, repo), rev)[1].items():
            size = entry.size or len(entry.content)
            lfs = {"lfs": {"oid": entry.sha256, "size": size, "pointerSize": len(entry.pointer)}}
            about = {"type": "file", "path": path, "oid": entry.git_oid, "size": size}
            answers.append(about | lfs if entry.sha256 else about)
        raise _Reply(200, answers)

    def resolve(self, user: User | None, body: bytes, repo: str, rev: str, path: str) -> None:
        sha, files = self._at(self._repo(user, repo), rev)
        if path not in files:
            raise _Reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        entry = files[path]
        if entry.sha256 is None:
            raise _Reply(200, entry.content, X_Repo_Commit=sha, ETag=f'"{entry.git_oid}"')
        about = {"X_Repo_Commit": sha, "X_Linked_Etag": f'"{entry.sha256}"', "X_Linked_Size": str(entry.size)}
        if xet := self.xet_hash(entry.sha256):
            route = f"{self.url}/api/models/{repo}/xet-read-token/{sha}"
            about |= {"X_Xet_Hash": xet, "X_Xet_Refresh_Route": route}
        raise _Reply(302, Location=f"{self.blob_url}/blobs/{entry.sha256}", **about)

    def xet_hash(self, sha256: str) -> str | None:
        """The Xet hash of an uploaded file, of which the commit tells the Hub the sha256 alone. The store's shards hold both: after
        48 bytes of header, per file 48 bytes (hash, flags, count), 48 or 96 for each count, and 48 that begin with the sha256."""
        for path in self.store.glob("xet/xorbs/shards/*.mdb"):
            data, at = path.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                found, (flags, count) = _words(data, at), struct.unpack_from("<2I", data, at + 32)
                at += 48 * (1 + count * (2 if flags >> 31 & 1 else 1))
                if flags >> 30 & 1:
                    if _words(data, at) == sha256:
                        return found
                    at += 48
        return None


def _words(data: bytes, at: int) -> str:
    """A hash in Xet's spelling: four little-endian words of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", data, at))


def _handler(hub: HubServer, port: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def serve(self) -> None:
            request = f"{self.command} {urlsplit(self.path).path}"
            found = ((name, re.fullmatch(pattern, request)) for name, pattern in _ROUTES.items())
            endpoint, match = next(((name, match) for name, match in found if match), ("unknown", None))
            hub.log.append(endpoint)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and port == "blobs":
                hub.leaks.append(request)
            fault = hub.due_fault(endpoint)
            length = int(self.headers.get("Content-Length", 0))
            if fault and fault.kind == "cut":
                self.rfile.read(min(length, 100))
                return self.reset()
            body = self.rfile.read(length)
            try:
                if fault and fault.kind == "status":
                    raise _Reply(fault.status, fault.body, **fault.headers)
                if match is None or (endpoint == "blob") != (port == "blobs"):
                    raise _Reply(404, {"error": f"no such endpoint: {request}"})
                hub.answer(endpoint, token, match.groupdict(), body)
            except _Reply as reply:
                answer = reply
            except Exception:
                hub.bugs.append(traceback.format_exc())
                answer = _Reply(500, {"error": "a bug of the stand-in"})
            if fault and fault.kind == "lose":
                return self.reset()
            self.send_response(answer.status)
            for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            return None

        def reset(self) -> None:
            # To linger for 0 seconds: the client sees a reset, not an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

        do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815 (the names that http.server calls)

    return Handler
