"""``benchmark.py tasks``: cost of many tasks on one host, with all tasks or one task per sentence.

    python -m scripts.research.benchmark tasks --model_name_or_path HOST --output results/mixed-tasks.json

For each number of tasks, an adapter with that many random tasks is made, on its own copy of the host. In every round
the same sentences are scored by an adapter with one task, and then in these ways:

- one pass (streams only): all tasks for every sentence, ``tasks=[…]``.
- mixed batch: one task per sentence, drawn at random, ``task_ids=[…]``.

Recorded are the median, the smallest and the largest ratio to the one task in the same round, so that other load on
the machine affects both times equally.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.reader import READERS
from modeling_unihyperlora.storage import StoredTensor, write_json
from modeling_unihyperlora.words import load_tokenizer

LABELS = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for prefix in "BI")]
ONE_PASS, MIXED = "one pass", "mixed batch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", required=True, help="the host")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100], help="numbers of tasks")
    parser.add_argument("--pathways", nargs="+", default=["inject", "stream"], choices=["inject", "stream"])
    parser.add_argument(
        "--reader", choices=sorted(READERS), default="small", help="size of each task's reader (stream)"
    )
    parser.add_argument("--space", help="file of the canonical space; default: the package's own")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="words per sentence, each of one sub-token")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)


def measure(args: argparse.Namespace) -> None:
    """Run the measurements and write the record to ``args.output``."""
    rows = [row for pathway in args.pathways for row in measure_pathway(pathway, args)]
    write_json(
        args.output,
        {
            "kind": "mixed_tasks",
            "host": Path(args.model_name_or_path).name,
            "reader": args.reader,
            "batch_size": args.batch_size,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
            "rows": rows,
        },
    )


@torch.no_grad()
def make_model(args: argparse.Namespace, pathway: str, tasks: int) -> UniHyperLoraForTokenClassification:
    """A model on its own host, with random tasks t0, t1, …"""
    torch.manual_seed(0)
    more = {"reader": args.reader, "space": args.space} if pathway == "stream" else {}
    config = UniHyperLoraConfig(pathway=pathway)
    model = UniHyperLoraForTokenClassification.from_host(args.model_name_or_path, LABELS, "t0", config, **more)
    for number in range(1, tasks):
        model.add_task(f"t{number}", LABELS, **({"reader": args.reader} if pathway == "stream" else {}))
    for own in model.adapter.tasks.values():
        for stored in own.children():
            if isinstance(stored, StoredTensor):  # δθ and head are zero in a new task, the reader is not
                stored.latent.copy_(0.1 * torch.randn_like(stored.latent))
    return model.eval()


def measure_pathway(pathway: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of the record, one for each number of tasks and each way."""
    one = make_model(args, pathway, 1)
    models = {n: make_model(args, pathway, n) for n in args.tasks}
    batch = sentences(args)
    draw = torch.Generator().manual_seed(0)
    ids = {n: [f"t{i}" for i in torch.randint(n, (args.batch_size,), generator=draw)] for n in args.tasks}
    calls = {(MIXED, n): {"task_ids": ids[n]} for n in args.tasks}
    if pathway == "stream":
        calls |= {(ONE_PASS, n): {"tasks": [f"t{i}" for i in range(n)]} for n in args.tasks}

    @torch.inference_mode()
    def seconds(model, **which) -> float:
        start = time.perf_counter()
        model(**batch, **which)
        return time.perf_counter() - start

    ratios: dict[tuple[str, int], list[float]] = {call: [] for call in calls}
    for number in range(args.rounds + 1):  # the first round warms up
        alone = seconds(one, task="t0")
        for call, which in calls.items():
            ratio = seconds(models[call[1]], **which) / alone
            if number > 0:
                ratios[call].append(ratio)
    own = one.adapter.tasks["t0"]
    held = sum(t.numel() * t.element_size() for t in (*own.parameters(), *own.buffers()))
    return [
        {
            "pathway": pathway,
            "way": way,
            "tasks": n,
            "tasks_in_the_batch": n if way == ONE_PASS else len(set(ids[n])),
            "ratio": statistics.median(ratios[way, n]),
            "least": min(ratios[way, n]),
            "greatest": max(ratios[way, n]),
            "bytes_in_memory_a_task": held,
        }
        for way, n in calls
    ]


def sentences(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """A batch of random words, each of one sub-token."""
    tokenizer = load_tokenizer(args.model_name_or_path)
    words = [word for word, number in tokenizer.get_vocab().items() if word.isascii() and word.isalpha()]
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(words), (args.batch_size, args.tokens), generator=draw)
    text = [[words[i] for i in row] for row in chosen]
    return dict(tokenizer(text, is_split_into_words=True, padding=True, return_tensors="pt"))
