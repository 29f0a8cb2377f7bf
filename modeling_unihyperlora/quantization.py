"""Tensors that are trained in the precision in which they are saved.

A ``StoredTensor`` keeps a float latent for the optimiser and hands out the value that its file would hold. The
gradient passes straight through the rounding (Bengio et al. 2013, arXiv:1308.3432), so that the saved adapter scores
what the trained one scored. Every codec is idempotent: encoding a decoded tensor gives the same codes, bit for bit.
"""

import re

import torch
from torch import nn


class RowInteger:
    """Signed integers of ``bits`` bits with one bfloat16 scale a row: value = code * scale.

    The scale has 8 significant bits and codes at most 8, so their product is exact in float32, and the largest code
    of a row is always ``2**(bits-1) - 1``: this is what makes the codec idempotent. A scale so small that it would
    lose bits (below about 1e-38) counts as zero.
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
        return (value / divisor).round().clamp(-self.largest, self.largest), scale

    def round(self, value: torch.Tensor) -> torch.Tensor:
        codes, scale = self.codes(value)
        return codes * scale

    def encode(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale = self.codes(value)
        packed = pack(codes, 4) if self.bits == 4 else codes.to(torch.int8)
        return {"": packed, ".scale": scale.bfloat16()}

    def decode(self, stored: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        codes = unpack(stored[""], shape, 4) if self.bits == 4 else stored[""].float()
        return codes * stored[".scale"].float()


class Grid:
    """4-bit integers -8…7 times one fixed ``step``: exactly half a byte a value and nothing else."""

    bits = 4

    def __init__(self, step: float):
        self.step = step

    def settings(self) -> list[float]:
        """What it is made with."""
        return [self.step]

    def codes(self, value: torch.Tensor) -> torch.Tensor:
        return (value / self.step).round().clamp(-8, 7)

    def round(self, value: torch.Tensor) -> torch.Tensor:
        return self.codes(value) * self.step

    def encode(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"": pack(self.codes(value), self.bits)}

    def decode(self, stored: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        return unpack(stored[""], shape, self.bits) * self.step


class TwoBit:
    """Integers -2…1 at (code + ½)·``step``, four to a byte; of unit variance, step 1 is about the best."""

    bits = 2

    def __init__(self, step: float):
        self.step = step

    def settings(self) -> list[float]:
        """What it is made with."""
        return [self.step]

    def codes(self, value: torch.Tensor) -> torch.Tensor:
        return (value / self.step).floor().clamp(-2, 1)

    def round(self, value: torch.Tensor) -> torch.Tensor:
        return (self.codes(value) + 0.5) * self.step

    def encode(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"": pack(self.codes(value), self.bits)}

    def decode(self, stored: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        return (unpack(stored[""], shape, self.bits) + 0.5) * self.step


class Half:
    """IEEE half precision, for small tensors of mixed range (biases, waves, embeddings)."""

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


# The name is that of the module, since a copy of it may be loaded from a Hub beside the package.
@torch.library.custom_op(re.sub(r"\W", "_", __name__) + "::rounded", mutates_args=())
def _rounded(value: torch.Tensor, codec: str, settings: list[float]) -> torch.Tensor:
    """``round`` of a codec as one operation, into which no compiler looks."""
    return CODECS[codec](*settings).round(value)


@_rounded.register_fake
def _(value: torch.Tensor, codec: str, settings: list[float]) -> torch.Tensor:
    return torch.empty_like(value)


def as_stored(value: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The value as a file of this codec holds it, without a gradient; under a compiler as well."""
    value = value.detach().float()
    if torch.compiler.is_compiling():  # one that fuses casts would keep the very digits that rounding drops
        return _rounded(value, type(codec).__name__, codec.settings())
    return codec.round(value)


class StoredTensor(nn.Module):
    """One tensor of the adapter: a trainable float32 ``latent`` and the codec of its file.

    Calling it returns the value as the file holds it, in float32, with the shape of the latent.
    """

    def __init__(self, initial: torch.Tensor, codec: Codec):
        super().__init__()
        self.codec = codec
        self.latent = nn.Parameter(initial.float())

    def forward(self) -> torch.Tensor:
        return _StraightThrough.apply(self.latent, as_stored(self.latent, self.codec))

    def encode(self) -> dict[str, torch.Tensor]:
        """File tensors by suffix ("" for the codes, ".scale" for the row scales), on the CPU, contiguous."""
        return {k: v.contiguous() for k, v in self.codec.encode(self.latent.detach().float().cpu()).items()}

    def decode(self, stored: dict[str, torch.Tensor]) -> None:
        """Take over what ``encode`` gave; the caller has checked dtypes and shapes."""
        with torch.no_grad():
            self.latent.copy_(self.codec.decode(stored, self.latent.shape))


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded value. Backward: the gradient of the latent is that of the rounded value."""

    @staticmethod
    def forward(ctx, latent: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes of 2 or 4 ``bits`` and any shape → uint8, 8/bits of them in a byte, the first one lowest."""
    flat, each = codes.reshape(-1).to(torch.int16), 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % each)).view(-1, each) + 2 ** (bits - 1)
    return (flat << torch.arange(0, 8, bits, device=flat.device)).sum(dim=1).to(torch.uint8)


def unpack(packed: torch.Tensor, shape: torch.Size, bits: int) -> torch.Tensor:
    """Inverse of ``pack``: float32 codes of ``shape``."""
    codes = packed[:, None] >> torch.arange(0, 8, bits, device=packed.device) & 2**bits - 1
    return (codes.float() - 2 ** (bits - 1)).reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
