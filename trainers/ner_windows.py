"""From sentences to model inputs and back: windows of sub-tokens, entity scores, one line of tags a sentence.

A word is scored once, at its first sub-token; every other position has the label -100, which losses skip. A sentence
that does not fit is cut between words into several windows, and put together again before it is scored.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from seqeval.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from modeling_unihyperlora.errors import ConfigError, DataError
from modeling_unihyperlora.words import NO_WORD

from .decoding import IGNORED
from .ner_data import Sentence, split_tag

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """Sub-token ids of consecutive words of one sentence, with the special tokens around them."""

    sentence: int
    first_word: int
    input_ids: list[int]
    starts: list[int]  # position in ``input_ids`` of each word's first sub-token, in order
    end: int  # position after the last word's sub-tokens

    def word_index(self) -> list[int]:
        """For each sub-token the number of its word in the window, or ``NO_WORD``."""
        index = [NO_WORD] * len(self.input_ids)
        for number, (start, end) in enumerate(zip(self.starts, [*self.starts[1:], self.end], strict=True)):
            index[start:end] = [number] * (end - start)
        return index


class SentenceWindows(Dataset):
    """Sentences cut into windows, ready for ``DataCollatorForTokenClassification``.

    Args:
        sentences: words and tags.
        tokenizer: a fast tokenizer, as ``words.load_tokenizer`` returns it.
        labels: names of the ids 0 … C-1; every tag must be one of them.
        max_seq_length: sub-tokens a window may have, special ones included.

    Raises:
        ConfigError: no word fits into ``max_seq_length``.
        DataError: there is nothing to read, or no way to write an unknown word.
    """

    def __init__(
        self, sentences: list[Sentence], tokenizer: PreTrainedTokenizerBase, labels: list[str], max_seq_length: int
    ):
        self.sentences = sentences
        self.labels = labels
        self.windows: list[Window] = []
        self._label_ids = {label: number for number, label in enumerate(labels)}
        before, after = _special_ids(tokenizer)
        room = max_seq_length - len(before) - len(after)
        if room < 1:
            raise ConfigError(
                f"max_seq_length={max_seq_length} leaves no room for a word beside {len(before) + len(after)} special "
                "tokens. Choose a larger one, such as 128."
            )
        for index, pieces in enumerate(_word_pieces(sentences, tokenizer)):
            self.windows.extend(_cut(index, pieces, room, before, after))
        if not self.windows:
            raise DataError(
                f"{sentences[0].origin}: not one sentence has a word in it. Check the column of the words."
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """``input_ids``, ``attention_mask``, ``word_index``, ``labels``: (T,) each, not padded."""
        window = self.windows[index]
        tags = self.sentences[window.sentence].tags
        labels = [IGNORED] * len(window.input_ids)
        for offset, position in enumerate(window.starts):
            labels[position] = self._label_ids[tags[window.first_word + offset]]
        return {
            "input_ids": window.input_ids,
            "attention_mask": [1] * len(window.input_ids),
            "word_index": window.word_index(),
            "labels": labels,
        }

    def tags_of(self, label_ids: np.ndarray) -> list[list[str]]:
        """One list of tag names a sentence, as long as the sentence; an empty sentence has an empty list.

        Args:
            label_ids: (windows, T) predicted ids, rows in the order of this data set, padding on the right.
        """
        if len(label_ids) != len(self.windows):
            raise DataError(f"{len(label_ids)} rows of predictions for {len(self.windows)} windows.")
        tags: list[list[str]] = [[] for _ in self.sentences]
        for window, row in zip(self.windows, label_ids, strict=True):
            tags[window.sentence].extend(self.labels[row[position]] for position in window.starts)
        return tags

    def lines_of(self, label_ids: np.ndarray) -> list[str]:
        """One line a sentence, its tags separated by spaces, from what ``tags_of`` takes."""
        return [" ".join(tags) for tags in self.tags_of(label_ids)]


def entity_scores(windows: SentenceWindows, by_type: bool = False) -> Callable[[EvalPrediction], dict[str, float]]:
    """``compute_metrics`` for one data set: micro precision, recall and F1 over entities, accuracy over words.

    Entities are those of seqeval's default mode, over whole sentences. Tags without a B- or I- are read as one
    entity for each unbroken run of a tag. Needs
    ``preprocess_logits_for_metrics=best_labels(labels)``.

    Args:
        windows: the data set that is evaluated, in its own order.
        by_type: also return the three figures of every entity type, as ``PER_f1`` and so on.
    """
    gold = [[_scored(tag) for tag in sentence.tags] for sentence in windows.sentences]
    if any(label != "O" and not split_tag(label)[0] for label in windows.labels):
        logger.warning("Some labels have no B- or I-: an unbroken run of such a tag counts as one entity.")

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        _require_own_order(windows, prediction.label_ids)
        found = [[_scored(tag) for tag in tags] for tags in windows.tags_of(prediction.predictions)]
        scores = {
            "precision": precision_score(gold, found, zero_division=0),
            "recall": recall_score(gold, found, zero_division=0),
            "f1": f1_score(gold, found, zero_division=0),
            "accuracy": accuracy_score(gold, found),
        }
        if by_type and any(tag != "O" for row in gold + found for tag in row):
            report = classification_report(gold, found, output_dict=True, zero_division=0)
            for name, row in report.items():
                if not name.endswith(" avg"):
                    scores |= {f"{name}_{short}": row[key] for short, key in _REPORTED.items()}
        return {name: float(value) for name, value in scores.items()}

    return compute


_SEQEVAL_PREFIX = {"": "I", "L": "E", "U": "S"}
_REPORTED = {"precision": "precision", "recall": "recall", "f1": "f1-score", "number": "support"}


def _scored(tag: str) -> str:
    """The tag as seqeval is to read it: L- and U- are its E- and S-; a bare type counts as inside."""
    if tag == "O":
        return tag
    prefix, entity_type = split_tag(tag)
    return f"{_SEQEVAL_PREFIX.get(prefix, prefix)}-{entity_type}"


def _require_own_order(windows: SentenceWindows, label_ids: np.ndarray) -> None:
    """The rows that come back must be the windows in order, or tags would be given to the wrong sentences."""
    in_order = len(label_ids) == len(windows) and all(
        [label for label in row if label != IGNORED]
        == [label for label in windows[index]["labels"] if label != IGNORED]
        for index, row in enumerate(label_ids)
    )
    if not in_order:
        raise DataError(
            "The evaluation did not return the data in their order. Evaluate without --train_sampling_strategy "
            "group_by_length."
        )


def _word_pieces(sentences: list[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """For every sentence, the sub-token ids of each of its words; at least one a word."""
    unknown = next(
        (i for i in (tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id) if i is not None), None
    )
    encoded = tokenizer(
        [sentence.tokens for sentence in sentences], is_split_into_words=True, add_special_tokens=False, verbose=False
    )
    pieces = []
    for index, sentence in enumerate(sentences):
        words: list[list[int]] = [[] for _ in sentence.tokens]
        for token_id, word in zip(encoded["input_ids"][index], encoded.word_ids(index), strict=True):
            words[word].append(token_id)
        if not all(words) and unknown is None:
            raise DataError(
                f"{sentence.origin}: the tokenizer makes nothing of a word and has no unknown token to use instead."
            )
        pieces.append([word or [unknown] for word in words])
    return pieces


def _cut(sentence: int, words: list[list[int]], room: int, before: list[int], after: list[int]) -> list[Window]:
    """Fill windows of ``room`` sub-tokens with whole words; a word that is longer is cut short, in a window alone."""
    windows: list[Window] = []
    ids: list[int] = []
    starts: list[int] = []
    first_word = 0
    for number, pieces in enumerate(words):
        if ids and len(ids) + len(pieces) > room:
            windows.append(Window(sentence, first_word, before + ids + after, starts, len(before) + len(ids)))
            ids, starts, first_word = [], [], number
        starts.append(len(before) + len(ids))
        ids.extend(pieces[:room])
    if ids:
        windows.append(Window(sentence, first_word, before + ids + after, starts, len(before) + len(ids)))
    return windows


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    encoded = tokenizer(["a"], is_split_into_words=True, return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return ids, []
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]
