"""``benchmark.py tasks``: a batch whose sentences are of many tasks, against the same batch as one task.

    python -m scripts.research.benchmark tasks --model_name_or_path HOST --output results/mixed-tasks.json

For each number of tasks there is an adapter with as many, each with random δθ, router embedding and head, on a host of
its own. In every round the same sentences are scored once as one task by an adapter that has no other, and once by
each of these adapters (``task_ids=``, drawn at random), one after the other, so that what else the machine does falls
on all alike. Kept are the median over the rounds of the ratio to the one task of the same round, the least and the
greatest.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.storage import write_json
from modeling_unihyperlora.words import load_tokenizer

LABELS = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for prefix in "BI")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", required=True, help="the host")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100, 1000], help="numbers of tasks")
    parser.add_argument("--pathways", nargs="+", default=["inject", "stream"], choices=["inject", "stream"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="words a sentence, each of one sub-token")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)


def measure(args: argparse.Namespace) -> None:
    """Measure what ``args`` ask for and write it to ``args.output``."""
    rows = [row for pathway in args.pathways for row in measure_pathway(pathway, args)]
    write_json(
        args.output,
        {
            "kind": "mixed_tasks",
            "host": Path(args.model_name_or_path).name,
            "batch_size": args.batch_size,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
            "rows": rows,
        },
    )


@torch.no_grad()
def make_model(host: str, pathway: str, tasks: int) -> UniHyperLoraForTokenClassification:
    """The host with tasks t0, t1, …"""
    torch.manual_seed(0)
    model = UniHyperLoraForTokenClassification.from_host(host, LABELS, "t0", UniHyperLoraConfig(pathway=pathway))
    for number in range(1, tasks):
        model.add_task(f"t{number}", LABELS)
    for own in model.adapter.tasks.values():
        for stored in (own.delta, own.embedding, own.head_weight, own.head_bias):
            stored.latent.copy_(0.1 * torch.randn_like(stored.latent))
    return model.eval()


def measure_pathway(pathway: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each number of tasks."""
    one = make_model(args.model_name_or_path, pathway, 1)
    models = {n: make_model(args.model_name_or_path, pathway, n) for n in args.tasks}
    tokenizer = load_tokenizer(args.model_name_or_path)
    words = [word for word, number in tokenizer.get_vocab().items() if word.isascii() and word.isalpha()]
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(words), (args.batch_size, args.tokens), generator=draw)
    text = [[words[i] for i in row] for row in chosen]
    batch = dict(tokenizer(text, is_split_into_words=True, padding=True, return_tensors="pt"))
    tasks = {n: [f"t{i}" for i in torch.randint(n, (args.batch_size,), generator=draw)] for n in args.tasks}

    @torch.inference_mode()
    def seconds(model, **which) -> float:
        start = time.perf_counter()
        model(**batch, **which)
        return time.perf_counter() - start

    ratios: dict[int, list[float]] = {n: [] for n in args.tasks}
    for number in range(args.rounds + 1):  # the first one warms up
        alone = seconds(one, task="t0")
        for n, task_ids in tasks.items():
            ratio = seconds(models[n], task_ids=task_ids) / alone
            if number > 0:
                ratios[n].append(ratio)
    own = one.adapter.tasks["t0"]
    held = sum(t.numel() * t.element_size() for t in (*own.parameters(), *own.buffers()))
    return [
        {
            "pathway": pathway,
            "tasks": n,
            "tasks_in_the_batch": len(set(tasks[n])),
            "ratio": statistics.median(ratios[n]),
            "least": min(ratios[n]),
            "greatest": max(ratios[n]),
            "bytes_in_memory_a_task": held,
        }
        for n in args.tasks
    ]
