"""Projectors: the maps between a host's vectors and the canonical space.

One interface for every kind (``DimensionProjector`` here; a calibrated kind shares it):

- ``sides(module_type)`` says on which side of a linear layer the update reads and writes: its input or its output;
- ``key(width, depth)`` names the map that serves a state of that width at that relative depth, so that equal maps
  are computed once; ``site_keys(module_type, widths, depth)`` names those for reading and writing at a linear
  layer;
- ``inward(key)`` is P_in, shape (D, width); ``outward(key)`` is P_out, shape (width, D).

A ``DimensionProjector`` is trained and begins as a ``CosineProjector``, which has nothing to train.
"""

import math
from collections.abc import Hashable
from typing import Literal

import torch
from torch import nn

from .storage import Half, StoredTensor

Side = Literal["input", "output"]


class CosineProjector(nn.Module):
    """The orthogonal DCT-II basis for any width: nothing to train, and nothing to store."""

    def __init__(self, canonical_dim: int):
        super().__init__()
        self.canonical_dim = canonical_dim

    def sides(self, module_type: str) -> tuple[Side, Side]:
        """Read at the layer's input, write at its output, as ΔW x does."""
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
    """h_ψ: a map for any width w from a wave network of (log10 w, i/w), 4·D half-precision numbers a direction.

    Row i of P(w) is the paper's factored form, a sine network of the width and the relative position times a shared
    factor, with as many sine features as canonical coordinates and a diagonal factor a:

        P(w)[i, m] = a_m · sqrt(2/w) · sin(π (m + f_m)(i + ½)/w + p_m + s_m log10 w)

    With f = s = 0 and p = π/2 the columns are the orthogonal DCT-II basis, which is where training starts: a narrow
    shared factor would limit every update on every host to a subspace of its rank.
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
    """Amplitude a, frequency offset f, phase p and width slope s with which waves are cosines: (4, D)."""
    waves = torch.zeros(4, canonical_dim)
    waves[0] = 1.0
    waves[2] = math.pi / 2
    return waves


def columns(waves: torch.Tensor, width: int) -> torch.Tensor:
    """P(width), (width, D) float32, from the four rows of wave parameters (4, D)."""
    amplitude, frequency, phase, slope = waves
    position = (torch.arange(width, device=waves.device, dtype=torch.float32) + 0.5) / width
    harmonic = torch.arange(waves.shape[1], device=waves.device, dtype=torch.float32) + frequency
    angle = math.pi * position[:, None] * harmonic + phase + slope * math.log10(width)
    return amplitude * math.sqrt(2 / width) * torch.sin(angle)
