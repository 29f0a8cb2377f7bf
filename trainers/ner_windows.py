"""From sentences to model inputs and back: windows of sub-tokens, entity scores, one line of tags a sentence.

A word is scored once, at its first sub-token; every other position has the label -100, which losses skip. A sentence
that does not fit is cut between words into windows that overlap, and each word is scored in the window in which it has
most context. The scores of all windows are put together before the sentence is decoded.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from seqeval.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from modeling_unihyperlora.errors import ConfigError, DataError

from .decoding import decode, rules_of
from .ner_data import Sentence
from .tag_schemes import default_scheme, reader_of_tags, tags_of_labels
from .windows import Window, cut

logger = logging.getLogger(__name__)

IGNORED = -100  # the label that cross-entropy and the scores skip


class SentenceWindows(Dataset):
    """Sentences cut into windows, ready for ``DataCollatorForTokenClassification``.

    Args:
        sentences: words and tags, or all without tags.
        tokenizer: a fast tokenizer, as ``words.load_tokenizer`` returns it.
        labels: names of the ids 0 … C-1; every tag must be one of them.
        max_seq_length: sub-tokens a window may have, special ones included.
        scheme: by whose rules predictions are decoded and scored; by default IOB2 where the labels are such.
        label_all_tokens: also label the further sub-tokens of a word; there B-X becomes I-X where that label exists.

    Raises:
        ConfigError: no word fits into ``max_seq_length``.
        DataError: there is nothing to read, or no way to write an unknown word.
    """

    def __init__(
        self,
        sentences: list[Sentence],
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str],
        max_seq_length: int,
        scheme: str | None = None,
        label_all_tokens: bool = False,
    ):
        self.sentences = sentences
        self.labels = labels
        self.scheme = scheme or default_scheme(labels)
        self.label_all_tokens = label_all_tokens
        self.windows: list[Window] = []
        self._label_ids = {label: number for number, label in enumerate(labels)}
        self._rules = rules_of(labels, self.scheme)
        meaning = tags_of_labels(labels, self.scheme)
        inside = {meaning[label].type: label for label in labels if meaning[label].role == "I"}
        self._further_ids = {  # what a word's further sub-tokens have: inside where the word begins an entity
            label: self._label_ids[inside.get(meaning[label].type, label) if meaning[label].role == "B" else label]
            for label in labels
        }
        before, after = _special_ids(tokenizer)
        room = max_seq_length - len(before) - len(after)
        if room < 1:
            raise ConfigError(
                f"max_seq_length={max_seq_length} leaves no room for a word beside {len(before) + len(after)} special "
                "tokens. Choose a larger one, such as 128."
            )
        shortened = 0
        for index, pieces in enumerate(_word_pieces(sentences, tokenizer)):
            shortened += sum(len(word) > room for word in pieces)
            self.windows.extend(cut(index, [word[:room] for word in pieces], room, before, after))
        if shortened:
            logger.warning(
                "%d words are longer than %d sub-tokens and are cut at the end. Give a larger --max_seq_length where "
                "the host reads more.",
                shortened,
                room,
            )
        if not self.windows:
            raise DataError(
                f"{sentences[0].origin}: not one sentence has a word in it. Check the column of the words."
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """``input_ids``, ``attention_mask``, ``word_index`` and, of tagged sentences, ``labels``: (T,) each."""
        window = self.windows[index]
        item = {"input_ids": window.input_ids, "attention_mask": [1] * len(window.input_ids)}
        item["word_index"] = window.word_index
        tags = self.sentences[window.sentence].tags
        if tags is None:
            return item
        labels = [IGNORED] * len(window.input_ids)
        for word, (start, size) in enumerate(zip(window.starts, window.sizes, strict=True), window.first_word):
            labels[start] = self._label_ids[tags[word]]
            if self.label_all_tokens:
                labels[start + 1 : start + size] = [self._further_ids[tags[word]]] * (size - 1)
        return item | {"labels": labels}

    def word_logits(self, logits: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scores (W, C) of every sentence's words, from those of its windows; see ``tags_of``."""
        if len(logits) != len(self.windows):
            raise DataError(f"{len(logits)} rows of predictions for {len(self.windows)} windows.")
        parts: list[list[np.ndarray]] = [[] for _ in self.sentences]
        for window, row in zip(self.windows, logits, strict=True):
            parts[window.sentence].append(np.asarray(row)[window.starts])
        nothing = np.zeros((0, len(self.labels)))
        return [np.concatenate(rows) if rows else nothing for rows in parts]

    def tags_of(self, logits: Sequence[np.ndarray]) -> list[list[str]]:
        """One list of tag names a sentence, as long as the sentence; an empty sentence has an empty list.

        Args:
            logits: of each window in the order of this data set (T, C), or log-probabilities; padding on the right.
        """
        return [[self.labels[number] for number in decode(rows, self._rules)] for rows in self.word_logits(logits)]

    def rows_of(self, logits: Sequence[np.ndarray]) -> list[dict[str, list[str]]]:
        """The words and the found tags of each sentence, as a file to train or score on has them."""
        found = zip(self.sentences, self.tags_of(logits), strict=True)
        return [{"tokens": sentence.tokens, "ner_tags": tags} for sentence, tags in found]


def token_scores(logits: torch.Tensor | tuple, labels: torch.Tensor | None = None) -> torch.Tensor:
    """``preprocess_logits_for_metrics``: keep the logits (B, T, C); decoding follows when all windows are scored."""
    return (logits[0] if isinstance(logits, tuple) else logits).float()


def entity_scores(windows: SentenceWindows, by_type: bool = False) -> Callable[[EvalPrediction], dict[str, float]]:
    """``compute_metrics`` for one data set: micro precision, recall and F1 over entities, accuracy over words.

    Entities are those of seqeval's default mode, over whole sentences, once each tag is written as that mode reads it:
    by the data set's scheme. Tags that are types alone make one entity of each unbroken run of a tag. Needs
    ``preprocess_logits_for_metrics=token_scores``.

    Args:
        windows: the data set that is evaluated, in its own order.
        by_type: also return the three figures of every entity type, as ``PER_f1`` and so on.
    """
    read = reader_of_tags(windows.labels, windows.scheme)
    gold = [[read(tag) for tag in sentence.tags or []] for sentence in windows.sentences]
    if any(label != "O" and read(label)[2:] == label for label in windows.labels):
        logger.warning("Some labels have no B- or I-: an unbroken run of such a tag counts as one entity.")

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        _require_own_order(windows, prediction.label_ids)
        found = [[read(tag) for tag in tags] for tags in windows.tags_of(prediction.predictions)]
        scores = {
            "precision": precision_score(gold, found, zero_division=0),
            "recall": recall_score(gold, found, zero_division=0),
            "f1": f1_score(gold, found, zero_division=0),
            "accuracy": accuracy_score(gold, found),
        }
        if by_type and any(tag != "O" for row in gold + found for tag in row):
            report = classification_report(gold, found, output_dict=True, zero_division=0)
            for name, row in report.items():
                if name not in _AVERAGES:
                    scores |= {f"{name}_{short}": row[key] for short, key in _REPORTED.items()}
        return {name: float(value) for name, value in scores.items()}

    return compute


_AVERAGES = ("micro avg", "macro avg", "weighted avg")
_REPORTED = {"precision": "precision", "recall": "recall", "f1": "f1-score", "number": "support"}


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


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    encoded = tokenizer(["a"], is_split_into_words=True, return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return ids, []
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]
