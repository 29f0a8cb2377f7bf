"""hub_configs/metrics: what users of evaluate load by a path, without a network."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.modeling_unihyperlora.small_streams import TOKENIZER, small_stream, text

evaluate = pytest.importorskip("evaluate", reason="pip install 'unihyperlora[evaluate]'")
FOLDER = Path(__file__).parents[1] / "hub_configs" / "metrics" / "entity_f1"
TYPES = ("PER", "LOC")


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """Loaded from a copy elsewhere: it needs nothing beside its folder."""
    folder = tmp_path_factory.mktemp("metrics") / "entity_f1"
    shutil.copytree(FOLDER, folder)
    return evaluate.load(str(folder))


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """The entities of IOB2 tags, plainly."""
    found, begin = set(), None
    for at, this in enumerate([*tags, "O"]):
        if begin is not None and this != f"I-{begin[0]}":
            found.add((*begin, at))
            begin = None
        if this.startswith("B-"):
            begin = (this[2:], at)
    return found


def random_tags(rng, sentences: int) -> list[list[str]]:
    """Tags in which an I- only continues what stands before it."""
    rows = []
    for _ in range(sentences):
        row = []
        for _ in range(rng.integers(1, 9)):
            before = row[-1] if row else "O"
            choices = ["O", *(f"B-{kind}" for kind in TYPES), *([f"I-{before[2:]}"] if before != "O" else [])]
            row.append(str(rng.choice(choices)))
        rows.append(row)
    return rows


def test_the_figures_are_those_of_the_entities(metric):
    rng = np.random.default_rng(0)
    references = random_tags(rng, 60)
    predictions = [[tag if rng.random() < 0.7 else "O" for tag in row] for row in references]
    predictions = [
        [
            "B" + tag[1:] if tag[0] == "I" and (at == 0 or row[at - 1][2:] != tag[2:]) else tag
            for at, tag in enumerate(row)
        ]
        for row in predictions
    ]
    gold, found = (
        [{(number, *span) for number, row in enumerate(rows) for span in spans(row)}][0]
        for rows in (references, predictions)
    )
    right = len(gold & found)
    precision, recall = right / len(found), right / len(gold)
    scores = metric.compute(predictions=predictions, references=references)
    assert scores["precision"] == pytest.approx(precision) and scores["recall"] == pytest.approx(recall)
    assert scores["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    pairs = [pair for rows in zip(predictions, references, strict=True) for pair in zip(*rows, strict=True)]
    assert scores["accuracy"] == pytest.approx(np.mean([one == other for one, other in pairs]))
    assert 0.1 < precision < 1 and {type(score) for score in scores.values()} == {float}


def test_nothing_found_is_nought(metric):
    scores = metric.compute(predictions=[["O", "O"]], references=[["B-PER", "O"]])
    assert scores == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.5}


def test_it_can_be_combined(metric):
    both = evaluate.combine([str(FOLDER), metric], force_prefix=True)
    scores = both.compute(predictions=[["B-PER"], ["O"]], references=[["B-PER"], ["B-LOC"]])
    assert len(scores) == 8
    assert [score for name, score in scores.items() if name.endswith("f1")] == pytest.approx([2 / 3, 2 / 3])


def test_an_evaluator_scores_a_model(metric):
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    model = small_stream(labels=labels)
    sentences = text(6, 12)
    encoded = [TOKENIZER([" ".join(words)], return_tensors="pt") for words in sentences]
    numbers = [model(**inputs).logits[0, 1:-1].argmax(-1).tolist() for inputs in encoded]
    best = [[labels[number] for number in row] for row in numbers]  # the evaluator takes each word's best tag
    references = [list(row) for row in best]
    references[0] = ["O"] * len(references[0])
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=labels)),
        }
    )
    ids = [[labels.index(tag) for tag in row] for row in references]
    data = datasets.Dataset.from_dict({"tokens": sentences, "ner_tags": ids}, features=features)
    scores = evaluate.evaluator("token-classification").compute(
        model_or_pipeline=model, tokenizer=model.stream.words.tokenizer, data=data, metric=metric
    )
    expected = metric.compute(predictions=best, references=references)
    assert expected["f1"] < 1
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
