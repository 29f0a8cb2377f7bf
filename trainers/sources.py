"""Training a stream on one host or several, and learning which coordinates of their states it keeps.

A stream is trained on canonical states of words (``state_cache``). Of a source host only its states are needed: of the
anchors, to line it up, and of the training text.

The coordinates themselves are learned first. In the wide space of the first source's leading whitened principal
components at each knot, a linear map to the D coordinates that the adapter will keep is trained together with the rest
of the adapter, on disturbed states. What it makes of the anchors is then rounded to the file's 4 bits, every source is
lined up with that as any other host would be, and training goes on from there.
"""

import functools
import logging
import math
import time
from collections.abc import Callable

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.adapter import KNOTS, near_layers
from modeling_unihyperlora.calibration import HostFit, canonical_coordinates, fit_host
from modeling_unihyperlora.hosts import describe_host, load_host, num_layers_of
from modeling_unihyperlora.stream import at_knots, disturb, read_anchor_states

from .state_cache import CanonicalStates, WordStates
from .tokenization import load_tokenizer

logger = logging.getLogger(__name__)

WIDE = 128  # principal components a knot in which the coordinates are looked for
AXES_LEARNING_RATE = 2e-3
WARMUP = 0.1  # share of the steps


class Source:
    """What a host says of the anchors and of a data set.

    Args:
        host: the encoder; kept until its states of the anchors are asked for.
        tokenizer: its fast tokenizer.
        sentences: the adapter's anchors.
        windows: the data set, see ``WordStates``.
        fit: the host's map into the canonical space, if it is lined up already.
    """

    def __init__(
        self, host: nn.Module, tokenizer, sentences: list[list[str]], windows: Dataset, fit: HostFit | None = None
    ):
        self.num_layers: int = num_layers_of(host)
        self.words = WordStates(host, tokenizer, windows)
        self.data = CanonicalStates(self.words, lambda: self.fit)
        self.fit: HostFit = fit or []
        self._to_read: tuple | None = (host, tokenizer, sentences)

    @functools.cached_property
    def anchor_states(self) -> torch.Tensor:
        """(layers, N, d), see ``read_anchor_states``."""
        to_read, self._to_read = self._to_read, None
        return read_anchor_states(*to_read)

    def calibrate(self, coordinates: torch.Tensor) -> None:
        """Line the source up with (K, N, D) coordinates of the anchors."""
        self.fit = fit_host(self.anchor_states, near_layers(self.num_layers), coordinates.detach().cpu())


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
        sources[-1].calibrate(anchors.canonical())
    return sources


def calibrate_all(model, sources: list[Source]) -> None:
    """Line every source, and the model on the first one, up with the adapter's coordinates."""
    for source in sources:
        source.calibrate(model.adapter.anchors.canonical())
    model.stream.fit = sources[0].fit


def learn_coordinates(trainer, sources: list[Source], epochs: float) -> float:
    """Choose the adapter's canonical coordinates by training; see the module's docstring.

    Args:
        trainer: a ``UniHyperLoraTrainer`` whose training data are those of the sources.
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
        source.calibrate(wide)
    device = anchors.coordinates.latent.device
    axes = nn.Parameter(torch.randn(len(KNOTS), wide.shape[-1], config.stream_dim, device=device))

    loader = DataLoader(
        trainer.train_dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        collate_fn=trainer.data_collator,
        generator=torch.Generator().manual_seed(args.seed),
    )
    steps = math.ceil(epochs * len(loader) / len(sources))
    logger.info("Learning %d coordinates a knot, %d steps", config.stream_dim, steps)
    optimizer = trainer.create_optimizer()
    optimizer.add_param_group({"params": [axes], "lr": AXES_LEARNING_RATE, "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (WARMUP * steps + 1)))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    model.stream.disturbs = False  # it is done here, in the wide space
    for step, batch in zip(range(steps), _repeat(loader), strict=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        z = disturb(batch["canonical_states"], config.stream_fidelity, config.stream_knot_dropout)
        batch["canonical_states"] = torch.einsum("bwkp,kpd->bwkd", z, _unit(axes))
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
    calibrate_all(model, sources)
    return time.perf_counter() - start


def _unit(axes: torch.Tensor) -> torch.Tensor:
    """(K, P, D) with columns of length 1, so that coordinates of whitened components have unit variance."""
    return axes / axes.norm(dim=1, keepdim=True)


def _repeat(loader):
    while True:
        yield from loader
