"""Controls for zero-shot scores: copies of an adapter whose alignment with the new host is wrong on purpose.

The score of a control shows how much the head and the calibration reach without a meaningful alignment. Each control
is an adapter folder, to be loaded and scored like any other. Letters: K knots, N anchors, d host width, D canonical
width.
"""

import json
from pathlib import Path

import torch
from torch import nn
from transformers.utils import CONFIG_NAME

from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.errors import ConfigError
from modeling_unihyperlora.hosts import load_host
from modeling_unihyperlora.reader import StreamAdapter
from modeling_unihyperlora.space import knot_layers, standardise, word_states
from modeling_unihyperlora.storage import WEIGHTS_NAME, load_adapter, save_adapter
from modeling_unihyperlora.words import WordReader, load_tokenizer


def shuffle_anchors(adapter: str | Path, folder: str | Path, seed: int = 0) -> Path:
    """Save the adapter with its coordinates shuffled among the anchors, so that no alignment is left.

    Args:
        adapter: folder of a stream adapter.
        folder: where to save the control.
        seed: random seed of the order.

    Raises:
        AdapterFileError, ConfigError: ``adapter`` is not a stream adapter.
    """
    loaded = _load(adapter)
    coordinates = loaded.space.canonical()
    order = torch.randperm(coordinates.shape[1], generator=torch.Generator().manual_seed(seed))
    return _save(loaded, coordinates[:, order], folder)


def random_map(adapter: str | Path, folder: str | Path, host: str | nn.Module, tokenizer=None, seed: int = 0) -> Path:
    """Save the adapter with random projections of a host's own anchor states as coordinates of its anchors.

    The host then fits the coordinates well, but the axes mean nothing to the adapter: the alignment only looks good.

    Args:
        adapter: folder of a stream adapter.
        folder: where to save the control.
        host: the host that will score the control: folder, Hub id, or loaded encoder.
        tokenizer: the host's fast tokenizer; by default loaded by the host's name.
        seed: random seed of the projections, one per knot.

    Raises:
        AdapterFileError, ConfigError: ``adapter`` is not a stream adapter.
        HostError: the host or its tokenizer cannot be loaded.
    """
    loaded = _load(adapter)
    if not isinstance(host, nn.Module):
        tokenizer = tokenizer or load_tokenizer(str(host))
        host = load_host(str(host))
    tokenizer = tokenizer or load_tokenizer(host.config.name_or_path)
    words = WordReader(host, tokenizer)
    states = word_states(host, words, loaded.space.sentences(), knot_layers(words.num_layers))
    return _save(loaded, random_coordinates(states, loaded.config.space["dim"], seed), folder)


def random_coordinates(states: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Random projections of standardised states, with unit variance: (K, N, d) → (K, N, width).

    An anchor that the host cannot read (NaN) gets zeros; a calibration on this host does not use it.
    """
    generator = torch.Generator().manual_seed(seed)
    readable = torch.isfinite(states).all(dim=-1).all(dim=0)
    coordinates = torch.zeros(*states.shape[:2], width)
    for knot, state in enumerate(states[:, readable]):
        standard, _, _ = standardise(state)
        projected = standard @ torch.randn(state.shape[-1], width, generator=generator)
        coordinates[knot, readable], _, _ = standardise(projected)
    return coordinates


def _load(folder: str | Path) -> StreamAdapter:
    config = read_config(Path(folder) / CONFIG_NAME)
    if config.pathway == "inject":
        raise ConfigError(f"{folder} has pathway 'inject'; only a stream has anchors.")
    adapter = StreamAdapter(config)
    load_adapter(adapter, Path(folder) / WEIGHTS_NAME)
    return adapter


def _save(adapter: StreamAdapter, coordinates: torch.Tensor, folder: str | Path) -> Path:
    with torch.no_grad():
        adapter.space.coordinates.latent.copy_(coordinates.flatten(0, 1))
    save_adapter(adapter, json.loads(adapter.config.to_json_string(use_diff=False)), Path(folder))
    return Path(folder)
