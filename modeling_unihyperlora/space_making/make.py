"""Makes a canonical space from hosts and unlabelled text."""

from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError, HostError
from ..hosts import encoder_of, load_host
from ..space import (
    KNOTS,
    CanonicalSpace,
    anchor_states,
    join_anchors,
    knot_layers,
    layers_read,
    read_anchors,
    standardise,
)
from ..words import WordReader, load_tokenizer

PACKAGE_ANCHORS = Path(__file__).with_name("anchors.txt")
DIM = 64
RIDGE = 0.3  # ridge of the soft whitening, as a share of the mean eigenvalue


def make_space(
    hosts: list[str | Path | nn.Module],
    anchor_file: str | Path | None = None,
    *,
    dim: int = DIM,
    atoms: int = 128,
    name: str = "own",
    version: int = 1,
    tokenizers: list | None = None,
) -> CanonicalSpace:
    """Make a space whose coordinates are the directions that the states of the hosts have in common.

    With one host, the coordinates at each knot are the leading whitened principal components of its standardised
    states. With several hosts, each host's standardised states are softly whitened and concatenated, and the
    coordinates are the leading left singular vectors: directions that many hosts share come first.

    Args:
        hosts: Hub ids, folders or loaded models.
        anchor_file: UTF-8 text, one sentence per line; by default the package's own.
        dim: D, number of coordinates per knot.
        atoms: M, number of atoms of δθ.
        name, version: name and version of the space.
        tokenizers: tokenizers of the hosts, in the same order; by default loaded by the hosts' names.

    Raises:
        ConfigError: no host is given.
        DataError: the anchor file cannot be used.
        HostError: a host cannot be loaded, or ``dim`` exceeds the number of dimensions or of readable anchors.
    """
    if not hosts:
        raise ConfigError("A space needs at least one host. Give one or more.")
    sentences = read_anchors(PACKAGE_ANCHORS if anchor_file is None else anchor_file)
    states = []
    for number, host in enumerate(hosts):
        tokenizer = tokenizers[number] if tokenizers else None
        if not isinstance(host, nn.Module):
            tokenizer = load_tokenizer(str(host)) if tokenizer is None else tokenizer
            host = load_host(str(host))
        host = encoder_of(host)
        words = WordReader(host, load_tokenizer(host.config.name_or_path) if tokenizer is None else tokenizer)
        layers = layers_read(words.num_layers)
        read = anchor_states(host, words, sentences)
        states.append(read[[layers.index(layer) for layer in knot_layers(words.num_layers)]])
    space = CanonicalSpace(name, version, sum(map(len, sentences)), len(join_anchors(sentences)), dim, atoms)
    space.set(sentences, common_coordinates(states, dim))
    return space


def common_coordinates(states: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Coordinates (K, N, dim) with unit variance, from the states (K, N, d) of one or more hosts.

    An anchor that one of the hosts cannot read gets zeros, the mean coordinates.

    Raises:
        HostError: ``dim`` exceeds the number of usable anchors or of dimensions.
    """
    usable = torch.stack([torch.isfinite(own).all(dim=-1).all(dim=0) for own in states]).all(dim=0)
    widest, count = sum(own.shape[-1] for own in states), int(usable.sum())
    if dim > min(widest, count - 1):
        raise HostError(
            f"{dim} canonical coordinates need hosts with at least {dim} dimensions in total and more than {dim} "
            f"anchors; these hosts have {widest}, and {count} anchors can be read. Ask for fewer coordinates, or give "
            "a wider host."
        )
    coordinates = torch.zeros(len(KNOTS), states[0].shape[1], dim)
    for k in range(len(KNOTS)):
        parts = [_standard(own[k, usable].double(), soft=len(states) > 1) for own in states]
        left, _, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
        coordinates[k, usable] = (left[:, :dim] * usable.sum() ** 0.5).float()
    return coordinates


def _standard(states: torch.Tensor, soft: bool) -> torch.Tensor:
    """Standardised states (N, d); with ``soft`` each principal component's variance v becomes v / (v + ridge)."""
    standard, _, _ = standardise(states)
    if not soft:
        return standard
    left, values, _ = torch.linalg.svd(standard, full_matrices=False)
    squares = values.square()
    return left * (squares / (squares + RIDGE * squares.mean())).sqrt()
