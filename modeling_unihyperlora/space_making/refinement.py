"""Lining a host up on text of the user's own as well, without a label.

The anchors of a file are some 5,000 words of general English, for the file has to hold what they look like in the
canonical space. Of any other text a host that the adapter was trained on says that, where it is at hand. Then another
host is lined up with the anchors and with the words of that text at once. Small hosts gain most, and the text has to
be of the kind that they are to read.
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

MAX_WORDS = 20_000  # of the text; more gained nothing on a host of two blocks, and memory grows with them


def refine(
    model: UniHyperLoraPreTrainedModel, sentences: list[list[str]], source: UniHyperLoraPreTrainedModel
) -> None:
    """Replace the map of a model's host; see ``UniHyperLoraPreTrainedModel.refine``.

    Args:
        model: on the host that is to be lined up.
        sentences: lists of words.
        source: an adapter of the same space, on a host that it was trained on.
    """
    here, there = _checked(model, source)
    sentences = _as_many_as_are_read(sentences)
    space = here.adapter.space
    said = json.dumps([fingerprint(source.host), there.words.key(), there.fit.r2, sentences])

    def read_source() -> dict[str, torch.Tensor]:
        read = anchor_states(source.host, there.words, sentences).unsqueeze(1)  # all words as one row
        layers = layers_read(there.words.num_layers)
        [z] = there.canonical_states(dict(zip(layers, read, strict=True)), torch.arange(read.shape[2])[None])
        return {"coordinates": z}  # (N, K, D), not a number where a word cannot be read

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
    """The streams of both, or the error that says why one host cannot be lined up by the other."""
    for one in (model, source):
        if one.config.pathway == "inject":
            raise ConfigError("The injected update has no map of its host to refine; only a stream has one.")
    here, there = model.bound_stream, source.bound_stream
    if here.adapter.space.digest != there.adapter.space.digest:
        raise ConfigError("The source is of another space: its coordinates mean other things. Load the same adapter.")
    known = {host["fingerprint"]: host["name"] for host in model.config.source_hosts}
    if fingerprint(source.host) not in known:
        raise HostError(
            f"The adapter was not trained on '{source.host.config.name_or_path}', whose own map is but an estimate. "
            f"Put it on one of its source hosts: {', '.join(map(str, known.values()))}."
        )
    return here, there


def _as_many_as_are_read(sentences: list[list[str]]) -> list[list[str]]:
    """All sentences, or of a longer text every n-th."""
    if text := next((sentence for sentence in sentences if isinstance(sentence, str)), None):
        raise DataError(
            f"A sentence is a list of words; {text[:60]!r} is a text. Split it at its blanks: text.split()."
        )
    kept = [list(sentence) for sentence in sentences if sentence]
    words = sum(map(len, kept))
    if words < MIN_ANCHORS:
        raise DataError(
            f"{words} words are too few to line up a host; at least {MIN_ANCHORS} are needed, and {MAX_WORDS:,} are "
            "better. Give lists of words, one a sentence."
        )
    return kept[:: math.ceil(words / MAX_WORDS)]
