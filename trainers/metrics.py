"""Scores of an evaluation: of entities by seqeval, of classes by scikit-learn.

Both libraries take more than a second to import, so tagging does not import this module.
"""

import logging
from collections.abc import Callable

import numpy as np
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn
from transformers import EvalPrediction

from modeling_unihyperlora.errors import DataError

from .ner_windows import IGNORED, SentenceWindows
from .tag_schemes import reader_of_tags

logger = logging.getLogger(__name__)

_AVERAGES = ("micro avg", "macro avg", "weighted avg")
_REPORTED = {"precision": "precision", "recall": "recall", "f1": "f1-score", "number": "support"}


def entity_scores(windows: SentenceWindows, by_type: bool = False) -> Callable[[EvalPrediction], dict[str, float]]:
    """``compute_metrics`` for one data set: micro precision, recall and F1 over entities, accuracy over words.

    Tags are rewritten from the data set's scheme to the tags that seqeval reads. seqeval then finds the entities of
    whole sentences in its default mode. If tags are bare types, each unbroken run of a tag is one entity. Needs
    ``preprocess_logits_for_metrics=token_scores``.

    Args:
        windows: the data set to evaluate, in its own order.
        by_type: also return precision, recall, F1 and the number of entities of every type (``PER_f1`` and so on).
    """
    read = reader_of_tags(windows.labels, windows.scheme)
    gold = [[read(tag) for tag in sentence.tags or []] for sentence in windows.sentences]
    if any(label != "O" and read(label)[2:] == label for label in windows.labels):
        logger.warning("Some labels have no B- or I- prefix: an unbroken run of such a tag counts as one entity.")

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        _require_own_order(windows, prediction.label_ids)
        found = [[read(tag) for tag in tags] for tags in windows.tags_of(prediction.predictions)]
        scores = {
            "precision": seqeval.precision_score(gold, found, zero_division=0),
            "recall": seqeval.recall_score(gold, found, zero_division=0),
            "f1": seqeval.f1_score(gold, found, zero_division=0),
            "accuracy": seqeval.accuracy_score(gold, found),
        }
        if by_type and any(tag != "O" for row in gold + found for tag in row):
            report = seqeval.classification_report(gold, found, output_dict=True, zero_division=0)
            for name, row in report.items():
                if name not in _AVERAGES:
                    scores |= {f"{name}_{short}": row[key] for short, key in _REPORTED.items()}
        return {name: float(value) for name, value in scores.items()}

    return compute


def _require_own_order(windows: SentenceWindows, label_ids: np.ndarray) -> None:
    """Raise ``DataError`` if predictions are not in the order of the windows: sentences would get wrong tags."""
    in_order = len(label_ids) == len(windows) and all(
        [label for label in row if label != IGNORED] == windows.label_ids(index) for index, row in enumerate(label_ids)
    )
    if not in_order:
        raise DataError(
            "The evaluation returned the data in another order. Evaluate without --train_sampling_strategy "
            "group_by_length."
        )


def classification_scores(prediction: EvalPrediction) -> dict[str, float]:
    """``compute_metrics``: accuracy, and F1 averaged over the classes that occur in the data or are predicted.

    Needs ``preprocess_logits_for_metrics=best_class``.
    """
    gold, found = prediction.label_ids, prediction.predictions
    return {
        "accuracy": float(sklearn.accuracy_score(gold, found)),
        "f1": float(sklearn.f1_score(gold, found, average="macro", zero_division=0)),
    }
