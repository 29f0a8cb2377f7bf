"""Pushes an adapter to the Hub: only the adapter's own files, in one commit, verified afterwards.

A push can be repeated safely: files that the repository already has are not sent again, and a commit is atomic.
"""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from transformers.utils import CONFIG_NAME

from ..configuration_unihyperlora import UniHyperLoraConfig, read_config
from ..errors import AdapterFileError, ConfigError, HubError, first_line, http_status
from ..modeling_unihyperlora import make_adapter
from ..storage import WEIGHTS_NAME, check_inside, load_adapter, read_json_object, write_json
from .bundle import copy_code
from .card import CARD_NAME, LICENCE_NAME, is_hub_id, public_name, write_card, write_licence
from .code_files import code_files

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses after which another attempt may succeed
PATIENCE = 30.0  # seconds during which a push is retried; the client itself waits too
REASONS = {
    401: "the Hub does not accept the token, or no token was given; run `hf auth login` or pass --token",
    403: "this token may not write there; use a token with write access, or --create_pr",
    404: "the repository or branch does not exist, or this token may not see it",
    409: "the Hub is changing that repository at the moment; try again",
    412: "somebody else has pushed in the meantime; look at the repository and push again",
    422: "the Hub received other bytes than were sent; try again",
    429: "the Hub limits the number of requests; wait a few minutes and try again",
}


def files_of(pathway: str) -> tuple[str, ...]:
    """The files of an adapter's repository."""
    return (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, LICENCE_NAME, *code_files(pathway))


@dataclass
class Push:
    """Result of a push, or of a dry run.

    Attributes:
        files: name → bytes, for the pushed files.
        changed: names of new and changed files.
        others: name → bytes, for all other files in the repository.
        url: URL of the commit; empty for a dry run.
        commit: id of the commit; empty for a dry run.
    """

    repo_id: str
    files: dict[str, int]
    changed: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    url: str = ""
    commit: str = ""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: bool | str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    base_model_name_or_path: str | None = None,
    **facts,
) -> Push:
    """Push the adapter in a folder; other files in it (checkpoints, arguments, tokenizers) are not pushed.

    Args:
        folder: folder that ``save_pretrained`` or a run wrote.
        repo_id, private, revision, create_pr, token, commit_message, commit_description, base_model_name_or_path: as
            for ``push_to_hub`` of a model.
        dry_run: check and list the files, but send nothing.
        **facts: facts for the card; see ``card.write_card``.

    Raises:
        AdapterFileError: the folder has no adapter, or its files do not belong together.
        HubError: the push failed; the repository is unchanged.
    """
    with tempfile.TemporaryDirectory() as staged:
        config = stage(Path(folder), Path(staged), repo_id, base_model_name_or_path, look_up=not dry_run, **facts)
        names = files_of(config.pathway)
        sizes = {name: (Path(staged) / name).stat().st_size for name in names}
        if dry_run:
            return Push(repo_id, sizes, list(names))
        logger.info("To push to %s:\n%s", repo_id, listing(sizes))
        with _in_one_sentence(repo_id):
            message = (commit_message, commit_description)
            push = _patiently(
                lambda: _push_once(Path(staged), names, repo_id, private, revision, create_pr, token, *message),
                once=create_pr,  # after a lost answer, a retry would open a second pull request
            )
    logger.info(
        "Files in %s now, %d of them changed:\n%s", push.url, len(push.changed), listing(push.files | push.others)
    )
    return push


def push_model(model, repo_id: str, **kwargs) -> str:
    """Push a model's adapter; see ``push_to_hub`` of the model.

    Returns:
        The URL of the commit.
    """
    names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
    own = {name: kwargs.get(name) for name in (*names, "base_model_name_or_path")} | {"create_pr": False}
    with tempfile.TemporaryDirectory() as folder:
        model.save_files(Path(folder))
        return push_folder(folder, repo_id, **own | {"create_pr": kwargs.get("create_pr", False)}).url


def create_repository(repo_id: str, private: bool | None = None, token: bool | str | None = None) -> str:
    """Create a repository if it does not exist; returns its full name.

    Raises:
        HubError: the repository cannot be created.
    """
    with _in_one_sentence(repo_id):
        api = HfApi(token=token)
        return _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id)


@contextlib.contextmanager
def _in_one_sentence(repo_id: str) -> Iterator[None]:
    """Turn any error of the client into a ``HubError`` that says what to do."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # versions of the client use HTTP libraries with different errors
        status = http_status(error)
        reason = REASONS.get(status) or f"the Hub cannot be reached or failed: {first_line(error)}"
        raise HubError(
            f"Not pushed to {repo_id}: {reason}{f' (HTTP {status})' if status else ''}. The repository is unchanged."
        ) from error


def listing(files: dict[str, int]) -> str:
    """One line for each file and one for the total."""
    lines = [f"{size:>10,}  {name}" for name, size in files.items()]
    return "\n".join([*lines, f"{sum(files.values()):>10,}  bytes in {len(files)} files"])


def stage(
    folder: Path, staged: Path, repo_id: str | None, base_model_name_or_path: str | None = None, **card
) -> UniHyperLoraConfig:
    """Copy the files to push into ``staged``: checked weights, configuration without local paths, code, card, licence.

    Raises:
        AdapterFileError: ``folder`` has no adapter, its files do not belong together, or one is a link out of it.
        ConfigError: ``base_model_name_or_path`` is not a name on the Hub.
    """
    if base_model_name_or_path is not None and not is_hub_id(base_model_name_or_path):
        raise ConfigError(
            f"base_model_name_or_path={base_model_name_or_path!r} is not a name on the Hub, so others could not load "
            "it. Give the host's Hub id."
        )
    sources = {}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        sources[name] = check_inside(folder, name)
        if not sources[name].is_file():
            raise AdapterFileError(f"{folder} has no {name}. Give the folder that save_pretrained or a run wrote.")
    config = read_config(sources[CONFIG_NAME])
    load_adapter(make_adapter(config), sources[WEIGHTS_NAME])
    (staged / WEIGHTS_NAME).write_bytes(sources[WEIGHTS_NAME].read_bytes())
    content = read_json_object(sources[CONFIG_NAME])
    name = content.get("base_model_name_or_path")
    if base_model_name_or_path is not None:
        for host in content.get("source_hosts") or []:
            host["name"] = base_model_name_or_path if host["name"] == name else host["name"]
        content["base_model_name_or_path"] = base_model_name_or_path
    elif not is_hub_id(name):
        content["base_model_name_or_path"] = None
        logger.warning(
            "The adapter's host is the folder %s, which others do not have: users of the adapter must name a host. If "
            "the host is on the Hub, push with --base_model_name_or_path.",
            name,
        )
    for host in content.get("source_hosts") or []:
        host["name"] = public_name(host["name"])
    write_json(staged / CONFIG_NAME, content)
    copy_code(staged, config.pathway)
    write_licence(staged)
    for name in (CARD_NAME, "all_results.json", "run_arguments.json"):  # sources of the card
        if (folder / name).is_file():
            (staged / name).write_bytes(check_inside(folder, name).read_bytes())
    write_card(staged, repo_id, **card)
    return config


def _patiently(work: Callable[[], T], once: bool = False) -> T:
    """Call ``work`` and retry after transient errors; ``work`` must be safe to repeat. ``once`` turns retries off."""
    start, wait = time.monotonic(), 1.0
    while True:
        try:
            return work()
        except Exception as error:
            retries = (http_status(error) in TRANSIENT or _is_connection(error)) and not once
            wait = max(wait, _retry_after(error))
            if not retries or time.monotonic() - start + wait > PATIENCE:
                raise
            logger.warning("%s; trying again in %.0f s.", first_line(error), wait)
            time.sleep(wait)
            wait *= 2


def _push_once(
    staged: Path, names: tuple[str, ...], repo_id: str, private, revision, create_pr, token, message, description
) -> Push:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    branch = revision or "main"
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=branch).sha
    known = _remote_files(api, repo_id, before)
    operations = [CommitOperationAdd(name, staged / name) for name in names]
    done = api.create_commit(
        repo_id,
        operations,
        commit_message=message or "Upload adapter",
        commit_description=description,
        revision=branch,
        parent_commit=before,
        create_pr=create_pr,
    )
    now = _remote_files(api, repo_id, done.oid)
    own = {name: (staged / name).stat().st_size for name in names}
    wrong = [name for name, size in own.items() if name not in now or now[name][0] != size]
    if wrong:
        raise HubError(f"{repo_id} has files that differ from the pushed ones: {', '.join(wrong)}. Push again.")
    changed = [name for name in names if known.get(name) != now[name]]
    others = {name: size for name, (size, _) in now.items() if name not in own}
    return Push(repo_id, own, changed, others, done.pr_url or done.commit_url, done.oid)


def _remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, tuple[int, str]]:
    """Name → (bytes, git's id) of every file in the repository."""
    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {item.path: (item.size, item.blob_id) for item in tree if hasattr(item, "blob_id")}


def _is_connection(error: BaseException | None) -> bool:
    """Whether a connection failed; clients use httpx or httpx2, and worker threads wrap their errors."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(
            ("httpx", "httpcore")
        ):
            return http_status(error) is None
        error = error.__cause__
    return False


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
