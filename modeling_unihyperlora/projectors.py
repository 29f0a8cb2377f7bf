"""Projectors: the maps between a host's vectors and the canonical space.

The interface of a projector:

- ``sides(module_type)``: the sides of a linear layer (input or output) where the update reads and where it writes;
- ``key(width, depth)``: key of the map for a state of a width at a relative depth; equal maps have equal keys, so each
  is computed once. ``site_keys(module_type, widths, depth)``: keys for reading and for writing at a linear layer;
- ``inward(key)``: P_in, shape (D, width); ``outward(key)``: P_out, shape (width, D).

A ``DimensionProjector`` is trained; it starts as a ``CosineProjector``, which has no parameters.
"""

import math
from collections.abc import Hashable
from typing import Literal

import torch
from torch import nn

from .storage import Half, StoredTensor

Side = Literal["input", "output"]


class CosineProjector(nn.Module):
    """The orthogonal DCT-II basis for any width; has no parameters."""

    def __init__(self, canonical_dim: int):
        super().__init__()
        self.canonical_dim = canonical_dim

    def sides(self, module_type: str) -> tuple[Side, Side]:
        """Read at the layer's input and write at its output, as ΔW x does."""
        return "input", "output"

    def key(self, width: int, depth: float) -> Hashable:
        return width

    def site_keys(self, module_type: str, widths: dict[Side, int], depth: float) -> tuple[Hashable, Hashable]:
        read, write = self.sides(module_type)
        return self.key(widths[read], depth), self.key(widths[write], depth)

    def inward(self, key: Hashable) -> torch.Tensor:
        return columns(cosine_waves(self.canonical_dim), key).T

    def outward(self, key: Hashable) -> torch.Tensor:
        return columns(cosine_waves(self.canonical_dim), key)


class DimensionProjector(CosineProjector):
    """h_ψ: a wave network of (log10 w, i/w) makes the map for any width w; 4·D half-precision values per direction.

    Row i of P(w) has the paper's factored form, a sine network of width and relative position times a shared factor.
    Here the network has as many sine features as canonical coordinates, and the factor is a diagonal a:

        P(w)[i, m] = a_m · sqrt(2/w) · sin(π (m + f_m)(i + ½)/w + p_m + s_m log10 w)

    Training starts at f = s = 0 and p = π/2, where the columns are the orthogonal DCT-II basis. (A shared factor of
    low rank would limit every update on every host to a subspace of that rank.)
    """

    def __init__(self, canonical_dim: int):
        super().__init__(canonical_dim)
        self.inward_waves = StoredTensor(cosine_waves(canonical_dim), Half())
        self.outward_waves = StoredTensor(cosine_waves(canonical_dim), Half())

    def inward(self, key: Hashable) -> torch.Tensor:
        return columns(self.inward_waves(), key).T

    def outward(self, key: Hashable) -> torch.Tensor:
        return columns(self.outward_waves(), key)


def cosine_waves(canonical_dim: int) -> torch.Tensor:
    """Amplitude a, frequency offset f, phase p and width slope s of the DCT-II basis: (4, D)."""
    waves = torch.zeros(4, canonical_dim)
    waves[0] = 1.0
    waves[2] = math.pi / 2
    return waves


def columns(waves: torch.Tensor, width: int) -> torch.Tensor:
    """P(width): wave parameters (4, D) → (width, D) float32."""
    amplitude, frequency, phase, slope = waves
    position = (torch.arange(width, device=waves.device, dtype=torch.float32) + 0.5) / width
    harmonic = torch.arange(waves.shape[1], device=waves.device, dtype=torch.float32) + frequency
    angle = math.pi * position[:, None] * harmonic + phase + slope * math.log10(width)
    return amplitude * math.sqrt(2 / width) * torch.sin(angle)
