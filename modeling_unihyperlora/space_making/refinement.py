"""Refines a host's map with the user's own text, without labels.

An adapter file holds coordinates only for its anchors, about 5,000 words of general English. A source host, one that
the adapter was trained on, can compute coordinates for any other text. The new host is then aligned on the anchors and
on the words of that text together. Small hosts gain most. The text should be similar to the text that the adapter will
read.
"""

import hashlib
import json
import math

import torch

from ..errors import ConfigError, DataError, HostError
from ..hosts import fingerprint
from ..modeling_unihyperlora import Stream, UniHyperLoraPreTrainedModel
from ..space import (
    MIN_ANCHORS,
    HostFit,
    anchor_states,
    cache_folder,
    fit_host,
    kept,
    kept_map,
    knot_layers,
    layers_read,
)

MAX_WORDS = 20_000  # of the text; more words take more memory and gained nothing on a host of two blocks


def refine(
    model: UniHyperLoraPreTrainedModel, sentences: list[list[str]], source: UniHyperLoraPreTrainedModel
) -> None:
    """Replace the map of a model's host; see ``UniHyperLoraPreTrainedModel.refine``.

    Args:
        model: a model on the host to align.
        sentences: lists of words.
        source: a model with the same space, on a host that the adapter was trained on.

    Raises:
        ConfigError, DataError, HostError: a model is no stream, the spaces differ, the text cannot be used, or the
            adapter was not trained on the source's host.
    """
    here, there = _checked(model, source)
    sentences = _checked_sentences(sentences)
    space = here.adapter.space
    said = json.dumps([fingerprint(source.host), there.words.key(), there.fit.r2, sentences])

    def read_source() -> dict[str, torch.Tensor]:
        read = anchor_states(source.host, there.words, sentences).unsqueeze(1)  # all words in one row
        layers = layers_read(there.words.num_layers)
        [z] = there.canonical_states(dict(zip(layers, read, strict=True)), torch.arange(read.shape[2])[None])
        return {"coordinates": z}  # (N, K, D), NaN for a word that cannot be read

    def compute() -> HostFit:
        name = hashlib.sha256(f"{space.digest} {said}".encode()).hexdigest()
        z = kept(cache_folder() / f"text-{name[:24]}.safetensors", read_source, lambda made: made["coordinates"])
        readable = torch.isfinite(z).flatten(1).all(dim=1)
        coordinates = torch.cat([space.canonical().cpu(), z[readable].transpose(0, 1)], dim=1)
        states = anchor_states(model.host, here.words, [*space.sentences(), *sentences])
        known = torch.cat([torch.ones(states.shape[1] - len(z), dtype=torch.bool), readable])
        return fit_host(states[:, known], knot_layers(here.words.num_layers), coordinates)

    here.fit = kept_map(space, model.host, here.words, compute, said)
    digest = hashlib.sha256(json.dumps(sentences).encode()).hexdigest()
    here.refined = {"words": sum(map(len, sentences)), "sha256": digest}


def _checked(model: UniHyperLoraPreTrainedModel, source: UniHyperLoraPreTrainedModel) -> tuple[Stream, Stream]:
    """Streams of both models, after checking that the source can refine the model's map.

    Raises:
        ConfigError: a model has no stream, or the spaces differ.
        HostError: the adapter was not trained on the source's host.
    """
    for one in (model, source):
        if one.config.pathway == "inject":
            raise ConfigError("An injected update has no map of its host to refine. Use a stream (pathway='stream').")
    here, there = model.bound_stream, source.bound_stream
    if here.adapter.space.digest != there.adapter.space.digest:
        raise ConfigError("The source has another space, so its coordinates mean other things. Load the same adapter.")
    known = {host["fingerprint"]: host["name"] for host in model.config.source_hosts}
    if fingerprint(source.host) not in known:
        raise HostError(
            f"The adapter was not trained on '{source.host.config.name_or_path}', so the map of that host is only an "
            f"estimate. Use one of its source hosts: {', '.join(map(str, known.values()))}."
        )
    return here, there


def _checked_sentences(sentences: list[list[str]]) -> list[list[str]]:
    """The sentences to read: all of them, or every n-th of a text longer than ``MAX_WORDS``.

    Raises:
        DataError: a sentence is not a list of words, or there are too few words.
    """
    if text := next((sentence for sentence in sentences if isinstance(sentence, str)), None):
        raise DataError(
            f"A sentence must be a list of words, but {text[:60]!r} is a string. Split it at its blanks: text.split()."
        )
    kept = [list(sentence) for sentence in sentences if sentence]
    words = sum(map(len, kept))
    if words < MIN_ANCHORS:
        raise DataError(
            f"{words} words are too few to align a host; give at least {MIN_ANCHORS}, better {MAX_WORDS:,}, as lists "
            "of words, one list per sentence."
        )
    return kept[:: math.ceil(words / MAX_WORDS)]
