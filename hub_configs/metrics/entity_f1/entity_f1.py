"""Precision, recall and F1 over entities, for users of evaluate: the figures of ``all_results.json``.

    metric = evaluate.load("hub_configs/metrics/entity_f1")     # a folder; no network

It is seqeval in its default mode, micro-averaged. evaluate copies this file and runs the copy, so nothing may be
imported from beside it, and each import stands on one line, as evaluate reads them.
"""

import datasets
import evaluate
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

_DESCRIPTION = "Micro precision, recall and F1 over entities, and accuracy over words, by seqeval's default mode."
_CITATION = """@misc{seqeval,
    title = {{seqeval}: A Python framework for sequence labeling evaluation},
    author = {Hiroki Nakayama},
    year = {2018},
    url = {https://github.com/chakki-works/seqeval}
}"""
_INPUTS = """
Args:
    predictions: a list of tags for each sentence, such as ["B-PER", "I-PER", "O"].
    references: the right tags, likewise.
Returns:
    precision, recall, f1, accuracy: numbers from 0 to 1.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class EntityF1(evaluate.Metric):
    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references):
        scores = {
            "precision": precision_score(references, predictions, zero_division=0),
            "recall": recall_score(references, predictions, zero_division=0),
            "f1": f1_score(references, predictions, zero_division=0),
            "accuracy": accuracy_score(references, predictions),
        }
        return {name: float(score) for name, score in scores.items()}
