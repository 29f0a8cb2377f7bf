"""Reading a corpus: any kind of input, by any number of processes, and again after one was stopped."""

import csv
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from modeling_unihyperlora import CanonicalSpace, ConfigError, DataError
from modeling_unihyperlora.words import cut_words
from tests.conftest import WORDS
from trainers import reading_job
from trainers.commands import main
from trainers.commands import read as command
from trainers.reading_job import CorpusReader, ReadingJob, load_rows, own_shards
from trainers.stored_states import StoredCorpus

ROWS = [
    {"tokens": np.random.default_rng(row).choice(WORDS, row % 7).tolist(), "ner_tags": ["O"] * (row % 7), "topic": row}
    for row in range(23)
]


@pytest.fixture(scope="module")
def space(tiny_host, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    anchors = folder / "anchors.txt"
    text = np.random.default_rng(0).choice(WORDS, (60, 8)).tolist()
    anchors.write_text("\n".join(map(" ".join, text)), encoding="utf-8")
    CanonicalSpace.make([str(tiny_host)], anchors, dim=12).save(folder / "space.safetensors")
    return folder / "space.safetensors"


@pytest.fixture
def job(tiny_host, space, tmp_path):
    """job(rows, bits=…) → a job on them."""

    def make(rows: list = ROWS, output: str = "states", file: Path | None = None, **given) -> ReadingJob:
        if file is None:
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        own = {"rows_a_shard": 5, "space": str(space)} | given
        return ReadingJob(str(tiny_host), str(file), str(tmp_path / output), **own)

    return make


def read_all(job: ReadingJob) -> CorpusReader:
    reader = CorpusReader(job)
    for shard in reader.to_do(range(reader.manifest.shards)):
        reader.read_shard(shard)
    return reader


def contents(job: ReadingJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(job.output).glob("*.parquet"))}


def test_a_folder_has_the_rows_their_words_and_their_states(job, tmp_path):
    reader = read_all(job())
    corpus = StoredCorpus(tmp_path / "states")
    assert corpus.columns == ["id", "ner_tags", "topic", "words", "states"]
    rows = list(corpus.rows("id", "words", "ner_tags", "topic"))
    assert rows == [(number, row["tokens"], row["ner_tags"], row["topic"]) for number, row in enumerate(ROWS)]
    expected = reader.model.read([row["tokens"] for row in ROWS])["states"]
    for number, states in enumerate(expected):
        found = corpus.states(number, len(states)).numpy()
        np.testing.assert_allclose(found, states.astype(np.float32), atol=4e-3)
    assert corpus.manifest.host["name"] == reader.job.host and corpus.manifest.input["column"] == "tokens"


def test_the_causal_copy_is_read_as_another_host(job, tmp_path, tiny_host):
    """Its words do not depend on later ones; a task can be trained on both folders."""
    rows = [row | {"ner_tags": ["B-PER", *row["ner_tags"][1:]]} for row in ROWS if row["tokens"]]
    plain, causal = read_all(job(rows)), read_all(job(rows, output="causal", causal=True))
    assert causal.model.stream.words.causal and not plain.model.stream.words.causal
    assert causal.manifest.host["fingerprint"] != plain.manifest.host["fingerprint"]
    words = ["anna", "flew", "to", "rome"]
    [whole], [part] = (causal.model.read([given])["states"] for given in (words, words[:2]))
    np.testing.assert_allclose(whole[:2], part, atol=2e-3)
    [whole], [part] = (plain.model.read([given])["states"] for given in (words, words[:2]))
    assert np.abs(whole[:2] - part).max() > 4e-3
    with pytest.raises(DataError, match="another run"):
        CorpusReader(job(rows, causal=True))
    folders = [str(tmp_path / name) for name in ("states", "causal")]
    flags = ["--space", job().space, "--do_train", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    main(["ner", "--train_states", *folders, *flags])
    sources = json.loads((tmp_path / "run" / "config.json").read_text())["source_hosts"]
    assert [host["name"] for host in sources] == [str(tiny_host)] * 2


def test_a_decoder_has_no_causal_copy(job, tmp_path, monkeypatch):
    monkeypatch.setattr(reading_job, "causal_copy_of", lambda host, words: None)
    with pytest.raises(ConfigError, match="cannot be read under a causal mask"):
        CorpusReader(job(causal=True))
    assert not (tmp_path / "states").exists()


def test_an_id_and_a_text_are_carried_along(job, tmp_path):
    rows = [{"id": f"row-{number}", "text": "anna, ben"} for number in range(3)]
    read_all(job(rows))
    found = list(StoredCorpus(tmp_path / "states").rows("id", "text", "words"))
    assert found == [(row["id"], row["text"], ["anna", ",", "ben"]) for row in rows]


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_kinds_of_input(job, tmp_path, kind):
    rows = {"text": ["anna, ben", "NA", ""], "label": [1, 0, 1]}
    if kind == "csv":
        path = tmp_path / "rows.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([rows, *zip(*rows.values(), strict=True)])
    elif kind == "parquet":
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(path)
    else:
        path = tmp_path / "data"
        path.mkdir()
        named = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
        named.to_parquet(path / "train.parquet")
    read_all(job(file=path))
    labels = ["good", "bad", "good"] if kind == "folder" else rows["label"]
    found = list(StoredCorpus(tmp_path / "states").rows("text", "words", "label"))
    assert found == list(zip(rows["text"], map(cut_words, rows["text"]), labels, strict=True))


def test_words_alone_are_enough(job, tmp_path):
    read_all(job([{"tokens": row["tokens"]} for row in ROWS]))
    found = list(StoredCorpus(tmp_path / "states").rows("id", "words"))
    assert found == [(number, row["tokens"]) for number, row in enumerate(ROWS)]


def test_ids_of_tags_become_their_names(job, tmp_path):
    (tmp_path / "data").mkdir()
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"]))
    rows = datasets.Dataset.from_dict({"tokens": [["anna", "in"], []], "ner_tags": [[1, 0], []]})
    rows.cast_column("ner_tags", tags).to_parquet(tmp_path / "data" / "train.parquet")
    read_all(job(file=tmp_path / "data"))
    assert list(StoredCorpus(tmp_path / "states").rows("ner_tags")) == [(["B-PER", "O"],), ([],)]


def test_a_split_names_the_first_rows(job, tmp_path):
    assert read_all(job(split="train[:7]")).manifest.rows == 7
    assert len(list(StoredCorpus(tmp_path / "states").rows("id"))) == 7


def test_processes_share_the_shards_out_and_write_what_one_writes(job, monkeypatch):
    read_all(job(output="one"))
    for rank in ("2", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        reader = CorpusReader(job(output="three"))
        for shard in reader.to_do(own_shards(reader.manifest.shards)):
            reader.read_shard(shard)
    assert contents(job(output="one")) == contents(job(output="three")) != {}


def test_a_reading_goes_on_where_it_stopped(job, monkeypatch):
    read_all(job(output="whole"))
    reader = CorpusReader(job(output="stopped"))
    reader.read_shard(0)
    reader.read_shard(3)
    read = []
    monkeypatch.setattr(
        reading_job, "states_of", lambda *args, own=reading_job.states_of: read.append(1) or own(*args)
    )
    read_all(job(output="stopped"))
    assert len(read) == 3  # of five
    assert contents(job(output="stopped")) == contents(job(output="whole"))


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_half_written(job, tmp_path):
    """It is killed by its id once it has written its first shard."""
    read_all(job(output="whole"))
    flags = [f"--{name}={value}" for name, value in vars(job(output="killed")).items() if value not in (None, False)]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainers.commands", "read", *flags], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "shard 1 of 5" in line:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stderr.close()
    there = contents(job(output="killed"))
    whole = contents(job(output="whole"))
    assert 0 < len(there) <= 5 and all(whole[name] == content for name, content in there.items())
    read_all(job(output="killed"))
    assert contents(job(output="killed")) == whole


@pytest.mark.parametrize(
    ("given", "said"),
    [({"bits": 4}, "bits: 16 there, 4 now"), ({"rows_a_shard": 6}, "rows_a_shard"), ({"rows": ROWS[:-1]}, "rows: 23")],
)
def test_two_runs_never_mix(job, given, said):
    CorpusReader(job())
    with pytest.raises(DataError, match=f"holds the states of another run.*{said}"):
        CorpusReader(job(**given))


def test_one_word_that_differs_is_another_input(job):
    CorpusReader(job())
    rows = [*ROWS[:-1], ROWS[-1] | {"topic": 99}]
    with pytest.raises(DataError, match="another run.*'digest'"):
        CorpusReader(job(rows))


def test_a_full_disk_leaves_what_is_complete(job, monkeypatch):
    reader = CorpusReader(job())
    reader.read_shard(0)

    def full(table, where, **_):
        Path(where).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(DataError, match="No space left on device.*resume with this one"):
        reader.read_shard(1)
    assert [*contents(job())] == ["states-00000-of-00005.parquet"]
    assert not list(Path(job().output).glob(".states*"))
    monkeypatch.undo()
    read_all(job())
    StoredCorpus(job().output)


def test_a_disk_without_room_is_found_before_the_host_reads(job, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(reading_job.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match="need about .* GB more.*--bits"):
        CorpusReader(job())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "anna"}, {"text": 5}], "row 1 is '5', of type int"),
        ([{"text": "anna"}, {"text": None}], "row 1 is 'None'"),
        ([{"tokens": ["anna"]}, {"tokens": ["ben", 3]}], "row 1 is"),
        ([{"tokens": ["anna"]}, {"tokens": ["ben", None]}], "row 1"),
        ([{"text": "anna"}, {"text": "a\ud800b"}], "rows.jsonl.*surrogate pair"),
        ([{"words": ["anna"], "states": 1}], "column 'states'"),
        ([{"body": "anna"}], "none of the columns tokens"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_before_the_host_reads(job, rows, said):
    with pytest.raises((DataError, ConfigError), match=said):
        CorpusReader(job(rows))


@pytest.mark.parametrize("content", ["", '{"text": "anna"}\n{"text": \n', "\xff"])
def test_a_file_that_cannot_be_read(job, tmp_path, content):
    (tmp_path / "bad.jsonl").write_text(content, encoding="latin1")
    with pytest.raises(DataError, match="bad.jsonl"):
        load_rows(job(file=tmp_path / "bad.jsonl"))


def test_an_unknown_kind_of_file_is_refused(job, tmp_path):
    (tmp_path / "text.docx").write_text("anna")
    with pytest.raises(DataError, match="unknown kind of file '.docx'. Give .jsonl"):
        load_rows(job(file=tmp_path / "text.docx"))


@pytest.mark.parametrize("given", [{"bits": 5}, {"rows_a_shard": 0}, {"batch_size": 0}, {"max_seq_length": -1}])
def test_numbers_that_are_not_allowed(job, given):
    with pytest.raises(ConfigError, match=f"{next(iter(given))} .* is not allowed"):
        CorpusReader(job(**given))


class TestCommand:
    def test_reads_and_says_what_it_read(self, job, capsys, caplog):
        flags = [f"--{name}={value}" for name, value in vars(job()).items() if value not in (None, False)]
        assert main(["read", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["shards"], found["shards_read"]) == (5, 5)
        assert found["words_read"] == sum(len(row["tokens"]) for row in ROWS)
        assert "shard 5 of 5" in caplog.text and "words a second" in caplog.text
        assert main(["read", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["shards_read"] == 0

    def test_a_bar_in_a_terminal_ends_at_the_last_row(self, monkeypatch):
        monkeypatch.setattr(command.Console, "is_terminal", property(lambda _: True))
        with command.ShownProgress(10) as progress:
            for words, rows in itertools.repeat((30, 5), 2):
                progress.add(words, rows)
            [task] = progress.bar.tasks
            assert (task.completed, progress.words) == (10, 60) and task.fields["rate"] > 0

    def test_an_error_is_one_line(self, job, capsys):
        flags = [f"--{name}={value}" for name, value in vars(job()).items() if value not in (None, False)]
        assert main(["read", *flags, "--input", "nothing.jsonl"]) == 1
        said = capsys.readouterr().err
        assert "unihyperlora read: " in said and "Traceback" not in said
