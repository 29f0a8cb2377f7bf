"""Training and evaluation data from stored canonical states, which ``unihyperlora read`` wrote.

Letters: W words, K knots, D coordinates per knot, C labels.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_unihyperlora.errors import DataError
from modeling_unihyperlora.space import CanonicalSpace

from . import classification_data, ner_data
from .classification_data import LABEL_COLUMNS, Example
from .decoding import decode, rules_of
from .ner_data import Sentence
from .reading import require_columns
from .stored_states import StoredCorpus
from .tag_schemes import default_scheme

logger = logging.getLogger(__name__)


class StoredWords(NamedTuple):
    """Location of the canonical states of a row's words."""

    corpus: StoredCorpus
    row: int
    words: int

    def states(self) -> torch.Tensor:
        """(W, K, D) float32."""
        return self.corpus.states(self.row, self.words)


# ---- rows ----


def read_sentences(
    folders: Sequence[str],
    limit: int | None,
    label_column: str,
    label_names: list[str] | None,
    needs_tags: bool = True,
) -> list[Sentence]:
    """Read tagged sentences from folders of states, one folder after the other.

    Args:
        folders: folders that ``unihyperlora read`` wrote.
        limit: maximum number of rows; None for all.
        label_column: column with a list of tags per row, as strings or ids.
        label_names: names of ids.
        needs_tags: refuse rows without tags.

    Raises:
        DataError: a folder cannot be used, or the number of tags in a row differs from its number of words.
    """
    return [
        dataclasses.replace(
            ner_data.sentence_of(words, tags, label_names, f"{corpus.folder}, row {row}", needs_tags),
            stored=StoredWords(corpus, row, len(words)),
        )
        for corpus, row, words, tags in _rows(folders, limit, label_column, needs_tags)
    ]


def read_examples(
    folders: Sequence[str],
    limit: int | None,
    label_column: str | None,
    label_names: list[str] | None,
    needs_label: bool = True,
) -> list[Example]:
    """Read labelled texts from folders of states, like ``read_sentences``.

    If ``label_column`` is None, the first existing column of ``LABEL_COLUMNS`` is used.

    Raises:
        DataError: a folder or a label cannot be used.
    """
    return [
        Example(
            " ".join(words),
            None,
            classification_data.label_name(label, label_names, f"{corpus.folder}, row {row}"),
            f"{corpus.folder}, row {row}",
            StoredWords(corpus, row, len(words)),
        )
        for corpus, row, words, label in _rows(folders, limit, label_column, needs_label)
    ]


def _rows(
    folders: Sequence[str], limit: int | None, label_column: str | None, needs_labels: bool
) -> Iterator[tuple[StoredCorpus, int, list[str], object]]:
    """Yield corpus, number, words and label of each row."""

    def rows_of(folder: str) -> Iterator[tuple[StoredCorpus, int, list[str], object]]:
        corpus = StoredCorpus(folder)
        column = label_column or next((name for name in LABEL_COLUMNS if name in corpus.columns), "label")
        if column in corpus.columns:
            rows = corpus.rows("words", column)
        else:
            require_columns(folder, corpus.columns, {"--label_column_name": column} if needs_labels else {})
            rows = ((words, None) for (words,) in corpus.rows("words"))
        for row, (words, label) in enumerate(rows):
            yield corpus, row, words, label

    return itertools.islice(itertools.chain.from_iterable(map(rows_of, folders)), limit)


def host_of(splits: dict[str, list[Sentence] | list[Example]]) -> str:
    """Name of the host that read the first row; the default host of an adapter."""
    return next(rows[0] for rows in splits.values()).stored.corpus.manifest.host["name"]


# ---- data sets ----


class StoredRows(Dataset):
    """Rows with one label per word or per row; ``UniHyperLoraTrainer`` trains and evaluates on them.

    Args:
        rows: sentences with at least one word, or texts.
        labels: for each row the labels of its words, or its label; None if unknown.
    """

    def __init__(self, rows: list[Sentence] | list[Example], labels: list[list[int]] | list[int] | None):
        self.rows, self.of_rows = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``canonical_states`` (W, K, D) and, if known, ``labels``, (W,) or a scalar."""
        item = {"canonical_states": self.rows[index].stored.states()}
        return item if self.of_rows is None else item | {"labels": torch.tensor(self.of_rows[index])}

    def check_space(self, space: CanonicalSpace) -> None:
        """Raise ``DataError`` unless all states belong to this space."""
        for corpus in self._corpora():
            corpus.check_space(space)

    def hosts(self) -> list[dict[str, object]]:
        """Descriptions of the hosts that read the rows."""
        found = [corpus.manifest.host for corpus in self._corpora()]
        return [host for number, host in enumerate(found) if host not in found[:number]]

    def _corpora(self) -> list[StoredCorpus]:
        return list({id(row.stored.corpus): row.stored.corpus for row in self.rows}.values())


class StoredSentences(StoredRows):
    """Tagged sentences with stored states; the counterpart of ``ner_windows.SentenceWindows`` for text.

    Args:
        sentences: result of ``read_sentences``.
        labels: names of the ids 0 … C-1; every tag must be one of them.
        scheme: tag scheme whose rules decode and score predictions; by default IOB2 if the labels allow it.

    Raises:
        DataError: no sentence has a word.
    """

    def __init__(self, sentences: list[Sentence], labels: list[str], scheme: str | None = None):
        self.sentences, self.labels = sentences, labels
        self.scheme = scheme or default_scheme(labels)
        self._rules = rules_of(labels, self.scheme)
        rows = [sentence for sentence in sentences if sentence.tokens]
        if not rows:
            raise DataError(f"{sentences[0].origin}: no sentence has any words. Check the column of the words.")
        ids = {label: number for number, label in enumerate(labels)}
        known = rows[0].tags is not None
        super().__init__(rows, [[ids[tag] for tag in row.tags] for row in rows] if known else None)

    def label_ids(self, index: int) -> list[int]:
        """Label ids of a row's words."""
        return [] if self.of_rows is None else self.of_rows[index]

    def tags_of(self, logits: np.ndarray) -> list[list[str]]:
        """Decode predictions to one list of tag names per sentence, one tag per word; empty for empty sentences.

        Args:
            logits: logits or log-probabilities (rows, W, C), in the order of this data set, padded on the right.
        """
        if len(logits) != len(self):
            raise DataError(f"{len(logits)} rows of predictions for {len(self)} sentences.")
        scores = iter(logits)
        found = [
            decode(np.asarray(next(scores))[: len(sentence.tokens)], self._rules) if sentence.tokens else []
            for sentence in self.sentences
        ]
        return [[self.labels[number] for number in numbers] for numbers in found]

    def rows_of(self, logits: np.ndarray) -> list[dict[str, list[str]]]:
        """Words and predicted tags of each sentence, in the format of training files."""
        found = zip(self.sentences, self.tags_of(logits), strict=True)
        return [{"tokens": sentence.tokens, "ner_tags": tags} for sentence, tags in found]


class StoredTexts(StoredRows):
    """Texts with one label each and stored states. A text without words is one word at the centre of the space.

    Args:
        examples: result of ``read_examples``.
        labels: names of the ids 0 … C-1; every label must be one of them.
    """

    def __init__(self, examples: list[Example], labels: list[str]):
        self.labels = labels
        ids = {label: number for number, label in enumerate(labels)}
        super().__init__(examples, None if examples[0].label is None else [ids[row.label] for row in examples])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        z = item["canonical_states"]
        return item if len(z) else item | {"canonical_states": z.new_zeros(1, *z.shape[1:])}

    def rows_of(self, label_ids: np.ndarray) -> list[dict[str, str]]:
        """Text and predicted class of each row; ``label_ids`` (N,) are in the order of this data set."""
        found = zip(self.rows, label_ids, strict=True)
        return [{"text": example.text, "label": self.labels[number]} for example, number in found]


class StoredSource:
    """Stored states as a source of training data; see ``sources.Source``.

    No host is in memory, so there are no copies of it: ``fits`` has one view, the host that read the text.
    """

    cpu_seconds = 0.0
    causal = None

    def __init__(self, data: StoredRows):
        self.data, self.hosts, self.fits = data, data.hosts(), [None]

    def line_up_copies(self) -> None:
        """Nothing to do."""
