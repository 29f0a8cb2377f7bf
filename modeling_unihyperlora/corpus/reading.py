"""Converts text to canonical states, without labels; implements ``model.read``.

Letters: W words of a text, K knots, D coordinates per knot.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..hosts import call_host, window_of
from ..space import KNOTS
from ..words import NO_WORD, cut_words

TEXT_COLUMNS = ("tokens", "words", "text", "sentence")  # by default the first that exists is read


def read(
    model,
    texts: Sequence[str] | Sequence[list[str]] | Mapping[str, Sequence],
    column: str | None = None,
    max_seq_length: int = 128,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list]:
    """Canonical states of all words; see ``UniHyperLoraPreTrainedModel.read``.

    Args:
        progress: called after every batch with its number of words.

    Raises:
        ConfigError: the column does not exist, or no word fits into ``max_seq_length``.
        DataError: a row is neither a text nor a list of words, or one text was given in place of a list.
        HostError: the model is not a stream that is aligned with a host.
    """
    if isinstance(texts, str):
        raise DataError("read takes a list of texts, but one text was given. Put it into a list: read([text]).")
    if isinstance(texts, Mapping):
        texts = texts[text_column(texts, column)]
    sentences = [words_of(row, f"row {number}") for number, row in enumerate(texts)]
    return {"words": sentences, "states": states_of(model, sentences, max_seq_length, batch_size, progress)}


def text_column(present: Iterable[str], named: str | None = None) -> str:
    """Column to read: the named one, else the first of ``TEXT_COLUMNS`` that exists.

    Raises:
        ConfigError: no such column exists.
    """
    present = list(present)
    column = named or next((name for name in TEXT_COLUMNS if name in present), None)
    if column not in present:
        lacks = f"no column {named!r}" if named else f"none of the columns {', '.join(TEXT_COLUMNS)}"
        raise ConfigError(f"The rows have {lacks}; they have {', '.join(present) or 'none'}. Name the one to read.")
    return column


def words_of(row: object, origin: str) -> list[str]:
    """Words of a row: a list is used as it is, a text is split into words.

    Raises:
        DataError: the row is neither, or contains half of a surrogate pair, which no tokenizer can read.
    """
    try:
        if isinstance(row, str):
            row.encode()
            return cut_words(row)
        if isinstance(row, list | tuple | np.ndarray) and all(isinstance(word, str) for word in row):
            "".join(row).encode()
            return [str(word) for word in row]
    except UnicodeEncodeError as error:
        raise DataError(
            f"{origin} has half of a surrogate pair in it ({str(row)[:40]!a}), which is no character. Write the text "
            "again in UTF-8."
        ) from error
    raise DataError(
        f"{origin} is {str(row)[:40]!a}, of type {type(row).__name__}. A row must be a text, or a list of words."
    )


@torch.inference_mode()
def states_of(
    model,
    sentences: list[list[str]],
    max_seq_length: int = 128,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Canonical states of the words of each sentence, (W, K, D) float16; (0, K, D) for a sentence without words.

    The host reads windows of similar length together, in batches of ``batch_size``.
    """
    stream = model.bound_stream
    tokenizer, device = stream.words.tokenizer, stream.host.device
    limit = min(max_seq_length, window_of(stream.host, tokenizer) or max_seq_length)
    windows = windows_of(sentences, tokenizer, limit, stream.words.causal)
    windows.sort(key=lambda window: len(window.input_ids))
    shape = (len(KNOTS), len(stream.fit.knots[0].offset))
    states = [np.empty((len(sentence), *shape), np.float16) for sentence in sentences]
    training = stream.host.training
    stream.host.eval()
    try:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            ids, mask = _padded(batch, tokenizer.pad_token_id, device)
            out = call_host(stream.host, mask, input_ids=ids, output_hidden_states=True)
            at = np.concatenate([row * ids.shape[1] + window.at for row, window in enumerate(batch)])
            at = torch.from_numpy(at).to(device)
            z = stream.states_at(out.hidden_states, at).half().cpu().numpy().reshape(-1, *shape)
            ends = np.cumsum([len(window.words) for window in batch])
            for window, own in zip(batch, np.split(z, ends[:-1]), strict=True):
                states[window.sentence][window.words] = own
            if progress is not None:
                progress(len(at))
    finally:
        stream.host.train(training)
    return states


class Window(NamedTuple):
    """A part of a sentence that the host reads at once, and the words (by number) whose states are taken from it."""

    sentence: int
    input_ids: list[int]
    words: np.ndarray
    at: np.ndarray  # position of the sub-token whose state represents each word


def windows_of(
    sentences: list[list[str]], tokenizer: PreTrainedTokenizerBase, limit: int, causal: bool
) -> list[Window]:
    """Windows of at most ``limit`` sub-tokens, overlapping by half; each word is read where it has most context.

    A word for which the tokenizer returns no token is replaced by the unknown token.

    Raises:
        ConfigError: no word fits into ``limit``.
        DataError: the tokenizer has no token for unknown words.
    """
    room = limit - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise ConfigError(
            f"max_seq_length={limit} leaves no room for a word beside {limit - room} special tokens. Choose a larger "
            "value, such as 128."
        )
    cut = {"truncation": True, "max_length": limit, "stride": room // 2, "return_overflowing_tokens": True}
    encoded = tokenizer(sentences, is_split_into_words=True, **cut) if sentences else {"input_ids": []}
    windows, unread = [], {}
    for number, (first, end) in enumerate(_runs(encoded.get("overflow_to_sample_mapping", []), len(sentences))):
        found = [_places(encoded["word_index"][row], causal) for row in range(first, end)]
        context = [_context(*edges, row > first, row < end - 1) for row, (*_, edges) in enumerate(found, start=first)]
        words = np.concatenate([words for words, *_ in found])
        window = np.repeat(np.arange(first, end), [len(words) for words, *_ in found])
        order = np.lexsort([-np.concatenate(context), words])
        best = order[np.unique(words[order], return_index=True)[1]]
        if len(best) < len(sentences[number]):
            unread[number] = {*range(len(sentences[number]))} - {*words[best].tolist()}
            continue
        at = np.concatenate([at for _, at, _ in found])
        for row in range(first, end):
            own = best[window[best] == row]
            if len(own):
                windows.append(Window(number, encoded["input_ids"][row], words[own], at[own]))
    if unread:
        unknown = tokenizer.unk_token or tokenizer.mask_token or tokenizer.eos_token
        if unknown is None:
            raise DataError(
                "The tokenizer returns no token for a word, and it has no unknown token. Use another host."
            )
        again = [
            [unknown if at in missing else word for at, word in enumerate(sentences[number])]
            for number, missing in unread.items()
        ]
        numbers = [*unread]
        windows += [
            window._replace(sentence=numbers[window.sentence])
            for window in windows_of(again, tokenizer, limit, causal)
        ]
    return windows


def _runs(sample: list[int], count: int) -> list[tuple[int, int]]:
    """Range of rows (first, end) of each text; ``sample`` has the text of each row."""
    ends = np.searchsorted(sample, np.arange(count), side="right").tolist()
    return list(pairwise([0, *ends]))


def _places(word_index: list[int], causal: bool) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Words of a row, the sub-token to read for each, and each word's first and last sub-token for ``_context``."""
    index = np.array(word_index)
    inside = index != NO_WORD
    first = np.flatnonzero(inside & (index != np.append(NO_WORD, index[:-1])))
    last = np.flatnonzero(inside & (index != np.append(index[1:], NO_WORD)))
    return index[first], last if causal else first, (first, last)


def _context(first: np.ndarray, last: np.ndarray, is_cut_before: bool, is_cut_after: bool) -> np.ndarray:
    """Number of sub-tokens on each word's shorter side; an end of the text counts as infinite context."""
    nothing = np.full(len(first), np.inf)
    left = first - first[:1] if is_cut_before else nothing
    right = last[-1:] - last if is_cut_after else nothing
    return np.minimum(left, right)


def _padded(batch: list[Window], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (B, T) each."""
    longest = max(len(window.input_ids) for window in batch)
    ids = torch.tensor([window.input_ids + [pad] * (longest - len(window.input_ids)) for window in batch])
    lengths = torch.tensor([[len(window.input_ids)] for window in batch])
    return ids.to(device), (torch.arange(longest) < lengths).long().to(device)
