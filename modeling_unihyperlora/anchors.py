"""Anchors: words of unlabelled text on which the states of different hosts are lined up with each other.

An anchor is a blank-separated word or mark in a sentence, so that hosts with different tokenizers have states for the
very same anchors.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .configuration_unihyperlora import UniHyperLoraConfig
from .errors import DataError
from .hosts import call_host, check_states, window_of
from .quantization import StoredTensor, TwoBit
from .words import NO_WORD, WordReader

COORDINATE_STEP = 1.0  # of coordinates of unit variance: -1.5, -0.5, 0.5 and 1.5
PACKAGE_ANCHORS = Path(__file__).with_name("anchors.txt")
MIN_ANCHORS = 256


class Anchors(nn.Module):
    """What the adapter keeps of its anchors: their text, and their canonical coordinates at each knot in 2 bits.

    Attributes:
        text: (bytes,) uint8, UTF-8, one sentence a line.
        coordinates: (K·N, D), no gradient reaches them.
    """

    def __init__(self, config: UniHyperLoraConfig, knots: int):
        super().__init__()
        self.knots = knots
        self.register_buffer("text", torch.zeros(config.anchor_text_bytes, dtype=torch.uint8))
        shape = (knots * config.anchor_words, config.stream_dim)
        self.coordinates = StoredTensor(torch.zeros(shape), TwoBit(COORDINATE_STEP))
        self.coordinates.requires_grad_(False)

    def set(self, sentences: list[list[str]], coordinates: torch.Tensor) -> None:
        """Take over anchors and their (K, N, D) coordinates."""
        self.text = torch.frombuffer(bytearray(join_anchors(sentences)), dtype=torch.uint8).to(self.text.device)
        with torch.no_grad():
            self.coordinates.latent.copy_(coordinates.flatten(0, 1))

    def sentences(self) -> list[list[str]]:
        return split_anchors(bytes(self.text.cpu().tolist()).decode(), "the adapter's anchor text")

    def canonical(self) -> torch.Tensor:
        """(K, N, D) as the file holds them."""
        return self.coordinates().unflatten(0, (self.knots, -1))


def read_anchors(path: str | Path | None = None) -> list[list[str]]:
    """The sentences of an anchor file as lists of words; the package's own text by default.

    Args:
        path: UTF-8 text, one sentence a line.

    Raises:
        DataError: the file cannot be read as UTF-8, or has fewer than ``MIN_ANCHORS`` words.
    """
    path = PACKAGE_ANCHORS if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The anchor file {path} cannot be read as UTF-8 text ({error}).") from error
    return split_anchors(text, str(path))


def join_anchors(sentences: list[list[str]]) -> bytes:
    """The text as an adapter keeps it, which ``split_anchors`` takes apart again."""
    return "\n".join(map(" ".join, sentences)).encode()


def split_anchors(text: str, source: str) -> list[list[str]]:
    """Sentences of words from text with one sentence a line; ``DataError`` if there are too few words."""
    sentences = [line.split() for line in text.splitlines() if line.strip()]
    words = sum(map(len, sentences))
    if words < MIN_ANCHORS:
        raise DataError(
            f"{source} has {words} words; at least {MIN_ANCHORS} are needed to line up a host, and 2,000 to 4,000 of "
            "varied text are better."
        )
    return sentences


@torch.no_grad()
def word_states(
    host: nn.Module,
    words: WordReader,
    sentences: list[list[str]],
    layers: list[int],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """States of every word.

    Args:
        host: the encoder or decoder.
        words: how its words are read.
        sentences: S lists of words, N words in all.
        layers: which of the L+1 hidden states to take.
        progress: called with the number of sentences done.

    Returns:
        (len(layers), N, d) float32 on the CPU, words in the order of the text. A word beyond the host's window, or
        one that its tokenizer gives no sub-token, has NaN.
    """
    was_training = host.training
    host.eval()
    offsets = [0]
    for sentence in sentences:
        offsets.append(offsets[-1] + len(sentence))
    states = torch.full((len(layers), offsets[-1], host.config.hidden_size), torch.nan)
    limit = window_of(host, words.tokenizer)
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
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
            hidden = call_host(host, mask, input_ids=ids, output_hidden_states=True).hidden_states
            check_states(host, hidden, ids)
            places = words.places(ids, mask, index)
            number, at = index.gather(1, places.first), words.read_at(places)  # (B, W)
            there = (torch.arange(at.shape[1], device=at.device) < places.lengths[:, None]) & (number != NO_WORD)
            row, column = there.nonzero(as_tuple=True)
            target = torch.tensor([offsets[index] for index in chosen])[row.cpu()] + number[row, column].cpu()
            for k, layer in enumerate(layers):
                states[k, target] = hidden[layer][row, at[row, column]].float().cpu()
            if progress is not None:
                progress(len(chosen))
    finally:
        host.train(was_training)
    return states
