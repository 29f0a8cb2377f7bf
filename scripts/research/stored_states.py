"""Measures canonical states as data: what reading costs, and tasks on stored states.

    python -m scripts.research.stored_states speed --host HOST --text corpus.jsonl
    python -m scripts.research.stored_states task --train_states A --validation_states VA VB VC --bits 16 8 4 3 2
    python -m scripts.research.stored_states task --train_states A B --validation_states VC
    python -m scripts.research.stored_states text --host HOST --train_file train.jsonl --max_train_samples 2000 …
    python -m scripts.research.stored_states columns --input train.jsonl --output train-tasks.jsonl
    python -m scripts.research.stored_states several --train_states A --validation_states VA
    python -m scripts.research.stored_states lora --host HOST --train_file train.jsonl --validation_file dev.jsonl
    python -m scripts.research.stored_states workers --host HOST --input corpus.jsonl --folder runs/workers

``speed`` compares ``model.read`` with the bare host's forward pass on the same texts of about 128 sub-tokens, in turn.
``task`` trains a tagger on folders of ``unihyperlora read`` in float16, and scores it on others; with ``--bits`` on
copies of all these folders in fewer bits. ``text`` trains on the same sentences as text, with the host in memory: also
on copies of it and on the words of raw text, which stored states do not have. ``lora`` measures a step of LoRA on the
same machine. ``workers`` reads one corpus with one process, two processes of accelerate, one and two Ray workers, and
with two of which one is killed in the middle, and compares the folders byte for byte. CPU seconds are those of one
process with one thread.

All of them add to one record, results/stored_states.json; ``benchmark.py render`` draws docs/how-to/states.md from it.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import torch

from modeling_unihyperlora import UniHyperLoraModel
from modeling_unihyperlora.storage import write_json
from scripts.research.own_process import run_in_own_process
from trainers.stored_states import BITS, Manifest, StoredCorpus, decode, write_shard

RECORD = Path(__file__).parents[2] / "results" / "stored_states.json"
TWO_PROCESSES = Path(__file__).parents[2] / "hub_configs" / "accelerate" / "ddp_cpu.yaml"
PERIOD = 0.2  # seconds between two looks for a worker


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--record", type=Path, default=RECORD)
    commands = own.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--host", required=True)
    speed.add_argument("--text", type=Path, required=True, help="JSON lines with tokens")
    speed.add_argument("--rounds", type=int, default=9)
    task = commands.add_parser("task")
    task.add_argument("--train_states", nargs="+", type=Path, required=True)
    task.add_argument("--bits", nargs="+", type=int, choices=BITS, default=[16])
    text = commands.add_parser("text")
    text.add_argument("--host", required=True)
    text.add_argument("--train_file", required=True)
    text.add_argument("--max_train_samples", type=int, required=True)
    for part in (task, text):
        part.add_argument("--validation_states", nargs="+", type=Path, required=True)
        part.add_argument("--folder", type=Path, required=True, help="for copies and runs")
        part.add_argument("--max_steps", type=int, default=1000)
        part.add_argument("--reader", default="medium")
    columns = commands.add_parser("columns")
    columns.add_argument("--input", type=Path, required=True, help="JSON lines with tokens and ner_tags")
    columns.add_argument("--output", type=Path, required=True)
    several = commands.add_parser("several")
    several.add_argument("--train_states", nargs=1, type=Path, required=True)
    several.add_argument("--validation_states", nargs=1, type=Path, required=True)
    several.add_argument("--folder", type=Path, required=True)
    several.add_argument("--max_steps", type=int, default=500)
    several.add_argument("--reader", default="medium")
    lora = commands.add_parser("lora")
    lora.add_argument("--host", required=True)
    lora.add_argument("--train_file", required=True)
    lora.add_argument("--validation_file", required=True)
    lora.add_argument("--max_steps", type=int, default=500)
    lora.add_argument("--folder", type=Path, required=True)
    workers = commands.add_parser("workers")
    workers.add_argument("--host", required=True)
    workers.add_argument("--input", required=True)
    workers.add_argument("--split", default="train")
    workers.add_argument("--rows_a_shard", type=int, default=100)
    workers.add_argument("--folder", type=Path, required=True)
    return own


def main(command_line: list[str] | None = None) -> None:
    args = parser().parse_args(command_line)
    if args.command == "columns":
        write_columns(args.input, args.output)
        return
    measure = {"speed": speed, "task": tasks, "text": text, "several": several, "lora": lora, "workers": workers}
    found = measure[args.command](args)
    record = (
        json.loads(args.record.read_text(encoding="utf-8")) if args.record.is_file() else {"kind": "stored_states"}
    )
    record["hardware"] = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record[args.command] = found if args.command != "task" else [*record.get("task", []), *found]
    write_json(args.record, record)
    print(json.dumps(found, indent=2))


# ---- reading beside the bare host ----


def speed(args: argparse.Namespace) -> dict[str, object]:
    """Words a CPU second of ``model.read`` and of the bare host, batches of 32 texts of about 128 sub-tokens."""
    model = UniHyperLoraModel.from_host(args.host)
    tokenizer = model.stream.words.tokenizer
    texts = texts_of(args.text, tokenizer, tokens=128, count=64)
    batches = [
        tokenizer(texts[at : at + 32], is_split_into_words=True, padding=True, return_tensors="pt")
        for at in range(0, len(texts), 32)
    ]

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            model.host(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def seconds(call) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    pairs = [(seconds(bare), seconds(lambda: model.read(texts))) for _ in range(args.rounds + 1)][1:]
    words = sum(map(len, texts))
    ratios = [alone / read for alone, read in pairs]
    return {
        "host": Path(args.host).name,
        "texts": len(texts),
        "words": words,
        "sub_tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "bare_words_a_second": words / statistics.median(alone for alone, _ in pairs),
        "read_words_a_second": words / statistics.median(read for _, read in pairs),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "greatest": max(ratios),
    }


def texts_of(path: Path, tokenizer, tokens: int, count: int) -> list[list[str]]:
    """Texts of at most so many sub-tokens, special ones included, from the words of a file one after the other."""
    with open(path, encoding="utf-8") as lines:
        words = list(itertools.islice((word for line in lines for word in json.loads(line)["tokens"]), count * tokens))
    sizes = [len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]]
    room, texts, used = tokens - tokenizer.num_special_tokens_to_add(), [[]], 0
    for word, size in zip(words, sizes, strict=True):
        if used + size > room:
            texts.append([])
            used = 0
        texts[-1].append(word)
        used += size
    return texts[:count]


# ---- tasks ----


def tasks(args: argparse.Namespace) -> list[dict[str, object]]:
    """For each number of bits a tagger that is trained on stored states and scored on others."""
    rows = []
    for bits in args.bits:
        train = [with_bits(folder, bits, args.folder) for folder in args.train_states]
        read_by = [host_of(folder) for folder in train]
        run = args.folder / f"{'+'.join(read_by)}-{bits}"
        results = train_task(run, args, ["--train_states", *map(str, train)])
        sizes = [bytes_of(folder) for folder in train]
        words = sum(size["words"] for size in sizes)
        rows.append(
            {
                "read_by": read_by,
                "bits": bits,
                "rows": results["train_samples"],
                "words": words,
                "bytes_a_word": sum(size["states"] for size in sizes) / words,
                "file_bytes_a_word": sum(size["files"] for size in sizes) / words,
                "steps": args.max_steps,
                "reader": args.reader,
                "cpu_seconds": results["cpu_seconds"],
                "validation_rows": Manifest.load(args.validation_states[0]).rows,
                "f1": scores(run, [with_bits(folder, bits, args.folder) for folder in args.validation_states]),
            }
        )
    return rows


def text(args: argparse.Namespace) -> dict[str, object]:
    """The same task trained on text, with the host in memory."""
    run = args.folder / "text"
    data = ["--train_file", args.train_file, "--max_train_samples", str(args.max_train_samples)]
    results = train_task(run, args, ["--model_name_or_path", args.host, *data])
    return {
        "host": Path(args.host).name,
        "rows": args.max_train_samples,
        "steps": args.max_steps,
        "reader": args.reader,
        "cpu_seconds": results["cpu_seconds"],
        "host_cpu_seconds": results["host_cpu_seconds"],
        "f1": scores(run, args.validation_states),
    }


def train_task(folder: Path, args: argparse.Namespace, data: list[str]) -> dict[str, object]:
    """Train a tagger on some data; returns the results of the run."""
    flags = f"--do_train --max_steps {args.max_steps} --reader {args.reader} --per_device_train_batch_size 32"
    more = "--seed 0 --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.01 --overwrite_output_dir"
    return call_ner(folder, [*flags.split(), *more.split(), *data])


def scores(run: Path, folders: list[Path]) -> dict[str, float]:
    """F1 of a trained tagger on folders of stored states, by the host that read them."""
    found = {}
    for folder in folders:
        flags = ["--adapter", str(run), "--do_eval", "--validation_states", str(folder)]
        found[host_of(folder)] = call_ner(run.with_name(f"{run.name}-on-{host_of(folder)}"), flags)["eval_f1"]
    return found


def call_ner(folder: Path, flags: list[str]) -> dict[str, object]:
    """A run in a process of its own; returns its results."""
    more = ["--output_dir", str(folder), "--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]
    run_in_own_process("run_ner", [*flags, *more])
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def host_of(folder: Path) -> str:
    return Path(Manifest.load(folder).host["name"]).name


def with_bits(folder: Path, bits: int, where: Path) -> Path:
    """A folder in float16 with its states in fewer bits, as ``unihyperlora read --bits`` writes them."""
    corpus = StoredCorpus(folder)
    if bits == corpus.manifest.bits:
        return folder
    manifest, copy = dataclasses.replace(corpus.manifest, bits=bits), where / f"{folder.name}-{bits}-bits"
    copy.mkdir(parents=True, exist_ok=True)
    manifest.save(copy)
    for shard in range(manifest.shards):
        table = pq.read_table(manifest.path(folder, shard))
        words = table["words"].to_pylist()
        shapes = [(len(row), manifest.knots, manifest.dim) for row in words]
        packed = table["states"].to_pylist()
        states = [decode(row, corpus.manifest.bits, shape) for row, shape in zip(packed, shapes, strict=True)]
        columns = table.drop_columns(["words", "states"])
        write_shard(manifest.path(copy, shard), manifest, columns, words, states)
    return copy


def bytes_of(folder: Path) -> dict[str, int]:
    """Words of a folder, bytes of its states before compression, and of its files."""
    corpus = StoredCorpus(folder)
    manifest, words = corpus.manifest, sum(len(words) for (words,) in corpus.rows("words"))
    states = words * manifest.knots * manifest.dim * manifest.bits // 8
    files = sum(manifest.path(folder, shard).stat().st_size for shard in range(manifest.shards))
    return {"words": words, "states": states, "files": files}


def types_of_tasks(types: Iterable[str], count: int = 10) -> list[tuple[str, ...]]:
    """The first ``count`` sets of entity types: each type alone, then pairs, and so on."""
    ordered = sorted(types)
    sets = (chosen for size in range(1, len(ordered) + 1) for chosen in itertools.combinations(ordered, size))
    return list(itertools.islice(sets, count))


def write_columns(source: Path, target: Path) -> None:
    """Copy rows with ``ner_tags`` and add a column "tags_…" for each set of ``types_of_tasks``."""
    with open(source, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    tasks = types_of_tasks({tag[2:] for row in rows for tag in row["ner_tags"] if tag != "O"})
    for row in rows:
        for types in tasks:
            row["_".join(("tags", *types))] = [tag if tag[2:] in types else "O" for tag in row["ner_tags"]]
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def several(args: argparse.Namespace) -> dict[str, object]:
    """A tagger for each column "tags_…" of one corpus: CPU seconds and F1, in the order of training."""
    [train], [validation] = args.train_states, args.validation_states
    names = pq.read_schema(StoredCorpus(train).manifest.path(train, 0)).names
    found = {}
    for column in (name for name in names if name.startswith("tags_")):
        run = args.folder / f"several-{column}"
        data = ["--train_states", str(train), "--validation_states", str(validation), "--do_eval"]
        results = train_task(run, args, [*data, "--label_column_name", column])
        found[column.removeprefix("tags_")] = {"cpu_seconds": results["cpu_seconds"], "f1": results["eval_f1"]}
    return {"read_by": host_of(train), "steps": args.max_steps, "reader": args.reader, "tasks": found}


def lora(args: argparse.Namespace) -> dict[str, object]:
    """CPU seconds and F1 of LoRA r=8."""
    flags = ["--method", "lora", "--model_name_or_path", args.host, "--train_file", args.train_file, "--do_train"]
    flags += ["--per_device_train_batch_size", "32", "--overwrite_output_dir", "--save_strategy", "no", "--seed", "0"]
    flags += ["--max_steps", str(args.max_steps)]
    scoring = ["--do_eval", "--validation_file", args.validation_file, "--per_device_eval_batch_size", "32"]
    results = call_ner(args.folder / "lora", [*flags, *scoring])
    return {
        "host": Path(args.host).name,
        "steps": args.max_steps,
        "cpu_seconds": results["cpu_seconds"],
        "f1": results["eval_f1"],
    }


# ---- several workers ----


def workers(args: argparse.Namespace) -> dict[str, object]:
    """Read a corpus in five ways; every folder has to have the same bytes."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]
    ways = {
        "one process": ([], []),
        "2 processes of accelerate": (launch, []),
        "1 Ray worker": ([], ["--ray_workers", "1"]),
        "2 Ray workers": ([], ["--ray_workers", "2"]),
        "2 Ray workers, one killed": ([], ["--ray_workers", "2"]),
    }
    found = {}
    for number, (way, (before, after)) in enumerate(ways.items()):
        folder = args.folder / f"way-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--host", args.host, "--input", args.input, "--split", args.split, "--output", str(folder)]
        flags += ["--rows_a_shard", str(args.rows_a_shard), *after]
        command = [sys.executable, *before, "-m", "trainers.commands", "read", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        killed = kill_one_worker(process, folder) if "killed" in way else None
        said = json.loads(process.communicate()[0].splitlines()[-1])
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*.parquet")):
            digest.update(path.name.encode() + path.read_bytes())
        found[way] = {"digest": digest.hexdigest()[:16], "shards": said["shards"], "seconds": said["seconds"]}
        if killed is not None:
            found[way]["shards_when_killed"] = killed
    found["equal"] = len({way["digest"] for way in found.values()}) == 1
    return {"host": Path(args.host).name, "ways": found}


def kill_one_worker(process: subprocess.Popen, folder: Path) -> int:
    """Send SIGKILL to a worker of a reading that has written a shard and has others left; returns how many it has."""
    while process.poll() is None:
        time.sleep(PERIOD)
        written = len(list(folder.glob("*.parquet")))
        reading = [pid for pid, name in descendants(process.pid).items() if "ShardReader" in name]
        if written and reading:
            os.kill(reading[0], signal.SIGKILL)
            return written
    raise RuntimeError("The reading ended before a worker could be killed: give more rows.")


def descendants(pid: int) -> dict[int, str]:
    """Process id → command line of all that a process has started, and these in turn."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text()
            names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found: dict[int, str] = {}
    for child in parents:
        line = child
        while line in parents and line != pid:
            line = parents[line]
        if line == pid and child != pid:
            found[child] = names[child]
    return found


if __name__ == "__main__":
    main()
