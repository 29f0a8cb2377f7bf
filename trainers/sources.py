"""The states that a stream trains on: of one or more hosts, and of copies of them.

A task is trained on canonical states of words (``state_cache``). A source host is needed only for its states of the
anchors, to align it, and of the training text. Copies of a host are aligned like any other host. They change the
coordinates as unseen hosts do, which noise alone does not imitate. There are two kinds:

- Narrow copies: the host with fewer blocks or fewer dimensions. The host's own states give theirs.
- The causal copy of an encoder: the same weights under a causal mask, read as a decoder is read. It needs a second
  pass over the text. It has narrow copies too.
"""

import bisect
import copy
import functools
import itertools
import logging
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.hosts import call_host, describe_host, dtype_of, fingerprint, load_host
from modeling_unihyperlora.space import (
    LANDMARKS,
    CanonicalSpace,
    HostFit,
    KnotFit,
    Landmarks,
    anchor_states,
    fit_host,
    knot_layers,
    line_up,
)
from modeling_unihyperlora.words import WordReader, load_tokenizer, probe

from .sampling import SentenceSampler
from .state_cache import CanonicalStates, WordStates

logger = logging.getLogger(__name__)

COPIES = ((1 / 3, 1 / 3), (2 / 3, 2 / 3), (1 / 2, 1), (1 / 3, 1 / 6), (1 / 2, 1 / 3), (5 / 6, 1 / 2))  # blocks, width


def layers_of_copies(num_layers: int) -> list[int]:
    """Layers that the maps of a host and of its copies read, sorted."""
    copies = [_knots_of_copy(round(blocks * num_layers)) for blocks, _ in COPIES]
    return sorted({*knot_layers(num_layers), *itertools.chain.from_iterable(copies)})


def _knots_of_copy(blocks: int) -> list[int]:
    """Layer of each knot in a copy with this number of blocks, at least 1."""
    return knot_layers(max(blocks, 1))


class Source:
    """A host's states of a data set, mapped by the host's own map and by those of its copies.

    Args:
        host: the encoder or decoder; kept until its states of the anchors are computed.
        words: reader of the host's words.
        space: the canonical space.
        windows: the data set, see ``WordStates``.
        fit: the host's map into the space.
        cpu_seconds: CPU time to find this map, if it counts here.
        bf16: see ``WordStates``.

    Attributes:
        fits: the host's map, and those of the narrow copies after a call of ``line_up_copies``.
        data: canonical states of the windows, one view per map.
        causal: the source of the causal copy, if there is one.
        cpu_seconds: CPU time for the maps and the states, also those of the causal copy.
        hosts: descriptions of hosts that read stored states; none here.
    """

    hosts: tuple = ()
    causal: "Source | None" = None

    def __init__(
        self,
        host: nn.Module,
        words: WordReader,
        space: CanonicalSpace,
        windows: Dataset,
        fit: HostFit,
        cpu_seconds: float = 0.0,
        bf16: bool = False,
    ):
        self.num_layers: int = words.num_layers
        self.words = WordStates(host, words, windows, layers_of_copies(words.num_layers), bf16)
        self._own_seconds = cpu_seconds + self.words.cpu_seconds
        self.space = space
        self.fits: list[HostFit] = [fit]
        self.data = CanonicalStates(self.words, lambda: self.fits)
        self._to_read: tuple | None = (host, words, space.sentences(), self.words.layers)

    def __getstate__(self) -> dict:
        """Pickle without the host and its states of the anchors, which a DataLoader's workers do not need."""
        return {name: value for name, value in vars(self).items() if name != "anchor_states"} | {"_to_read": None}

    @property
    def cpu_seconds(self) -> float:
        return self._own_seconds + (0.0 if self.causal is None else self.causal.cpu_seconds)

    @functools.cached_property
    def anchor_states(self) -> torch.Tensor:
        """The host's states of the anchors, (layers, N, d); see ``space.anchor_states``."""
        to_read, self._to_read = self._to_read, None
        return anchor_states(*to_read)

    def line_up_copies(self) -> None:
        """Add the maps of the narrow copies, also of the causal copy."""
        if self.causal is not None:
            self.causal.line_up_copies()
        if len(self.fits) == 1:
            start, coordinates = time.process_time(), self.space.canonical().cpu()
            copies = [
                self._fit_copy(round(blocks * self.num_layers), width, number, coordinates)
                for number, (blocks, width) in enumerate(COPIES)
            ]
            self.fits = [*self.fits, *copies]
            self._own_seconds += time.process_time() - start

    def _fit_copy(self, blocks: int, width: float, seed: int, coordinates: torch.Tensor) -> HostFit:
        """Map, for the host's states, of a copy with the first ``blocks`` blocks and a random share of dimensions."""
        dim = self.anchor_states.shape[-1]
        kept = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))[: round(width * dim)]
        knots, states = _knots_of_copy(blocks), self.anchor_states[..., kept]
        narrow = fit_host(states, knots, coordinates, self.words.layers, LANDMARKS // 2)  # a copy need not be good

        def widened(part: KnotFit | Landmarks) -> KnotFit | Landmarks:
            given = part.matrix.unflatten(1, (-1, len(kept)))  # (…, layers, kept dimensions)
            matrix = given.new_zeros(*given.shape[:2], dim)
            matrix[..., kept] = given
            return part._replace(matrix=matrix.flatten(1))

        return HostFit([widened(knot) for knot in narrow.knots], narrow.landmarks and widened(narrow.landmarks))


class CausalCopy(nn.Module):
    """An encoder whose tokens see themselves and the tokens before them, as in a decoder."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.host, self.config, self.training = host, host.config, host.training

    @property
    def device(self) -> torch.device:
        return self.host.device

    def get_input_embeddings(self) -> nn.Module:
        return self.host.get_input_embeddings()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids=None, return_dict=True, **kwargs
    ):
        """The host's output for ids (B, T) and a mask (B, T) that is above 0 for tokens."""
        seen = (attention_mask[:, None, None] > 0).expand(-1, 1, input_ids.shape[1], -1).tril()
        dtype = dtype_of(self.host)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        return call_host(self.host, mask, input_ids=input_ids, **kwargs)


def causal_copy_of(host: nn.Module, words: WordReader) -> tuple[CausalCopy, WordReader] | None:
    """The causal copy of a host, and the reader of its words; None for a decoder, and for hosts without such masks.

    Most families of transformers take a mask (B, 1, T, T) that says what each token sees. Whether a host obeys it is
    tried out.
    """
    if words.causal:
        return None
    causal = CausalCopy(host)
    try:
        obeys = probe(causal, words.rules)[0]
    except Exception as error:  # each family fails in its own way
        logger.debug("No causal copy: %s", error)
        obeys = False
    if not obeys:
        logger.info("%s takes no causal mask, so it has no causal copy.", type(host).__name__)
        return None
    read_causally = copy.copy(words)
    read_causally.causal = True
    return causal, read_causally


def disturb(z: torch.Tensor, fidelity: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Add noise that simulates another host, whose coordinates correlate less with the source's.

    An aligned host has coordinates of unit variance, with a correlation ρ < 1 to the source's. Each sentence draws its
    ρ from U(``fidelity``, 1) and gets ρ·z + √(1 - ρ²)·noise.

    Args:
        z: (B, W, K, D) coordinates of unit variance.
        fidelity: smallest ρ; 1 adds no noise.
        generator: random generator of the noise; by default torch's own.
    """
    rho = torch.empty(len(z), 1, 1, 1, device=z.device).uniform_(fidelity, 1, generator=generator)
    return rho * z + (1 - rho.square()).sqrt() * torch.randn(z.shape, device=z.device, generator=generator)


class SourceStates(Dataset):
    """Training windows of all sources, one source after the other; see ``CanonicalStates`` for views and keys.

    Args:
        sources: the hosts.
        fidelity, copy_fidelity: ``fidelity`` of ``disturb`` for the hosts' own states and for their copies'; the
            Trainer sets both. Copies get more noise, since other hosts may differ more than copies do.
        copy_share: share of the windows that are read with copies; the Trainer sets it too.

    A key is ``view * len(self) + index``. The first views are those of the hosts and of their narrow copies; as many
    views of the causal copies follow.
    """

    def __init__(
        self, sources: list[Source], fidelity: float = 1.0, copy_fidelity: float = 1.0, copy_share: float = 0.6
    ):
        self.sources = sources
        self.fidelity, self.copy_fidelity, self.copy_share = fidelity, copy_fidelity, copy_share
        self.starts = [0, *itertools.accumulate(len(source.data) for source in sources)]
        self._sampler: SentenceSampler | None = None  # the noise depends on its seed and epoch

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        view, index = divmod(key, len(self))
        which = bisect.bisect_right(self.starts, index) - 1
        source = self.sources[which]
        is_causal, view = divmod(view, len(source.fits))
        data = source.causal.data if is_causal and source.causal else source.data
        item = data[view * len(data) + index - self.starts[which]]
        fidelity = self.copy_fidelity if view else self.fidelity
        if fidelity < 1:
            item["canonical_states"] = disturb(item["canonical_states"][None], fidelity, self._noise(key))[0]
        return item

    def _noise(self, key: int) -> torch.Generator:
        """Noise generator of an item in an epoch; it depends on nothing else, so a resumed run has the same noise."""
        seed, epoch = (0, 0) if self._sampler is None else (self._sampler.seed, self._sampler.epoch)
        return torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 1_000_000_007 + key) % 2**63)

    def sampler(self, seed: int) -> SentenceSampler:
        """A sampler that yields every window once per epoch."""
        causal = any(source.causal is not None for source in self.sources)
        self._sampler = SentenceSampler(len(self), len(self.sources[0].fits), seed, self.copy_share, causal)
        return self._sampler


def sources_of(
    model,
    train: Dataset,
    others: list[str],
    make_dataset: Callable[[PreTrainedTokenizerBase], Dataset],
    bf16: bool = False,
    causal: bool = True,
    **hub,
) -> list[Source]:
    """The sources to train a stream on, its own host first; records the other hosts in the model's configuration.

    Args:
        model: the stream model to train.
        train: training data for its own host.
        others: Hub ids or folders of the other hosts.
        make_dataset: the training data for the host of another tokenizer.
        bf16: see ``WordStates``.
        causal: read every encoder's causal copy too.
        **hub: ``cache_dir``, ``token``.

    Raises:
        ConfigError: a host is named twice, or is the model's own.
        HostError, DataError: a host cannot be loaded or aligned, or its states cannot be cached.
    """
    stream, space = model.bound_stream, model.adapter.space

    def add_causal(source: Source, host: nn.Module, words: WordReader, windows: Dataset) -> Source:
        made = causal_copy_of(host, words) if causal else None
        if made is not None:
            start = time.process_time()
            fit = line_up(space, *made)
            source.causal = Source(*made, space, windows, fit, time.process_time() - start, bf16)
        return source

    own = Source(model.host, stream.words, space, train, stream.fit, bf16=bf16)
    sources = [add_causal(own, model.host, stream.words, train)]
    known, named = model.config.source_hosts, {fingerprint(model.host)}
    for name in others:
        host = load_host(name, **hub)
        words = WordReader(host, load_tokenizer(name, **hub))
        described = describe_host(host, name, words.num_layers)
        if described["fingerprint"] in named:
            raise ConfigError(f"The source host '{name}' is among the sources already; name each host once.")
        named.add(described["fingerprint"])
        if described["fingerprint"] not in [host["fingerprint"] for host in known]:  # of another task
            known.append(described)
        start = time.process_time()
        fit = line_up(space, host, words)
        seconds, windows = time.process_time() - start, make_dataset(words.tokenizer)
        sources.append(add_causal(Source(host, words, space, windows, fit, seconds, bf16), host, words, windows))
    return sources
