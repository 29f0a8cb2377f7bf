"""Training a stream on one host or several, and learning which coordinates of their states it keeps.

A stream is trained on canonical states of words (``state_cache``). Of a source host only its states are needed: of the
anchors, to line it up, and of the training text. From the same states come those of its copies: the host with fewer
blocks or fewer of its dimensions, lined up like any other host. What they do to the coordinates is what hosts do that
were never seen, which noise alone does not show.

The coordinates themselves are learned first. In the wide space of the first source's leading whitened principal
components at each knot, a linear map to the D coordinates that the adapter will keep is trained together with the rest
of the adapter, on disturbed states. What it makes of the anchors is then rounded to the file's 2 bits, every source is
lined up with that as any other host would be, and training goes on from there.
"""

import bisect
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.adapter import KNOTS, knot_layers, near_layers
from modeling_unihyperlora.calibration import HostFit, KnotFit, Landmarks, canonical_coordinates, fit_host
from modeling_unihyperlora.hosts import describe_host, load_host, num_layers_of
from modeling_unihyperlora.stream import at_knots, disturb, kept_anchor_states, unpack
from modeling_unihyperlora.words import WordReader, load_tokenizer

from .sampling import SentenceSampler
from .state_cache import CanonicalStates, WordStates

logger = logging.getLogger(__name__)

WIDE = 128  # principal components a knot in which the coordinates are looked for
AXES_LEARNING_RATE_FACTOR = 0.4  # of --learning_rate
WARMUP = 0.1  # share of the steps
COPIES = ((1 / 3, 1 / 3), (2 / 3, 2 / 3), (1 / 2, 1), (1 / 3, 1 / 6), (1 / 2, 1 / 3), (5 / 6, 1 / 2))  # blocks, width
WIDE_COPIES = 2  # of them, while the coordinates are learned: wide states take much memory


class Source:
    """What a host says of the anchors and of a data set.

    Args:
        host: the encoder; kept until its states of the anchors are asked for.
        tokenizer: its fast tokenizer.
        sentences: the adapter's anchors.
        windows: the data set, see ``WordStates``.
        fit: the host's map into the canonical space, if it is lined up already.

    Attributes:
        fits: that map, and those of the copies.
        data: the words of the windows by each of these maps.
    """

    def __init__(
        self, host: nn.Module, tokenizer, sentences: list[list[str]], windows: Dataset, fit: HostFit | None = None
    ):
        self.num_layers: int = num_layers_of(host)
        words = WordReader(host, tokenizer)
        self.words = WordStates(host, words, windows)
        self.fits: list[HostFit] = [] if fit is None else [fit]
        self.data = CanonicalStates(self.words, lambda: self.fits)
        self._to_read: tuple | None = (host, words, sentences)

    @functools.cached_property
    def anchor_states(self) -> torch.Tensor:
        """(layers, N, d), see ``kept_anchor_states``."""
        to_read, self._to_read = self._to_read, None
        return kept_anchor_states(*to_read)

    def calibrate(self, coordinates: torch.Tensor, copies: int = len(COPIES)) -> None:
        """Line the source and as many copies of it up with (K, N, D) coordinates of the anchors."""
        coordinates = coordinates.detach().cpu()
        at, near = knot_layers(self.num_layers), near_layers(self.num_layers)
        fits = [fit_host(self.anchor_states, near, at, coordinates)]
        for number, (blocks, width) in enumerate(COPIES[:copies]):
            fits.append(self._fit_copy(round(blocks * self.num_layers), width, number, coordinates))
        self.fits = fits

    def _fit_copy(self, blocks: int, width: float, seed: int, coordinates: torch.Tensor) -> HostFit:
        """The map of the host's first ``blocks`` blocks and a random share of its dimensions, in terms of the host."""
        dim = self.anchor_states.shape[-1]
        kept = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))[: round(width * dim)]
        stored = self.words.layers
        near = [
            [layer for layer in layers if layer in stored] or [min(stored, key=lambda layer: abs(layer - layers[0]))]
            for layers in near_layers(max(blocks, 1))
        ]
        at = [min(stored, key=lambda layer, at=at: abs(layer - at)) for at in knot_layers(max(blocks, 1))]
        narrow = fit_host(self.anchor_states[..., kept], near, at, coordinates, stored)

        def widened(part: KnotFit | Landmarks) -> KnotFit | Landmarks:
            matrix = part.matrix.new_zeros(len(part.matrix), len(part.layers), dim)
            matrix[..., kept] = part.matrix.unflatten(1, (len(part.layers), -1))
            return part._replace(matrix=matrix.flatten(1))

        return HostFit([widened(knot) for knot in narrow.knots], widened(narrow.landmarks))


class SourceStates(Dataset):
    """The training windows of all sources, one source after the other; see ``CanonicalStates`` for views and keys."""

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self.starts = [0, *itertools.accumulate(len(source.data) for source in sources)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        view, index = divmod(key, len(self))
        which = bisect.bisect_right(self.starts, index) - 1
        data = self.sources[which].data
        return data[view * len(data) + index - self.starts[which]]

    def sampler(self, seed: int) -> SentenceSampler:
        """All windows once an epoch."""
        return SentenceSampler(len(self), len(self.sources[0].fits), seed)


def sources_of(
    model,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    others: list[str],
    make_dataset: Callable[[PreTrainedTokenizerBase], Dataset],
    **hub,
) -> list[Source]:
    """The hosts to train a stream on, its own first; the model's configuration takes note of the others.

    Args:
        model: the stream model that is to be trained.
        tokenizer: its host's.
        train: the training data for its host.
        others: Hub ids or folders of the other hosts.
        make_dataset: the training data for the host of another tokenizer.
        **hub: ``cache_dir``, ``token``.

    Raises:
        ConfigError: a host is named twice, or is the model's own.
        HostError, DataError
    """
    anchors = model.adapter.anchors
    sources = [Source(model.host, tokenizer, anchors.sentences(), train, model.stream.fit)]
    for name in others:
        host, other = load_host(name, **hub), load_tokenizer(name, **hub)
        described = describe_host(host, name)
        if described["fingerprint"] in [known["fingerprint"] for known in model.config.source_hosts]:
            raise ConfigError(f"The source host '{name}' is among the sources already; name each once.")
        model.config.source_hosts.append(described)
        sources.append(Source(host, other, anchors.sentences(), make_dataset(other)))
    return sources


def calibrate_all(model, sources: list[Source]) -> None:
    """Line every source and its copies, and the model on the first one, up with the adapter's coordinates."""
    for source in sources:
        source.calibrate(model.adapter.anchors.canonical())
    model.stream.fit = sources[0].fits[0]


def learn_coordinates(trainer, sources: list[Source], epochs: float) -> float:
    """Choose the adapter's canonical coordinates by training; see the module's docstring.

    Every process of a launch takes whole batches and does the same, so that it does not matter how many there are.

    Args:
        trainer: a ``UniHyperLoraTrainer`` whose training data are the ``SourceStates`` of the sources.
        sources: the model's own host first.
        epochs: passes over the training text, of which each source then gives its share.

    Returns:
        Seconds taken.
    """
    start = time.perf_counter()
    model, args = trainer.unwrapped, trainer.args
    config, anchors = model.config, model.adapter.anchors
    first = at_knots(sources[0].anchor_states, sources[0].num_layers)
    wide = canonical_coordinates(first, min(WIDE, *first.shape[1:]))
    for source in sources:
        source.calibrate(wide, WIDE_COPIES)
    device = anchors.coordinates.latent.device
    axes = nn.Parameter(torch.randn(len(KNOTS), wide.shape[-1], config.stream_dim, device=device))

    data = trainer.train_dataset
    sampler = data.sampler(args.seed)
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    loader = DataLoader(data, batch_size=size, sampler=sampler, collate_fn=trainer.data_collator)
    steps = math.ceil(epochs * len(loader) / len(sources))
    logger.info("Learning %d coordinates a knot, %d steps", config.stream_dim, steps)
    optimizer = trainer.create_optimizer()
    rate = AXES_LEARNING_RATE_FACTOR * args.learning_rate
    optimizer.add_param_group({"params": [axes], "lr": rate, "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (WARMUP * steps + 1)))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    model.stream.disturbs = False  # it is done here, in the wide space
    for step, batch in zip(range(steps), _epochs(loader, sampler), strict=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        inside = batch["attention_mask"] > 0  # (B, W)
        cells = inside.flatten().nonzero().squeeze(1)
        z = batch["canonical_states"].flatten(0, 1).index_select(0, cells)
        z = disturb(z, cells // inside.shape[1], len(inside), config.stream_fidelity)
        batch["canonical_states"] = unpack(torch.einsum("nkp,kpd->nkd", z, _unit(axes)), cells, inside.shape)
        loss = trainer.compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        if (step + 1) % args.logging_steps == 0:
            logger.info("coordinates: step %d of %d, loss %.4f", step + 1, steps, float(loss.detach()))
    model.stream.disturbs = True
    trainer.optimizer = None  # what follows starts its own
    with torch.no_grad():
        kept = torch.einsum("knp,kpd->knd", wide.to(device), _unit(axes))
        anchors.coordinates.latent.copy_(kept.flatten(0, 1))
        for parameter in model.adapter.parameters():
            parameter.copy_(broadcast(parameter.data))
    seconds = time.perf_counter() - start
    logger.info("Coordinates learned in %.0f s", seconds)
    return seconds


def _unit(axes: torch.Tensor) -> torch.Tensor:
    """(K, P, D) with columns of length 1, so that coordinates of whitened components have unit variance."""
    return axes / axes.norm(dim=1, keepdim=True)


def _epochs(loader: DataLoader, sampler: SentenceSampler) -> Iterator[dict[str, torch.Tensor]]:
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader
