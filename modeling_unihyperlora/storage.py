"""Storage of an adapter: tensors that are trained in the precision of their file, and the checked file itself.

A ``StoredTensor`` has a float latent for the optimiser and returns the value that its file would hold. The gradient
passes straight through the rounding (Bengio et al. 2013, arXiv:1308.3432), so the saved adapter scores the same as the
trained one. Every codec is idempotent: encoding a decoded tensor gives the same codes, bit for bit.

The file is safetensors. Its tensors have the names of the stored tensors ("tasks.conll2003.delta", …); a quantised
tensor with row scales has a second entry "<name>.scale". The header holds the format version and a SHA-256 of all
contents, which detects damage even if the file still decodes. The whole file is checked before any of it is used.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from transformers.utils import cached_file

from .errors import AdapterFileError, ConfigError, first_line

FORMAT_VERSION = 2
WEIGHTS_NAME = "model.safetensors"
LATENTS_NAME = "training_latents.safetensors"
READY = Path(__file__).with_name("ready")  # adapters of the package; absent beside published code
MAX_CONFIG_BYTES = 1_000_000
MAX_HEADER_BYTES = 1_000_000
MAX_WEIGHTS_BYTES = 64_000_000  # an adapter has less than 1 MB; this limit allows thousands of tasks


class RowInteger:
    """Signed integers of ``bits`` bits with one bfloat16 scale per row: value = code * scale.

    The codec is idempotent for two reasons: scales have 8 significant bits and codes at most 8, so their product is
    exact in float32; and the largest code of a row is always ``2**(bits-1) - 1``. A scale so small that it would lose
    bits (below about 1e-38) counts as zero.
    """

    def __init__(self, bits: int):
        self.bits = int(bits)
        self.largest = 2 ** (self.bits - 1) - 1

    def settings(self) -> list[float]:
        """What it is made with."""
        return [float(self.bits)]

    def codes(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(rows, columns)`` float32 → float codes of the same shape and scales ``(rows, 1)``."""
        scale = (value.abs().amax(dim=-1, keepdim=True) / self.largest).bfloat16().float()
        scale = torch.where(scale < torch.finfo(torch.bfloat16).tiny, 0.0, scale)
        divisor = torch.where(scale > 0, scale, 1.0)
        return (value / divisor).round_().clamp_(-self.largest, self.largest), scale

    def round(self, value: torch.Tensor) -> torch.Tensor:
        codes, scale = self.codes(value)
        return codes.mul_(scale)

    def encode(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale = self.codes(value)
        packed = pack(codes, 4) if self.bits == 4 else codes.to(torch.int8)
        return {"": packed, ".scale": scale.bfloat16()}

    def decode(self, stored: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        codes = unpack(stored[""], shape, 4) if self.bits == 4 else stored[""].float()
        return codes * stored[".scale"].float()


class Grid:
    """4-bit integers -8…7 times a fixed ``step``: exactly half a byte per value."""

    bits = 4

    def __init__(self, step: float):
        self.step = step

    def settings(self) -> list[float]:
        """What it is made with."""
        return [self.step]

    def codes(self, value: torch.Tensor) -> torch.Tensor:
        return (value / self.step).round_().clamp_(-8, 7)

    def round(self, value: torch.Tensor) -> torch.Tensor:
        return self.codes(value).mul_(self.step)

    def encode(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"": pack(self.codes(value), self.bits)}

    def decode(self, stored: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        return unpack(stored[""], shape, self.bits).mul_(self.step)


class TwoBit:
    """2-bit codes -2…1 with value (code + ½)·``step``, four per byte; for unit variance, step 1 is nearly optimal."""

    bits = 2

    def __init__(self, step: float):
        self.step = step

    def settings(self) -> list[float]:
        """What it is made with."""
        return [self.step]

    def codes(self, value: torch.Tensor) -> torch.Tensor:
        return (value / self.step).floor_().clamp_(-2, 1)

    def round(self, value: torch.Tensor) -> torch.Tensor:
        return self.codes(value).add_(0.5).mul_(self.step)

    def encode(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"": pack(self.codes(value), self.bits)}

    def decode(self, stored: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        return unpack(stored[""], shape, self.bits).add_(0.5).mul_(self.step)


class Half:
    """IEEE half precision, for small tensors with values of mixed size (biases, waves, embeddings)."""

    bits = 16

    def settings(self) -> list[float]:
        """What it is made with."""
        return []

    def round(self, value: torch.Tensor) -> torch.Tensor:
        return value.half().float()

    def encode(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"": value.half()}

    def decode(self, stored: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        return stored[""].float()


Codec = RowInteger | Grid | TwoBit | Half
CODECS = {codec.__name__: codec for codec in (RowInteger, Grid, TwoBit, Half)}


# The operation is named after the module, since a copy of the module from the Hub may be loaded beside the package.
@torch.library.custom_op(re.sub(r"\W", "_", __name__) + "::rounded", mutates_args=())
def _rounded(value: torch.Tensor, codec: str, settings: list[float]) -> torch.Tensor:
    """``round`` of a codec as one operation that compilers treat as opaque."""
    return CODECS[codec](*settings).round(value)


@_rounded.register_fake
def _(value: torch.Tensor, codec: str, settings: list[float]) -> torch.Tensor:
    return torch.empty_like(value)


def as_stored(value: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The value as a file with this codec holds it, without a gradient; also exact in compiled code."""
    value = value.detach().float()
    if torch.compiler.is_compiling():  # a compiler that fuses casts would keep the digits that rounding removes
        return _rounded(value, type(codec).__name__, codec.settings())
    return codec.round(value)


class StoredTensor(nn.Module):
    """A tensor of the adapter: a trainable float32 ``latent`` and the codec of its file.

    Calling it returns the value that the file holds, in float32, with the shape of the latent.
    """

    def __init__(self, initial: torch.Tensor, codec: Codec):
        super().__init__()
        self.codec = codec
        self.latent = nn.Parameter(initial.float())

    def forward(self) -> torch.Tensor:
        rounded = as_stored(self.latent, self.codec)
        if self.latent.requires_grad and torch.is_grad_enabled():
            return _StraightThrough.apply(self.latent, rounded)
        return rounded

    def encode(self) -> dict[str, torch.Tensor]:
        """File tensors by suffix ("" for the codes, ".scale" for the row scales), on the CPU, contiguous."""
        return {k: v.contiguous() for k, v in self.codec.encode(self.latent.detach().float().cpu()).items()}

    def layout(self) -> dict[str, torch.Tensor]:
        """What ``encode`` returns, on the device "meta": names, dtypes and shapes without values."""
        return self.codec.encode(torch.empty_like(self.latent, device="meta"))

    def decode(self, stored: dict[str, torch.Tensor]) -> None:
        """Set the latent from tensors as ``encode`` returns them; the caller has checked dtypes and shapes."""
        with torch.no_grad():
            self.latent.copy_(self.codec.decode(stored, self.latent.shape))


class _StraightThrough(torch.autograd.Function):
    """Forward: returns the rounded value. Backward: passes its gradient to the latent unchanged."""

    @staticmethod
    def forward(ctx, latent: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes of 2 or 4 ``bits``, of any shape, into uint8: 8/bits codes per byte, the first one lowest."""
    flat, each = codes.reshape(-1).to(torch.int16), 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % each)).view(-1, each) + 2 ** (bits - 1)
    places = torch.arange(0, 8, bits, dtype=flat.dtype, device=flat.device)
    return (flat << places).sum(dim=1, dtype=flat.dtype).to(torch.uint8)


def unpack(packed: torch.Tensor, shape: torch.Size, bits: int) -> torch.Tensor:
    """Inverse of ``pack``: float32 codes of ``shape``."""
    places = torch.arange(0, 8, bits, dtype=packed.dtype, device=packed.device)
    codes = (packed[:, None] >> places & 2**bits - 1).float().sub_(2 ** (bits - 1))
    return codes.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)


# ---- the file ----


def adapter_tensors(
    adapter: nn.Module, made: Callable[[StoredTensor], dict[str, torch.Tensor]] = StoredTensor.encode
) -> dict[str, torch.Tensor]:
    """Tensor name → tensor, for all tensors of the file; includes no tensor of a host.

    With ``StoredTensor.layout`` as ``made``, the stored tensors have no values.
    """
    tensors = {}
    for name, module in _stored(adapter).items():
        tensors.update({name + suffix: tensor for suffix, tensor in made(module).items()})
    for name, buffer in adapter.named_buffers():
        buffer = buffer.detach().cpu()
        tensors[name] = (buffer.half() if buffer.is_floating_point() else buffer).contiguous()
    return tensors


def check_same_layout(adapter: nn.Module, other: nn.Module) -> None:
    """Raise ``ConfigError`` unless two adapters have the same tensors in the same codecs.

    Args:
        adapter: adapter to save.
        other: new adapter, made from the configuration to save.
    """
    one, two = (
        {name: (tuple(x.latent.shape), type(x.codec).__name__, *x.codec.settings()) for name, x in _stored(a).items()}
        for a in (adapter, other)
    )
    if one != two:
        name = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))[0]
        raise ConfigError(
            f"The configuration was changed and no longer describes the adapter: '{name}' is {one.get(name)}, but "
            f"would be {two.get(name)}. Nothing was written; restore the shapes, readers and delta_step."
        )


def adapter_file(name: str | Path, file: str, revision: str | None, hub: dict) -> Path:
    """Path of an adapter's file: in a folder, of a ready adapter of the package, or downloaded from the Hub.

    Raises:
        AdapterFileError: the file does not exist, or its name or a link leads out of the folder.
    """
    folder, ready = Path(name), ready_adapters()
    if not folder.is_dir() and str(name) in ready:
        folder = READY / name
    if folder.is_dir():
        path = check_inside(folder, os.path.join(hub.get("subfolder") or "", file))
        if not path.is_file():
            raise AdapterFileError(f"{folder} has no {file}. Give the folder that save_pretrained wrote.")
        return path
    try:
        return Path(cached_file(str(name), file, revision=revision, **hub))
    except Exception as error:  # versions of the client use HTTP libraries with different errors
        raise AdapterFileError(
            f"No adapter '{name}': it is not a folder{' or one of ' + ', '.join(ready) if ready else ''}, and its "
            f"{file} cannot be loaded from the Hub ({first_line(error)})."
        ) from error


def ready_adapters() -> list[str]:
    """Names of the adapters that the package includes."""
    return sorted(path.parent.name for path in READY.glob(f"*/{WEIGHTS_NAME}"))


def save_adapter(adapter: nn.Module, config: dict[str, object], folder: Path) -> None:
    """Write the weights and ``config.json``; if writing fails, earlier files stay.

    Raises:
        AdapterFileError: a value is NaN or infinite, or the folder cannot be written.
    """
    for name, value in [*adapter.named_parameters(), *adapter.named_buffers()]:
        if not torch.isfinite(value).all():
            raise AdapterFileError(
                f"'{name}' holds NaN or infinite values, so nothing was written to {folder}. The training diverged: "
                "lower the learning rates, or resume from the last checkpoint."
            )
    tensors = adapter_tensors(adapter)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(
                f"'{name}' holds values too large for {tensor.dtype}, its type in the file, so nothing was written to "
                f"{folder}. The training diverged: lower the learning rates, or resume from the last checkpoint."
            )
    with replacing(folder / "config.json") as text, replacing(folder / WEIGHTS_NAME) as weights:
        Path(text).write_text(_json(config), encoding="utf-8")
        save_file(tensors, weights, metadata=signed_metadata(tensors))


def load_adapter(adapter: nn.Module, path: Path) -> None:
    """Load a weights file into an adapter that was built from the same configuration.

    Raises:
        AdapterFileError: the file is missing, damaged, of another shape, or holds values that are not finite; the
            adapter is unchanged.
    """
    if path.is_file() and path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise AdapterFileError(f"{path} has {path.stat().st_size} bytes; an adapter has at most {MAX_WEIGHTS_BYTES}.")
    take_over(adapter, read_checked(path), str(path))


def take_over(adapter: nn.Module, tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Decode the tensors of a file into an adapter that was built from the same configuration.

    Args:
        tensors: tensors with the names of ``adapter_tensors``.
        origin: name of their source, for error messages.

    Raises:
        AdapterFileError: the tensors do not fit the adapter, or hold values that are not finite; the adapter is
            unchanged.
    """
    expected = adapter_tensors(adapter, StoredTensor.layout)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise AdapterFileError(
            f"{origin} does not fit its configuration: missing tensors {missing[:4]}, unknown tensors {unknown[:4]}. "
            "Use config.json and model.safetensors of the same adapter."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise AdapterFileError(
                f"{origin}: '{name}' is {tensor.dtype} {tuple(tensor.shape)}, but the configuration requires "
                f"{expected[name].dtype} {tuple(expected[name].shape)}."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{origin}: '{name}' holds NaN or infinite values; download or train it again.")
    for name, module in _stored(adapter).items():
        module.decode({suffix: tensors[name + suffix] for suffix in module.layout()})
    for name, buffer in adapter.named_buffers():
        buffer.copy_(tensors[name].float())


def read_checked(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file after checking its header, format version and digest.

    Raises:
        AdapterFileError: the file cannot be read, has another format, or does not match its digest.
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
        raise AdapterFileError(f"{path} is not a UniHyperLoRA adapter: its header names no format version.")
    if int(version) < FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format {version}, from version 0.1 of the package. This package reads format "
            f"{FORMAT_VERSION}: train the adapter again, or install 'unihyperlora<0.2'."
        )
    if int(version) > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format {version}, but this package reads up to {FORMAT_VERSION}. Update the package."
        )
    if metadata.get("sha256") != digest:
        raise AdapterFileError(
            f"{path} is damaged: its contents do not match their SHA-256. Download it again, "
            "with force_download=True if it is from the Hub."
        )
    return tensors


def metadata_of(path: Path) -> dict[str, str]:
    """Metadata in the header of a file; the caller has checked the file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_checked(path: Path, tensors: dict[str, torch.Tensor], more: dict[str, str] | None = None) -> None:
    """Write a file for ``read_checked``, atomically; ``more`` is added to the header's metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=signed_metadata(tensors, more))


def save_file(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that depends only on the contents: safetensors itself shuffles the metadata."""
    content = serialize(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def signed_metadata(tensors: dict[str, torch.Tensor], more: dict[str, str] | None = None) -> dict[str, str]:
    """Metadata for the header: the format version, ``more``, and the digest of everything in the file."""
    metadata = {"format": "pt", "unihyperlora_format": str(FORMAT_VERSION), **(more or {})}
    return metadata | {"sha256": content_digest(tensors, metadata)}


def content_digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over the metadata and over the tensors' names, dtypes, shapes and bytes, ordered by name."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_bytes(adapter: nn.Module) -> int:
    """Size in bytes of the weights file that ``save_adapter`` would write now, including its header."""
    tensors = adapter_tensors(adapter)
    return len(serialize(tensors, metadata=signed_metadata(tensors)))


# ---- training state: the float latents, which a resumed run needs ----


def save_latents(adapter: nn.Module, path: Path) -> None:
    """Write float32 latents and buffers, bit for bit, to resume training; a deployed adapter does not need them."""
    write_checked(path, adapter.state_dict())


def load_latents(adapter: nn.Module, path: Path) -> None:
    """Load a file of ``save_latents`` into an adapter.

    Raises:
        AdapterFileError: the file is damaged or belongs to another adapter; the adapter is unchanged.
    """
    state, own = read_checked(path), adapter.state_dict()
    shapes, expected = ({name: value.shape for name, value in x.items()} for x in (state, own))
    unlike = sorted(name for name, _ in shapes.items() ^ expected.items())
    if unlike:
        raise AdapterFileError(
            f"{path} belongs to another adapter; missing, unknown or differently shaped tensors: {unlike[:4]}. Give "
            "the latents that this run saved."
        )
    adapter.load_state_dict(state)


# ---- files ----


@contextlib.contextmanager
def replacing(path: Path):
    """Yield a temporary file name beside ``path``; it replaces ``path`` if the block ends without an error.

    Raises:
        AdapterFileError: the folder or the file cannot be written; an earlier file stays.
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
            f"{path} cannot be written ({error}). Nothing was changed; choose a folder that is writable and has space."
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(_json(content), encoding="utf-8")


def _json(content: dict) -> str:
    return json.dumps(dict(sorted(content.items())), indent=2) + "\n"  # only outer keys: the order of tasks matters


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _stored(adapter: nn.Module) -> dict[str, StoredTensor]:
    return {name: module for name, module in adapter.named_modules() if isinstance(module, StoredTensor)}


# ---- files from others ----


def read_json_object(path: Path) -> dict:
    """Read the object in a small JSON file; refuses repeated keys.

    Raises:
        AdapterFileError: the file is too large or not readable, holds no JSON object, or has a key twice.
    """
    try:
        if os.path.getsize(path) > MAX_CONFIG_BYTES:
            raise AdapterFileError(
                f"{path} has more than {MAX_CONFIG_BYTES} bytes, so it is not an adapter's config.json."
            )
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} is not a JSON object.")
    return content


def check_header(path: Path) -> None:
    """Check the header of a safetensors file.

    Raises:
        AdapterFileError: the header is too large, is not readable, or names a tensor twice.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"it announces a header of {size} bytes; at most {MAX_HEADER_BYTES} are read")
            json.loads(file.read(size), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not a readable safetensors file ({error}). Download it again.") from error


def check_inside(folder: Path, file: str) -> Path:
    """Path of ``file`` in ``folder``, after checking that it really lies there.

    Links may lead into the blob store of the Hub's cache, whose snapshots consist of such links, but not elsewhere.

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
        raise ValueError(f"the key {twice!r} appears twice")
    return found
