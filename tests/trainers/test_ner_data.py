"""Readers of tagged text: what they accept, and one clear error for everything else."""

import datasets
import pytest

from modeling_unihyperlora.errors import DataError
from trainers.ner_data import (
    Sentence,
    check_labels,
    collect_labels,
    read_file,
    read_hub_dataset,
)

ROWS = [(["Anna", "lives", "in", "Paris"], ["B-PER", "O", "O", "B-LOC"]), (["."], ["O"])]


def contents(sentences: list[Sentence]) -> list[tuple[list[str], list[str]]]:
    return [(sentence.tokens, sentence.tags) for sentence in sentences]


# ---- JSON lines ----


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
