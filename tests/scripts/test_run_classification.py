"""scripts/run_classification.py from end to end on a tiny host; shared behaviour is tested with run_ner.py."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.metrics import f1_score
from transformers import BertConfig, BertModel, Trainer

from modeling_unihyperlora import CanonicalSpace, ConfigError, DataError, HostError
from scripts import run_classification, run_ner
from trainers.baselines import BASELINES
from trainers.results import RESULT_KEYS

REPOSITORY = Path(__file__).parents[2]
PEOPLE, PLACES = ("anna", "ben", "carla", "david"), ("paris", "rome", "oslo", "lima")
ROWS = [
    {"sentence": f"{person} {verb} {place} .", "label": int(verb == "lives in")}
    for person in PEOPLE
    for place in PLACES
    for verb in ("lives in", "flew to", "flew from")
]
PAIRS = [
    {"question": f"{person} works", "passage": f"{other} works in {place}", "answer": person == other}
    for person in PEOPLE
    for other in PEOPLE
    for place in PLACES[:2]
]
TRAIN = ("--do_train", "--per_device_train_batch_size", 8, "--max_steps", 4, "--learning_rate", "1e-2")


@pytest.fixture
def write(tmp_path):
    def go(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return go


@pytest.fixture
def run(tiny_host, tmp_path, write):
    """run("--do_train", …, output="first") → all_results.json of that run."""
    data = {"--train_file": write("train.jsonl", ROWS[6:]), "--validation_file": write("validation.jsonl", ROWS[:6])}
    data["--test_file"] = write("test.jsonl", [{"sentence": row["sentence"]} for row in ROWS[:5]])

    def go(*flags: str, output: str = "out", host: Path | None = tiny_host, main=run_classification.main) -> dict:
        folder = tmp_path / output
        where = ["--output_dir", folder, "--use_cpu", "--disable_tqdm", "true", "--max_flops_overhead_pct", "100"]
        where += ["--save_strategy", "no", *(["--model_name_or_path", host] if host else [])]
        if not {"--pathway", "--adapter", "sat_lora", *BASELINES} & set(flags):
            where += ["--pathway", "inject"]  # which needs no anchors
        results = main([*map(str, where), *(part for pair in data.items() for part in pair), *map(str, flags)])
        assert json.loads((folder / "all_results.json").read_text()) == results
        return results

    return go


def predictions(tmp_path, output: str = "out") -> list[str]:
    return (tmp_path / output / "predictions.txt").read_text().splitlines()


def test_it_learns_and_writes_what_the_contract_names(run, tmp_path):
    flags = ["--do_train", "--do_eval", "--do_predict", "--max_steps", 60, "--learning_rate", "1e-2"]
    results = run(*flags, "--per_device_train_batch_size", 16)
    assert results["eval_f1"] == results["eval_accuracy"] == 1.0  # one word decides; untrained it is 0.4 at most
    assert set(RESULT_KEYS) <= set(results)
    assert results["zero_shot_f1"] is None and "zero_shot_accuracy" not in results
    assert results["adapter_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    of_a_stream = ("reader_bytes", "host_cpu_seconds", "space")
    others = [results[name] for name in RESULT_KEYS if name not in ("zero_shot_f1", "budget_ok", *of_a_stream)]
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in others)
    assert predictions(tmp_path) == [str(row["label"]) for row in ROWS[:5]]
    assert "predict_f1" not in results and results["predict_samples"] == 5  # its labels are not known

    (tmp_path / "out" / "predictions.txt").unlink()
    flags = ["--do_eval", "--do_predict", "--adapter", tmp_path / "out", "--test_file", tmp_path / "validation.jsonl"]
    zero_shot = run(*flags, output="again")
    for name in ("f1", "accuracy"):
        assert zero_shot[f"zero_shot_{name}"] == zero_shot[f"eval_{name}"] == zero_shot[f"predict_{name}"] == 1.0


def test_scores_are_those_of_the_predictions(run, tmp_path):
    results = run(*TRAIN, "--do_predict", "--test_file", tmp_path / "validation.jsonl", "--max_steps", 1)
    gold = [str(row["label"]) for row in ROWS[:6]]
    found = predictions(tmp_path)
    assert results["predict_f1"] == f1_score(gold, found, average="macro", zero_division=0)
    assert results["predict_accuracy"] == sum(map(str.__eq__, gold, found)) / 6


@pytest.mark.parametrize("method", ["unihyperlora", "lora", "full", "probe"])
def test_pairs_with_every_method(run, write, method):
    files = ["--train_file", write("pairs.jsonl", PAIRS), "--validation_file", write("dev.jsonl", PAIRS[:8])]
    results = run(*TRAIN, "--do_eval", *files, "--method", method)
    head = 64 * 64 + 64 + 64 * 2 + 2  # pooler and classifier
    lora = 2 * 8 * (4 * (64 + 64) + 2 * (64 + 128))
    if method != "unihyperlora":
        assert results["head_bytes"] == 4 * head
    if method in ("probe", "lora"):
        assert results["trainable_parameters"] == head + (lora if method == "lora" else 0)
    assert 0 <= results["eval_f1"] <= 1 and results["train_samples"] == len(PAIRS)


def test_the_second_text_matters(run, write):
    same = [row | {"passage": "rome"} for row in PAIRS[:8]]
    flags = ["--do_eval", "--method", "full", "--class_names", "False", "True"]
    whole, blind = (
        run(*flags, "--validation_file", write(f"{i}.jsonl", rows)) for i, rows in enumerate((PAIRS[:8], same))
    )
    assert whole["eval_loss"] != blind["eval_loss"]


def test_every_method_reads_the_same_batches(run, monkeypatch):
    batches = {}
    step = Trainer.training_step

    def noted(self, model, inputs, *args, **kwargs):
        batches[method].append((inputs["input_ids"].tolist(), inputs["labels"].tolist()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", noted)
    for method in ("unihyperlora", "probe", "lora", "full"):
        batches[method] = []
        run(*TRAIN, "--method", method, output=method)
    assert len(batches["full"]) == 4
    assert all(seen == batches["unihyperlora"] for seen in batches.values())


def test_labels_of_the_adapter_name_ids(run, tmp_path, write):
    named = [row | {"label": ("elsewhere", "home")[row["label"]]} for row in ROWS]
    run(
        *TRAIN,
        "--train_file",
        write("named.jsonl", named),
        "--validation_file",
        write("n.jsonl", named[:6]),
        output="1",
    )
    assert json.loads((tmp_path / "1" / "config.json").read_text())["tasks"]["classification"] == {
        "type": "sequence_classification",
        "labels": ["elsewhere", "home"],
        "trained": True,
    }
    by_id = run("--do_eval", "--adapter", tmp_path / "1", output="2")
    by_name = run("--do_eval", "--adapter", tmp_path / "1", "--validation_file", tmp_path / "n.jsonl", output="3")
    assert by_id["eval_loss"] == by_name["eval_loss"]


def test_csv_with_other_columns(run, tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("stars,body\n" + "".join(f'{1 + 4 * row["label"]},"{row["sentence"]}"\n' for row in ROWS))
    columns = ["--text_column_name", "body", "--label_column_name", "stars"]
    files = ["--train_file", path, "--validation_file", path, "--max_train_samples", 20, "--max_eval_samples", 7]
    results = run(*TRAIN, "--do_eval", *columns, *files)
    assert (results["train_samples"], results["eval_samples"]) == (20, 7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tasks"]["classification"]["labels"] == [
        "1",
        "5",
    ]


def test_an_adapter_holds_tags_and_sentences(run, tmp_path, write):
    tagged = write("tagged.jsonl", [{"tokens": ["anna", "in", "rome"], "ner_tags": ["B-PER", "O", "B-LOC"]}] * 8)
    ner = ["--validation_file", tagged, "--do_eval"]
    first = run(*TRAIN, *ner, "--train_file", tagged, output="1", main=run_ner.main)
    flags = [*TRAIN, "--do_eval", "--train_scope", "delta", "--task_name", "home", "--adapter", tmp_path / "1"]
    second = run(*flags, output="2", host=None)
    assert second["zero_shot_f1"] is None  # its head knew nothing yet
    tasks = json.loads((tmp_path / "2" / "config.json").read_text())["tasks"]
    assert {name: task["type"].split("_")[0] for name, task in tasks.items()} == {"ner": "token", "home": "sequence"}
    back = run(*ner, "--adapter", tmp_path / "2", output="3", host=None, main=run_ner.main)
    assert back["zero_shot_f1"] == first["eval_f1"] and back["eval_loss"] == first["eval_loss"]
    with pytest.raises(ConfigError, match="Task 'ner' is token_classification"):
        run("--do_eval", "--task_name", "ner", "--adapter", tmp_path / "2")


@pytest.fixture
def anchors(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "anchors.txt").write_text("".join(row["sentence"] + "\n" for row in ROWS * 2), encoding="utf-8")
    return tmp_path / "anchors.txt"


@pytest.fixture
def other_host(tmp_path, tokenizer) -> Path:
    shape = {"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 100}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    BertModel(config).save_pretrained(tmp_path / "h")
    tokenizer.save_pretrained(tmp_path / "h")
    return tmp_path / "h"


@pytest.fixture
def stream_flags(anchors, tiny_host, tmp_path) -> list:
    CanonicalSpace.make([str(tiny_host)], anchors, dim=16).save(tmp_path / "space.safetensors")
    space = ["--pathway", "stream", "--space", tmp_path / "space.safetensors", "--reader", "small"]
    return [*space, "--max_flops_overhead_pct", "1e6"]


def test_the_stream_is_trained_here_and_scored_there(run, tmp_path, stream_flags, other_host):
    trained = run(
        *stream_flags, "--do_train", "--do_eval", "--max_steps", 40, "--per_device_train_batch_size", 16, output="1"
    )
    assert trained["eval_f1"] > 0.9 and trained["bytes_of_reader"] == trained["reader_bytes"] > 0
    there = run("--adapter", tmp_path / "1", "--do_eval", output="2", host=other_host)
    assert there["zero_shot_f1"] == there["eval_f1"] is not None
    assert there["adapter_bytes"] == trained["adapter_bytes"]


def test_a_host_is_lined_up_on_text_as_well(run, tmp_path, write, stream_flags, other_host, tiny_host):
    tagged = write("tagged.jsonl", [{"tokens": ["anna", "in", "rome"], "ner_tags": ["B-PER", "O", "B-LOC"]}] * 8)
    ner = ["--train_file", tagged, "--validation_file", tagged, *stream_flags]
    run(*TRAIN, *ner, output="1", main=run_ner.main)
    text = tmp_path / "text.txt"  # of another kind of task, with other words
    text.write_text("rome flew to anna .\n\n" * 60, encoding="utf-8")
    new = [*TRAIN, "--task_name", "home", "--adapter", tmp_path / "1", "--max_flops_overhead_pct", "1e6"]
    run(*new, "--reader", "small", output="both")
    flags = [*TRAIN, "--do_eval", "--train_scope", "delta", "--task_name", "home", "--adapter", tmp_path / "both"]
    flags += ["--max_flops_overhead_pct", "1e6"]
    plain = run(*flags, output="2", host=other_host)
    refined = run(*flags, "--refine_file", text, "--refine_host", tiny_host, output="3", host=other_host)
    assert refined["calibration_r2"] != plain["calibration_r2"] and refined["eval_loss"] != plain["eval_loss"]
    with pytest.raises(HostError, match="not trained on"):
        run(*flags, "--refine_file", text, "--refine_host", other_host, output="4")
    rows = ROWS[6:] * 4
    text.write_text("".join(f"{row['sentence']}\n" for row in rows), encoding="utf-8")
    flags += ["--train_file", write("more.jsonl", rows)]
    by_file = run(*flags, "--refine_file", text, "--refine_host", tiny_host, output="5", host=other_host)
    by_training = run(*flags, "--refine_host", tiny_host, output="6", host=other_host)
    assert by_training["calibration_r2"] == by_file["calibration_r2"] != refined["calibration_r2"]
    tasks = [json.loads((tmp_path / output / "config.json").read_text())["tasks"] for output in "26"]
    assert [task["home"].get("refined", {}).get("words") for task in tasks] == [None, len(rows) * 5]
    assert not any("refined" in own for task in tasks for name, own in task.items() if name != "home")
    run(*flags, "--adapter", tmp_path / "6", output="7", host=other_host)  # tuned on, and now on the anchors' map
    assert "refined" not in json.loads((tmp_path / "7" / "config.json").read_text())["tasks"]["home"]


@pytest.mark.parametrize("method", ["unihyperlora", "lora"])
def test_in_bfloat16_on_the_cpu(run, method):
    results = run(*TRAIN, "--do_eval", "--bf16", "--method", method)
    assert math.isfinite(results["eval_loss"])


# ---- refusals: one clear error, nothing written ----


def test_a_row_without_a_label_is_named_before_the_number_of_labels(run, tmp_path):
    (tmp_path / "half.csv").write_text("text,label\nword1 word2,a\nword3 word4,\n")
    with pytest.raises(DataError, match=r"half.csv.* has no label\. Label every example"):
        run(*TRAIN, "--train_file", tmp_path / "half.csv")


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        (["--text_column_name", "body"], DataError, "no column 'body'; it has sentence, label"),
        (["--text_column_name", "sentence", "--text_pair_column_name", "b"], DataError, "no column 'b'; it has"),
        (["--text_pair_column_name", "sentence"], DataError, "needs --text_column_name"),
        (["--label_column_name", "stars"], DataError, "no column 'stars'"),
        (["--text_column_name", "label"], DataError, "'label' must be a string, not '1'"),
        (["--class_names", "no"], DataError, "id 1 is outside the 1 labels: no"),
        (["--max_train_samples", "1"], DataError, "At least two labels are needed; found: 1. .* --class_names"),
        (["--train_file", "missing.csv"], DataError, "missing.csv cannot be read"),
        (["--max_seq_length", "2"], ConfigError, "leaves no room"),
        (["--tag_names", "no", "yes"], ConfigError, "Unknown argument --tag_names. The nearest flag is"),
    ],
)
def test_bad_arguments(run, tmp_path, flags, error, expected):
    with pytest.raises(error, match=expected):
        run(*TRAIN, *flags)
    assert not (tmp_path / "out").exists()


def test_label_sets_that_differ(run, tmp_path, write):
    other = write("other.jsonl", [{"sentence": "anna", "label": 7}])
    with pytest.raises(DataError, match="other.jsonl, line 1: label '7' is not in the label set of this run: 0, 1"):
        run(*TRAIN, "--do_eval", "--validation_file", other)
    run(*TRAIN, output="1")
    with pytest.raises(DataError, match="label '7' .* label set of task 'classification' of the adapter: 0, 1"):
        run("--do_eval", "--adapter", tmp_path / "1", "--validation_file", other)


@pytest.mark.slow
def test_as_a_command(tiny_host, tmp_path, write):
    files = ["--train_file", write("train.jsonl", ROWS), "--validation_file", write("dev.jsonl", ROWS[:4])]
    flags = ["--model_name_or_path", tiny_host, "--do_train", "--do_eval", "--max_steps", 2, "--use_cpu", *files]
    flags += ["--pathway", "inject", "--max_flops_overhead_pct", 100, "--output_dir", tmp_path / "out"]
    command = [sys.executable, "scripts/run_classification.py", *flags]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["adapter_bytes"] > 0
