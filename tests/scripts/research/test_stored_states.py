"""stored_states.py: folders in fewer bits, texts of one length, and which processes a reading has started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from modeling_unihyperlora import CanonicalSpace
from scripts.research import stored_states
from tests.conftest import WORDS, tiny_tokenizer
from tests.scripts.test_run_ner import ROWS
from trainers.reading_job import CorpusReader, ReadingJob
from trainers.stored_states import BITS


@pytest.fixture(scope="module")
def folders(tiny_host, tmp_path_factory) -> dict[int, Path]:
    """The same rows, read in each number of bits."""
    folder = tmp_path_factory.mktemp("bits")
    anchors, rows = folder / "anchors.txt", folder / "rows.jsonl"
    anchors.write_text("".join(" ".join(words) + "\n" for words, _ in ROWS), encoding="utf-8")
    CanonicalSpace.make([str(tiny_host)], anchors, dim=16).save(folder / "space.safetensors")
    lines = [json.dumps({"tokens": words, "ner_tags": tags}) + "\n" for words, tags in ROWS[:9]]
    rows.write_text("".join(lines), encoding="utf-8")
    made = {}
    for bits in BITS:
        made[bits] = folder / f"read-{bits}"
        space = str(folder / "space.safetensors")
        reader = CorpusReader(ReadingJob(str(tiny_host), str(rows), str(made[bits]), bits=bits, space=space))
        reader.read_shard(0)
    return made


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_fewer_bits_are_what_a_reading_in_them_writes(folders, bits, tmp_path):
    copy = stored_states.with_bits(folders[16], bits, tmp_path)
    assert (copy / "manifest.json").read_text() == (folders[bits] / "manifest.json").read_text()
    [name] = [path.name for path in copy.glob("*.parquet")]
    assert pq.read_table(copy / name).equals(pq.read_table(folders[bits] / name))
    sizes = stored_states.bytes_of(copy)
    assert sizes["words"] == 63 and sizes["states"] == 63 * 5 * 16 * bits // 8
    assert sizes["files"] == (copy / name).stat().st_size
    assert stored_states.host_of(copy) == stored_states.host_of(folders[16])


def test_texts_are_as_long_as_the_host_reads(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", tiny_tokenizer()
    rows = [WORDS[number : number + 6] + ["supercalifragilistic"] for number in range(12)]
    path.write_text("".join(json.dumps({"tokens": words}) + "\n" for words in rows), encoding="utf-8")
    texts = stored_states.texts_of(path, tokenizer, tokens=20, count=4)
    lengths = [len(ids) for ids in tokenizer(texts, is_split_into_words=True)["input_ids"]]
    assert len(texts) == 4 and all(17 <= length <= 20 for length in lengths)
    assert [word for text in texts for word in text] == [word for row in rows for word in row][: sum(map(len, texts))]


def test_descendants_are_those_that_a_process_started():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # a worker of this test"])
    try:
        found = stored_states.descendants(os.getpid())
        assert "a worker of this test" in found[child.pid]
        assert os.getpid() not in found and os.getppid() not in found
    finally:
        child.kill()
        child.wait()


def test_columns_have_the_tags_of_some_types_alone(tmp_path):
    rows = [
        {"tokens": ["Ada", "flew", "to", "Rome"], "ner_tags": ["B-PER", "O", "O", "B-LOC"]},
        {"tokens": ["Air", "France"], "ner_tags": ["B-ORG", "I-ORG"]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stored_states.main(["columns", "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "tasks.jsonl")])
    first, second = map(json.loads, (tmp_path / "tasks.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["tokens"] == rows[0]["tokens"] and second["ner_tags"] == rows[1]["ner_tags"]
    names = [name for name in first if name.startswith("tags_")]
    alone, pairs = ["tags_LOC", "tags_ORG", "tags_PER"], ["tags_LOC_ORG", "tags_LOC_PER", "tags_ORG_PER"]
    assert names == [*alone, *pairs, "tags_LOC_ORG_PER"]
    assert first["tags_LOC"] == ["O", "O", "O", "B-LOC"] and first["tags_ORG_PER"] == ["B-PER", "O", "O", "O"]
    assert second["tags_LOC_PER"] == ["O", "O"] and second["tags_ORG"] == ["B-ORG", "I-ORG"]


def test_ten_tasks_of_four_types():
    tasks = stored_states.types_of_tasks(["PER", "LOC", "ORG", "MISC"])
    assert len(set(tasks)) == 10 and [len(task) for task in tasks] == [1] * 4 + [2] * 6
