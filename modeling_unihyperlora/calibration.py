"""Lining a host up with the canonical space: closed form, from its states on the anchors, without a label.

Letters: K knots, N anchors, d host width, D canonical width, R landmarks, Q their width. The adapter keeps coordinates
C of its anchors at every knot. On any host a ridge regression maps to C what the host has there:

- the states of up to three layers near the knot's relative depth, side by side and standardised;
- how near the word is to each of R landmarks: exp(-|q - q_r|²), where q are the leading principal components of the
  states at all knots, and the landmarks are means of neighbouring anchors (k-means). What one host's states say of
  another's is not linear, the less the smaller the host is. This is kernel ridge regression by the Nyström method
  (Williams and Seeger, 2000; with k-means, Zhang, Tsang and Kwok, 2008), and the kernel is the sum of a linear and a
  Gaussian one.

The ridge is the one that predicts held-out anchors best. A regression shrinks what it cannot predict, some directions
of a knot's coordinates more than others; so its predictions are stretched by the symmetric matrix that gives them the
covariance of the coordinates of the anchors, and then scaled so that those on held-out anchors have their variances.
"""

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from filelock import FileLock

from .anchors import Anchors
from .errors import AdapterFileError, HostError
from .storage import read_checked, write_checked

logger = logging.getLogger(__name__)

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # variance of noise, where that of a word's features is about 1
LANDMARKS, QUERY_WIDTH = 1024, 96
ROUNDS = 8  # of k-means
BLOCK = 512  # columns of a product at a time
LINEAR = 0.25  # weight of the linear kernel; that of the Gaussian one is 1
LEAST_EIGENVALUE = 1e-4  # of the landmarks' kernel, as a share of the largest
HELD_OUT, RUN = 5, 50  # of five runs of fifty neighbouring anchors one is held out
LOW_FIT = 0.1  # mean R² under which a host is reported as a bad fit
MIN_SCALE = 1e-6

T = TypeVar("T")


class KnotFit(NamedTuple):
    """What is linear of the map from the states of some layers, side by side, to the coordinates of one knot."""

    layers: list[int]
    matrix: torch.Tensor  # (D, len(layers)·d) float32
    offset: torch.Tensor  # (D,) float32
    r2: float  # share of the coordinates' variance explained on held-out anchors, by all of the map


class Landmarks(NamedTuple):
    """What nearness to landmarks adds to the coordinates of all knots."""

    layers: list[int]
    matrix: torch.Tensor  # (Q, len(layers)·d) float32: the states of these layers, side by side → q
    offset: torch.Tensor  # (Q,) float32
    at: torch.Tensor  # (R, Q) float32
    weights: torch.Tensor  # (K·D, R) float32

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        """(N, Q) → (N, K·D)."""
        return torch.nn.functional.linear(nearness(query, self.at), self.weights)


class HostFit(NamedTuple):
    """A host's map into the canonical space."""

    knots: list[KnotFit]
    landmarks: Landmarks

    @property
    def r2(self) -> list[float]:
        """Share of the coordinates' variance explained on held-out anchors, for each knot."""
        return [knot.r2 for knot in self.knots]


def nearness(query: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """exp(-|q - q_r|²): (N, Q), (R, Q) → (N, R)."""
    squares = query.square().sum(dim=-1, keepdim=True) + landmarks.square().sum(dim=-1)
    return torch.exp(2 * query @ landmarks.T - squares)


class HostToKnots(NamedTuple):
    """A host's fit, layer by layer: what each layer's states give to the knots that read it, and to the landmarks.

    ``layers`` has a layer's number, the first and the last + 1 of the K·D coordinates and Q numbers for the landmarks,
    and a matrix (that many, d).
    """

    fit: HostFit  # of which it was made
    layers: list[tuple[int, int, int, torch.Tensor]]
    offset: torch.Tensor  # (K·D + Q,)
    landmarks: Landmarks

    @classmethod
    def of(cls, fit: HostFit, device: torch.device | str = "cpu") -> "HostToKnots":
        readers, parts = (*fit.knots, fit.landmarks), []
        starts = [0, *itertools.accumulate(len(reader.offset) for reader in readers)]
        for layer in layers_of([reader.layers for reader in readers]):
            runs: list[list[int]] = []  # of readers that follow one another, for one product each
            for k in (k for k, reader in enumerate(readers) if layer in reader.layers):
                runs[-1].append(k) if runs and runs[-1][-1] == k - 1 else runs.append([k])
            for run in runs:
                rows = [
                    readers[k].matrix.unflatten(1, (len(readers[k].layers), -1))[:, readers[k].layers.index(layer)]
                    for k in run
                ]
                parts.append((layer, starts[run[0]], starts[run[-1] + 1], torch.cat(rows).to(device)))
        offset = torch.cat([reader.offset for reader in readers]).to(device)
        return cls(fit, parts, offset, fit_on(device, fit).landmarks)

    def __call__(self, states: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Canonical coordinates of words: by layer their states (N, d) → (N, K·D) float32."""
        coordinates, _ = self.landmarks.weights.shape
        states = {layer: states[layer].float() for layer, *_ in self.layers}
        made = self.offset.repeat(len(states[self.layers[0][0]]), 1)
        with full_precision(made.device):
            for layer, start, end, matrix in self.layers:
                made[:, start:end].addmm_(states[layer], matrix.T)
            return made[:, :coordinates] + self.landmarks(made[:, coordinates:])


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Without autocast: a map sums nearness times weights of up to 20, which cancel; bfloat16 is too coarse."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def fit_on(device: torch.device | str, fit: HostFit) -> HostFit:
    """The same map with its tensors on a device."""
    moved = [part._replace(**_tensors_of(part, lambda x: x.to(device))) for part in (*fit.knots, fit.landmarks)]
    return HostFit(moved[:-1], moved[-1])


def _tensors_of(part: KnotFit | Landmarks, change: Callable = lambda x: x) -> dict[str, torch.Tensor]:
    return {name: change(value) for name, value in part._asdict().items() if isinstance(value, torch.Tensor)}


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
    states: torch.Tensor,
    near: list[list[int]],
    knot_layers: list[int],
    coordinates: torch.Tensor,
    stored: list[int] | None = None,
) -> HostFit:
    """Kernel ridge regression of the coordinates on a host's states.

    Args:
        states: (layers, N, d), in the order of the layers; anchors with NaN are left out.
        near: for each knot the layers whose states are used.
        knot_layers: for each knot the layer that the landmarks are told by.
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

    def beside(layers: list[int]) -> torch.Tensor:
        return torch.cat([states[stored.index(layer), usable] for layer in layers], dim=-1)

    own = sorted({*knot_layers})
    knots, weights, ridge = [], [], RIDGES[len(RIDGES) // 2]
    with full_precision(states.device):
        matrix, offset, query = _query(beside(own))
        landmarks = _means(query, LANDMARKS)
        features_of = _nystroem(nearness(landmarks, landmarks))
        by_nearness = nearness(query, landmarks) @ features_of
        for layers, target in zip(near, coordinates, strict=True):
            knot = _fit_knot(beside(layers), by_nearness, target[usable].to(query.device), ridge)
            ridge = knot.ridge  # where the search for the next one starts
            knots.append(KnotFit(layers, knot.matrix, knot.offset, knot.r2))
            weights.append((features_of @ knot.weights).T)
    return HostFit(knots, Landmarks(own, matrix, offset, landmarks, torch.cat(weights).contiguous()))


def layers_of(near: list[list[int]]) -> list[int]:
    """All layers that the knots use, in order."""
    return sorted({layer for layers in near for layer in layers})


def _query(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components of standardised states, scaled so that the mean of |q - q'|² over two words is 1.

    (N, F) → matrix (Q, F) and offset (Q,) in raw host units, and q (N, Q).
    """
    x, mean, scale = standardise(states)
    width = min(QUERY_WIDTH, *x.shape)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)  # of the sketch that the decomposition starts from
        _, _, axes = torch.svd_lowrank(x, q=min(width + 16, *x.shape))
    axes = axes[:, :width] / (2 * (x @ axes[:, :width]).square().sum(dim=1).mean()).clamp_min(MIN_SCALE).sqrt()
    matrix = (axes / scale[:, None]).T.contiguous()
    return matrix, -matrix @ mean, x @ axes


def _means(points: torch.Tensor, count: int) -> torch.Tensor:
    """Means of groups of neighbouring points by k-means (Lloyd): (N, Q) → (min(count, N), Q)."""
    means = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]].clone()
    for _ in range(ROUNDS if count < len(points) else 0):
        group = torch.cdist(points, means).argmin(dim=1)
        members = torch.bincount(group, minlength=count)[:, None]
        sums = torch.zeros_like(means).index_add_(0, group, points)
        means = torch.where(members > 0, sums / members.clamp_min(1), means)
    return means


def _nystroem(kernel: torch.Tensor) -> torch.Tensor:
    """Kernel of the landmarks with each other (R, R) → the map (R, R') from nearness to features.

    The features' inner products are the kernel, as far as it is spanned by the landmarks.
    """
    values, vectors = torch.linalg.eigh(kernel.double())
    kept = values > LEAST_EIGENVALUE * values[-1]
    return (vectors[:, kept] / values[kept].sqrt()).to(kernel.dtype)


class _Regression(NamedTuple):
    matrix: torch.Tensor  # (D, F) of the raw states
    weights: torch.Tensor  # (R', D) of the features by nearness
    offset: torch.Tensor  # (D,)
    r2: float
    ridge: float


def _fit_knot(states: torch.Tensor, by_nearness: torch.Tensor, target: torch.Tensor, start: float) -> _Regression:
    """Ridge regression of (N, D) on states (N, F) and features (N, R'), see the module's docstring.

    From the ridge ``start`` the search goes to greater ones, or else to smaller ones, as long as the fit gains.
    """
    x, mean, scale = standardise(states)
    shrink = (LINEAR / x.shape[1]) ** 0.5
    middle, centre = by_nearness.mean(dim=0), target.mean(dim=0)
    x, y = torch.cat([x * shrink, by_nearness - middle], dim=1), target - centre
    held_out = torch.arange(len(x), device=x.device) // RUN % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        held_out = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    seen, unseen = x[~held_out], x[held_out]
    gram, cross = _gram(seen), seen.T @ y[~held_out]
    spread = (y[held_out] - y[held_out].mean(dim=0)).square().sum().clamp_min(MIN_SCALE)

    def tried(ridge: float) -> tuple[float, float, torch.Tensor]:
        predicted = unseen @ _solve(gram, cross, ridge)
        return float(1 - (predicted - y[held_out]).square().sum() / spread), ridge, predicted

    best = tried(start)
    at = RIDGES.index(start)
    for further in (RIDGES[at + 1 :], RIDGES[:at][::-1]):
        for ridge in further:
            found = tried(ridge)
            if found[0] < best[0]:
                break
            best = found
        if best[1] != start:
            break  # the fit falls on both sides of the best ridge
    r2, ridge, predicted = best
    gram, cross = gram + _gram(unseen), cross + unseen.T @ y[held_out]
    weight = _solve(gram, cross, ridge)
    weight = weight @ _stretch(x @ weight, y, predicted)
    matrix = (weight[: len(scale)] * shrink / scale[:, None]).T.contiguous()
    weights = weight[len(scale) :]
    return _Regression(matrix, weights, centre - matrix @ mean - middle @ weights, r2, ridge)


def _stretch(predicted: torch.Tensor, y: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """What predictions (N, D) of the coordinates y (N, D) are to be multiplied by, (D, D); the mean of both is zero.

    ``held_out`` are the predictions of anchors that the regression had not seen.
    """
    together = _transport(predicted, y)
    return together * y.std(dim=0) / (held_out @ together).std(dim=0).clamp_min(MIN_SCALE)


def _transport(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix A (D, D) that gives ``given`` (N, D) the covariance of ``wanted`` and moves it least.

    Of both the mean is zero. A = G^-½ (G^½ W G^½)^½ G^-½, with their covariances G and W (Olkin and Pukelsheim, 1982).
    """
    given, wanted = ((x.T @ x / len(x)).double() for x in (given, wanted))
    root, inverse = _power(given, 0.5), _power(given, -0.5)
    return (inverse @ _power(root @ wanted @ root, 0.5) @ inverse).float()


def _power(symmetric: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(max(LEAST_EIGENVALUE * float(values[-1]), MIN_SCALE)) ** exponent @ vectors.T


def _gram(x: torch.Tensor) -> torch.Tensor:
    """The lower blocks of xᵀx, which is symmetric: (N, F) → (F, F)."""
    gram = x.new_zeros(x.shape[1], x.shape[1])
    for start in range(0, x.shape[1], BLOCK):
        rows = x[:, start : start + BLOCK]
        gram[start : start + BLOCK, : start + BLOCK] = rows.T @ x[:, : start + BLOCK]
    return gram


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
    host_fingerprint: str, reading: str, anchors: Anchors, compute: Callable[[], HostFit], also: str = ""
) -> HostFit:
    """The fit of a host, from an earlier calibration of the very same weights, tokenizer and anchors if there is one.

    ``reading`` says how the host's words are read (``WordReader.key``), ``also`` what else the map depends on. See
    ``kept``.
    """
    digest = hashlib.sha256(
        f"6 {RIDGES} {HELD_OUT} {RUN} {LANDMARKS} {QUERY_WIDTH} {ROUNDS} {LINEAR} {host_fingerprint}".encode()
    )
    digest.update(reading.encode())
    for part in (anchors.text, *anchors.coordinates.encode().values()):
        digest.update(part.cpu().numpy().tobytes())
    digest.update(also.encode())
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
    tensors = {"r2": torch.tensor(fit.r2, dtype=torch.float64)}
    for name, part in (*((str(k), knot) for k, knot in enumerate(fit.knots)), ("landmarks", fit.landmarks)):
        tensors |= {f"{name}.{field}": value for field, value in _tensors_of(part).items()}
        tensors[f"{name}.layers"] = torch.tensor(part.layers)
    return tensors


def _from_tensors(kept: dict[str, torch.Tensor]) -> HostFit:
    def part(kind: type, name: str, **more):
        fields = {field: kept[f"{name}.{field}"] for field in kind._fields if field not in more}
        return kind(**fields | {"layers": fields["layers"].tolist()} | more)

    knots = [part(KnotFit, str(k), r2=r2) for k, r2 in enumerate(kept["r2"].tolist())]
    return HostFit(knots, part(Landmarks, "landmarks"))
