"""Lining a host up with the canonical space: closed form, from its states on the anchors, without a label.

Letters: K knots, N anchors, d host width, D canonical width. On the source host the canonical coordinates C of an
anchor are the leading whitened principal components of its standardised state; on any host a ridge regression maps
its own standardised states of the same anchors to C (λ = 0.3·N), and each coordinate is scaled to unit variance over
the anchors, since the regression shrinks what it cannot predict.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .anchors import Anchors
from .errors import AdapterFileError, HostError
from .storage import read_checked, write_checked

logger = logging.getLogger(__name__)

RIDGE = 0.3  # λ as a share of the number of anchors
HELD_OUT = 5  # one anchor in so many measures the fit and is not fitted on
LOW_FIT = 0.1  # mean R² under which a host is reported as a bad fit


class HostFit(NamedTuple):
    """Affine maps from host states to canonical coordinates: z = matrix · h + offset."""

    matrix: torch.Tensor  # (K, D, d) float32
    offset: torch.Tensor  # (K, D) float32
    r2: list[float]  # share of the coordinates' variance explained on held-out anchors, a knot


def canonical_coordinates(states: torch.Tensor, width: int) -> torch.Tensor:
    """Whitened principal components of standardised states: (K, N, d) → (K, N, width), unit variance each.

    Raises:
        HostError: fewer usable anchors or dimensions than coordinates are asked for.
    """
    knots, anchors, dim = states.shape
    if width > min(dim, anchors - 1):
        raise HostError(
            f"{width} canonical coordinates need a source host at least that wide and more anchors; "
            f"it has width {dim} and {anchors} anchors. Ask for fewer, or train on a wider source."
        )
    coordinates = torch.empty(knots, anchors, width)
    for k in range(knots):
        standard, _, _ = standardise(states[k].double())
        left, _, _ = torch.linalg.svd(standard, full_matrices=False)
        coordinates[k] = (left[:, :width] * anchors**0.5).float()
    return coordinates


def fit_host(states: torch.Tensor, coordinates: torch.Tensor) -> HostFit:
    """Ridge regression of the coordinates on a host's states, one knot at a time.

    Args:
        states: (K, N, d) the host's states of the anchors; anchors with NaN are left out.
        coordinates: (K, N, D) canonical coordinates of the same anchors.

    Raises:
        HostError: fewer than D usable anchors.
    """
    usable = torch.isfinite(states).all(dim=-1).all(dim=0)
    if int(usable.sum()) <= coordinates.shape[-1]:
        raise HostError(
            f"Only {int(usable.sum())} of {len(usable)} anchors can be read by this host's tokenizer; more than "
            f"{coordinates.shape[-1]} are needed. The anchor text does not suit this host."
        )
    states, coordinates = states[:, usable].double(), coordinates[:, usable].double()
    matrices, offsets, scores = [], [], []
    held_out = torch.arange(states.shape[1]) % HELD_OUT == HELD_OUT - 1
    for state, target in zip(states, coordinates, strict=True):
        matrix, offset = _ridge(state[~held_out], target[~held_out])
        error = state[held_out] @ matrix.T + offset - target[held_out]
        spread = target[held_out] - target[held_out].mean(dim=0)
        scores.append(float(1 - error.square().sum() / spread.square().sum()))
        matrix, offset = _ridge(state, target)
        scale = (state @ matrix.T + offset).std(dim=0).clamp_min(1e-6)
        matrices.append(matrix / scale[:, None])
        offsets.append(offset / scale)
    return HostFit(torch.stack(matrices).float(), torch.stack(offsets).float(), scores)


def cache_folder() -> Path:
    """Where calibrations and states are kept: $UNIHYPERLORA_CACHE, else ~/.cache/unihyperlora."""
    return Path(os.environ.get("UNIHYPERLORA_CACHE") or Path.home() / ".cache" / "unihyperlora")


def cached_fit(
    host_fingerprint: str, vocabulary: list[str], anchors: Anchors, compute: Callable[[], HostFit]
) -> HostFit:
    """The fit of a host, from an earlier calibration of the very same weights, vocabulary and anchors if there is one.

    A cache that is damaged, of another version or not writable is as good as none.
    """
    digest = hashlib.sha256(f"{RIDGE} {HELD_OUT} {host_fingerprint}".encode())
    digest.update("\n".join(map(str, vocabulary)).encode())
    for part in (anchors.text, anchors.canonical().detach()):
        digest.update(part.cpu().numpy().tobytes())
    path = cache_folder() / f"calibration-{digest.hexdigest()[:24]}.safetensors"
    try:
        kept = read_checked(path)
        return HostFit(kept["matrix"], kept["offset"], kept["r2"].tolist())
    except (AdapterFileError, KeyError):
        fit = compute()
    try:
        write_checked(path, {"matrix": fit.matrix, "offset": fit.offset, "r2": torch.tensor(fit.r2)})
    except AdapterFileError as error:
        logger.warning("The calibration could not be kept for next time: %s", error)
    return fit


def _ridge(states: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, d), (N, D) float64 → matrix (D, d) and offset (D,) in raw host units."""
    standard, mean, scale = standardise(states)
    gram = standard.T @ standard
    gram.diagonal().add_(RIDGE * len(states))
    weight = torch.linalg.solve(gram, standard.T @ (target - target.mean(dim=0)))
    matrix = weight.T / scale
    return matrix, target.mean(dim=0) - matrix @ mean


def standardise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, d) → zero mean and unit variance a column, the means (d,), the deviations (d,)."""
    mean, scale = states.mean(dim=0), states.std(dim=0).clamp_min(1e-6)
    return (states - mean) / scale, mean, scale
