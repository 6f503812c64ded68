"""A stand-in of the Hugging Face hub: a real HTTP server with the endpoints that huggingface_hub's client uses.

It keeps repositories in memory: branches, commits with all their files, and large files by SHA-256. It can be told to
fail (`faults`), and keeps what it was asked (`requests`).
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "t" * 20
BAD_TOKEN = "Invalid credentials in Authorization header"
LARGE = (".safetensors", ".parquet", ".zip")
_API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|preupload|commit|branch)/([^/]+)(.*))?")
_BATCH = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch")
_RESOLVE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """A repository: what each branch points at, and the files of each commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        sha = hashlib.sha1(json.dumps([parent, content]).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class Hub(ThreadingHTTPServer):
    """The server.

    Faults, by name: `refuse` (401 to every request), `commit` (500 to a commit), `upload` (507 from that large file on,
    counted from 0), `cut` (a file of this name loses its last byte when it arrives, and when it is read), `digest` (a
    file of this name is listed with another digest), `race` (somebody commits before each commit), `unseen` (the next
    look-up of a repository does not find it, so that its creation answers 409).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: dict[str, Any] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.tokens: set[str] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes], *, kind: str = "datasets", private: bool = False) -> str:
        """Commit files to a new or known repository, and return the commit."""
        repo = self.repos.setdefault((kind, repo_id), Repo(private))
        return repo.commit("main", {**(repo.files("main") or {}), **files})

    def asked(self, method: str, ending: str = "") -> list[str]:
        return [path for verb, path in self.requests if verb == method and path.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:  # noqa: PLR0911
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path, faults = unquote(url.path), self.server.faults
        self.server.requests.append((self.command, path))
        said = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if said:
            self.server.tokens.add(said)
        if faults.get("refuse"):
            return self._send(
                401, {"error": "Invalid credentials"}, message="Invalid credentials in Authorization header"
            )
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path.startswith("/large/"):
            return self._put(path.rpartition("/")[2], body)
        if found := _BATCH.fullmatch(path):
            return self._batch(json.loads(body))
        if found := _RESOLVE.fullmatch(path):
            return self._resolve("datasets" if found[1] else "models", *found.groups()[1:], said)
        # A branch is one part of the path: its slashes are quoted.
        found = _API.fullmatch(url.path)
        if not found:
            return self._send(404, {"error": path})
        repo = self.server.repos.get((found[1], found[2]))
        if repo is None or (repo.private and said != TOKEN) or faults.pop("unseen", False):
            return self._send(404, {"error": "Repository not found"}, code="RepoNotFound")
        revision = unquote(found[4] or "main")
        return self._of_repo(repo, found[2], found[3] or "revision", revision, body)

    def _of_repo(self, repo: Repo, repo_id: str, what: str, revision: str, body: bytes) -> None:
        if what == "branch":
            repo.branches.setdefault(revision, repo.branches["main"])
            return self._send(200, {})
        files = repo.files(revision)
        if files is None:
            return self._send(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        if what == "revision":
            sha = repo.branches.get(revision, revision)
            return self._send(200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": []})
        if what == "tree":
            return self._tree(files)
        if what == "preupload":
            asked = json.loads(body)["files"]
            return self._send(200, {"files": [self._mode(one, files.get(one["path"])) for one in asked]})
        return self._commit(repo, repo_id, revision, files, [json.loads(line) for line in body.splitlines()])

    def _tree(self, files: dict[str, bytes]) -> None:
        url = urlsplit(self.path)
        folder = unquote(url.path.partition("/tree/")[2]).partition("/")[2]
        below = {name: data for name, data in sorted(files.items()) if not folder or name.startswith(f"{folder}/")}
        if folder and not below:
            return self._send(404, {"error": "Not found"}, code="EntryNotFound")
        if "recursive=true" in url.query.lower():
            return self._send(200, [self._entry(name, data) for name, data in below.items()])
        parts = {name: name.removeprefix(f"{folder}/").split("/") for name in below}
        inner = sorted({f"{folder}/{first}".lstrip("/") for first, *rest in parts.values() if rest})
        entries = [{"type": "directory", "path": path, "oid": "0" * 40} for path in inner]
        entries += [self._entry(name, data) for name, data in below.items() if len(parts[name]) == 1]
        return self._send(200, entries)

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        key = (f"{asked.get('type', 'model')}s", repo_id)
        prefix = "datasets/" if key[0] == "datasets" else ""
        url = f"{self.server.endpoint}/{prefix}{repo_id}"
        if key in self.server.repos:
            return self._send(409, {"error": "You already created this repo", "url": url})
        repo = self.server.repos[key] = Repo(asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send(200, {"url": url})

    def _mode(self, asked: dict[str, Any], there: bytes | None) -> dict[str, Any]:
        large = asked["path"].endswith(LARGE)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _blob(there)
        return {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.endpoint}/large/{one['oid']}"}}}
            objects.append({**one, **({} if one["oid"] in self.server.large else upload)})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        limit = self.server.faults.get("upload")
        if limit is not None and len(self.server.uploads) >= limit:
            return self._send(507, {"error": "no space"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.uploads.append(oid)
        self.server.large[oid] = body
        return self._send(200, {})

    def _commit(self, repo: Repo, repo_id: str, branch: str, files: dict[str, bytes], lines: list[Any]) -> None:
        if self.server.faults.get("commit"):
            return self._send(500, {"error": "Internal Error"})
        if self.server.faults.get("race"):
            files = files | {"theirs.txt": b"first"}
            repo.commit(branch, files)
        changed = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repo.branches[branch]):
                return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                changed[value["path"]] = self.server.large[value["oid"]]
        if (cut := self.server.faults.get("cut")) in changed:
            changed[cut] = changed[cut][:-1]
        sha = repo.commit(branch, changed)
        return self._send(200, {"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
        digest = hashlib.sha256(data).hexdigest()
        if self.server.faults.get("digest") == name:
            digest = entry["oid"] = digest[::-1][:40]
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
        return entry

    def _resolve(self, kind: str, repo_id: str, revision: str, name: str, said: str) -> None:
        repo = self.server.repos.get((kind, repo_id))
        if repo is None or (repo.private and said != TOKEN):
            return self._send(404, {"error": "Repository not found"}, code="RepoNotFound")
        files = repo.files(revision)
        if files is None or name not in files:
            return self._send(404, {"error": "Entry not found"}, code="EntryNotFound" if files else "RevisionNotFound")
        data = files[name]
        etag = hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else _blob(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.branches.get(revision, revision)}
        headers["X-Linked-Size"] = str(len(data))
        sent = data[:-1] if self.server.faults.get("cut") == name else data
        return self._send(200, sent, headers=headers)

    def _send(
        self, status: int, value: Any, *, code: str = "", message: str = "", headers: dict[str, str] | None = None
    ) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message}.items():
            if text:
                self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """Start a hub, and let huggingface_hub's client speak to it, with a token and a cache of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        close_session,
        disable_progress_bars,
        enable_progress_bars,
    )

    from gen2embed_mteb.hub import addresses

    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setenv("HF_TOKEN", TOKEN)
    addresses._downloaded.cache_clear()
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield hub
    finally:
        if shown:
            enable_progress_bars()
        close_session()
        hub.shutdown()
        hub.server_close()
        addresses._downloaded.cache_clear()
