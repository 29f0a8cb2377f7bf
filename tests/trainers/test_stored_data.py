"""Tasks on stored states: the same scores as on text, no host in memory, and one corpus for several tasks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_unihyperlora import CanonicalSpace, ConfigError, DataError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.hosts import NoHost
from scripts import run_classification, run_ner
from tests.scripts.test_run_ner import MANY, ROWS
from trainers import UniHyperLoraTrainer, UniHyperLoraTrainingArguments
from trainers.reading_job import CorpusReader, ReadingJob
from trainers.stored_data import StoredSentences, StoredTexts, read_examples, read_sentences

LABELS = ["O", "B-LOC", "B-PER"]
TRAIN = ["--do_train", "--max_steps", 60, "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def folder(tiny_host, tmp_path_factory) -> Path:
    """A space, tagged text with a row of no words in it, and the same rows as stored states of two hosts' names."""
    folder = tmp_path_factory.mktemp("stored")
    anchors = folder / "anchors.txt"
    anchors.write_text("".join(" ".join(words) + "\n" for words, _ in ROWS), encoding="utf-8")
    CanonicalSpace.make([str(tiny_host)], anchors, dim=16).save(folder / "space.safetensors")
    parts = {"train": [*ROWS[4:], ([], [])], "validation": ROWS[:4]}
    for name, rows in parts.items():
        lines = [
            {"tokens": words, "ner_tags": tags, "topic": words[:1] == ["anna"] and "anna" or "other"}
            for words, tags in rows
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        job = ReadingJob(
            str(tiny_host), str(path), str(folder / name), rows_a_shard=20, space=str(folder / "space.safetensors")
        )
        reader = CorpusReader(job)
        for shard in range(reader.manifest.shards):
            reader.read_shard(shard)
    return folder


@pytest.fixture
def flags(folder):
    return [*MANY, "--use_cpu", "--disable_tqdm", "true", "--space", folder / "space.safetensors", "--reader", "small"]


def run(script, *flags) -> dict:
    return script.main([*map(str, flags)])


@pytest.fixture
def no_host(monkeypatch):
    """Any host that is loaded or called is an error."""

    def refuse(*_, **__):
        raise AssertionError("a host was used")

    for name in ("modeling_unihyperlora.modeling_unihyperlora.load_host", "trainers.sources.load_host"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("modeling_unihyperlora.modeling_unihyperlora.call_host", refuse)


def test_a_task_is_trained_and_scored_without_a_host(folder, flags, tmp_path, tiny_host, monkeypatch, no_host):
    states = ["--train_states", folder / "train", "--validation_states", folder / "validation"]
    results = run(run_ner, *flags, *states, *TRAIN, "--do_eval", "--output_dir", tmp_path / "out")
    assert results["eval_f1"] > 0.9 and results["host_cpu_seconds"] == 0 and results["budget_ok"]
    assert results["flops_overhead_pct"] is results["extra_ram_mb"] is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    [source] = config["source_hosts"]
    assert source["name"] == str(tiny_host) == config["base_model_name_or_path"] and len(source["fingerprint"]) == 16
    monkeypatch.undo()

    test = ["--do_predict", "--output_dir", tmp_path / "there"]
    stored = run(run_ner, "--use_cpu", "--adapter", tmp_path / "out", "--test_states", folder / "train", *test)
    lines = (tmp_path / "there" / "predictions.txt").read_text()
    assert [len(line.split()) for line in lines.splitlines()] == [len(words) for words, _ in [*ROWS[4:], ([], [])]]
    text = ["--adapter", tmp_path / "out", "--test_file", folder / "train.jsonl", "--do_predict"]
    live = run(run_ner, "--use_cpu", *text, "--output_dir", tmp_path / "live")  # on the host that it names
    assert live["predict_f1"] == stored["predict_f1"]
    assert live["predict_loss"] == pytest.approx(stored["predict_loss"], abs=2e-3)
    assert (tmp_path / "live" / "predictions.txt").read_text() == lines


def test_texts_are_classified_on_the_same_corpus(folder, flags, tmp_path, no_host):
    states = ["--train_states", folder / "train", folder / "validation", "--validation_states", folder / "validation"]
    own = ["--label_column_name", "topic", "--do_eval", "--do_predict", "--test_states", folder / "train"]
    results = run(run_classification, *flags, *states, *TRAIN, *own, "--output_dir", tmp_path / "out")
    assert results["eval_accuracy"] == 1 and results["train_samples"] == len(ROWS) + 1
    assert len((tmp_path / "out" / "predictions.txt").read_text().splitlines()) == len(ROWS) - 3


def test_the_same_corpus_gives_a_second_task(folder, flags, tmp_path, no_host):
    states = ["--train_states", folder / "train"]
    run(run_ner, *flags, *states, *TRAIN, "--output_dir", tmp_path / "one")
    second = [*flags[:-4], "--reader", "small", "--adapter", tmp_path / "one", "--task_name", "again", *states, *TRAIN]
    run(run_ner, *second, "--output_dir", tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert [*config["tasks"]] == ["ner", "again"] and len(config["source_hosts"]) == 1


def test_delta_is_tuned_on_stored_states(folder, flags, tmp_path, no_host):
    states = ["--train_states", folder / "train", "--validation_states", folder / "validation"]
    run(run_ner, *flags, *states, *TRAIN, "--output_dir", tmp_path / "one")
    delta = ["--use_cpu", "--adapter", tmp_path / "one", "--train_scope", "delta", "--delta_learning_rate", 0.5]
    results = run(run_ner, *delta, *states, "--do_train", "--max_steps", 3, "--output_dir", tmp_path / "two")
    assert results["trainable_parameters"] == 8 * 128


def test_interrupted_training_goes_on(folder, flags, tmp_path):
    states = ["--train_states", folder / "train", *TRAIN[:2], 12, "--save_steps", 6]
    run(run_ner, *flags, *states, "--output_dir", tmp_path / "whole")
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "part" / "checkpoint-6")
    run(run_ner, *flags, *states, "--resume_from_checkpoint", "true", "--output_dir", tmp_path / "part")
    losses = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", "part")
    ]
    assert losses[0][-1]["step"] == losses[1][-1]["step"] == 12
    scored = [
        run(run_ner, "--use_cpu", "--adapter", tmp_path / name, "--validation_states", folder / "validation",
            "--do_eval", "--output_dir", tmp_path / f"{name}-scored")["eval_loss"]
        for name in ("whole", "part")
    ]  # fmt: skip
    assert scored[0] == pytest.approx(scored[1], abs=1e-6)


def test_a_trainer_takes_stored_data_as_it_is(folder, tiny_host, tmp_path):
    data = StoredSentences(read_sentences([str(folder / "train")], None, "ner_tags", None), LABELS)
    space = folder / "space.safetensors"
    model = UniHyperLoraForTokenClassification.from_host(NoHost(), labels=LABELS, space=space, reader="small")
    args = UniHyperLoraTrainingArguments(tmp_path, max_steps=3, use_cpu=True, report_to="none", save_strategy="no")
    before = {name: value.clone() for name, value in model.adapter.tasks.state_dict().items()}
    trainer = UniHyperLoraTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert any((value != before[name]).any() for name, value in model.adapter.tasks.state_dict().items())
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.train_dataset.fidelity == args.fidelity  # noise, as of any stream
    assert model.config.source_hosts == data.hosts()


def test_items(folder):
    sentences = read_sentences([str(folder / "validation"), str(folder / "train")], 6, "ner_tags", None)
    assert [(s.tokens, s.tags) for s in sentences] == [(words, tags) for words, tags in ROWS[:6]]
    data = StoredSentences(sentences, LABELS)
    item = data[5]
    assert item["canonical_states"].shape == (7, 5, 16) and item["canonical_states"].dtype == torch.float32
    assert item["labels"].tolist() == [2, 0, 0, 1, 0, 1, 0]
    texts = StoredTexts(read_examples([str(folder / "train")], None, "topic", None), ["anna", "other"])
    assert texts[-1 + len(texts)]["canonical_states"].abs().sum() == 0  # of a text of no words
    assert texts[0]["labels"].item() == 0


def test_scores_are_put_back_in_order(folder):
    data = StoredSentences(read_sentences([str(folder / "train")], None, "ner_tags", None), LABELS)
    assert len(data) == len(ROWS) - 4 and len(data.sentences) == len(ROWS) - 3
    logits = np.zeros((len(data), 9, 3))
    for row in range(len(data)):
        logits[row, np.arange(7), data.label_ids(row)] = 5
    assert data.tags_of(logits) == [*(tags for _, tags in ROWS[4:]), []]
    with pytest.raises(DataError, match="1 rows of predictions"):
        data.tags_of(logits[:1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model_name_or_path", "x"], "no host is loaded. Leave --model_name_or_path out"),
        (["--train_file", "x.jsonl"], "not both"),
        (["--method", "lora"], "--method lora computes inside a host"),
        (["--pathway", "inject"], "--pathway inject computes inside a host"),
        (["--cache_eval_states"], "are stored already"),
        (["--label_all_tokens"], "no sub-tokens"),
        (["--source_hosts", "x"], "Leave --source_hosts out"),
        (["--do_eval"], "give --validation_states"),
        (["--label_column_name", "tags"], "no column 'tags'; it has id, ner_tags, topic, words"),
    ],
)
def test_what_does_not_go_with_stored_states(folder, tmp_path, given, said):
    flags = ["--train_states", folder / "train", "--do_train", "--max_steps", 1, "--output_dir", tmp_path / "out"]
    with pytest.raises((ConfigError, DataError), match=said):
        run(run_ner, *flags, *given)


def test_states_of_another_space_are_refused(folder, tmp_path):
    flags = ["--train_states", folder / "train", "--do_train", "--max_steps", 1, "--output_dir", tmp_path / "out"]
    with pytest.raises(DataError, match="have the space 'own' 1 .* the adapter has 'english'.*--space"):
        run(run_ner, *flags)
