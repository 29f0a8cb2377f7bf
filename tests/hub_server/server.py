"""HTTP server of the local Hub: one handler, a table of routes, and faults.

Large files are answered with a redirect to another host name (localhost for 127.0.0.1), as the real Hub does: the
client follows relative redirects within one host by itself and would then miss the headers of the first answer.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from .faults import Fault, Faults
from .store import LARGE_SUFFIXES, Refused, Repo, Store, small_entry


@dataclass
class Request:
    """One answered request; its bytes are those of the whole message, including headers."""

    method: str
    path: str
    status: int
    received: int
    sent: int


class HubServer:
    """Runs in threads of this process inside a block ``with HubServer() as hub:``.

    Attributes:
        url: what HF_ENDPOINT has to be.
        store: its repositories.
        faults: faults that will happen.
        requests: requests in the order of their answers.
    """

    def __init__(self):
        self.store, self.faults = Store(), Faults()
        self.requests: list[Request] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url, self.blob_url = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def fault(self, request: str, kind: str, **how) -> Fault:
        return self.faults.add(Fault(request, kind, **how))

    def take_requests(self) -> list[Request]:
        """Return the requests since the last call."""
        taken, self.requests = self.requests, []
        return taken


class _Counting:
    """A socket's file that counts the bytes passing through."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.count += len(data)
        return data

    def readline(self, limit: int = -1) -> bytes:
        data = self.file.readline(limit)
        self.count += len(data)
        return data

    def write(self, data: bytes) -> int:
        self.count += len(data)
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


class _Cut(Exception):
    """Raised to close the connection."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rfile, self.wfile = _Counting(self.rfile), _Counting(self.wfile)

    def log_message(self, *_) -> None:
        """Log nothing to the terminal; ``HubServer.requests`` records the requests."""

    def parse_request(self) -> bool:
        self.before = (self.rfile.count - len(self.raw_requestline), self.wfile.count)
        return super().parse_request()

    def do_GET(self) -> None:  # noqa: N802 (the names are those of http.server)
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    # ---- one request ----

    def _serve(self) -> None:
        self.status = 0
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), {key: value[-1] for key, value in parse_qs(url.query).items()}
        self.asked = f"{self.command} {self.route}"
        try:
            if slow := self.hub.faults.take(self.asked, "slow"):
                time.sleep(slow.seconds)
            self.body = self._read_body()
            if fault := self.hub.faults.take(self.asked, "status"):
                self._answer(fault.status, {"error": "as ordered by the test"}, fault.headers)
            else:
                self._dispatch()
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._answer(refused.status, {"error": refused.message}, headers | {"X-Error-Message": refused.message})
        except (_Cut, BrokenPipeError, ConnectionResetError):
            self._close()
        sizes = (self.rfile.count - self.before[0], self.wfile.count - self.before[1])
        self.hub.requests.append(Request(self.command, self.route, self.status, *sizes))

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None and self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(iter(self._read_chunk, b""))
        length = int(length or 0)
        if length and self.hub.faults.take(self.asked, "cut_upload"):
            self.rfile.read(length // 2)
            raise _Cut
        return self.rfile.read(length)

    def _read_chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        if size and self.hub.faults.take(self.asked, "cut_upload"):
            raise _Cut
        return chunk

    def _close(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client was quicker

    def _dispatch(self) -> None:
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                with self.hub.store.lock:
                    action(self, **match.groupdict())
                return
        raise Refused(404, f"No such endpoint: {self.asked}")

    def _answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        """Send JSON or raw bytes; a HEAD request gets only the headers."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        announced = len(body)
        sent, cut = body, False
        if self.command == "GET" and status in (200, 206):
            if self.hub.faults.take(self.asked, "wrong_bytes"):
                middle = len(body) // 2
                sent = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            if self.hub.faults.take(self.asked, "truncated"):
                sent, announced = body[: len(body) // 2], len(body) // 2
        if self.hub.faults.take(self.asked, "cut_download"):
            sent, cut = sent[: len(body) // 2], True
        self.status = status
        self.send_response(status)
        lines = {"Content-Type": "application/json", "Content-Length": str(announced)} | (headers or {})
        for name, value in lines.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        self.wfile.flush()
        if cut:
            raise _Cut

    # ---- what the routes do ----

    def _user(self) -> str | None:
        return self.hub.store.user(self.headers.get("Authorization"))

    def _readable(self, repo: str) -> Repo:
        return self.hub.store.readable(repo, self._user())

    def _writable(self, repo: str) -> Repo:
        return self.hub.store.writable(repo, self._user())

    def _json(self) -> dict:
        return json.loads(self.body or b"{}")

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Log in first")
        self._answer(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self) -> None:
        asked, user = self._json(), self._user()
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        name = f"{asked.get('organization') or user}/{asked['name']}"
        about = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.store.repos and name.split("/")[0] == user:
            self._answer(409, about | {"error": "You already created this model repo"})
        else:
            self.hub.store.create(name, user, private)
            self._answer(200, about)

    def validate_yaml(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def repo_info(self, repo: str, revision: str = "main") -> None:
        found = self._readable(repo)
        commit = self.hub.store.resolve(found, revision)
        siblings = [
            {"rfilename": path, "size": entry.size, "blobId": entry.oid}
            for path, entry in sorted(self.hub.store.files(found, commit).items())
        ]
        about = {"id": repo, "modelId": repo, "sha": commit, "private": found.private, "siblings": siblings}
        self._answer(200, about | {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False})

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        files = self.hub.store.files(self._readable(repo), revision)
        listed = []
        for name, entry in sorted(files.items()):
            if path and not name.startswith(path.rstrip("/") + "/"):
                continue
            item = {"type": "file", "path": name, "size": entry.size, "oid": entry.oid}
            if entry.sha256:
                item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
            listed.append(item)
        self._answer(200, listed)

    def refs(self, repo: str) -> None:
        found = self._readable(repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in found.branches.items()
            if not name.startswith("refs/")
        ]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in found.tags.items()]
        self._answer(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def create_branch(self, repo: str, revision: str) -> None:
        found = self._writable(repo)
        if revision in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[revision] = self.hub.store.resolve(found, self._json().get("startingPoint") or "main")
        self._answer(200, {})

    def create_tag(self, repo: str, revision: str) -> None:
        found, asked = self._writable(repo), self._json()
        if asked["tag"] in found.tags:
            raise Refused(409, "Tag already exists")
        found.tags[asked["tag"]] = self.hub.store.resolve(found, revision)
        self._answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        files = self.hub.store.files(self._writable(repo), revision)
        answers = []
        for asked in self._json()["files"]:
            path = asked["path"]
            known = files.get(path)
            large = path.endswith(LARGE_SUFFIXES) or asked["size"] > 10_000_000
            oid = None if known is None else known.sha256 or known.oid
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self._writable(repo)
        objects = []
        for asked in self._json()["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.store.blobs:
                target = f"{self.hub.blob_url}/blobs/{asked['oid']}"
                verify = f"{self.hub.url}/{repo}.git/info/lfs/verify"
                answer["actions"] = {"upload": {"href": target, "header": {}}, "verify": {"href": verify}}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, oid: str) -> None:
        found = hashlib.sha256(self.body).hexdigest()
        if found != oid or self.hub.faults.take(self.asked, "wrong_hash"):
            raise Refused(422, f"The content does not have the announced SHA-256 {oid[:12]}")
        self.hub.store.blobs[oid] = self.body
        self._answer(200)

    def verify_blob(self, repo: str) -> None:
        self._writable(repo)
        asked = self._json()
        if len(self.hub.store.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "No such object")
        self._answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        pull = self.query.get("create_pr") == "1"
        found = self._readable(repo) if pull and self._user() else self._writable(repo)
        added, deleted, parent = {}, [], None
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                parent = value.get("parentCommit")
            elif kind == "file":
                added[value["path"]] = small_entry(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                added[value["path"]] = self.hub.store.large_entry(value["oid"])
            elif kind == "deletedFile":
                deleted.append(value["path"])
            else:
                raise Refused(400, f"Unknown operation {kind}")
        commit, number = self.hub.store.change(found, revision, added, deleted, parent, pull)
        answer = {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "success": True}
        if number:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self._answer(200, answer)

    def resolve_file(self, repo: str, revision: str, path: str) -> None:
        found = self._readable(repo)
        commit = self.hub.store.resolve(found, revision)
        headers = {"X-Repo-Commit": commit}
        try:
            entry = self.hub.store.entry(found, commit, path)
        except Refused as refused:  # the client remembers by the commit that a file is not there
            gone = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._answer(refused.status, {"error": refused.message}, headers | gone)
            return
        if entry.sha256 is not None:
            about = {"ETag": f'"{commit}"', "X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
            location = {"Location": f"{self.hub.blob_url}/blobs/{entry.sha256}"}
            self._answer(302, b"", headers | about | location)
        else:
            self._send_file(entry.content, headers | {"ETag": f'"{entry.oid}"'})

    def get_blob(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "The token was sent on to the store of large files")
        if oid not in self.hub.store.blobs:
            raise Refused(404, "No such object")
        self._send_file(self.hub.store.blobs[oid], {"ETag": f'"{oid}"'})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        kind = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and int(asked[1]) < len(content):
            start = int(asked[1])
            span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self._answer(206, content[start:], headers | kind | span)
        else:
            self._answer(200, content, headers | kind)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create_repo),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"/api/models/{_REPO}/refs", _Handler.refs),
    (("GET",), rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<path>.+))?", _Handler.tree),
    (("GET",), rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.repo_info),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<revision>.+)", _Handler.create_branch),
    (("POST",), rf"/api/models/{_REPO}/tag/{_REVISION}", _Handler.create_tag),
    (("POST",), rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    (("GET",), rf"/api/models/{_REPO}", _Handler.repo_info),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("POST",), rf"/{_REPO}\.git/info/lfs/verify", _Handler.verify_blob),
    (("PUT",), r"/blobs/(?P<oid>[0-9a-f]{64})", _Handler.put_blob),
    (("GET", "HEAD"), r"/blobs/(?P<oid>[0-9a-f]{64})", _Handler.get_blob),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve_file),
]
