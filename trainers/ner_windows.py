"""Sentences as model inputs, and predictions as tags: windows of sub-tokens, lines of tags.

Each word is scored once, at its first sub-token; all other positions have the label -100, which losses ignore. A
sentence that is too long is split between words into overlapping windows. Each word is scored in the window that gives
it the most context. The scores of all windows are joined before the sentence is decoded.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_unihyperlora.errors import ConfigError, DataError

from .decoding import decode, rules_of
from .ner_data import Sentence
from .tag_schemes import default_scheme, tags_of_labels
from .windows import Window, cut

logger = logging.getLogger(__name__)

IGNORED = -100  # label that cross-entropy and the metrics ignore


class SentenceWindows(Dataset):
    """Sentences cut into windows, ready for ``DataCollatorForTokenClassification``.

    Args:
        sentences: all with tags, or all without.
        tokenizer: a fast tokenizer, as ``words.load_tokenizer`` returns it.
        labels: names of the ids 0 … C-1; every tag must be one of them.
        max_seq_length: maximum number of sub-tokens in a window, including special tokens.
        scheme: tag scheme for decoding and scoring; by default IOB2 if the labels fit it.
        label_all_tokens: also label the further sub-tokens of a word; for these B-X becomes I-X if I-X exists.

    Raises:
        ConfigError: no word fits into ``max_seq_length``.
        DataError: no sentence has a word, or the tokenizer has no token for an unknown word.
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
        self._further_ids = {  # label ids of a word's further sub-tokens: B-X becomes I-X
            label: self._label_ids[inside.get(meaning[label].type, label) if meaning[label].role == "B" else label]
            for label in labels
        }
        before, after = _special_ids(tokenizer)
        room = max_seq_length - len(before) - len(after)
        if room < 1:
            raise ConfigError(
                f"max_seq_length={max_seq_length} leaves no room for a word beside {len(before) + len(after)} special "
                "tokens. Choose a larger value, such as 128."
            )
        shortened = 0
        for index, pieces in enumerate(_word_pieces(sentences, tokenizer)):
            shortened += sum(len(word) > room for word in pieces)
            self.windows.extend(cut(index, [word[:room] for word in pieces], room, before, after))
        if shortened:
            logger.warning(
                "%d words are longer than %d sub-tokens and are cut at the end. Give a larger --max_seq_length if the "
                "host can read more.",
                shortened,
                room,
            )
        if not self.windows:
            raise DataError(
                f"{sentences[0].origin}: no sentence has a word in it. Check the name of the column of words."
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """``input_ids``, ``attention_mask``, ``word_index`` and, if the sentence has tags, ``labels``: each (T,)."""
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

    def label_ids(self, index: int) -> list[int]:
        """Labels of the words that a window scores, in order."""
        return [label for label in self[index].get("labels", []) if label != IGNORED]

    def word_logits(self, logits: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Logits (W, C) of every sentence's words, joined from its windows; ``logits`` as for ``tags_of``."""
        if len(logits) != len(self.windows):
            raise DataError(
                f"There are {len(logits)} rows of predictions but {len(self.windows)} windows. Predict this data set."
            )
        parts: list[list[np.ndarray]] = [[] for _ in self.sentences]
        for window, row in zip(self.windows, logits, strict=True):
            parts[window.sentence].append(np.asarray(row)[window.starts])
        nothing = np.zeros((0, len(self.labels)))
        return [np.concatenate(rows) if rows else nothing for rows in parts]

    def tags_of(self, logits: Sequence[np.ndarray]) -> list[list[str]]:
        """Tag names of every sentence, one per word; an empty sentence has an empty list.

        Args:
            logits: logits or log-probabilities (T, C) of each window, in the order of this data set, padded on the
                right.
        """
        return [[self.labels[number] for number in decode(rows, self._rules)] for rows in self.word_logits(logits)]

    def rows_of(self, logits: Sequence[np.ndarray]) -> list[dict[str, list[str]]]:
        """The words and the found tags of each sentence, as a file to train or score on has them."""
        found = zip(self.sentences, self.tags_of(logits), strict=True)
        return [{"tokens": sentence.tokens, "ner_tags": tags} for sentence, tags in found]


def token_scores(logits: torch.Tensor | tuple, labels: torch.Tensor | None = None) -> torch.Tensor:
    """``preprocess_logits_for_metrics``: keep the logits (B, T, C); decoding follows when all windows are scored."""
    return (logits[0] if isinstance(logits, tuple) else logits).float()


def _word_pieces(sentences: list[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """Sub-token ids of each word of each sentence; every word has at least one sub-token."""
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
                f"{sentence.origin}: the tokenizer returns no token for a word, and it has no unknown token. Use a "
                "host whose tokenizer has an unknown, mask or end token."
            )
        pieces.append([word or [unknown] for word in words])
    return pieces


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that the tokenizer adds before and after a text."""
    encoded = tokenizer(["a"], is_split_into_words=True, return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in special:
        return ids, []
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]
