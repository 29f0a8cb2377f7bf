"""The canonical space: host-independent coordinates of words, and the alignment of a host with the space.

Letters: K knots, N anchors, d host width, D canonical width, R landmarks, Q their width, M atoms.

A knot is a relative depth. A space consists of anchor text and the coordinates C of its words at every knot, in 2
bits. It is made without labels and serves all tasks. It also holds M rank-one atoms, along which δθ changes a map.

To align a host, a ridge regression predicts C from two kinds of features of the host:

- the states of the layer nearest to the knot's relative depth, standardised;
- the nearness of the word to each of R landmarks: exp(-|q - q_r|²). Here q are the leading principal components of
  the states of all these layers, and the landmarks are means of clusters of anchors (k-means). These features make
  the map nonlinear, which matters most for small hosts. This is kernel ridge regression by the Nyström method
  (Williams and Seeger, 2000; with k-means, Zhang, Tsang and Kwok, 2008) with the sum of a linear and a Gaussian
  kernel. A host whose states alone predict C as well, such as one that the space was made from, has no landmarks.

The ridge is chosen on held-out anchors. A regression shrinks predictions in directions that it cannot predict well. So
the predictions are multiplied by the symmetric matrix that gives them the covariance of the anchors' coordinates, and
then scaled so that predictions for held-out anchors have the right variances.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from transformers.utils import logging as hf_logging

from .errors import AdapterFileError, DataError, HostError
from .hosts import call_host, check_states, fingerprint, window_of
from .storage import RowInteger, StoredTensor, TwoBit, content_digest, metadata_of, read_checked, write_checked
from .words import NO_WORD, WordReader

logger = logging.getLogger(__name__)

METHOD = "11"  # version of the alignment; changed whenever maps would change
KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # relative depths
COORDINATE_STEP = 1.0  # coordinates have unit variance and the values -1.5, -0.5, 0.5 and 1.5
ATOM_BITS = 8
MIN_ANCHORS = 256
AT_ONCE = 2**18  # numbers per step of a copy, so that temporary arrays stay small
PACKAGE_SPACE = Path(__file__).with_name("space.safetensors")

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # noise variances to try; a word's features have a variance of about 1
LANDMARKS, QUERY_WIDTH = 1024, 192
WORTH = 0.01  # landmarks are used if they raise the mean R² on held-out anchors by this much
ROUNDS = 8  # rounds of k-means
BLOCK = 512  # columns per step of a matrix product
LINEAR = 0.5  # weight of the linear kernel; the Gaussian kernel has weight 1
LEAST_EIGENVALUE = 1e-4  # smallest eigenvalue of the landmarks' kernel to use, as a share of the largest
HELD_OUT, RUN = 5, 50  # one of five runs of fifty neighbouring anchors is held out
LOW_FIT = 0.1  # a host with a mean R² below this is reported as a bad fit
MIN_SCALE = 1e-6

T = TypeVar("T")


class CanonicalSpace(nn.Module):
    """Anchor text, coordinates of its words, and atoms.

    Args:
        name: name of the space, such as "english".
        version: version of its contents.
        anchor_words: N.
        anchor_text_bytes: length of the text.
        dim: D.
        atoms: M.

    Attributes:
        text: (bytes,) uint8, UTF-8, one sentence per line.
        coordinates: (K·N, D), with unit variance.
        atoms_in, atoms_out: (M, D), the rows v_j and u_j.
    """

    def __init__(self, name: str, version: int, anchor_words: int, anchor_text_bytes: int, dim: int, atoms: int = 128):
        super().__init__()
        self.name, self.version = name, version
        self.register_buffer("text", torch.zeros(anchor_text_bytes, dtype=torch.uint8))
        self.coordinates = StoredTensor(torch.zeros(len(KNOTS) * anchor_words, dim), TwoBit(COORDINATE_STEP))
        first, second = basis_atoms(dim, atoms)
        self.atoms_in = StoredTensor(first, RowInteger(ATOM_BITS))
        self.atoms_out = StoredTensor(second, RowInteger(ATOM_BITS))
        self.requires_grad_(False)

    def shape(self) -> dict[str, str | int]:
        """The constructor's arguments for this space."""
        words, dim = len(self.coordinates.latent) // len(KNOTS), self.coordinates.latent.shape[1]
        own = {"name": self.name, "version": self.version, "anchor_words": words, "dim": dim}
        return own | {"anchor_text_bytes": len(self.text), "atoms": len(self.atoms_in.latent)}

    def set(self, sentences: list[list[str]], coordinates: torch.Tensor) -> None:
        """Set the anchors and their coordinates (K, N, D)."""
        self.text = torch.frombuffer(bytearray(join_anchors(sentences)), dtype=torch.uint8).to(self.text.device)
        with torch.no_grad():
            self.coordinates.latent.copy_(coordinates.flatten(0, 1))

    def sentences(self) -> list[list[str]]:
        return split_anchors(bytes(self.text.cpu().tolist()).decode(), "the space's anchor text")

    def canonical(self) -> torch.Tensor:
        """Coordinates (K, N, D), as the file holds them."""
        return self.coordinates().detach().unflatten(0, (len(KNOTS), -1))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name → tensor, for all tensors of the file."""
        stored = {"text": self.text.cpu()}
        for name in ("coordinates", "atoms_in", "atoms_out"):
            stored |= {name + suffix: value for suffix, value in getattr(self, name).encode().items()}
        return stored

    @property
    def digest(self) -> str:
        """SHA-256 (16 hex digits) of all tensors; equal spaces have equal digests, whatever their names."""
        return content_digest(self.tensors(), {})[:16]

    @classmethod
    def default(cls) -> "CanonicalSpace":
        """Load the package's own space."""
        return cls.load(PACKAGE_SPACE)

    @classmethod
    def load(cls, path: str | Path) -> "CanonicalSpace":
        """Read a space.

        Raises:
            AdapterFileError: the file is missing, is damaged, or holds no space.
        """
        if not Path(path).is_file():
            raise AdapterFileError(f"No canonical space '{path}'. Give a file that CanonicalSpace.save wrote.")
        tensors = read_checked(Path(path))
        try:
            shape = json.loads(metadata_of(Path(path))["space"])
            space = cls(**shape)
            space.text = tensors["text"]
            for name in ("coordinates", "atoms_in", "atoms_out"):
                stored = getattr(space, name)
                stored.decode({suffix: tensors[name + suffix] for suffix in stored.layout()})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise AdapterFileError(
                f"{path} holds no canonical space ({type(error).__name__}: {error}). Give a file that "
                "CanonicalSpace.save wrote."
            ) from error
        return space

    def save(self, path: str | Path) -> None:
        """Write the space to one file, atomically."""
        write_checked(Path(path), self.tensors(), {"space": json.dumps(self.shape(), sort_keys=True)})

    @classmethod
    def make(cls, hosts: list, anchor_file: str | Path | None = None, **kwargs) -> "CanonicalSpace":
        """Make a new space; needs the installed package, see ``space_making.make.make_space``."""
        from importlib import import_module

        return import_module("modeling_unihyperlora.space_making.make").make_space(hosts, anchor_file, **kwargs)


def basis_atoms(dim: int, atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms v_j and u_j, (M, D) each: first the gain of each coordinate, then random directions (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(atoms, dim, generator=generator) / dim**0.5 for _ in range(2))
    gains = min(atoms, dim)
    first[:gains] = second[:gains] = torch.eye(dim)[:gains]
    return first, second


def read_anchors(path: str | Path) -> list[list[str]]:
    """Read an anchor file (UTF-8, one sentence per line); returns lists of words.

    Raises:
        DataError: the file cannot be read as UTF-8, or has fewer than ``MIN_ANCHORS`` words.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The anchor file {path} cannot be read as UTF-8 text ({error}). Check the path.") from error
    return split_anchors(text, str(path))


def join_anchors(sentences: list[list[str]]) -> bytes:
    """Join sentences to the text of a space; ``split_anchors`` is the inverse."""
    return "\n".join(map(" ".join, sentences)).encode()


def split_anchors(text: str, source: str) -> list[list[str]]:
    """Split text with one sentence per line into lists of words; raises ``DataError`` for too few words."""
    sentences = [line.split() for line in text.splitlines() if line.strip()]
    words = sum(map(len, sentences))
    if words < MIN_ANCHORS:
        raise DataError(
            f"{source} has {words} words; aligning a host needs at least {MIN_ANCHORS}. Better give 2,000 to 5,000 "
            "words of varied text."
        )
    return sentences


# ---- a host's states of the anchors ----


def knot_layers(num_layers: int) -> list[int]:
    """Indices of the hidden states (0…L) nearest to each knot."""
    return [int(knot * num_layers + 0.5) for knot in KNOTS]


def layers_read(num_layers: int) -> list[int]:
    """Layers that a map reads: the layers of the knots, each once, sorted."""
    return sorted({*knot_layers(num_layers)})


@torch.no_grad()
def word_states(
    host: nn.Module, words: WordReader, sentences: list[list[str]], layers: list[int], batch_size: int = 32
) -> torch.Tensor:
    """States of every word of some sentences.

    Args:
        host: the encoder or decoder.
        words: reader of the host's words.
        sentences: lists of words, N words in total.
        layers: indices of the hidden states (0…L) to return.

    Returns:
        (len(layers), N, d) float32 on the CPU, in the order of the text. A word beyond the host's window, or without
        a sub-token, has NaN.
    """
    was_training = host.training
    host.eval()
    offsets = [0]
    for sentence in sentences:
        offsets.append(offsets[-1] + len(sentence))
    states = torch.full((len(layers), offsets[-1], host.config.hidden_size), torch.nan)
    limit = window_of(host, words.tokenizer)
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    progress = hf_logging.tqdm(total=len(sentences), desc="Reading anchors", unit="sentence", leave=False)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            encoded = words.tokenizer(
                [sentences[index] for index in chosen],
                is_split_into_words=True,
                padding=True,
                truncation=limit is not None,
                max_length=limit,
                return_tensors="pt",
            ).to(host.device)
            ids, mask, index = (encoded[name] for name in ("input_ids", "attention_mask", "word_index"))
            with full_precision(host.device):
                hidden = call_host(host, mask, input_ids=ids, output_hidden_states=True).hidden_states
            check_states(host, hidden, ids)
            places = words.places(ids, mask, index)
            number, at = index.gather(1, places.first), places.read  # (B, W)
            there = (torch.arange(at.shape[1], device=at.device) < places.lengths[:, None]) & (number != NO_WORD)
            row, column = there.nonzero(as_tuple=True)
            target = torch.tensor([offsets[index] for index in chosen])[row.cpu()] + number[row, column].cpu()
            for k, layer in enumerate(layers):
                states[k, target] = hidden[layer][row, at[row, column]].float().cpu()
            progress.update(len(chosen))
    finally:
        progress.close()
        host.train(was_training)
    return states


def anchor_states(
    host: nn.Module, words: WordReader, sentences: list[list[str]], layers: list[int] | None = None
) -> torch.Tensor:
    """States (layers, N, d) of the sentences' words, by default in ``layers_read``; cached on disk."""
    layers = layers_read(words.num_layers) if layers is None else layers
    said = json.dumps([fingerprint(host), words.key(), layers, sentences])
    path = cache_folder() / f"anchors-{hashlib.sha256(said.encode()).hexdigest()[:24]}.safetensors"
    return kept(path, lambda: {"states": word_states(host, words, sentences, layers)}, lambda made: made["states"])


# ---- a host's map into the space ----


class KnotFit(NamedTuple):
    """Linear part of the map from the states of a layer to the coordinates of one knot."""

    layer: int
    matrix: torch.Tensor  # (D, d) float32
    offset: torch.Tensor  # (D,) float32
    r2: float  # share of variance that the whole map explains on held-out anchors


class Landmarks(NamedTuple):
    """Nonlinear part of the map to the coordinates of all knots, from the nearness to landmarks."""

    matrix: torch.Tensor  # (Q, L'·d) float32: concatenated states of the L' layers that the map reads → q
    offset: torch.Tensor  # (Q,) float32
    at: torch.Tensor  # (R, Q) float32
    weights: torch.Tensor  # (K·D, R) float32

    def query(self, states: Collection[torch.Tensor]) -> torch.Tensor:
        """States (N, d) float32 of words, for each layer that the map reads → (N, Q)."""
        query = self.offset
        for of_layer, matrix in zip(states, self.matrix.chunk(len(states), dim=1), strict=True):
            query = torch.addmm(query, of_layer, matrix.T)  # adds up layers, which is faster than joining them
        return query


class HostFit(NamedTuple):
    """A host's map into the canonical space."""

    knots: list[KnotFit]
    landmarks: Landmarks | None  # None: the map is linear

    @property
    def layers(self) -> list[int]:
        """The different layers that the map reads, sorted."""
        return sorted({knot.layer for knot in self.knots})

    @property
    def device(self) -> torch.device:
        return self.knots[0].offset.device

    @property
    def widest(self) -> int:
        """The most numbers that the map makes of one word: R, or K·D without landmarks."""
        return len(self.landmarks.at) if self.landmarks else len(self.knots) * len(self.knots[0].offset)

    @property
    def parts(self) -> list["KnotFit | Landmarks"]:
        """All parts that have tensors."""
        return [*self.knots, *([] if self.landmarks is None else [self.landmarks])]

    @property
    def r2(self) -> list[float]:
        """Share of variance explained on held-out anchors, for each knot."""
        return [knot.r2 for knot in self.knots]

    def __call__(self, states: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Layer → states (N, d) of words; returns their canonical coordinates (N, K·D) float32."""
        read = {layer: states[layer].float() for layer in self.layers}
        with full_precision(self.device):
            of_knots = [F.linear(read[knot.layer], knot.matrix, knot.offset) for knot in self.knots]
            linear = torch.cat(of_knots, dim=1)
            if self.landmarks is None:
                return linear
            near = nearness(self.landmarks.query(read.values()), self.landmarks.at)
            return torch.addmm(linear, near, self.landmarks.weights.T)


def nearness(query: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """exp(-|q - q_r|²): (N, Q), (R, Q) → (N, R)."""
    doubled = torch.addmm(-landmarks.square().sum(dim=-1), query, landmarks.T, alpha=2)  # 2 q·q_r - |q_r|²
    return doubled.sub_(query.square().sum(dim=-1, keepdim=True)).exp_()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Context without autocast: a map adds large terms that cancel (weights up to 20), too coarse in bfloat16."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def fit_on(device: torch.device | str, fit: HostFit) -> HostFit:
    """A map with its tensors on a device; the same one if they are there already."""
    if fit.device == torch.device(device):
        return fit
    moved = [part._replace(**_tensors_of(part, lambda x: x.to(device))) for part in fit.parts]
    return HostFit(moved[: len(fit.knots)], moved[-1] if fit.landmarks else None)


def _tensors_of(part: KnotFit | Landmarks, change: Callable = lambda x: x) -> dict[str, torch.Tensor]:
    return {name: change(value) for name, value in part._asdict().items() if isinstance(value, torch.Tensor)}


def fit_host(
    states: torch.Tensor,
    layers: list[int],
    coordinates: torch.Tensor,
    stored: list[int] | None = None,
    count: int = LANDMARKS,
) -> HostFit:
    """Kernel ridge regression of the coordinates on a host's states.

    Args:
        states: (layers, N, d), sorted by layer; anchors with NaN are left out.
        layers: layer of each knot; the query for the landmarks uses the layers of all knots.
        coordinates: (K, N, D) canonical coordinates of the same anchors.
        stored: layers of ``states``; by default the different ``layers``.
        count: number of landmarks, if they are worth it.

    Raises:
        HostError: there are not more than D usable anchors.
    """
    usable = torch.isfinite(states).all(dim=-1).all(dim=0)
    if int(usable.sum()) <= coordinates.shape[-1]:
        raise HostError(
            f"This host's tokenizer can read only {int(usable.sum())} of {len(usable)} anchors; more than "
            f"{coordinates.shape[-1]} are needed. The anchor text does not suit this host: use another host, or "
            "a space with other anchor text."
        )
    different = sorted({*layers})
    stored = stored or different
    of_layer = {layer: states[stored.index(layer), usable] for layer in different}
    targets = coordinates[:, usable].to(states.device)
    with full_precision(states.device):
        linear, _ = _fit_knots(of_layer, layers, targets, states.new_zeros(targets.shape[1], 0))
        matrix, offset, query = _query(torch.cat([*of_layer.values()], dim=-1))
        landmarks = _means(query, count)
        features_of = _nystroem(nearness(landmarks, landmarks))
        knots, weights = _fit_knots(of_layer, layers, targets, nearness(query, landmarks) @ features_of)
        weights = torch.cat([(features_of @ own).T for own in weights]).contiguous()
    gain = sum(knot.r2 - alone.r2 for knot, alone in zip(knots, linear, strict=True)) / len(knots)
    if gain < WORTH:
        return HostFit(linear, None)
    return HostFit(knots, Landmarks(matrix, offset, landmarks, weights))


def _fit_knots(
    of_layer: dict[int, torch.Tensor], layers: list[int], targets: torch.Tensor, by_nearness: torch.Tensor
) -> tuple[list[KnotFit], list[torch.Tensor]]:
    """Fit every knot to the states of its layer and features (N, R'); returns also the features' weights (R', D)."""
    features, ridge = _Features.of(by_nearness), RIDGES[len(RIDGES) // 2]
    knots, weights = [], []
    for layer, target in zip(layers, targets, strict=True):
        knot = _fit_knot(of_layer[layer], features, target, ridge)
        ridge = knot.ridge  # the search for the next knot starts here
        knots.append(KnotFit(layer, knot.matrix, knot.offset, knot.r2))
        weights.append(knot.weights)
    return knots, weights


def _query(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components q of standardised states, scaled so that |q - q'|² of two words is 1 on average.

    States (N, F) → matrix (Q, F) and offset (Q,) for raw states, and q (N, Q).
    """
    x, mean, scale = standardise(states)
    width = min(QUERY_WIDTH, *x.shape)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)  # the decomposition starts from a random sketch
        _, _, axes = torch.svd_lowrank(x, q=min(width + 16, *x.shape))
    axes = axes[:, :width] / (2 * (x @ axes[:, :width]).square().sum(dim=1).mean()).clamp_min(MIN_SCALE).sqrt()
    matrix = (axes / scale[:, None]).T.contiguous()
    return matrix, -matrix @ mean, x @ axes


def _means(points: torch.Tensor, count: int) -> torch.Tensor:
    """Means of clusters of points by k-means (Lloyd): (N, Q) → (min(count, N), Q)."""
    means = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]].clone()
    for _ in range(ROUNDS if count < len(points) else 0):
        group = torch.cdist(points, means).argmin(dim=1)
        members = torch.bincount(group, minlength=count)[:, None]
        sums = torch.zeros_like(means).index_add_(0, group, points)
        means = torch.where(members > 0, sums / members.clamp_min(1), means)
    return means


def _nystroem(kernel: torch.Tensor) -> torch.Tensor:
    """Kernel matrix of the landmarks (R, R) → matrix (R, R') that maps nearness to features.

    Inner products of the features approximate the kernel (exactly so on the landmarks' span).
    """
    values, vectors = torch.linalg.eigh(kernel.double())
    kept = values > LEAST_EIGENVALUE * values[-1]
    return (vectors[:, kept] / values[kept].sqrt()).to(kernel.dtype)


class _Features(NamedTuple):
    """Features from nearness, which all knots share, and their products over seen and held-out anchors."""

    values: torch.Tensor  # (N, R'), with zero mean
    mean: torch.Tensor  # (R',)
    held_out: torch.Tensor  # (N,) bool
    grams: tuple[torch.Tensor, torch.Tensor]  # (R', R') each, lower blocks

    @classmethod
    def of(cls, by_nearness: torch.Tensor) -> "_Features":
        mean = by_nearness.mean(dim=0)
        values, number = by_nearness - mean, torch.arange(len(by_nearness), device=by_nearness.device)
        held_out = number // RUN % HELD_OUT == HELD_OUT - 1
        if not held_out.any():
            held_out = number % HELD_OUT == HELD_OUT - 1
        return cls(values, mean, held_out, (_gram(values[~held_out]), _gram(values[held_out])))


class _Regression(NamedTuple):
    matrix: torch.Tensor  # (D, F) for the raw states
    weights: torch.Tensor  # (R', D) for the features from nearness
    offset: torch.Tensor  # (D,)
    r2: float
    ridge: float


def _fit_knot(states: torch.Tensor, features: _Features, target: torch.Tensor, start: float) -> _Regression:
    """Ridge regression of target (N, D) on states (N, F) and features (N, R'), see the module's docstring.

    The search for the ridge starts at ``start`` and tries larger ridges, else smaller ones, while the fit improves.
    """
    x, mean, scale = standardise(states)
    shrink = (LINEAR / x.shape[1]) ** 0.5
    centre, held_out = target.mean(dim=0), features.held_out
    x, y = torch.cat([x * shrink, features.values], dim=1), target - centre
    seen, unseen = x[~held_out], x[held_out]
    gram, cross = _gram(seen, features.grams[0]), seen.T @ y[~held_out]
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
            break  # both neighbours of the best ridge are worse
    r2, ridge, predicted = best
    gram, cross = gram + _gram(unseen, features.grams[1]), cross + unseen.T @ y[held_out]
    weight = _solve(gram, cross, ridge)
    weight = weight @ _stretch(x @ weight, y, predicted)
    matrix = (weight[: len(scale)] * shrink / scale[:, None]).T.contiguous()
    weights = weight[len(scale) :]
    return _Regression(matrix, weights, centre - matrix @ mean - features.mean @ weights, r2, ridge)


def _stretch(predicted: torch.Tensor, y: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """Matrix (D, D) by which to multiply predictions (N, D) of coordinates y (N, D); both have zero mean.

    ``held_out`` are predictions for anchors that the regression has not seen.
    """
    together = _transport(predicted, y)
    return together * y.std(dim=0) / (held_out @ together).std(dim=0).clamp_min(MIN_SCALE)


def _transport(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Symmetric matrix A (D, D) that gives ``given`` (N, D) the covariance of ``wanted`` with the smallest change.

    Both have zero mean. A = G^-½ (G^½ W G^½)^½ G^-½ with their covariances G and W (Olkin and Pukelsheim, 1982).
    """
    given, wanted = ((x.T @ x / len(x)).double() for x in (given, wanted))
    root, inverse = _power(given, 0.5), _power(given, -0.5)
    return (inverse @ _power(root @ wanted @ root, 0.5) @ inverse).float()


def _power(symmetric: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(max(LEAST_EIGENVALUE * float(values[-1]), MIN_SCALE)) ** exponent @ vectors.T


def _gram(x: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
    """The lower blocks of the symmetric matrix xᵀx: (N, F) → (F, F).

    ``last`` (R', R') are the blocks of the last R' columns, if known.
    """
    gram, known = x.new_zeros(x.shape[1], x.shape[1]), 0 if last is None else len(last)
    first = x.shape[1] - known
    for start in range(0, first, BLOCK):
        end = min(start + BLOCK, first)
        gram[start:end, :end] = x[:, start:end].T @ x[:, :end]
    if known:
        gram[first:, :first], gram[first:, first:] = x[:, first:].T @ x[:, :first], last
    return gram


def _solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    gram = gram.clone()
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))


def standardise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (N, d) → states with zero mean and unit variance per column, means (d,), standard deviations (d,)."""
    mean, scale = states.mean(dim=0), states.std(dim=0).clamp_min(MIN_SCALE)
    return (states - mean) / scale, mean, scale


def cache_folder() -> Path:
    """Folder of cached maps and states: $UNIHYPERLORA_CACHE, else ~/.cache/unihyperlora."""
    return Path(os.environ.get("UNIHYPERLORA_CACHE") or Path.home() / ".cache" / "unihyperlora")


def line_up(space: CanonicalSpace, host: nn.Module, words: WordReader, states: torch.Tensor | None = None) -> HostFit:
    """Align a host with a space: find its map in closed form, without labels, in seconds; maps are cached.

    Args:
        space: the canonical space.
        host: any model that returns its hidden states.
        words: reader of the host's words.
        states: result of ``anchor_states`` for the space's anchors, if known.

    Raises:
        HostError: the host can read too few anchors.
    """

    def compute() -> HostFit:
        read = anchor_states(host, words, space.sentences()) if states is None else states
        return fit_host(read, knot_layers(words.num_layers), space.canonical().cpu())

    return kept_map(space, host, words, compute)


def kept_map(
    space: CanonicalSpace, host: nn.Module, words: WordReader, compute: Callable[[], HostFit], more: str = ""
) -> HostFit:
    """A map from the cache, or from ``compute``; ``more`` describes what else the map depends on."""
    said = json.dumps([METHOD, fingerprint(host), words.key(), space.digest, more])
    path = cache_folder() / f"map-{hashlib.sha256(said.encode()).hexdigest()[:24]}.safetensors"
    return kept(path, lambda: to_tensors(compute()), from_tensors)


def kept(path: Path, make: Callable[[], dict[str, torch.Tensor]], read: Callable[[dict[str, torch.Tensor]], T]) -> T:
    """Result of ``read`` on the tensors of a cache file; if there is none, ``make`` makes them and they are cached.

    If several processes need the file, one makes it and the others wait. A damaged, outdated or read-only cache is
    ignored.
    """
    with contextlib.ExitStack() as stack:
        try:
            (path.parent / "locks").mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.parent / "locks" / path.name))
        except OSError:
            pass  # work without the cache
        try:
            return read(read_checked(path))
        except (AdapterFileError, KeyError):
            tensors = make()
        try:
            write_checked(path, tensors)
        except AdapterFileError as error:
            logger.warning("The result could not be cached: %s", error)
    return read(tensors)


def to_tensors(fit: HostFit) -> dict[str, torch.Tensor]:
    layers = [knot.layer for knot in fit.knots]
    tensors = {"r2": torch.tensor(fit.r2, dtype=torch.float64), "layers": torch.tensor(layers)}
    for name, part in zip([*map(str, range(len(layers))), "landmarks"], fit.parts, strict=False):
        tensors |= {f"{name}.{field}": value for field, value in _tensors_of(part).items()}
    return tensors


def from_tensors(made: dict[str, torch.Tensor]) -> HostFit:
    layers, r2 = made["layers"].tolist(), made["r2"].tolist()
    own = [(made[f"{k}.matrix"], made[f"{k}.offset"]) for k in range(len(layers))]
    knots = [KnotFit(layer, *of_knot, fit) for layer, of_knot, fit in zip(layers, own, r2, strict=True)]
    if "landmarks.at" not in made:
        return HostFit(knots, None)
    return HostFit(knots, Landmarks(**{name: made[f"landmarks.{name}"] for name in Landmarks._fields}))
