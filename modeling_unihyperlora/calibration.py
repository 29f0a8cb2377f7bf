"""Lining a host up with the canonical space: closed form, from its states on the anchors, without a label.

Letters: K knots, N anchors, d host width, D canonical width, F features of an anchor. The adapter keeps coordinates C
of its anchors at every knot. On any host a ridge regression maps what the host has near the knot's relative depth (the
states of up to three neighbouring layers side by side, standardised) to C. Its λ is the one that predicts held-out
anchors best, and each coordinate is scaled so that its predictions on held-out anchors have unit variance, since the
regression shrinks what it cannot predict.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from filelock import FileLock

from .anchors import Anchors
from .errors import AdapterFileError, HostError
from .storage import read_checked, write_checked

logger = logging.getLogger(__name__)

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # λ as a share of the number of anchors
HELD_OUT, RUN = 5, 50  # of five runs of fifty neighbouring anchors one is held out
LOW_FIT = 0.1  # mean R² under which a host is reported as a bad fit
MIN_SCALE = 1e-6

T = TypeVar("T")


class KnotFit(NamedTuple):
    """Affine map from the states of some layers, side by side, to the coordinates of one knot."""

    layers: list[int]
    matrix: torch.Tensor  # (D, len(layers)·d) float32
    offset: torch.Tensor  # (D,) float32
    r2: float  # share of the coordinates' variance explained on held-out anchors

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(…, len(layers)·d) → (…, D)."""
        return torch.nn.functional.linear(states.float(), self.matrix, self.offset)


HostFit = list[KnotFit]  # one a knot


def apply_fit(fit: HostFit, states: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Canonical coordinates of words: (…, layers, d) states of the named layers → (…, K, D) float32."""
    return torch.stack(
        [knot(states[..., [layers.index(i) for i in knot.layers], :].flatten(-2)) for knot in fit], dim=-2
    )


def fit_on(device: torch.device | str, fit: HostFit) -> HostFit:
    """The same maps with their tensors on a device."""
    return [knot._replace(matrix=knot.matrix.to(device), offset=knot.offset.to(device)) for knot in fit]


def canonical_coordinates(states: torch.Tensor, width: int) -> torch.Tensor:
    """Whitened principal components of standardised states: (K, N, d) → (K, N, width), unit variance each.

    Raises:
        HostError: fewer usable anchors or dimensions than coordinates are asked for.
    """
    usable = torch.isfinite(states).all(dim=-1).all(dim=0)
    knots, anchors, dim = states.shape
    if width > min(dim, int(usable.sum()) - 1):
        raise HostError(
            f"{width} canonical coordinates need a source host at least that wide and more anchors; "
            f"it has width {dim} and {int(usable.sum())} anchors. Ask for fewer, or train on a wider source."
        )
    coordinates = torch.zeros(knots, anchors, width)  # an anchor that the source cannot read is an average one
    for k in range(knots):
        standard, _, _ = standardise(states[k, usable].double())
        left, _, _ = torch.linalg.svd(standard, full_matrices=False)
        coordinates[k, usable] = (left[:, :width] * usable.sum() ** 0.5).float()
    return coordinates


def fit_host(
    states: torch.Tensor, near: list[list[int]], coordinates: torch.Tensor, stored: list[int] | None = None
) -> HostFit:
    """Ridge regression of the coordinates on a host's states, one knot at a time.

    Args:
        states: (layers, N, d), in the order of the layers; anchors with NaN are left out.
        near: for each knot the layers whose states are used.
        coordinates: (K, N, D) canonical coordinates of the same anchors.
        stored: the layers that ``states`` are of; all that ``near`` names by default.

    Raises:
        HostError: fewer than D usable anchors.
    """
    usable = torch.isfinite(states).all(dim=-1).all(dim=0)
    if int(usable.sum()) <= coordinates.shape[-1]:
        raise HostError(
            f"Only {int(usable.sum())} of {len(usable)} anchors can be read by this host's tokenizer; more than "
            f"{coordinates.shape[-1]} are needed. The anchor text does not suit this host."
        )
    stored = stored or layers_of(near)
    fits = []
    for layers, target in zip(near, coordinates, strict=True):
        features = torch.cat([states[stored.index(layer), usable] for layer in layers], dim=-1)
        fits.append(KnotFit(layers, *_fit_knot(features, target[usable].to(features.device))))
    return fits


def layers_of(near: list[list[int]]) -> list[int]:
    """All layers that the knots use, in order."""
    return sorted({layer for layers in near for layer in layers})


def _fit_knot(features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(N, F), (N, D) → matrix (D, F) and offset (D,) in raw host units, R² on held-out anchors."""
    x, mean, scale = standardise(features)
    centre = target.mean(dim=0)
    y = target - centre
    held_out = torch.arange(len(x), device=x.device) // RUN % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        held_out = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    gram, cross = x.T @ x, x.T @ y
    gram_left, cross_left = gram - x[held_out].T @ x[held_out], cross - x[held_out].T @ y[held_out]
    spread = (y[held_out] - y[held_out].mean(dim=0)).square().sum().clamp_min(MIN_SCALE)
    best = (-torch.inf, 0.0, y[held_out])
    for ridge in RIDGES:
        predicted = x[held_out] @ _solve(gram_left, cross_left, ridge * int((~held_out).sum()))
        r2 = float(1 - (predicted - y[held_out]).square().sum() / spread)
        if r2 > best[0]:
            best = (r2, ridge, predicted)
    r2, ridge, predicted = best
    weight = _solve(gram, cross, ridge * len(x)) / predicted.std(dim=0).clamp_min(MIN_SCALE)
    matrix = weight.T / scale
    return matrix.contiguous(), centre - matrix @ mean, r2


def _solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    gram = gram.clone()
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))


def standardise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, d) → zero mean and unit variance a column, the means (d,), the deviations (d,)."""
    mean, scale = states.mean(dim=0), states.std(dim=0).clamp_min(MIN_SCALE)
    return (states - mean) / scale, mean, scale


def cache_folder() -> Path:
    """Where calibrations and states are kept: $UNIHYPERLORA_CACHE, else ~/.cache/unihyperlora."""
    return Path(os.environ.get("UNIHYPERLORA_CACHE") or Path.home() / ".cache" / "unihyperlora")


def cached_fit(
    host_fingerprint: str, vocabulary: list[str], anchors: Anchors, compute: Callable[[], HostFit]
) -> HostFit:
    """The fit of a host, from an earlier calibration of the very same weights, vocabulary and anchors if there is one.

    See ``kept``.
    """
    digest = hashlib.sha256(f"2 {RIDGES} {HELD_OUT} {RUN} {host_fingerprint}".encode())
    digest.update("\n".join(map(str, vocabulary)).encode())
    for part in (anchors.text, *anchors.coordinates.encode().values()):
        digest.update(part.cpu().numpy().tobytes())
    path = cache_folder() / f"calibration-{digest.hexdigest()[:24]}.safetensors"
    return kept(path, lambda: _to_tensors(compute()), _from_tensors)


def kept(path: Path, make: Callable[[], dict[str, torch.Tensor]], read: Callable[[dict[str, torch.Tensor]], T]) -> T:
    """What ``read`` says of the tensors in a file of the cache, or else of those that are made, and kept, now.

    Of several processes one makes them and the others wait. A cache that is damaged, of another version or not
    writable is as good as none.
    """
    with contextlib.ExitStack() as stack:
        try:
            (path.parent / "locks").mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.parent / "locks" / path.name))
        except OSError:
            pass  # as good as none
        try:
            return read(read_checked(path))
        except (AdapterFileError, KeyError):
            tensors = make()
        try:
            write_checked(path, tensors)
        except AdapterFileError as error:
            logger.warning("What was computed could not be kept for next time: %s", error)
    return read(tensors)


def _to_tensors(fit: HostFit) -> dict[str, torch.Tensor]:
    tensors = {"r2": torch.tensor([knot.r2 for knot in fit], dtype=torch.float64)}
    for k, knot in enumerate(fit):
        tensors |= {f"{k}.layers": torch.tensor(knot.layers), f"{k}.matrix": knot.matrix, f"{k}.offset": knot.offset}
    return tensors


def _from_tensors(kept: dict[str, torch.Tensor]) -> HostFit:
    return [
        KnotFit(kept[f"{k}.layers"].tolist(), kept[f"{k}.matrix"], kept[f"{k}.offset"], r2)
        for k, r2 in enumerate(kept["r2"].tolist())
    ]
