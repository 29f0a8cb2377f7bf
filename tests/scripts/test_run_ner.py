"""scripts/run_ner.py from end to end on a tiny host: its output, and its errors for bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, Trainer

from modeling_unihyperlora import BudgetError, CanonicalSpace, ConfigError, DataError, HostError, UniHyperLoraError
from scripts import run_ner
from trainers.arguments import NerArguments
from trainers.baselines import BASELINES
from trainers.results import RESULT_KEYS, write_results
from trainers.running import next_steps

REPOSITORY = Path(__file__).parents[2]
PEOPLE, PLACES = ("anna", "ben", "carla", "david"), ("paris", "rome", "oslo", "lima")
ROWS = [
    (f"{person} flew from {start} to {end} .".split(), "B-PER O O B-LOC O B-LOC O".split())
    for person in PEOPLE
    for start in PLACES
    for end in PLACES
    if start != end
]
TEST_ROWS = [([], []), (["Rome", "\x00", "."], ["B-LOC", "O", "O"]), (["anna"] * 100, ["B-PER"] * 100)]


@pytest.fixture
def data(write_jsonl) -> dict[str, str]:
    return {
        "--train_file": str(write_jsonl("train.jsonl", ROWS[4:])),
        "--validation_file": str(write_jsonl("validation.jsonl", ROWS[:4])),
        "--test_file": str(write_jsonl("test.jsonl", TEST_ROWS)),
    }


@pytest.fixture
def run(tiny_host, tmp_path, data):
    """run("--do_train", …, output="first") → all_results.json of that run."""

    def go(*flags: str, output: str = "out", host: Path | None = tiny_host) -> dict:
        folder = tmp_path / output
        where = ["--output_dir", str(folder), "--use_cpu", "--disable_tqdm", "true"]
        where += TINY
        where += ["--model_name_or_path", str(host)] if host else []
        if not {"--pathway", "--adapter", "sat_lora", *BASELINES, "--run_config"} & set(flags):
            where += ["--pathway", "inject"]  # which needs no anchors; TestStream has the default
        results = run_ner.main([*where, *(part for pair in data.items() for part in pair), *map(str, flags)])
        assert json.loads((folder / "all_results.json").read_text()) == results
        return results

    go.host, go.files = str(tiny_host), [part for pair in data.items() for part in pair]
    return go


TINY = ["--max_flops_overhead_pct", "100"]  # beside so small a host any adapter is large
MANY = ["--max_flops_overhead_pct", "1e6", "--per_device_train_batch_size", 8]  # for a stream
TRAIN = ("--do_train", "--per_device_train_batch_size", 8, "--max_steps", 4, "--learning_rate", "1e-2")


def test_it_learns_and_writes_what_the_contract_names(run, tmp_path):
    flags = ["--do_train", "--do_eval", "--do_predict", "--max_steps", 60, "--learning_rate", "1e-2"]
    results = run(*flags, "--per_device_train_batch_size", 16, "--return_entity_level_metrics")
    assert results["eval_f1"] > 0.9  # a word's tag depends on the word alone; untrained it is near 0
    assert set(RESULT_KEYS) <= set(results)
    assert results["zero_shot_f1"] is None
    assert results["adapter_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert results["delta_bytes"] == 512
    assert results["budget_ok"] in (True, False)
    of_a_stream = ("reader_bytes", "host_cpu_seconds", "space")
    assert [results[name] for name in of_a_stream] == [None] * 3
    others = [results[name] for name in RESULT_KEYS if name not in ("zero_shot_f1", "budget_ok", *of_a_stream)]
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in others)
    assert "eval_PER_f1" in results

    lines = (tmp_path / "out" / "predictions.txt").read_text().split("\n")
    assert [len(line.split()) for line in lines] == [0, 3, 100, 0]  # the last is the end of the file
    assert set(" ".join(lines).split()) <= {"O", "B-LOC", "B-PER"}
    rows = [json.loads(row) for row in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [words for words, _ in TEST_ROWS]
    assert [" ".join(row["ner_tags"]) for row in rows] == lines[:-1]


def test_a_run_says_where_the_adapter_is_and_what_to_type(run, tmp_path, caplog):
    """And nothing of pinned memory, special tokens, or weights that the encoder does not need."""
    with caplog.at_level("INFO"):
        run(*TRAIN)
    said = caplog.records[-1].getMessage()
    folder = tmp_path / "out"
    assert said.startswith(f"The adapter is the folder {folder};")
    assert f"unihyperlora tag {folder} " in said and f"unihyperlora inspect {folder}" in said
    assert "ANOTHER_HOST" not in said  # an injected update stays where it is
    assert "--host ANOTHER_HOST" in next_steps("ner", "runs/x", moves=True)


def test_a_run_warns_of_nothing(tiny_host, data, tmp_path):
    """In a process of its own: torch and transformers warn once a process."""
    model = BertForMaskedLM.from_pretrained(tiny_host)  # has weights that the encoder lacks, and lacks the pooler's
    model.save_pretrained(tmp_path / "host")
    AutoTokenizer.from_pretrained(tiny_host).save_pretrained(tmp_path / "host")
    flags = [*map(str, TRAIN), *TINY, "--pathway", "inject", "--disable_tqdm", "true"]
    flags += ["--max_seq_length", "64"]
    where = ["--model_name_or_path", str(tmp_path / "host"), "--output_dir", str(tmp_path / "out")]
    files = ["--train_file", data["--train_file"]]
    command = [sys.executable, "scripts/run_ner.py", *flags, *where, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    log = done.stderr.splitlines()
    assert any("What to type next" in line for line in log)
    assert [line for line in log if any(sign in line for sign in ("WARNING", "Warning", "[transformers]", "%|"))] == []


def test_sat_lora_is_trained_saved_and_scored_again(run, tmp_path):
    flags = ["--do_eval", "--method", "sat_lora"]
    own = ["--lora_r", 4, "--share_across_layers", "false", "--target_modules", "q_proj", "ffn_down"]
    results = run("--do_train", *flags, *own, "--max_steps", 60, "--learning_rate", "1e-2", output="first")
    assert results["eval_f1"] > 0.9 and results["delta_bytes"] is None
    assert results["adapter_bytes"] == (tmp_path / "first" / "model.safetensors").stat().st_size
    again = run(*flags, "--adapter", tmp_path / "first", output="second")
    assert again["eval_f1"] == again["zero_shot_f1"] == results["eval_f1"]
    with pytest.raises(ConfigError, match="is of --method sat_lora, not unihyperlora"):
        run("--do_eval", "--adapter", tmp_path / "first", output="third")


def test_another_run_continues_from_the_adapter(run, tmp_path):
    first = run(*TRAIN, "--do_eval", output="first")
    zero_shot = run("--do_eval", "--adapter", tmp_path / "first", output="second")
    assert zero_shot["eval_f1"] == zero_shot["zero_shot_f1"] == first["eval_f1"]
    assert zero_shot["zero_shot_accuracy"] == first["eval_accuracy"]
    assert zero_shot["adapter_bytes"] == first["adapter_bytes"]
    assert zero_shot["train_runtime"] is None

    flags = [*TRAIN, "--do_eval", "--adapter", tmp_path / "first", "--train_scope", "delta"]
    delta = run(*flags, "--delta_learning_rate", 0.2, output="third", host=None)  # more than one of δθ's 4-bit steps
    assert delta["zero_shot_f1"] == first["eval_f1"]
    assert delta["trainable_parameters"] == 8 * 128
    assert delta["zero_shot_loss"] != delta["eval_loss"]  # it did train


def test_delta_that_does_harm_gives_back_what_it_got(run, tmp_path):
    learnt = run(*TRAIN, "--max_steps", 40, "--do_eval", output="first")
    each_step = (
        "--eval_strategy steps --eval_steps 1 --save_steps 1 --load_best_model_at_end --metric_for_best_model f1"
    )
    flags = [*TRAIN, "--do_eval", "--adapter", tmp_path / "first", "--train_scope", "delta", *each_step.split()]
    delta = run(*flags, "--delta_learning_rate", 1e4, output="second")
    assert delta["eval_f1"] == delta["zero_shot_f1"] == learnt["eval_f1"] > 0.5
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    latest = load_file(tmp_path / "second" / "checkpoint-4" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], latest[name])} == {"tasks.ner.delta"}


def test_a_new_task_gets_its_own_head(run, tmp_path, write_jsonl):
    run(*TRAIN, output="first")
    other = write_jsonl("other.jsonl", [(["rome", "lives"], ["B-CITY", "O"])] * 8)
    files = ["--train_file", other, "--validation_file", other, "--test_file", other]
    flags = [*TRAIN, "--adapter", tmp_path / "first", "--train_scope", "delta", *files]
    results = run(*flags, "--do_eval", "--task_name", "cities", output="second")
    assert results["zero_shot_f1"] is None  # its head knew nothing yet
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert {name: task["labels"] for name, task in config["tasks"].items()} == {
        "ner": ["O", "B-LOC", "B-PER"],
        "cities": ["O", "B-CITY"],
    }


def test_ids_are_named_by_the_adapter(run, tmp_path, write_jsonl):
    run(*TRAIN, output="first")
    ids = write_jsonl("ids.jsonl", [(["rome", "anna"], [1, 2])])
    results = run("--do_eval", "--adapter", tmp_path / "first", "--validation_file", ids, output="second")
    named = write_jsonl("named.jsonl", [(["rome", "anna"], ["B-LOC", "B-PER"])])
    again = run("--do_eval", "--adapter", tmp_path / "first", "--validation_file", named, output="third")
    assert results["eval_loss"] == again["eval_loss"]


def test_resuming_ends_like_an_uninterrupted_run(run, tmp_path):
    flags = ["--do_train", "--do_eval", "--per_device_train_batch_size", 8, "--learning_rate", "1e-2"]
    flags += ["--lr_scheduler_type", "constant", "--save_steps", 3]
    whole = run(*flags, "--max_steps", 6, output="whole")
    run(*flags, "--max_steps", 3, output="parts")
    resumed = run(*flags, "--max_steps", 6, "--resume_from_checkpoint", "true", output="parts")
    assert resumed["eval_loss"] == whole["eval_loss"]
    parts, at_once = (load_file(tmp_path / folder / "model.safetensors") for folder in ("parts", "whole"))
    assert parts.keys() == at_once.keys()
    assert all(torch.equal(parts[name], at_once[name]) for name in parts)


HEAD = 64 * 3 + 3
LORA = 2 * 8 * (4 * (64 + 64) + 2 * (64 + 128))  # two blocks, rank 8, the widths on both sides of a block's layers


@pytest.mark.parametrize(
    ("method", "trained", "files"),
    [
        ("probe", HEAD, {"model.safetensors"}),
        ("lora", HEAD + LORA, {"adapter_model.safetensors", "adapter_config.json"}),
        ("full", None, {"model.safetensors"}),
    ],
)
def test_a_baseline_trains_what_it_says(run, tiny_host, tmp_path, method, trained, files):
    results = run(*TRAIN, "--do_eval", "--do_predict", "--save_strategy", "no", "--method", method)
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    if method == "full":
        host = load_file(tiny_host / "model.safetensors")
        trained = HEAD + sum(x.numel() for name, x in host.items() if not name.startswith("pooler."))
        after = load_file(tmp_path / "out" / "model.safetensors")
        unmoved = [name for name, x in host.items() if torch.equal(after.get("bert." + name, x + 1), x)]
        assert not unmoved
    assert results["trainable_parameters"] == trained
    assert results["head_bytes"] == 4 * HEAD
    assert (results["adapter_bytes"] is not None) == (method != "probe")
    if method == "lora":
        assert 4 * LORA < results["adapter_bytes"] < 4 * LORA + 8000
    for name in ("delta_bytes", "active_atoms_per_token", "zero_shot_f1", "budget_ok"):
        assert results[name] is None
    assert (results["flops_overhead_pct"] is not None) == (method == "lora")
    assert results["train_runtime"] > 0 and results["eval_accuracy"] >= 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_baseline_resumes_like_an_uninterrupted_run(run, method):
    flags = ["--do_train", "--do_eval", "--per_device_train_batch_size", 8, "--method", method]
    flags += ["--lr_scheduler_type", "constant", "--save_steps", 2]
    whole = run(*flags, "--max_steps", 4, output="whole")
    run(*flags, "--max_steps", 2, output="parts")
    resumed = run(*flags, "--max_steps", 4, "--resume_from_checkpoint", "true", output="parts")
    assert resumed["eval_loss"] == whole["eval_loss"]


def test_every_method_reads_the_same_batches(run, monkeypatch):
    batches = {}
    step = Trainer.training_step

    def noted(self, model, inputs, *args, **kwargs):
        batches[method].append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", noted)
    for method in ("unihyperlora", "probe", "lora", "full"):
        batches[method] = []
        run(*TRAIN, "--method", method, "--save_strategy", "no", output=method)
    assert len(batches["full"]) == 4
    assert all(seen == batches["unihyperlora"] for seen in batches.values())


@pytest.mark.parametrize(
    ("method", "flags", "rate"),
    [
        ("unihyperlora", [], 5e-3),
        ("probe", [], 5e-3),
        ("probe", ["--head_learning_rate", "0.02"], 0.02),
        ("lora", [], 1e-3),
        ("full", [], 5e-5),
        ("lora", ["--learning_rate", "0.01"], 0.01),
        ("full", ["--learning_rate", "0.005"], 0.005),
    ],
)
def test_each_method_has_its_learning_rate(run, tmp_path, method, flags, rate):
    run("--do_train", "--max_steps", 1, "--save_strategy", "no", "--method", method, *flags)
    assert json.loads((tmp_path / "out" / "run_arguments.json").read_text())["learning_rate"] == rate


def test_figures_that_are_not_finite_become_null(tmp_path):
    write_results(tmp_path, {"eval_f1": math.nan, "train_loss": math.inf, "epoch": 1.5})
    written = json.loads((tmp_path / "all_results.json").read_text(), parse_constant=pytest.fail)
    assert (written["eval_f1"], written["train_loss"], written["epoch"], written["delta_bytes"]) == (
        None,
        None,
        1.5,
        None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]])
def test_as_a_command(tiny_host, data, tmp_path, launcher):
    files = [part for pair in data.items() for part in pair]
    flags = [
        "--model_name_or_path",
        tiny_host,
        "--do_train",
        "--do_eval",
        "--max_steps",
        "2",
        "--use_cpu",
        *files,
        *TINY,
        *("--pathway", "inject"),
    ]
    command = [sys.executable, *launcher, "scripts/run_ner.py", *flags, "--output_dir", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["adapter_bytes"] > 0


@pytest.mark.slow
def test_a_refusal_is_one_line(tmp_path):
    command = [sys.executable, "scripts/run_ner.py", "--do_eval", "--output_dir", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("run_ner: No host: give --model_name_or_path")
    assert "Traceback" not in done.stderr


# ---- schemes, long sentences, text without tags ----


def iob1(rows: list[tuple]) -> list[tuple]:
    """The rows in IOB1; no two entities are adjacent."""
    return [(words, [tag.replace("B-", "I-") for tag in tags]) for words, tags in rows]


def files(write_jsonl, train: list[tuple], validation: list[tuple]) -> list:
    return [
        "--train_file",
        write_jsonl("own-train.jsonl", train),
        "--validation_file",
        write_jsonl("own-dev.jsonl", validation),
    ]


def task_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["tasks"]["ner"]


def test_the_scheme_is_kept_with_the_task_and_obeyed(run, tmp_path, write_jsonl):
    pair = (["anna", "ben"], ["I-PER", "B-PER"])  # two people side by side
    own = files(write_jsonl, iob1(ROWS[4:]) + [pair] * 20, iob1(ROWS[:4]) + [pair])
    flags = ["--do_train", "--do_eval", "--max_steps", 60, "--learning_rate", "1e-2"]
    first = run(*flags, "--per_device_train_batch_size", 16, *own, output="first")
    assert first["eval_f1"] > 0.9  # read as IOB2 no entity could begin
    assert task_of(tmp_path / "first")["scheme"] == "IOB1"
    again = run("--do_eval", "--adapter", tmp_path / "first", *own, output="again")
    assert again["eval_f1"] == again["zero_shot_f1"] == first["eval_f1"]
    with pytest.raises(DataError, match="--tag_scheme IOB2: the task of the adapter is IOB1"):
        run("--do_eval", "--adapter", tmp_path / "first", "--tag_scheme", "IOB2", *own, output="x")
    run("--do_train", "--max_steps", 1, output="second")
    assert task_of(tmp_path / "second")["scheme"] == "IOB2"
    run("--do_train", "--max_steps", 1, "--tag_scheme", "IOB1", output="third")
    assert task_of(tmp_path / "third")["scheme"] == "IOB1"


@pytest.mark.parametrize("method", ["full", "unihyperlora"])
def test_a_long_entity_is_found_whole_in_short_windows(run, write_jsonl, method):
    people = [([name] * 12 + ["."], ["B-PER"] + ["I-PER"] * 11 + ["O"]) for name in PEOPLE] * 8
    own = files(write_jsonl, people, people[:4])
    flags = ["--do_train", "--do_eval", "--max_steps", 100, "--learning_rate", "3e-3", "--method", method]
    flags += ["--pathway", "inject"] if method == "unihyperlora" else []
    cut, whole = (
        run(*flags, "--per_device_train_batch_size", 8, *own, "--max_seq_length", length, output=f"at-{length}")
        for length in (8, 64)
    )
    assert whole["eval_f1"] == 1 and cut["eval_f1"] == 1


def test_text_without_tags_is_tagged(run, tmp_path, write_jsonl):
    run(*TRAIN, output="first")
    (tmp_path / "bare.txt").write_text("Anna\nflew\n\nrome\n")
    results = run("--do_predict", "--adapter", tmp_path / "first", "--test_file", tmp_path / "bare.txt", output="bare")
    lines = (tmp_path / "bare" / "predictions.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [2, 1]
    assert results["predict_samples"] == 2 and "predict_f1" not in results and "predict_loss" not in results
    tagged = write_jsonl("tagged.jsonl", [(["Anna", "flew"], ["B-PER", "O"]), (["rome"], ["B-LOC"])])
    run("--do_predict", "--adapter", tmp_path / "first", "--test_file", tagged, output="tagged")
    assert (tmp_path / "tagged" / "predictions.txt").read_text().splitlines() == lines


def test_every_sub_token_is_trained_on_if_asked_for(run, write_jsonl):
    rows = [(["supercalifragilistic", "lives"], ["B-PER", "O"])] * 8 + [(["anna"], ["I-PER"])]
    own = files(write_jsonl, rows, rows)
    first, further = (
        run("--do_train", "--max_steps", 2, "--method", "full", *own, *flags, output=name)
        for name, flags in (("first", []), ("further", ["--label_all_tokens"]))
    )
    assert first["train_loss"] != further["train_loss"]


# ---- refusals: one clear error, nothing written ----


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        (["--method", "sat_lora", "--train_scope", "delta"], ConfigError, "has no δθ"),
        (["--method", "sat_lora", "--pathway", "stream"], ConfigError, "--method sat_lora does not use --pathway"),
        (["--method", "sat_lora", "--target_modules", "qkv"], ConfigError, r"target_modules=\['qkv'\]"),
        (["--share_across_layers", "true"], ConfigError, "does not use --share_across_layers"),
        (["--method", "magic"], ConfigError, "--method magic is unknown"),
        (["--n_trials", "3"], ConfigError, "give --do_search with it"),
        (["--train_scope", "delta"], ConfigError, "give --adapter"),
        (["--train_scope", "source"], SystemExit, "2"),
        (["--pathway", "both"], ConfigError, "pathway='both' is not allowed; choose 'stream' or 'inject'"),
        (["--pathway", "stream", "--atoms", "3"], ConfigError, "--atoms is for an injected update"),
        (["--pathway", "stream", "--router_top_k", "3"], ConfigError, "--router_top_k is for an injected update"),
        (["--pathway", "stream", "--reader", "huge"], ConfigError, "reader='huge' is not allowed; .* small, medium"),
        (["--pathway", "stream", "--reader_bits", "3"], ConfigError, "bits=3 of the reader"),
        (["--pathway", "stream", "--space", "a", "--anchor_file", "b"], ConfigError, "--anchor_file .*not both"),
        (["--pathway", "stream", "--space", "no.safetensors"], UniHyperLoraError, "no.safetensors"),
        (["--fidelity", "1.5"], ConfigError, "fidelity=1.5 is not allowed; it must be a number from 0 to 1"),
        (["--reader_learning_rate", "1"], ConfigError, "reader_learning_rate is not read: .* pathway 'inject'"),
        (["--method", "probe", "--adapter", "x"], ConfigError, "leave --adapter out"),
        (["--method", "lora", "--adapter", "x"], ConfigError, "leave --adapter out"),
        (["--method", "lora", "--lora_r", "0"], ConfigError, "--lora_r 0"),
        (["--method", "full", "--head_learning_rate", "1"], ConfigError, "leave --head_learning_rate out"),
        (["--dataset_name", "conll2003"], DataError, "not both"),
        (["--text_column_name", "words"], DataError, "no column 'words'; it has tokens, ner_tags"),
        (["--train_file", "missing.jsonl"], DataError, "missing.jsonl cannot be read"),
        (["--tag_names", "O", "B-PER"], DataError, "tag 'B-LOC' of word 3 is not in the label set of this run"),
        (["--max_train_samples", "0"], ConfigError, "--max_train_samples 0"),
        (["--hidden_size", "768"], ConfigError, "states hidden_size 768, but the host .* has 64"),
        (["--num_layers", "6"], ConfigError, "states num_layers 6, but the host .* has 2"),
        (["--max_seq_length", "2"], ConfigError, "leaves no room"),
        (["--router_top_k", "9"], ConfigError, "router_top_k=9"),
        (["--model_name_or_path", "no/such-host"], UniHyperLoraError, "no/such-host"),
        (["--max_adapter_bytes", "1000"], BudgetError, "1,000 allowed.*anchor_dim"),
        (["--max_adapter_bytes", "1000", "--method", "sat_lora"], BudgetError, "--lora_r"),
        (["--adapter", "no/such-adapter"], UniHyperLoraError, "no/such-adapter"),
        (["--resume_from_checkpoint", "nowhere"], ConfigError, "no such checkpoint"),
        (["--train_sampling_strategy", "group_by_length", "--do_eval"], ConfigError, "group_by_length"),
        (["--source_hosts", "another", "--pathway", "inject"], ConfigError, "--source_hosts names further hosts"),
        (["--refine_file", "text.txt"], ConfigError, "--refine_file needs --refine_host"),
        (["--refine_host", "a"], ConfigError, "--refine_host aligns one more host"),
        (["--refine_host", "a", "--adapter", "b"], ConfigError, "train with --train_scope delta or not at all"),
        (["--refine_host", "a", "--do_train", "false", "--do_eval"], ConfigError, "add --refine_file TEXT"),
        (["--config_name", "x"], ConfigError, "--config_name is not supported: a host is frozen"),
        (
            ["--preprocessing_num_workers=4"],
            ConfigError,
            "--preprocessing_num_workers is not supported: .* RAYON_NUM",
        ),
        (["--overwrite_cache"], ConfigError, "--overwrite_cache is not supported: .* Leave it out"),
        (["--group_by_length"], ConfigError, "--group_by_length is not supported: its name is --train_sampling_str"),
        (["--warmup_ratio", "0.1"], ConfigError, "--warmup_ratio is not supported: --warmup_steps below 1 is a share"),
        (["--evaluation_strategy=steps"], ConfigError, "its name is --eval_strategy now"),
        (["--tag_scheme", "BIO"], ConfigError, "--tag_scheme BIO is unknown. Choose one of IOB1, IOB2, IOBES"),
        (["--tag_scheme", "IO"], DataError, "not of the scheme IO"),
        (["--tag_names", "O", "B-PER", "B-LOC", "B-LOC"], DataError, "name 'B-LOC' twice"),
        (["--tag_names", "O", "B-PER", "B-LOC", "B-a b"], DataError, "'B-a b' is empty or has a space"),
        (["--warmup_steps", "x"], SystemExit, "2"),
        (["--learning_rat", "1"], ConfigError, "Unknown argument --learning_rat. The nearest flag is --learning_rate"),
        (["--metric_for_best_model", "f2", "--do_eval"], ConfigError, "precision, recall, f1, accuracy, loss, active"),
        (
            ["--metric_for_best_model", "PER_f1", "--do_eval"],
            ConfigError,
            "does not report --metric_for_best_model PER",
        ),
        (["--report_to", "clearml"], ConfigError, "report_to clearml needs its package"),
        (["--optim", "adamw_bnb_8bit"], ConfigError, "install `bitsandbytes`"),
        (["--use_liger_kernel"], ConfigError, "use_liger_kernel"),
        (["--batch_eval_metrics"], ConfigError, "--batch_eval_metrics: F1 is computed on a whole split"),
        (["--eval_do_concat_batches", "false"], ConfigError, "--eval_do_concat_batches false: F1 is computed on"),
        (["--include_for_metrics", "inputs"], ConfigError, "--include_for_metrics: no metric"),
        (["--prediction_loss_only", "true", "--do_predict"], ConfigError, "leaves nothing for --do_predict to write"),
        (["--neftune_noise_alpha", "5"], ConfigError, "would change nothing"),
        (["--dataloader_drop_last", "--per_device_train_batch_size", "99"], ConfigError, "one batch takes 99"),
        (["--max_steps", "0"], ConfigError, "--max_steps 0 trains nothing"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], ConfigError, "--num_train_epochs 0.0 trains nothing"),
        (["--lr_scheduler_kwargs", "{bad"], ConfigError, "The arguments cannot be used: Expecting property name"),
        (["--deepspeed", "none.json"], ConfigError, "The arguments cannot be used"),
        (["--method", "probe", "--pathway", "stream"], ConfigError, "--method probe does not use --pathway"),
        (["--method", "lora", "--atoms", "3"], ConfigError, "--method lora does not use --atoms"),
        (["--method", "full", "--train_scope", "delta"], ConfigError, "--method full has no δθ"),
        (["--pathway", "inject", "--reader", "small"], ConfigError, "--reader is for a new stream"),
        (["--adapter", "x", "--anchor_file", "y"], ConfigError, "--anchor_file is for a new stream"),
    ],
)
def test_bad_arguments(run, tmp_path, flags, error, expected):
    with pytest.raises(error, match=expected):
        run(*TRAIN, *flags)
    assert not (tmp_path / "out").exists()


def test_a_used_output_folder_is_overwritten_only_where_it_is_asked_for(run, tmp_path):
    run(*TRAIN, "--save_steps", 2, output="out")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    for flags in (["--method", "lora"], [], ["--adapter", tmp_path / "out"]):
        with pytest.raises(ConfigError, match="holds another training .*--overwrite_output_dir"):
            run(*TRAIN, *flags)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    run("--do_eval", "--adapter", tmp_path / "out")  # which overwrites no weights
    run(*TRAIN, "--save_steps", 3, "--max_steps", 3, "--overwrite_output_dir")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    run(*TRAIN, "--save_strategy", "no", "--overwrite_output_dir")
    with pytest.raises(ConfigError, match="holds another training"):
        run(*TRAIN, "--resume_from_checkpoint", "true")  # from nothing: it would begin anew


def test_a_baseline_does_not_resume_from_an_adapters_checkpoint(run, tmp_path):
    run(*TRAIN, "--save_steps", 2, output="first")
    checkpoint = tmp_path / "first" / "checkpoint-2"
    for method in ("probe", "lora"):
        with pytest.raises(ConfigError, match="The checkpoint belongs to another model or --method"):
            run(*TRAIN, "--method", method, "--resume_from_checkpoint", checkpoint, output=method)


def test_the_metrics_that_are_named_are_those_of_an_evaluation(run):
    results = run("--do_train", "--do_eval", "--max_steps", 1)
    metrics = {*NerArguments.METRICS, "loss", "active_atoms_per_token"}
    assert metrics <= {name.removeprefix("eval_") for name in results if name.startswith("eval_")}
    with_loss_alone = run("--do_train", "--do_eval", "--max_steps", 1, "--prediction_loss_only", "true", output="2")
    assert with_loss_alone["eval_f1"] is None and with_loss_alone["eval_loss"] == results["eval_loss"]


def test_data_are_predicted_whole_where_training_drops_the_last_batch(run, tmp_path):
    run("--do_train", "--do_predict", "--max_steps", 1, "--dataloader_drop_last", "--per_device_eval_batch_size", 2)
    assert len((tmp_path / "out" / "predictions.txt").read_text().splitlines()) == len(TEST_ROWS)


def test_nothing_to_do(run):
    with pytest.raises(ConfigError, match="Nothing to do"):
        run()


@pytest.mark.parametrize("place", ["", "below/it"])
def test_an_output_folder_that_cannot_be_made(run, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be created: .*file is a file"):
        run(*TRAIN, output=f"file/{place}".rstrip("/"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody may write")
def test_an_output_folder_that_cannot_be_written(run):
    with pytest.raises(ConfigError, match="cannot be written .* at /proc"):
        run_ner.main([*run.files, "--model_name_or_path", run.host, "--do_train", "--output_dir", "/proc/x"])
    with pytest.raises(ConfigError, match="has no name"):
        run_ner.main([*run.files, "--model_name_or_path", run.host, "--do_train", "--output_dir", ""])


def test_labels_that_the_adapter_does_not_have(run, tmp_path, write_jsonl):
    run(*TRAIN, output="first")
    other = write_jsonl("other.jsonl", [(["rome"], ["B-CITY"])])
    with pytest.raises(DataError, match="tag 'B-CITY' .* label set of task 'ner' of the adapter: O, B-LOC, B-PER"):
        run("--do_eval", "--adapter", tmp_path / "first", "--validation_file", other)
    with pytest.raises(DataError, match="does not have: B-X"):
        run("--do_eval", "--adapter", tmp_path / "first", "--tag_names", "O", "B-X")


def test_an_injected_update_warns_on_a_host_that_it_was_not_trained_on(run, tiny_host, tmp_path, tokenizer, caplog):
    run(*TRAIN, output="first")
    run("--do_eval", "--adapter", tmp_path / "first", output="same")
    assert "does not transfer" not in caplog.text
    other = tmp_path / "other"
    BertModel(BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=64)).save_pretrained(
        other
    )
    tokenizer.save_pretrained(other)
    flags = [*TRAIN, "--adapter", tmp_path / "first", "--max_steps", 1]
    run(*flags, "--max_flops_overhead_pct", 1e6, output="second", host=other)
    assert "not trained on " + str(other) in caplog.text and "pathway='stream'" in caplog.text
    caplog.clear()
    run("--do_eval", "--adapter", tmp_path / "second", output="third", host=other)  # by now it was
    assert "does not transfer" not in caplog.text


def test_flags_that_contradict_the_adapter(run, tmp_path):
    run(*TRAIN, output="first")
    with pytest.raises(ConfigError, match="--atoms 64 contradicts the adapter .* atoms 128"):
        run("--do_eval", "--adapter", tmp_path / "first", "--atoms", 64)


def test_a_tokenizer_that_is_not_the_hosts(run, tiny_host, tmp_path):
    BertModel(BertConfig(vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(
        tmp_path / "small"
    )
    with pytest.raises(HostError, match="it is not the host's"):
        run(*TRAIN, "--tokenizer_name", tiny_host, host=tmp_path / "small")


def test_labels_that_nothing_names(run):
    with pytest.raises(DataError, match="--tag_names"):
        run("--do_eval")


def test_a_run_config_for_another_host(run):
    with pytest.raises(ConfigError, match="states hidden_size 768, but the host .* has 64"):
        config = REPOSITORY / "hub_configs" / "runs" / "proposed-iter1-CoNLL-2003.yaml"
        run("--run_config", config, "--train_scope", "task", "--do_train")


class TestStream:
    """--pathway stream: trained on cached states of one host, scored on a host of another shape."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture
    def flags(self, tmp_path, tiny_host, cache):
        anchors = tmp_path / "anchors.txt"
        anchors.write_text("".join(" ".join(words) + "\n" for words, _ in ROWS), encoding="utf-8")
        CanonicalSpace.make([str(tiny_host)], anchors, dim=16).save(tmp_path / "space.safetensors")
        space = ["--pathway", "stream", "--space", tmp_path / "space.safetensors", "--reader", "small"]
        return [*space, *MANY]

    @pytest.fixture
    def other_host(self, tmp_path, tokenizer) -> Path:
        folder = tmp_path / "wider"
        shape = {"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 100}
        torch.manual_seed(1)
        BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def test_one_file_is_trained_here_and_scored_there(self, run, flags, tmp_path, other_host):
        trained = run(*flags, "--do_train", "--do_eval", "--max_steps", 60, output="here")
        assert trained["eval_f1"] > 0.9 and trained["zero_shot_f1"] is None
        assert trained["bytes_of_reader"] == trained["reader_bytes"] > 0 and trained["bytes_of_space"] > 0
        assert trained["host_cpu_seconds"] >= 0 and trained["active_atoms_per_token"] is None
        assert trained["space"] == f"own 1 {CanonicalSpace.load(tmp_path / 'space.safetensors').digest}"
        weights = (tmp_path / "here" / "model.safetensors").read_bytes()
        there = run("--adapter", tmp_path / "here", "--do_eval", output="there", host=other_host)
        assert there["zero_shot_f1"] == there["eval_f1"] is not None
        assert there["adapter_bytes"] == len(weights)
        assert (there["space"], there["reader_bytes"]) == (trained["space"], trained["reader_bytes"])
        assert (tmp_path / "here" / "model.safetensors").read_bytes() == weights
        again = run("--adapter", tmp_path / "here", "--do_eval", "--cache_eval_states", output="again")
        assert again["eval_f1"] == trained["eval_f1"]
        assert again["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-3)  # its states are in half precision

    def test_delta_is_tuned_to_another_host(self, run, flags, tmp_path, other_host):
        run(*flags, "--do_train", "--max_steps", 60, output="here")
        there = ["--adapter", tmp_path / "here", "--do_eval"]
        untouched = run(*there, "--cache_eval_states", output="there", host=other_host)
        tune = [*there, *MANY, "--do_train", "--train_scope", "delta", "--max_steps", 60, "--learning_rate", "2e-2"]
        tuned = run(*tune, "--cache_eval_states", output="tuned", host=other_host)
        assert tuned["zero_shot_f1"] == untouched["eval_f1"] and tuned["zero_shot_loss"] == untouched["eval_loss"]
        assert tuned["eval_loss"] < untouched["eval_loss"]
        assert tuned["trainable_parameters"] == 8 * 128 and tuned["delta_bytes"] == 512
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("here", "tuned"))
        assert {name for name in after if not torch.equal(before[name], after[name])} == {"tasks.ner.delta"}
        hosts = json.loads((tmp_path / "tuned" / "config.json").read_text())["source_hosts"]
        assert [host["name"] for host in hosts] == [run.host]  # δθ makes no host a source

    def test_a_second_task_gets_a_reader_of_its_own(self, run, flags, tmp_path, write_jsonl, other_host):
        first = run(*flags, "--do_train", "--do_eval", "--max_steps", 60, output="first")
        rows = [(words, ["B-CITY" if tag == "B-LOC" else "O" for tag in tags]) for words, tags in ROWS]
        cities = files(write_jsonl, rows[4:], rows[:4])
        add = ["--adapter", tmp_path / "first", "--task_name", "cities", *cities, *MANY, "--do_train"]
        with pytest.raises(ConfigError, match="'cities' is new: its reader was never trained"):
            run(*add, "--train_scope", "delta", output="refused")
        add += ["--do_eval", "--max_steps", 60, "--reader", "medium", "--reader_bits", 4]
        second = run(*add, output="second", host=other_host)
        assert second["zero_shot_f1"] is None and second["eval_f1"] > 0.9
        assert second["space"] == first["space"] and second["bytes_of_space"] == first["bytes_of_space"]
        assert second["bytes_of_reader"] == first["reader_bytes"] + second["reader_bytes"]
        config = json.loads((tmp_path / "second" / "config.json").read_text())
        assert config["tasks"]["cities"]["reader"] == {"width": 96, "hidden": 64, "bits": 4}
        assert [host["name"] for host in config["source_hosts"]] == [run.host, str(other_host)]
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
        assert all(torch.equal(before[name], after[name]) for name in before)
        back = run("--adapter", tmp_path / "second", "--task_name", "ner", "--do_eval", output="back")
        assert back["zero_shot_f1"] == first["eval_f1"] and back["eval_loss"] == first["eval_loss"]
        with pytest.raises(ConfigError, match="--reader is for a new task, but .* already has the task 'ner'"):
            run("--adapter", tmp_path / "first", "--reader", "small", "--do_eval", output="refused")

    def test_several_sources(self, run, flags, tmp_path, other_host, write_jsonl, caplog):
        train = [*flags, "--do_train", "--do_eval", "--max_steps", 40]
        both = run(*train, "--source_hosts", other_host, output="both")
        hosts = json.loads((tmp_path / "both" / "config.json").read_text())["source_hosts"]
        assert [host["name"] for host in hosts] == [run.host, str(other_host)]
        assert both["train_samples"] == len(ROWS) - 4 and both["eval_f1"] > 0.5
        again = ["--adapter", tmp_path / "both", "--task_name", "more", "--do_train", "--max_steps", 2, *MANY]
        run(*again, "--source_hosts", other_host, output="again")  # another task, the same sources
        assert json.loads((tmp_path / "again" / "config.json").read_text())["source_hosts"] == hosts
        with pytest.raises(ConfigError, match="is among the sources already; name each host once"):
            run(*train, "--source_hosts", run.host, output="twice")
        with pytest.raises(ConfigError, match="--source_hosts names further hosts"):
            run("--do_train", "--adapter", tmp_path / "both", "--train_scope", "delta", "--source_hosts", other_host)

    def test_it_is_what_is_trained_where_no_pathway_is_given(self, run, flags, tmp_path):
        command = ["--model_name_or_path", run.host, *run.files, *flags[2:], "--do_train", "--max_steps", 1]
        command += ["--use_cpu", "--output_dir", tmp_path / "out"]
        assert run_ner.main(list(map(str, command)))["reader_bytes"] > 0
        assert json.loads((tmp_path / "out" / "config.json").read_text())["pathway"] == "stream"

    def test_resuming_ends_like_an_uninterrupted_run(self, run, flags, tmp_path):
        train = [*flags, "--do_train", "--do_eval", "--lr_scheduler_type", "constant", "--save_steps", 4]
        whole = run(*train, "--max_steps", 12, output="whole")
        run(*train, "--max_steps", 8, output="parts")  # within the second epoch
        resumed = run(*train, "--max_steps", 12, "--resume_from_checkpoint", "true", output="parts")
        assert resumed["eval_loss"] == whole["eval_loss"]
        parts, at_once = (load_file(tmp_path / folder / "model.safetensors") for folder in ("parts", "whole"))
        assert all(torch.equal(parts[name], at_once[name]) for name in at_once)

    def test_the_best_checkpoint_is_what_is_saved(self, run, flags, tmp_path):
        each_step = "--eval_strategy steps --eval_steps 10 --save_steps 10 --load_best_model_at_end"
        train = [*flags, "--do_train", "--do_eval", "--max_steps", 30, "--cache_eval_states", *each_step.split()]
        results = run(*train, "--metric_for_best_model", "loss")
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        seen = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        assert state["best_model_checkpoint"].endswith(f"checkpoint-{min(seen, key=seen.get)}")
        assert results["eval_loss"] == pytest.approx(min(seen.values()), rel=1e-5)

    def test_states_are_computed_once_and_again_when_cut_short(self, run, flags, cache):
        """Those of the host, and those of its causal copy."""
        train = [*flags, "--do_train", "--max_steps", 2]
        run(*train, output="first")
        made = sorted(cache.glob("states-*"))
        assert len(made) == 2
        whole, written = [file.read_bytes() for file in made], [file.stat().st_mtime_ns for file in made]
        run(*train, output="second")
        assert [file.stat().st_mtime_ns for file in made] == written
        for file, content in zip(made, whole, strict=True):
            file.write_bytes(content[:-10])
        run(*train, output="third")
        assert [file.read_bytes() for file in made] == whole
        assert sorted(cache.glob("states-*")) == made
        run(*train, "--copy_share", 0, output="without copies")
        shutil.rmtree(cache)
        run(*train, "--copy_share", 0, output="without copies, again")
        assert len(list(cache.glob("states-*"))) == 1

    def test_a_task_is_also_trained_on_the_words_of_raw_text(self, run, flags, cache, tmp_path, write_jsonl):
        row = (["Anna", "-from-", "Paris", "."], ["B-PER", "O", "B-LOC", "O"])  # in raw text 6 words
        train = [*flags, *files(write_jsonl, [*ROWS[4:], row], ROWS[:4]), "--do_train", "--max_steps", 2]
        results = run(*train, output="here")
        states = {*cache.glob("states-*")}
        words, layers, width = sum(len(words) for words, _ in ROWS[4:]) + 4 + 6, 3, 64
        assert [file.stat().st_size for file in states] == [2 * words * layers * width] * 2
        assert results["train_samples"] == len(ROWS) - 4 + 1
        tune = ["--adapter", tmp_path / "here", "--train_scope", "delta", *train[len(flags) :], *MANY]
        run(*tune, output="tuned")  # on a host as it is, and so on the data
        (other,) = {*cache.glob("states-*")} - states
        assert other.stat().st_size == 2 * (words - 6) * layers * width

    def test_a_space_is_made_of_anchor_text(self, run, tmp_path, write_jsonl):
        anchors = tmp_path / "anchors.txt"
        anchors.write_text("".join(" ".join(words) + "\n" for words, _ in ROWS), encoding="utf-8")
        own = ["--pathway", "stream", "--anchor_file", anchors, "--reader", "small", *MANY]
        made = run(*own, "--do_train", "--max_steps", 2, output="made")
        space = json.loads((tmp_path / "made" / "config.json").read_text())["space"]
        assert (space["name"], space["dim"], space["anchor_words"]) == ("own", 64, 7 * len(ROWS))
        assert made["space"].startswith("own 1 ")

    def test_a_host_narrower_than_the_coordinates_is_refused(self, run, tmp_path, tokenizer):
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100}
        BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(
            tmp_path / "narrow"
        )
        tokenizer.save_pretrained(tmp_path / "narrow")
        anchors = tmp_path / "anchors.txt"
        anchors.write_text("".join(" ".join(words) + "\n" for words, _ in ROWS), encoding="utf-8")
        own = ["--pathway", "stream", "--anchor_file", anchors, *MANY]
        with pytest.raises(UniHyperLoraError, match="64 canonical coordinates need hosts with at least"):
            run(*own, "--do_train", "--max_steps", 1, host=tmp_path / "narrow")

    @pytest.mark.parametrize(
        ("more", "error", "expected"),
        [
            (["--max_adapter_bytes", "1000"], BudgetError, "1,000 allowed.*--reader.*--space"),
            (["--label_all_tokens"], ConfigError, "--label_all_tokens cannot be used with --pathway stream"),
            (["--router_learning_rate", "1"], ConfigError, "router_learning_rate is not read: .* delta, head, reader"),
            (
                ["--metric_for_best_model", "f2", "--do_eval"],
                ConfigError,
                "not report --metric_for_best_model f2",
            ),
        ],
    )
    def test_refusals(self, run, flags, tmp_path, more, error, expected):
        with pytest.raises(error, match=expected):
            run(*flags, "--do_train", "--max_steps", 1, *more)
        assert not (tmp_path / "out").exists()
