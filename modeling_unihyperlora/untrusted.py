"""Checks on files that others wrote, before anything is taken from them."""

import json
import os
from pathlib import Path

from .errors import AdapterFileError

MAX_CONFIG_BYTES = 1_000_000
MAX_HEADER_BYTES = 1_000_000
MAX_WEIGHTS_BYTES = 64_000_000  # an adapter has less than 1 MB; this leaves room for thousands of tasks


def read_json_object(path: Path) -> dict:
    """The object in a small JSON file in which no key is written twice.

    Raises:
        AdapterFileError: it is too large, not readable, no JSON object, or names a key twice.
    """
    try:
        if os.path.getsize(path) > MAX_CONFIG_BYTES:
            raise AdapterFileError(
                f"{path} has more than {MAX_CONFIG_BYTES} bytes, so it is no adapter's config.json."
            )
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} is not a JSON object.")
    return content


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is oversized or names a tensor twice.

    Raises:
        AdapterFileError
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"it announces a header of {size} bytes, at most {MAX_HEADER_BYTES} are read")
            json.loads(file.read(size), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not a readable safetensors file ({error}). Download it again.") from error


def check_inside(folder: Path, file: str) -> Path:
    """The path of ``file`` in ``folder``, if that is where it really is.

    A link may lead to the store of the Hub's cache, whose snapshots consist of such links; no other link may leave.

    Raises:
        AdapterFileError: the name or a link leads out of the folder.
    """
    path, root = Path(folder) / file, Path(folder).resolve()
    real = path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if ".." in Path(file).parts or not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise AdapterFileError(f"{path} leads out of the folder, to {real}; nothing is read from there.")
    return path


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found
