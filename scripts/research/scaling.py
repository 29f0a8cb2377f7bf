"""``benchmark.py scaling``: how an adapter's costs grow with tokens, sentences, batch size and hosts.

    python -m scripts.research.benchmark scaling --model_name_or_path HOST --hosts HOST SMALLER \
        --output results/scaling.json

Each quantity is measured at several sizes in turn, ``--rounds`` times after a warm-up; the median is recorded. The
slope is the least-squares slope of log seconds over log size: 1 means proportional, below 1 means slower growth. The
bare host is measured in the same rounds as the adapter.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.hosts import load_host
from modeling_unihyperlora.sites import linear_multiply_adds
from modeling_unihyperlora.space import (
    CanonicalSpace,
    fit_host,
    knot_layers,
    layers_read,
    word_states,
)
from modeling_unihyperlora.storage import StoredTensor, write_json
from modeling_unihyperlora.words import WordReader, load_tokenizer
from trainers.state_cache import WordStates

LABELS = ["O", "B-X", "I-X"]
BATCH, WORDS = 8, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", required=True, help="host of everything except the alignments")
    parser.add_argument("--hosts", nargs="+", required=True, help="hosts to align")
    parser.add_argument("--space", help="file of the canonical space; default: the package's own")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument(
        "--sentences", type=int, nargs="+", default=[64, 128, 256], help="sentences to cache states of"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)


def measure(args: argparse.Namespace) -> None:
    """Run the measurements and write the record to ``args.output``."""
    torch.manual_seed(0)
    space = CanonicalSpace.default() if args.space is None else CanonicalSpace.load(args.space)
    make = UniHyperLoraForTokenClassification.from_host
    models = {
        "inject": make(args.model_name_or_path, LABELS, "t", UniHyperLoraConfig(pathway="inject")),
        "stream": make(args.model_name_or_path, LABELS, "t", space=space),
    }
    for model in models.values():
        for name, module in model.adapter.named_modules():
            if isinstance(module, StoredTensor) and not name.startswith("space.") and "waves" not in name:
                module.latent.data += 0.1 * torch.randn_like(module.latent)
    curves = forward(models, args) + training_step(models["stream"], args) + states(args)
    rows, calibrations = [], line_up(args.hosts, space)
    for what, size, seconds in curves:
        xs, ys = list(seconds), list(seconds.values())
        slope = float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
        rows.append({"what": what, "size": size, "sizes": xs, "seconds": ys, "slope": slope})
    write_json(
        args.output,
        {
            "kind": "scaling",
            "host": Path(args.model_name_or_path).name,
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
            "rows": rows,
            "calibrations": calibrations,
        },
    )


def medians(sizes: list[int], rounds: int, do: dict[str, Callable[[int], object]]) -> dict[str, dict[int, float]]:
    """Name → size → median seconds; each round does everything once at every size."""
    found: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in do}
    for number in range(rounds + 1):  # the first round warms up
        for size in sizes:
            for name, act in do.items():
                start = time.perf_counter()
                act(size)
                if number > 0:
                    found[name][size].append(time.perf_counter() - start)
    return {name: {size: statistics.median(times) for size, times in own.items()} for name, own in found.items()}


def forward(models: dict[str, nn.Module], args: argparse.Namespace) -> list[tuple]:
    """Time of scoring, by tokens per sentence."""
    host = load_host(args.model_name_or_path).eval()
    ids = random_ids(host, BATCH, max(args.tokens))

    @torch.inference_mode()
    def score(model: nn.Module, tokens: int) -> None:
        model(input_ids=ids[:, :tokens], attention_mask=torch.ones(BATCH, tokens, dtype=torch.long))

    contenders = {"bare host": host} | {f"host with pathway {name}": model.eval() for name, model in models.items()}
    do = {name: lambda tokens, model=model: score(model, tokens) for name, model in contenders.items()}
    return [
        (f"scoring {BATCH} sentences, {name}", "tokens per sentence", seconds)
        for name, seconds in medians(args.tokens, args.rounds, do).items()
    ]


def random_ids(host: nn.Module, sentences: int, tokens: int) -> torch.Tensor:
    """Random ids (sentences, tokens) from the upper part of the vocabulary, which has no special tokens."""
    size = host.config.vocab_size
    return torch.randint(min(1000, size // 2), size, (sentences, tokens))


def training_step(model: nn.Module, args: argparse.Namespace) -> list[tuple]:
    """Time of a stream's training step on cached states, without the host, by sentences per batch."""
    model.train().set_train_scope("task")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    dim = model.config.space["dim"]

    def step(sentences: int) -> None:
        batch = {
            "canonical_states": torch.randn(sentences, WORDS, 5, dim),
            "attention_mask": torch.ones(sentences, WORDS, dtype=torch.long),
            "labels": torch.randint(len(LABELS), (sentences, WORDS)),
        }
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = medians(args.batches, args.rounds, {"step": step})["step"]
    return [(f"a training step of the stream, {WORDS} words per sentence", "sentences per batch", seconds)]


def states(args: argparse.Namespace) -> list[tuple]:
    """Time of computing the states of a training text, by sentences."""
    host = load_host(args.model_name_or_path).eval()
    words = WordReader(host, load_tokenizer(args.model_name_or_path))
    ids = random_ids(host, max(args.sentences), WORDS).tolist()
    windows = [{"input_ids": row, "attention_mask": [1] * WORDS, "labels": [0] * WORDS} for row in ids]

    def read(sentences: int) -> None:
        before = os.environ.get("UNIHYPERLORA_CACHE")
        with tempfile.TemporaryDirectory() as empty:
            os.environ["UNIHYPERLORA_CACHE"] = empty
            WordStates(host, words, windows[:sentences])
        os.environ.pop("UNIHYPERLORA_CACHE")
        if before is not None:
            os.environ["UNIHYPERLORA_CACHE"] = before

    seconds = medians(args.sentences, args.rounds, {"read": read})["read"]
    return [(f"states of a training text, once per host, {WORDS} tokens per sentence", "sentences", seconds)]


def line_up(hosts: list[str], space: CanonicalSpace) -> list[dict[str, object]]:
    """Time of aligning each host, and its multiply-adds per token; alignments are independent, so times add up."""
    rows = []
    for name in hosts:
        host = load_host(name).eval()
        start = time.perf_counter()
        words = WordReader(host, load_tokenizer(name))
        read = word_states(host, words, space.sentences(), layers_read(words.num_layers))
        fit_host(read, knot_layers(words.num_layers), space.canonical())
        seconds = time.perf_counter() - start
        rows.append(
            {
                "host": Path(name).name,
                "blocks": words.num_layers,
                "width": host.config.hidden_size,
                "multiply_adds_a_token": linear_multiply_adds(host),
                "seconds": seconds,
            }
        )
    return rows
