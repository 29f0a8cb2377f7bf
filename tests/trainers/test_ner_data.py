"""Readers of tagged text: accepted files, and one clear error for anything else."""

import json
import logging

import datasets
import pytest

from modeling_unihyperlora.errors import DataError
from trainers.ner_data import (
    Sentence,
    check_labels,
    check_splits,
    collect_labels,
    read_file,
    read_hub_dataset,
    scheme_of_splits,
)

ROWS = [(["Anna", "lives", "in", "Paris"], ["B-PER", "O", "O", "B-LOC"]), (["."], ["O"])]


def contents(sentences: list[Sentence]) -> list[tuple[list[str], list[str]]]:
    return [(sentence.tokens, sentence.tags) for sentence in sentences]


# ---- JSON lines ----


def test_types_that_differ_in_capitals_alone_are_said(caplog):
    check_splits({}, ["O", "B-PER", "B-Per"], "this run")
    assert "'B-PER' and 'B-Per' of this run differ only in blanks or capitals" in caplog.text


def test_json_lines_with_strings(write_jsonl):
    sentences = read_file(write_jsonl("a.jsonl", ROWS))
    assert contents(sentences) == ROWS
    assert sentences[1].origin.endswith("a.jsonl, line 2")


def test_json_lines_with_ids_and_names(write_jsonl):
    path = write_jsonl("a.json", [(["Anna", "left"], [1, 0])])
    assert contents(read_file(path, label_names=["O", "B-PER"])) == [(["Anna", "left"], ["B-PER", "O"])]


def test_json_lines_with_other_columns(write_jsonl):
    path = write_jsonl("a.jsonl", ROWS, text="words", label="labels")
    assert contents(read_file(path, text_column="words", label_column="labels")) == ROWS


def test_an_empty_sentence_stays(write_jsonl):
    assert contents(read_file(write_jsonl("a.jsonl", [([], []), *ROWS]))) == [([], []), *ROWS]


def test_odd_characters_survive(write_jsonl):
    words = ["\x85", "a\u2028b", "", "\u200d", "naïve"]
    assert read_file(write_jsonl("a.jsonl", [(words, ["O"] * 5)]))[0].tokens == words


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"tokens": ["a"]}', "no column 'ner_tags'; it has tokens"),
        ('{"words": ["a"], "ner_tags": ["O"]}', "no column 'tokens'; it has words, ner_tags"),
        ('{"tokens": ["a", "b"], "ner_tags": ["O"]}', "2 words and 1 tags"),
        ('{"tokens": "a b", "ner_tags": ["O"]}', "list of strings"),
        ('{"tokens": ["a", null], "ner_tags": ["O", "O"]}', "list of strings"),
        ('{"tokens": ["a"], "ner_tags": "O"}', "strings or of ids"),
        ('{"tokens": ["a"], "ner_tags": [true]}', "strings or of ids"),
        ('{"tokens": ["a"], "ner_tags": [1.0]}', "strings or of ids"),
        ('{"tokens": ["a"], "ner_tags": [""]}', "is empty or has a space"),
        ('{"tokens": ["a"], "ner_tags": ["B-work of art"]}', "is empty or has a space"),
        ('{"tokens": ["a"], "ner_tags": [0]}', "--tag_names"),
        ('{"tokens": ["a"], "ner_tags": ["O"]', "is not JSON"),
        ('{"tokens": ["a"], "ner_tags": ["O"], "tokens": ["b"]}', "names 'tokens' twice. Give each name one value"),
        ('{"tokens": ["a"], "ner_tags": ["O"], "more": {"a": 1, "a": 2}}', "names 'a' twice"),
        ('{"tokens": ["a"], "ner_tags": [' + "1" * 5000 + "]}", "is not JSON"),
        ('{"tokens": ["a"], "ner_tags": ["O"], "x": ' + "[" * 9999 + "]" * 9999 + "}", "is not JSON"),
        ('{"tokens": ["\\ud83d"], "ner_tags": ["O"]}', "the word has half of a surrogate pair"),
        ('{"tokens": ["a"], "ner_tags": ["B-\\ud83d"]}', "the tag has half of a surrogate pair"),
        ('{"tokens": ["New\\nYork"], "ner_tags": ["O"]}', "the word 'New\\nYork' has a line break in it"),
        ('{"tokens": ["a"], "ner_tags": null}', "strings or of ids"),
        ('[{"tokens": ["a"], "ner_tags": ["O"]}]', "not an object"),
    ],
)
def test_bad_json_lines_name_the_line(tmp_path, line, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"tokens": ["a"], "ner_tags": ["O"]}\n' + line + "\n")
    with pytest.raises(DataError, match="bad.jsonl, line 2") as caught:
        read_file(path)
    assert expected in str(caught.value)


def test_an_id_outside_the_names(write_jsonl):
    path = write_jsonl("a.jsonl", [(["a"], [2])])
    with pytest.raises(DataError, match="id 2 is outside the 2 labels: O, B-PER"):
        read_file(path, label_names=["O", "B-PER"])
    with pytest.raises(DataError, match="id -1"):
        read_file(write_jsonl("b.jsonl", [(["a"], [-1])]), label_names=["O", "B-PER"])


# ---- columns ----


def test_columns_take_first_and_last(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(
        "-DOCSTART- -X- -X- O\n\n\nAnna NNP B-NP B-PER\nlives VBZ B-VP O\n\n# NN B-NP O\n. . O O\n", encoding="utf-8"
    )
    assert contents(read_file(path)) == [(["Anna", "lives"], ["B-PER", "O"]), (["#", "."], ["O", "O"])]


def test_columns_with_tabs_keep_spaces_and_empty_words(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("New York\tB-LOC\r\n\tO\r\n#\tO\r\n\r\n#tag\tO", encoding="utf-8-sig")
    assert contents(read_file(path)) == [(["New York", "", "#"], ["B-LOC", "O", "O"]), (["#tag"], ["O"])]


def test_comments_are_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("# id 7\tdomain=en\n# newdoc\nAnna _ _ B-PER\n\n# text of the second one is here\nleft _ _ O\n")
    assert contents(read_file(path)) == [(["Anna"], ["B-PER"]), (["left"], ["O"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Anna B-PER\nlives\n", "line 2 has one column"),
        ("Anna B-PER\nlives x O\n", "line 2 has 3 columns"),
        ("Anna\tB-PER\nlives\t\n", "line 2: the word 'lives' has no tag"),
    ],
)
def test_bad_columns_name_the_line(tmp_path, text, expected):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=expected):
        read_file(path)


def write(tmp_path, text: str, name: str = "a.tsv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_line_without_the_files_tabs_is_not_split_at_its_spaces(tmp_path):
    """ "New York" would be the word New with the tag York."""
    with pytest.raises(DataError, match="line 2 has one column .'New York'., but the lines before it have 2"):
        read_file(write(tmp_path, "Anna\tB-PER\nNew York\n"))
    mixed = write(tmp_path, "Anna  B-PER\nlives\tO\nin \t O\n")
    assert contents(read_file(mixed)) == [(["Anna", "lives", "in"], ["B-PER", "O", "O"])]


def test_a_conll_u_file_says_what_its_columns_are(tmp_path):
    rows = "1\tAnna\tPROPN\tB-PER\t_\n2-3\tdel\t_\t_\t_\n2\tde\tADP\tO\t_\n3\tel\tDET\tO\t_\n3.1\tx\t_\t_\t_\n"
    head = "# global.columns = ID FORM UPOS NER MISC\n# sent_id = 1\n# text = Anna del\n"
    path = write(tmp_path, head + rows)
    expected = [(["Anna", "de", "el"], ["B-PER", "O", "O"])]
    assert contents(read_file(path, label_column="NER")) == expected
    assert contents(read_file(path, label_column="UPOS"))[0][1] == ["PROPN", "ADP", "DET"]
    assert contents(read_file(path, text_column="UPOS", label_column="NER"))[0][0] == ["PROPN", "ADP", "DET"]
    assert contents(read_file(path, needs_tags=False)) == [(expected[0][0], None)]
    assert contents(read_file(path.rename(path.with_suffix(".conllu")), label_column="NER")) == expected
    path = write(tmp_path, head + rows)
    with pytest.raises(
        DataError, match="no column 'ner_tags'; it has ID, FORM, UPOS, NER, MISC. .*--label_column_name"
    ):
        read_file(path)
    with pytest.raises(DataError, match="names 4 columns .ID, FORM, UPOS, NER., but the lines have 5"):
        read_file(write(tmp_path, head.replace(" MISC", "") + rows), label_column="NER")
    with pytest.raises(DataError, match="no column 'FORM'; it has .*--text_column_name"):
        read_file(write(tmp_path, head.replace("FORM", "WORD") + rows), label_column="NER")


def test_columns_with_names_and_without_ids_keep_a_hash(tmp_path):
    path = write(tmp_path, "# global.columns = FORM NER\n#\tO\n# x\tO\nAnna\tB-PER\n")
    assert contents(read_file(path, label_column="NER")) == [(["#", "Anna"], ["O", "B-PER"])]


@pytest.mark.parametrize("first", [0, 1])
def test_ids_are_not_words(tmp_path, first):
    lines = [f"{number}\t{word}\tO" for number, word in enumerate("Anna lives here".split(), first)]
    path = write(tmp_path, "\n".join([*lines, "", *lines[:2], ""]))
    with pytest.raises(DataError, match="first column counts the words .*# global.columns = ID FORM NER'"):
        read_file(path)
    # two columns, and numbers that do not count: words
    assert read_file(write(tmp_path, "1\tO\n2\tO\n"))[0].tokens == ["1", "2"]
    assert read_file(write(tmp_path, "1\tx\tO\n3\tx\tO\n"))[0].tokens == ["1", "3"]


def test_tags_first_is_refused(tmp_path):
    with pytest.raises(DataError, match="line 1: the first column seems to hold the tags .'O.tAnna'.*awk"):
        read_file(write(tmp_path, "O\tAnna\nB-PER\tlives\n"))
    with pytest.raises(DataError, match="the first column seems to hold the tags"):
        read_file(write(tmp_path, "O a\nPER b\nO c\n", "a.bio"))
    assert read_file(write(tmp_path, "O O\nO O\n", "a.bio"))[0].tokens == ["O", "O"]
    assert read_file(write(tmp_path, "a NOUN\nb VERB\n", "a.bio"))[0].tags == ["NOUN", "VERB"]


def test_line_breaks_of_another_age(tmp_path):
    with pytest.raises(DataError, match="line 1 has a carriage return inside .* tr "):
        read_file(write(tmp_path, "Anna B-PER\rlives O\r\rAda B-PER\r", "a.txt"))


# ---- every reader checks the same ----


def readers(tmp_path, monkeypatch, word: str, tag: str):
    """Functions that read the same word and tag from every kind of source."""
    row = {"tokens": ["Anna", word], "ner_tags": ["O", tag]}
    json_lines = write(tmp_path, json.dumps(row) + "\n", "a.jsonl")
    ids = write(tmp_path, json.dumps(row | {"ner_tags": [0, 1]}) + "\n", "ids.jsonl")
    tsv = write(tmp_path, f"Anna\tO\n{word}\t{tag}\n")
    text = datasets.List(datasets.Value("string"))
    names = datasets.List(datasets.ClassLabel(names=["O", tag]))
    sets = [
        datasets.Dataset.from_dict(
            {"tokens": [row["tokens"]], "ner_tags": [tags]},
            features=datasets.Features({"tokens": text, "ner_tags": feature}),
        )
        for feature, tags in ((text, row["ner_tags"]), (names, [0, 1]))
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **kwargs: sets[int(name)])
    return {
        "json": lambda: read_file(json_lines),
        "ids": lambda: read_file(ids, label_names=["O", tag]),
        "tsv": lambda: read_file(tsv),
        "hub, strings": lambda: read_hub_dataset("0", "train")[0],
        "hub, ClassLabel": lambda: read_hub_dataset("1", "train")[0],
    }


def outcome(read) -> str:
    try:
        return repr(contents(read()))
    except DataError as error:
        return str(error).split(": ", 1)[1]


@pytest.mark.parametrize(
    ("word", "tag", "expected"),
    [
        ("rome", "B-work of art", "the tag 'B-work of art' is empty or has a space"),
        ("rome", "B-a\u00a0b", "is empty or has a space"),
        ("rome", "B-LOC", "B-LOC"),
        ("", "B-LOC", "['Anna', '']"),
        (" ", "B-LOC", "['Anna', ' ']"),
        ("a\u2028b", "B-LOC", "u2028b"),
        ("New York", "B-LOC", "New York"),
    ],
)
def test_every_reader_says_the_same(tmp_path, monkeypatch, word, tag, expected):
    said = {name: outcome(read) for name, read in readers(tmp_path, monkeypatch, word, tag).items()}
    assert len(set(said.values())) == 1, said
    assert expected in said["json"]


def test_blank_words_are_counted_in_a_warning(write_jsonl, caplog):
    path = write_jsonl("a.jsonl", [(["a", "", "\n\n", "\u00a0", "\x00"], ["O"] * 5)])
    assert len(read_file(path)[0].tokens) == 5
    assert "3 words are empty or blank; each is read as an unknown word" in caplog.text


# ---- without tags ----


def test_a_test_set_may_be_without_tags(write_jsonl, tmp_path, monkeypatch):
    words = [(["Anna", "lives"], None), (["."], None)]
    one = write(tmp_path, "Anna\nlives\n\n.\n", "a.txt")
    bare = write(tmp_path, '{"tokens": ["Anna", "lives"]}\n{"tokens": ["."], "ner_tags": null}\n', "b.jsonl")
    for path in (one, bare):
        assert contents(read_file(path, needs_tags=False)) == words
        with pytest.raises(DataError, match="line 1"):
            read_file(path)
    secret = write(tmp_path, '{"tokens": ["Anna", "lives"], "ner_tags": [-1, -1]}\n', "c.jsonl")
    assert contents(read_file(secret, label_names=["O", "B-X"], needs_tags=False)) == words[:1]
    with pytest.raises(DataError, match="id -1 is outside the 2 labels"):
        read_file(secret, label_names=["O", "B-X"])
    data = datasets.Dataset.from_dict({"tokens": [["Anna", "lives"], ["."]]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    sentences, names = read_hub_dataset("x/y", "test", needs_tags=False)
    assert (contents(sentences), names) == (words, None)
    with pytest.raises(DataError, match="no column 'ner_tags'; it has tokens"):
        read_hub_dataset("x/y", "train")
    with pytest.raises(DataError, match="line 2 has 2 columns .*but the lines before it have 1"):
        read_file(write(tmp_path, "Anna\nNew York\n", "c.txt"), needs_tags=False)


def test_tags_are_all_there_or_none_is():
    tagged, bare = Sentence(["a"], ["O"], "x, line 1"), Sentence(["a"], None, "x, line 2")
    empty = Sentence([], [], "x, line 3")
    check_splits({"train": [tagged], "test": [bare, empty, bare]}, ["O", "B-X"], "this run")
    for splits in ({"test": [tagged, bare]}, {"validation": [bare, bare]}):
        with pytest.raises(DataError, match="x, line 2 has no tags. .* only a whole test set"):
            check_splits(splits, ["O", "B-X"], "this run")
    assert collect_labels([tagged, bare]) == ["O"]


def test_labels_that_nobody_uses_are_checked_too():
    """Unused labels can be predicted, and predictions.txt must stay readable."""
    with pytest.raises(DataError, match="The labels of this run: the tag 'B-work of art' is empty or has a space"):
        check_splits({"train": [Sentence(["a"], ["O"], "x")]}, ["O", "B-work of art"], "this run")


# ---- the scheme of a task ----


def tagged(*lines: str) -> list[Sentence]:
    return [Sentence(["a"] * len(line.split()), line.split(), f"line {n}") for n, line in enumerate(lines, 1)]


IOB = ["O", "B-PER", "I-PER"]


def test_the_scheme_comes_from_the_training_tags(caplog):
    iob1, iob2 = tagged("I-PER B-PER O"), tagged("B-PER I-PER O")
    assert scheme_of_splits({"train": iob1}, IOB, None, None) == "IOB1"
    assert scheme_of_splits({"train": iob1}, IOB, "IOB1", None) == "IOB1"
    assert scheme_of_splits({"train": iob2}, IOB, None, None) == "IOB2"
    assert scheme_of_splits({"validation": iob1}, IOB, None, None) is None  # only training may tell
    assert scheme_of_splits({"validation": iob1}, IOB, None, "IOB1") == "IOB1"
    assert scheme_of_splits({"test": [Sentence(["a"], None, "x")]}, IOB, "IOB1", None) == "IOB1"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert scheme_of_splits({"train": iob2, "validation": iob1}, IOB, None, None) == "IOB2"
    assert "tags of validation break the rules of IOB2, the task's scheme, 1 times, first in line 1" in caplog.text


def test_a_task_keeps_its_scheme():
    with pytest.raises(DataError, match="The training tags are IOB1, but the task of the adapter is IOB2"):
        scheme_of_splits({"train": tagged("I-PER B-PER O")}, IOB, "IOB2", None)
    with pytest.raises(DataError, match="--tag_scheme IOB1: the task of the adapter is IOB2. Leave the flag out"):
        scheme_of_splits({}, IOB, "IOB2", "IOB1")
    assert scheme_of_splits({"train": tagged("I-PER I-PER O")}, IOB, "IOB1", None) == "IOB1"  # fits both


# ---- files ----


@pytest.mark.parametrize("content", ["", "\n\n \n", "-DOCSTART- O\n\n"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(DataError, match="empty.txt has no sentence"):
        read_file(path)


def test_not_utf8_names_line_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Anna B-PER\nné O\n".encode("latin1"))
    with pytest.raises(DataError, match="line 2 is not UTF-8 .byte 0xe9."):
        read_file(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path / "no.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path / "folder.jsonl")


def test_unknown_suffix(tmp_path):
    with pytest.raises(DataError, match="unknown kind of file '.csv'"):
        read_file(tmp_path / "a.csv")


# ---- labels ----


def test_label_order_depends_on_the_set_alone():
    sentence = Sentence(list("abcdef"), ["I-PER", "B-LOC", "O", "B-PER", "I-LOC", "E-LOC"], "here")
    expected = ["O", "B-LOC", "I-LOC", "E-LOC", "B-PER", "I-PER"]
    assert collect_labels([sentence]) == expected
    assert collect_labels([Sentence(sentence.tokens, sentence.tags[::-1], "there")]) == expected


def test_a_tag_outside_the_label_set():
    sentences = [Sentence(["a"], ["O"], "x, line 1"), Sentence(["a", "b"], ["O", "B-ORG"], "x, line 2")]
    with pytest.raises(
        DataError, match="x, line 2: tag 'B-ORG' of word 1 is not in the label set of this run: O, B-PER"
    ):
        check_labels(sentences, ["O", "B-PER"], "this run")
    check_labels(sentences, ["O", "B-ORG"], "this run")


# ---- data sets ----

NAMES = ["O", "B-PER", "I-PER"]


@pytest.fixture
def dataset() -> datasets.Dataset:
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=NAMES)),
        }
    )
    return datasets.Dataset.from_dict({"tokens": [["Anna", "B"], []], "ner_tags": [[1, 2], []]}, features=features)


def test_a_folder_that_datasets_reads(dataset, tmp_path):
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    sentences, names = read_hub_dataset(str(tmp_path), "train", cache_dir=str(tmp_path / "cache"))
    assert names == NAMES
    assert contents(sentences) == [(["Anna", "B"], ["B-PER", "I-PER"]), ([], [])]


def test_a_script_data_set_is_read_from_its_parquet_branch(dataset, monkeypatch, caplog):
    calls = []

    def load_dataset(name, config=None, **kwargs):
        calls.append((name, config, kwargs))
        if "revision" not in kwargs:
            raise RuntimeError("Dataset scripts are no longer supported, but found conll2003.py")
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sentences, names = read_hub_dataset("eriktks/conll2003", "train", "conll2003", token="secret")
    assert (len(sentences), names) == (2, NAMES)
    assert calls[1] == (
        "eriktks/conll2003",
        None,
        {"data_dir": "conll2003", "split": "train", "revision": "refs/convert/parquet", "token": "secret"},
    )
    assert "refs/convert/parquet" in caplog.text


def test_a_data_set_that_cannot_be_loaded():
    with pytest.raises(DataError, match="'nobody/nothing' .configuration default, split train. cannot be loaded"):
        read_hub_dataset("nobody/nothing", "train")


def test_a_data_set_with_other_columns(dataset, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    with pytest.raises(DataError, match="no column 'words'; it has tokens, ner_tags"):
        read_hub_dataset("x/y", "train", text_column="words")
