"""The adapter's file: one safetensors file with quantised tensors, checked whole before anything is taken from it.

Tensor names are those of the adapter's stored tensors ("atoms_in", "tasks.conll2003.delta", …); a quantised tensor
with row scales has a second entry "<name>.scale". The header carries the format version and a SHA-256 of all
contents, so that damage is found even where it would still decode.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import nn
from transformers.utils import CONFIG_NAME, cached_file

from .adapter import UniHyperLoraAdapter, part_of
from .configuration_unihyperlora import FORMAT_VERSION, UniHyperLoraConfig
from .errors import AdapterFileError, UniHyperLoraError, first_line
from .quantization import StoredTensor
from .untrusted import MAX_WEIGHTS_BYTES, check_header, check_inside, read_json_object

WEIGHTS_NAME = "model.safetensors"
LATENTS_NAME = "training_latents.safetensors"


def adapter_tensors(adapter: UniHyperLoraAdapter) -> dict[str, torch.Tensor]:
    """Every tensor of the file by its name; no tensor of a host is among them."""
    tensors = {}
    for name, module in _stored(adapter).items():
        tensors.update({name + suffix: tensor for suffix, tensor in module.encode().items()})
    for name, buffer in adapter.named_buffers():
        buffer = buffer.detach().cpu()
        tensors[name] = (buffer.half() if buffer.is_floating_point() else buffer).contiguous()
    return tensors


def read_config(path: Path) -> UniHyperLoraConfig:
    """The configuration in a ``config.json``.

    Raises:
        AdapterFileError: it is not JSON, names a key twice, or is not of this kind.
    """
    content = read_json_object(path)
    if content.pop("model_type", None) != UniHyperLoraConfig.model_type:
        raise AdapterFileError(f"{path} is not the configuration of a UniHyperLoRA adapter.")
    try:
        return UniHyperLoraConfig(**content)
    except UniHyperLoraError:
        raise
    except Exception as error:  # transformers checks its own keys with many kinds of error
        raise AdapterFileError(f"{path} holds a value that cannot be used ({error}).") from error


def adapter_file(name: str | Path, file: str, revision: str | None, hub: dict) -> Path:
    """A file of an adapter, in its folder or from the Hub.

    Raises:
        AdapterFileError: there is none, or its name or a link leads out of the folder.
    """
    folder = Path(name)
    if folder.is_dir():
        path = check_inside(folder, os.path.join(hub.get("subfolder") or "", file))
        if not path.is_file():
            raise AdapterFileError(f"{folder} has no {file}. Give the folder that save_pretrained wrote.")
        return path
    try:
        return Path(cached_file(str(name), file, revision=revision, **hub))
    except Exception as error:  # the HTTP libraries of the client's generations have nothing in common
        raise AdapterFileError(
            f"No adapter '{name}': it is no folder, and on the Hub {file} cannot be had ({first_line(error)})."
        ) from error


def save_adapter(adapter: UniHyperLoraAdapter, config: dict[str, object], folder: Path) -> None:
    """Write the weights and ``config.json``, or leave what was there before.

    Raises:
        AdapterFileError: a value is NaN or infinite, or the folder cannot be written.
    """
    for name, value in [*adapter.named_parameters(), *adapter.named_buffers()]:
        if not torch.isfinite(value).all():
            raise AdapterFileError(
                f"'{name}' holds NaN or infinite values, so nothing was written to {folder}. The training diverged: "
                "lower the learning rates, or go back to the last checkpoint."
            )
    tensors = adapter_tensors(adapter)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(
                f"'{name}' holds values beyond {tensor.dtype}, in which it is stored, so nothing was written to "
                f"{folder}. The training diverged: lower the learning rates, or go back to the last checkpoint."
            )
    with replacing(folder / CONFIG_NAME) as text, replacing(folder / WEIGHTS_NAME) as weights:
        Path(text).write_text(_json(config), encoding="utf-8")
        save_file(tensors, weights, metadata=signed_metadata(tensors))


def load_adapter(adapter: UniHyperLoraAdapter, path: Path) -> None:
    """Read the file into an adapter that was built from the file's configuration.

    Raises:
        AdapterFileError: the file is missing, damaged, of another shape, or holds values that are not finite; the
            adapter is then as it was.
    """
    if path.is_file() and path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise AdapterFileError(
            f"{path} has {path.stat().st_size} bytes; no adapter has more than {MAX_WEIGHTS_BYTES}."
        )
    take_over(adapter, read_checked(path), str(path))


def take_over(adapter: UniHyperLoraAdapter, tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Decode the tensors of a file into an adapter that was built from the file's configuration.

    Args:
        tensors: as ``adapter_tensors`` names them.
        origin: what an error calls them.

    Raises:
        AdapterFileError: they do not fit, or hold values that are not finite; the adapter is then as it was.
    """
    expected = adapter_tensors(adapter)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise AdapterFileError(
            f"{origin} does not fit its configuration: missing tensors {missing[:4]}, unknown tensors {unknown[:4]}. "
            "Use the config.json and model.safetensors of one and the same adapter."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise AdapterFileError(
                f"{origin}: '{name}' is {tensor.dtype} {tuple(tensor.shape)}, the configuration asks for "
                f"{expected[name].dtype} {tuple(expected[name].shape)}."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{origin}: '{name}' holds NaN or infinite values; download or train it again.")
    for name, module in _stored(adapter).items():
        suffixes = module.encode().keys()
        module.decode({suffix: tensors[name + suffix] for suffix in suffixes})
    for name, buffer in adapter.named_buffers():
        buffer.copy_(tensors[name].float())


def read_checked(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file whose digest holds.

    Raises:
        AdapterFileError: the file cannot be read, or its contents are not what was written.
    """
    if not Path(path).is_file():
        raise AdapterFileError(f"No adapter file {path}. Give a folder that holds {WEIGHTS_NAME}.")
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        digest = content_digest(tensors, {name: text for name, text in metadata.items() if name != "sha256"})
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise AdapterFileError(f"{path} is not a readable safetensors file ({error}). Download it again.") from error
    version = metadata.get("unihyperlora_format", "")
    if not (version.isascii() and version.isdigit()):
        raise AdapterFileError(f"{path} is no UniHyperLoRA adapter: its header does not say so.")
    if int(version) > FORMAT_VERSION:
        raise AdapterFileError(f"{path} has format {version}, this package reads up to {FORMAT_VERSION}; update it.")
    if metadata.get("sha256") != digest:
        raise AdapterFileError(
            f"{path} is damaged: its contents do not match their SHA-256. Download it again, "
            "with force_download=True if it is from the Hub."
        )
    return tensors


def write_checked(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as ``read_checked`` wants them, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=signed_metadata(tensors))


def signed_metadata(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """What the header says beside the tensors: the format, and the digest of everything in the file."""
    metadata = {"format": "pt", "unihyperlora_format": str(FORMAT_VERSION)}
    return metadata | {"sha256": content_digest(tensors, metadata)}


def content_digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over the metadata and over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_bytes(adapter: UniHyperLoraAdapter) -> int:
    """Size of the weights file that ``save_adapter`` would write now, header and all."""
    tensors = adapter_tensors(adapter)
    return len(serialize(tensors, metadata=signed_metadata(tensors)))


def bytes_of_parts(adapter: UniHyperLoraAdapter) -> dict[str, int]:
    """Bytes of tensor data in the file, by part; "mean_gate" of a task counts as router."""
    parts: dict[str, int] = {}
    for name, tensor in adapter_tensors(adapter).items():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
    return parts


# ---- training state: the float latents, which a resumed run continues from ----


def save_latents(adapter: UniHyperLoraAdapter, path: Path) -> None:
    """Float32 latents and buffers, bit for bit, for resuming; a deployed adapter does not need them."""
    write_checked(path, adapter.state_dict())


def load_latents(adapter: UniHyperLoraAdapter, path: Path) -> None:
    """Take over what ``save_latents`` wrote.

    Raises:
        AdapterFileError: the file is damaged or of another adapter; this one is then as it was.
    """
    state, own = read_checked(path), adapter.state_dict()
    shapes, expected = ({name: value.shape for name, value in x.items()} for x in (state, own))
    unlike = sorted(name for name, _ in shapes.items() ^ expected.items())
    if unlike:
        raise AdapterFileError(f"{path} is of another adapter: missing, unknown or of another shape {unlike[:4]}.")
    adapter.load_state_dict(state)


# ---- files ----


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary name in the folder of ``path`` that takes its place when the block ends without an error.

    Raises:
        AdapterFileError: the folder or the file cannot be written; what was there before is still there.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"{path} cannot be written ({error}). Nothing was changed there; choose a folder that can be written and "
            "has space."
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(_json(content), encoding="utf-8")


def _json(content: dict) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _stored(adapter: nn.Module) -> dict[str, StoredTensor]:
    return {name: module for name, module in adapter.named_modules() if isinstance(module, StoredTensor)}
