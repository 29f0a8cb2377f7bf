"""Readers of labelled texts: columns, label names, and one clear error for anything else."""

import csv
import json
import logging

import datasets
import pytest

from modeling_unihyperlora.errors import DataError
from trainers.classification_data import (
    Columns,
    Example,
    check_splits,
    choose_columns,
    collect_labels,
    read_file,
    read_hub_dataset,
)


@pytest.fixture
def write(tmp_path):
    """write("a.jsonl", [{…}, …]) or write("a.csv", "text,label\\n…") → path."""

    def go(name: str, content):
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return go


def contents(examples: list[Example]) -> list[tuple]:
    return [(example.text, example.pair, example.label) for example in examples]


# ---- columns ----


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ("sentence label idx", Columns("sentence", None, "label")),  # SST-2
        ("question passage answer title", Columns("question", "passage", "answer")),  # BoolQ
        ("text title label rating domain", Columns("text", None, "label")),  # reviews
        ("label title content", Columns("content", None, "label")),
        ("sentence1 sentence2 label", Columns("sentence1", "sentence2", "label")),
        ("premise hypothesis label", Columns("premise", "hypothesis", "label")),
        ("question sentence label", Columns("question", "sentence", "label")),  # not a single sentence
        ("question1 question2 labels", Columns("question1", "question2", "labels")),
    ],
)
def test_known_columns_are_found(present, expected):
    assert choose_columns("here", present.split()) == expected


def test_named_columns_come_first():
    present = "question passage answer title".split()
    assert choose_columns("here", present, text="title") == Columns("title", None, "answer")
    assert choose_columns("here", present, "passage", "title", "question") == Columns("passage", "title", "question")
    assert choose_columns("here", ["text"], needs_label=False) == Columns("text", None, None)
    assert choose_columns("here", ["text"], label="stars", needs_label=False) == Columns("text", None, None)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {"text": "body"},
            "no column 'body'; it has text, label. Name the right one with --text_column_name",
        ),
        ({"text": "text", "pair": "body"}, "no column 'body'; it has text, label. .* --text_pair_column_name"),
        ({"pair": "text"}, "--text_pair_column_name text needs --text_column_name"),
        ({"label": "stars"}, "no column 'stars'; it has text, label. Name the right one with --label_column_name"),
    ],
)
def test_named_columns_that_are_not_there(flags, expected):
    with pytest.raises(DataError, match=expected):
        choose_columns("here", ["text", "label"], **flags)


def test_columns_that_nobody_knows():
    with pytest.raises(DataError, match="known to hold text; it has body, label. Name it with --text_column_name"):
        choose_columns("here", ["body", "label"])
    with pytest.raises(DataError, match=r"hold text \(premise without hypothesis\); it has premise, label"):
        choose_columns("here", ["premise", "label"])
    with pytest.raises(DataError, match="known to hold labels; it has text, stars. Name it with --label_column_name"):
        choose_columns("here", ["text", "stars"])


# ---- labels ----


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["good", "bad"], None, ["good", "bad"]),
        ([1, 0], None, ["1", "0"]),
        ([True, False], None, ["True", "False"]),
        ([1, 0], ["negative", "positive"], ["positive", "negative"]),
        ([True, False], ["no", "yes"], ["yes", "no"]),
        ([1, 5], ["1", "2", "3", "4", "5"], ["1", "5"]),  # stars are their own names, not places
        ([0, 2], ["0", "2"], ["0", "2"]),
        ([1, 0], ["False", "True"], ["True", "False"]),
        ([-1, 1], None, ["-1", "1"]),
        (["01", "1", 1], None, ["01", "1", "1"]),
    ],
)
def test_labels_become_names(write, labels, names, expected):
    path = write("a.jsonl", [{"text": "x", "label": label} for label in labels])
    assert [example.label for example in read_file(path, label_names=names)] == expected


@pytest.mark.parametrize(
    "labels",
    [["01", "1", "007"], ["+1", "1", "1.0"], ["-0", "0", "00"], ["1_000", "1000"], ["1e3", "1000"], ["\u0661", "1"]]
    + [["TRUE", "True", "true"], [" 1", "1"], ["9" * 5000, "9" * 4999]],
)
def test_a_csv_keeps_labels_as_they_are_written(write, labels):
    path = write("a.csv", "text,label\n" + "".join(f"x,{label}\n" for label in labels))
    examples = read_file(path)
    assert [example.label for example in examples] == labels
    assert sorted(collect_labels(examples)) == sorted(labels)
    assert collect_labels(examples) == collect_labels(examples[::-1])


def test_only_a_canonical_number_is_a_place(write):
    names = ["negative", "positive"]
    assert [x.label for x in read_file(write("a.csv", "text,label\nx,1\nx,01\n"), label_names=names)] == [
        "positive",
        "01",
    ]
    path = write("b.csv", "text,label\nx,1\n")
    assert read_file(path, label_names=["01", "02"])[0].label == "1"  # a name that is not there, not the place of 02


def test_labels_that_hardly_differ_are_named(caplog):
    check_splits({"validation": split_of("pos")}, ["pos", "pos ", "Pos", "neg"], "this run")
    assert [record.getMessage().split(" of ")[0] for record in caplog.records] == [
        "The labels 'pos' and 'pos '",
        "The labels 'pos' and 'Pos'",
    ]


def test_the_order_of_labels():
    def examples(*labels):
        return [Example("x", None, label, "here") for label in labels]

    assert collect_labels(examples("10", "9", "-1", "9", None)) == ["-1", "9", "10"]
    assert collect_labels(examples("b", "10", "9")) == ["10", "9", "b"]
    assert collect_labels([]) == []


@pytest.mark.parametrize(
    ("row", "names", "expected"),
    [
        ({"text": 3, "label": 1}, None, "line 2: 'text' must be a string, not '3'"),
        ({"text": None, "label": 1}, None, "line 2: 'text' must be a string"),
        ({"text": ["a", "b"], "label": 1}, None, "line 2: 'text' must be a string"),
        ({"text": "x", "label": 4.5}, None, "line 2: a label is a string, a whole number or true/false, not '4.5'"),
        ({"text": "x", "label": ["a"]}, None, "line 2: a label is"),
        ({"text": "x", "label": " "}, None, "line 2: the label ' ' is empty"),
        ({"text": "x", "label": "a\nb"}, None, "line 2: the label .* line break"),
        ({"text": "x", "label": 2}, ["no", "yes"], "line 2: id 2 is outside the 2 labels: no, yes"),
        ({"text": "x", "label": -1}, ["no", "yes"], "line 2: id -1 is outside"),
        ({"label": 1}, None, "line 2 has no column 'text'"),
        ({"text": "x"}, None, "line 2 has no column 'label'"),
    ],
)
def test_bad_rows(write, row, names, expected):
    path = write("a.jsonl", [{"text": "fine", "label": 0}, row])
    with pytest.raises(DataError, match=expected):
        read_file(path, label_names=names)


# ---- files ----


def test_json_lines_and_csv_say_the_same(write):
    rows = [
        {"text": 'He said "no", twice', "label": 0},
        {"text": "two\nlines, é", "label": 1},
        {"text": "", "label": 1},
        {"text": "12", "label": 0},
    ]
    csv = '\ufefftext,label\r\n"He said ""no"", twice",0\r\n"two\nlines, é",1\r\n,1\r\n\r\n12,0\r\n'
    from_json, from_csv = read_file(write("a.jsonl", rows)), read_file(write("a.csv", csv))
    assert contents(from_json) == contents(from_csv) == [(row["text"], None, str(row["label"])) for row in rows]
    assert [example.origin.split(", ")[-1] for example in from_csv] == ["line 2", "line 4", "line 5", "line 7"]


def test_unknown_labels(write):
    expected = [("x", None, None), ("y", None, None)]
    assert contents(read_file(write("a.jsonl", [{"text": "x"}, {"text": "y"}]), needs_label=False)) == expected
    assert contents(read_file(write("b.jsonl", [{"text": t, "label": None} for t in "xy"]))) == expected
    assert contents(read_file(write("a.csv", "text,label\nx,\ny,\n"))) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "has no example in it"),
        ("a.csv", "text,label\n", "has no example in it"),
        ("a.csv", "", "has no example in it"),
        ("a.csv", "text,label\nfine,1\none, two,1\n", "line 3 does not have as many fields .* \\(text, label\\)"),
        ("a.csv", "text,label\nfine\n", "line 2 does not have as many fields"),
        ("a.csv", 'text,label\n"open,1\n', "is not CSV"),
        ("a.csv", b"text,label\n\xff,1\n", "line 2 is not UTF-8"),
        ("a.jsonl", '{"text": 1', 'line 1 is not JSON .* \\{"text": "well done", "label": "positive"\\}'),
        ("a.json", '[{"text": "x", "label": 1}]', "is a JSON list, not an object"),
        (
            "a.csv",
            "text,label,text\nx,1,y\n",
            "line 1 names the column 'text' twice. Give every column a",
        ),
        ("a.jsonl", '{"text": "x", "label": 1, "label": 0}', "line 1 names 'label' twice"),
        ("a.jsonl", '{"text": "\\ud83d", "label": 1}', "'text' has half of a surrogate pair in it"),
        ("a.parquet", "x", "unknown kind of file '.parquet'. Give JSON lines .* or CSV"),
    ],
)
def test_bad_files(write, name, content, expected):
    with pytest.raises(DataError, match=expected):
        read_file(write(name, content))


def test_a_csv_field_may_be_long(write):
    usual = csv.field_size_limit()
    long = "word " * 40_000
    assert read_file(write("a.csv", f'text,label\n"{long}",1\n'))[0].text == long
    with pytest.raises(DataError, match="is not CSV"):
        read_file(write("b.csv", 'text,label\n"open,1\n'))
    assert csv.field_size_limit() == usual


def test_columns_without_a_name_may_be_several(write):
    """A CSV file with commas at the end of each line."""
    assert contents(read_file(write("a.csv", "text,label,,\nx,1,,\n"))) == [("x", None, "1")]


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="none.csv cannot be read"):
        read_file(tmp_path / "none.csv")


# ---- data sets ----


def dataset_of(rows: dict, **features) -> datasets.Dataset:
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch):
    """hub(dataset) makes ``load_dataset`` return this data set."""
    return lambda dataset: monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)


def test_declared_names_are_used(hub):
    names = datasets.ClassLabel(names=["negative", "positive"])
    hub(dataset_of({"sentence": ["a", "b"], "label": [1, 0]}, sentence=datasets.Value("string"), label=names))
    examples, declared = read_hub_dataset("some/set", "train", label_names=["x", "y"])
    assert contents(examples) == [("a", None, "positive"), ("b", None, "negative")]
    assert declared == ["negative", "positive"]
    assert examples[1].origin == "some/set (train), row 1"


def test_a_class_label_is_a_place_even_where_names_are_numbers(hub):
    hub(
        dataset_of(
            {"text": ["a"], "label": [1]}, text=datasets.Value("string"), label=datasets.ClassLabel(names=["1", "2"])
        )
    )
    assert contents(read_hub_dataset("some/set", "train")[0]) == [("a", None, "2")]


def test_minus_one_is_an_unknown_label(hub):
    names = datasets.ClassLabel(names=["negative", "positive"])
    hub(dataset_of({"sentence": ["a", "b"], "label": [-1, -1]}, sentence=datasets.Value("string"), label=names))
    examples, _ = read_hub_dataset("some/set", "test", needs_label=False)
    assert [example.label for example in examples] == [None, None]


def test_pairs_with_true_and_false(hub):
    text = datasets.Value("string")
    rows = {"question": ["a"], "passage": ["b"], "answer": [True]}
    hub(dataset_of(rows, question=text, passage=text, answer=datasets.Value("bool")))
    assert read_hub_dataset("some/set", "train") == ([Example("a", "b", "True", "some/set (train), row 0")], None)


def test_an_empty_split(hub):
    hub(dataset_of({"text": [], "label": []}, text=datasets.Value("string"), label=datasets.Value("int64")))
    with pytest.raises(DataError, match=r"some/set \(train\) has no example"):
        read_hub_dataset("some/set", "train")


# ---- all splits together ----


def split_of(*labels: str | None, pair: str | None = None) -> list[Example]:
    return [Example("x", pair, label, f"line {number}") for number, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": split_of("a", "b"), "validation": split_of("a", "c")}, "line 2: label 'c' .* of this run: a, b"),
        ({"train": split_of("a", None)}, "line 2 has no label"),
        ({"validation": split_of(None, None)}, "line 1 has no label"),
        ({"test": split_of("a", None)}, "line 2 has no label. .* only a whole test set"),
        ({"train": split_of("a", pair="y"), "test": split_of("a")}, "One of train and test has pairs"),
    ],
)  # fmt: skip
def test_splits_that_do_not_go_together(splits, expected):
    with pytest.raises(DataError, match=expected):
        check_splits(splits, ["a", "b"], "this run")


def test_a_class_without_examples_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_splits({"train": split_of("a", "b"), "test": split_of(None)}, ["a", "b"], "this run")
        check_splits({"validation": split_of("a")}, ["a", "b"], "this run")
        assert not caplog.records
        check_splits({"train": split_of("b", "b"), "validation": split_of("c")}, ["a", "b", "c"], "this run")
    assert [record.getMessage() for record in caplog.records] == [
        "No training example has label a, c: it will hardly ever be predicted."
    ]
