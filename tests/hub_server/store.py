"""Storage of the local Hub: users, repositories with commits, branches and tags, large files by SHA-256."""

import hashlib
import itertools
import threading
from dataclasses import dataclass, field

LARGE_SUFFIXES = (".safetensors", ".bin", ".onnx")  # what the Hub's default .gitattributes keeps outside git
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refused(Exception):
    """An error answer: HTTP status, the Hub's error code, and a message."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Entry:
    """One file of a commit; ``content`` is None for a large file, whose bytes are in ``Store.blobs``."""

    size: int
    oid: str  # SHA-1 as git's, of the content or of the pointer
    content: bytes | None
    sha256: str | None = None


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, tuple[str | None, dict[str, Entry]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]


class Store:
    """Two users, "alice" and "bob", with the tokens "token-of-alice" and so on; "reader" may only read."""

    def __init__(self):
        self.users = {f"token-of-{name}": name for name in ("alice", "bob", "reader")}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._numbers = itertools.count()

    # ---- who may do what ----

    def user(self, authorization: str | None) -> str | None:
        """The user of an Authorization header; None without a valid token."""
        if not authorization:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, name: str, user: str | None) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and user not in (repo.owner, "reader")):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name: str, user: str | None) -> Repo:
        if user is None:
            raise Refused(401, "Log in to write")
        repo = self.readable(name, user)
        if user != repo.owner:
            raise Refused(403, f"{user} has no write access to {name}")
        return repo

    # ---- repositories ----

    def create(self, name: str, user: str | None, private: bool) -> Repo:
        if user is None:
            raise Refused(401, "Log in to make a repository")
        if name.split("/")[0] != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        repo = self.repos[name] = Repo(name, private)
        self._commit(repo, "main", {".gitattributes": small_entry(GITATTRIBUTES)})
        return repo

    def resolve(self, repo: Repo, revision: str) -> str:
        """The commit of a branch, tag or commit id."""
        for names in (repo.branches, repo.tags):
            if revision in names:
                return names[revision]
        found = [commit for commit in repo.commits if len(revision) >= 7 and commit.startswith(revision)]
        if len(found) != 1:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def files(self, repo: Repo, revision: str) -> dict[str, Entry]:
        return repo.commits[self.resolve(repo, revision)][1]

    def entry(self, repo: Repo, revision: str, path: str) -> Entry:
        files = self.files(repo, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return files[path]

    def content(self, entry: Entry) -> bytes:
        return self.blobs[entry.sha256] if entry.content is None else entry.content

    def large_entry(self, sha256: str) -> Entry:
        if sha256 not in self.blobs:
            raise Refused(400, f"The file {sha256} was never uploaded")
        size = len(self.blobs[sha256])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(size, small_entry(pointer).oid, None, sha256)

    def change(
        self, repo: Repo, branch: str, added: dict[str, Entry], deleted: list[str], parent: str | None, pull: bool
    ) -> tuple[str, int | None]:
        """Make an atomic commit on a branch; returns its id, and the number of the pull request if any."""
        head = self.resolve(repo, branch)
        if not pull and branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if parent is not None and parent != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = {path: entry for path, entry in repo.commits[head][1].items() if path not in deleted} | added
        number = None
        if pull:
            repo.pulls = number = repo.pulls + 1
            branch = f"refs/pr/{number}"
        return self._commit(repo, branch, files, head), number

    def _commit(self, repo: Repo, branch: str, files: dict[str, Entry], parent: str | None = None) -> str:
        listing = "".join(f"{path}{entry.oid}" for path, entry in sorted(files.items()))
        commit = hashlib.sha1(f"{repo.name}{parent}{next(self._numbers)}{listing}".encode()).hexdigest()
        repo.commits[commit] = (parent, files)
        repo.branches[branch] = commit
        return commit

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Set up a repository with these files, without the client; returns the commit."""
        with self.lock:
            if name not in self.repos:
                self.create(name, name.split("/")[0], private)
            entries = {}
            for path, content in files.items():
                if path.endswith(LARGE_SUFFIXES):
                    digest = hashlib.sha256(content).hexdigest()
                    self.blobs[digest] = content
                    entries[path] = self.large_entry(digest)
                else:
                    entries[path] = small_entry(content)
            return self.change(self.repos[name], "main", entries, [], None, pull=False)[0]

    def state(self, name: str) -> dict[str, dict[str, str]]:
        """The whole state of a repository, names → commits → files, to compare before and after."""
        repo = self.repos[name]
        return {
            branch: {path: entry.oid for path, entry in repo.commits[commit][1].items()} | {"commit": commit}
            for branch, commit in repo.branches.items()
        }


def small_entry(content: bytes) -> Entry:
    return Entry(len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content)
