"""Costs of an adapter in time, memory and bytes, compared with the bare host and PEFT's methods.

    python -m scripts.research.benchmark latency --model_name_or_path H [--adapter DIR] --output F.json
    python -m scripts.research.benchmark parts --model_name_or_path H [--adapter DIR] --output F.json
    python -m scripts.research.benchmark many --model_name_or_path H --reader small --output F.json
    python -m scripts.research.benchmark start --model_name_or_path H --adapter DIR --output F.json
    python -m scripts.research.benchmark slopes --model_name_or_path H --output F.json
    python -m scripts.research.benchmark train --model_name_or_path H [--adapter DIR] --output F.json
    python -m scripts.research.benchmark memory --model_name_or_path H [--adapter DIR] --output F.json
    python -m scripts.research.benchmark calibrate --model_name_or_path H [--adapter DIR] --output F.json
    python -m scripts.research.benchmark size --model_name_or_path H [--adapter DIR] --output F.json

Contenders run in turns in one process. The result is the ratio to the first contender in the same turn: median and
quartiles over the turns. Milliseconds of the first contender show the length of a turn. ``memory`` measures the peak
memory of a fresh process for each contender. Measurements that would take longer than ``--seconds`` are left out and
listed.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from modeling_unihyperlora import UniHyperLoraForTokenClassification
from modeling_unihyperlora.measure.accounting import flops_overhead_pct, host_multiply_adds, measure
from modeling_unihyperlora.reader import READERS
from modeling_unihyperlora.space import CanonicalSpace, layers_read, word_states
from modeling_unihyperlora.storage import write_json
from scripts.research.race import quartiles, race, rounded, wait
from scripts.research.speed_contenders import PATHWAYS, PEERS, TRAINED, Ground, anchors, texts
from scripts.research.speed_stream import many, parts, process_cost, start

COMMANDS = ("latency", "parts", "many", "start", "slopes", "train", "memory", "calibrate", "size")
SLOPES = {  # what varies → (blocks, width, tokens)
    "blocks": [(blocks, 256, 128) for blocks in (2, 4, 8)],
    "width": [(4, width, 128) for width in (128, 256, 512)],
    "tokens": [(4, 256, tokens) for tokens in (32, 128, 512)],
}
SLOPE_BATCH = 8
SLOPE_ANCHOR_SENTENCES = 40
MEMORY_ROUNDS, MEMORY_STEPS = 2, 3
WITH_MEMORY = ("lora", "stream", "stream_delta", "inject_delta", "inject_delta_checkpointed", "lora_checkpointed")
CALIBRATE_ROUNDS = 3
VERSIONS = ("torch", "transformers", "peft")


def add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", required=True, help="The host: Hub id or folder.")
    parser.add_argument("--adapter", help="Folder of a trained adapter; default: a new adapter.")
    parser.add_argument("--reader", choices=sorted(READERS), default="large", help="Reader of a new stream's task.")
    parser.add_argument("--space", help="File of a new stream's canonical space; default: the package's own.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch on the CPU.")
    parser.add_argument("--output", type=Path, required=True, help="The JSON file to write.")
    if command == "latency":
        parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
        parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 512], help="Tokens of a sentence.")
        parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="Sentences of a batch.")
    if command in ("latency", "parts", "many", "slopes", "train"):
        most = 60.0 if command in ("train", "many") else 20.0  # a backward pass through a host takes longer
        parser.add_argument("--seconds", type=float, default=most, help="Maximum for one batch size and length.")


def run(command: str, args: argparse.Namespace) -> None:
    """Run the measurement of a command, and write the record to ``args.output``."""
    torch.set_num_threads(args.threads)
    ground = Ground(args.model_name_or_path, args.adapter, args.device, reader=args.reader, space=args.space)
    measured = {
        "latency": latency,
        "parts": parts,
        "many": many,
        "start": start,
        "slopes": slopes,
        "train": train,
        "memory": memory,
        "calibrate": calibrate,
        "size": size,
    }[command](ground, args)
    config = ground.new_host().config
    host = {"name": Path(args.model_name_or_path).name, "family": config.model_type}
    host |= {"hidden_size": config.hidden_size, "num_layers": config.num_hidden_layers}
    record = {
        "kind": "speed",
        "what": command,
        "host": host,
        "trained_adapter": args.adapter is not None,
        "reader": args.reader,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": args.threads,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    write_json(args.output, record | measured)


# ---- the measurements ----


def latency(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Time of every contender's forward pass relative to the bare host's, by batch size and length."""
    names = ["host", *PATHWAYS, *(name for name in args.peers if name != "host")]
    models = {name: ground.forward(name) for name in names}
    cells = []
    for tokens, sentences in itertools.product(args.lengths, args.batches):
        batch = ground.batch(sentences, tokens)
        contenders = {name: (lambda model=model, batch=batch: model(batch)) for name, model in models.items()}
        with torch.inference_mode():
            cells.append({"batch": sentences, "tokens": tokens} | race(contenders, args.seconds, args.device))
    return {"first": "host", "cells": cells}


def slopes(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Growth of the overhead and of the host's time with blocks, width and tokens, as exponents of fitted powers."""
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder) / "space.safetensors"
        slope_space(ground, Path(folder)).save(space)
        for varied, shapes in SLOPES.items():
            points = []
            for blocks, width, tokens in shapes:
                new_host = partial(random_host, blocks, width, ground)
                here = Ground(ground.host, None, ground.device, new_host, ground.reader, str(space))
                batch = here.batch(SLOPE_BATCH, tokens)
                models = {name: here.forward(name) for name in ("host", "stream", "inject")}
                contenders = {name: (lambda model=model, batch=batch: model(batch)) for name, model in models.items()}
                shape = {"blocks": blocks, "width": width, "tokens": tokens}
                with torch.inference_mode():
                    points.append(shape | race(contenders, args.seconds, args.device))
            raced = [point for point in points if "left_out" not in point]
            sizes = [point[varied] for point in raced]
            exponents = {"host": _exponent(sizes, [point["first_ms"] for point in raced])}
            for name in ("stream", "inject"):
                exponents[name] = _exponent(sizes, [point[name]["more_ms"] for point in raced])
            curves[varied] = {"points": points, "exponents": exponents}
    return {"first": "host", "batch": SLOPE_BATCH, "curves": curves}


def slope_space(ground: Ground, folder: Path) -> CanonicalSpace:
    """A space with few anchors, so that aligning the random hosts is fast; its maps have the usual size."""
    text = folder / "anchors.txt"
    text.write_text("\n".join(map(" ".join, anchors()[:SLOPE_ANCHOR_SENTENCES])), encoding="utf-8")
    return CanonicalSpace.make([random_host(2, 128, ground)], text, tokenizers=[ground.tokenizer])


def random_host(blocks: int, width: int, ground: Ground) -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(ground.tokenizer),
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
    )
    return BertModel(config, add_pooling_layer=False)


def _exponent(sizes: list[float], values: list[float]) -> float | None:
    """Exponent p of the best-fitting power a·size^p; None for fewer than two values, or if one is not positive."""
    if len(values) < 2 or min(values) <= 0:
        return None
    x, y = ([math.log(value) for value in series] for series in (sizes, values))
    return round(statistics.linear_regression(x, y).slope, 3)


def train(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Time of a training step relative to LoRA's: on 8 windows of 128 tokens, and on 32 sentences of natural length.

    An epoch has the same number of steps for all contenders, so the ratio also holds for epochs. The stream's states
    are computed once, before.
    """
    cells = []
    with _cache_of_its_own():
        for sentences, words, tokens in ((8, 126, 128), (32, None, 128)):
            corpus = texts(8 * sentences, words)
            steps = {
                name: ground.step(name, corpus, tokens) for name in ("lora", *(n for n in TRAINED if n != "lora"))
            }
            batches = [range(start, start + sentences) for start in range(0, len(corpus), sentences)]
            turns = {name: _in_turn(step, itertools.cycle(batches)) for name, step in steps.items()}
            shape = {"batch": sentences, "tokens": tokens if words else None}
            cells.append(shape | race(turns, args.seconds, args.device))
    return {"first": "lora", "epoch_ratio_is_extrapolated_from_steps": True, "cells": cells}


def _in_turn(step: Callable[[range], None], batches: Iterator[range]) -> Callable[[], None]:
    """A function that takes a step on the next batch; all contenders get the batches in the same order."""
    return lambda: step(next(batches))


def memory(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Peak memory of a training process relative to LoRA's: 8 windows of 128 tokens, a fresh process each time.

    The first round does not count: in it the stream aligns its host and computes the states that it then caches.
    """
    marks: dict[str, list[dict]] = {name: [] for name in WITH_MEMORY}
    with _cache_of_its_own() as cache:
        stream = ground.stream_folder(cache / "adapter")
        for number, name in itertools.product(range(1 + MEMORY_ROUNDS), marks):
            adapter = stream if name.startswith("stream") else args.adapter
            given = [name, args.model_name_or_path, args.device, str(args.threads)]
            given += [adapter or "", args.reader, args.space or ""]
            cost = process_cost(given, "scripts.research.speed", args.threads)
            if number:
                marks[name].append(json.loads(cost["printed"].splitlines()[-1]))
    figures: dict[str, object] = {"rounds": MEMORY_ROUNDS, "steps": MEMORY_STEPS, "batch": 8, "tokens": 128}
    for name, own in marks.items():
        figures[name] = {}
        for key in ("peak_mb", "peak_over_loaded_mb"):
            ratios = [mine[key] / base[key] for mine, base in zip(own, marks["lora"], strict=True)]
            figures[name][key] = statistics.median(mark[key] for mark in own)
            figures[name][key.replace("_mb", "_ratio")] = rounded(statistics.median(ratios))
            figures[name][key.replace("_mb", "_ratio_range")] = [rounded(min(ratios)), rounded(max(ratios))]
    return {"first": "lora"} | figures


def memory_of_one(
    name: str, host: str, device: str, threads: str, adapter: str, reader: str, space: str
) -> dict[str, float]:
    """Train a contender for some steps in this process; returns its peak megabytes, and above the loaded host."""
    torch.set_num_threads(int(threads))
    ground = Ground(host, adapter or None, device, reader=reader, space=space or None)
    ground.new_host()
    loaded = _peak(device)
    step = ground.step(name, texts(8, 126), 128)
    for _ in range(MEMORY_STEPS):
        step(range(8))
    peak = _peak(device)
    return {"peak_mb": round(peak, 1), "peak_over_loaded_mb": round(peak - loaded, 1)}


def _peak(device: str) -> float:
    """Peak megabytes of this process: of tensors on the GPU, or of resident memory on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def calibrate(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Time of aligning a host relative to a bare pass over the anchors, and of loading an adapter relative to a host.

    Adapters are loaded with the alignment cached. The first round warms up and does not count.
    """
    spent: dict[str, list[float]] = {
        name: [] for name in ("host_on_anchors", "calibrate", "load_host", "load_adapter")
    }

    def timed(name: str, function: Callable[[], object]) -> object:
        wait(args.device)
        start = time.perf_counter()
        result = function()
        wait(args.device)
        spent[name].append(time.perf_counter() - start)
        return result

    with _cache_of_its_own() as cache:
        folder = ground.stream_folder(cache / "adapter")
        here = ground.new_host()
        model = UniHyperLoraForTokenClassification.from_pretrained(folder, host=here, tokenizer=ground.tokenizer)
        words, sentences = model.bound_stream.words, model.adapter.space.sentences()
        layers = layers_read(words.num_layers)
        for _ in range(1 + CALIBRATE_ROUNDS):
            for path in cache.glob("*.safetensors"):  # the cached map, and the cached states of the anchors
                path.unlink()
            host = timed("load_host", ground.new_host)
            timed("host_on_anchors", lambda: word_states(here, words, sentences, layers))
            timed("calibrate", lambda: model.calibrate(ground.tokenizer))
            own = {"host": host, "tokenizer": ground.tokenizer}
            load = partial(UniHyperLoraForTokenClassification.from_pretrained, folder, **own)
            timed("load_adapter", load).detach()
    warm = {name: values[1:] for name, values in spent.items()}
    figures: dict[str, object] = {
        name: {"seconds": rounded(statistics.median(values)), "quartiles": quartiles(values)}
        for name, values in warm.items()
    }
    for name, base in (("calibrate", "host_on_anchors"), ("load_adapter", "load_host")):
        ratios = [own / other for own, other in zip(warm[name], warm[base], strict=True)]
        figures[name] |= {f"ratio_to_{base}": rounded(statistics.median(ratios)), "ratio_quartiles": quartiles(ratios)}
    return {"rounds": CALIBRATE_ROUNDS, "layers_read": len(layers)} | figures


def size(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Bytes of the files by part, and multiply-adds, of both pathways and of LoRA."""
    lora = ground._forward_model("lora")
    lora_bytes = sum(p.numel() * p.element_size() for n, p in lora.named_parameters() if ".lora_" in n)
    rank_adds = sum(p.numel() for n, p in lora.named_parameters() if ".lora_" in n)
    figures: dict[str, object] = {"lora": {"bytes": lora_bytes}}
    for pathway in ("stream", "inject"):
        model = ground.pathway_model(pathway)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            own = measure(model, folder)
        overhead = {str(tokens): rounded(flops_overhead_pct(model, tokens)) for tokens in (16, 128, 512)}
        figures[pathway] = {
            "bytes": own["adapter_bytes"],
            "bytes_over_lora": rounded(own["adapter_bytes"] / lora_bytes),
            "delta_bytes": own["delta_bytes"],
            "bytes_by_part": own["parts"],
            "flops_overhead_pct_by_tokens": overhead,
        }
        host = host_multiply_adds(model, 128)
        figures["lora"]["flops_overhead_pct_by_tokens"] = {"128": rounded(100 * rank_adds / host)}
    figures["reader_bytes"] = {name: reader_bytes(ground, name) for name in READERS}
    return figures


def reader_bytes(ground: Ground, size: str) -> int:
    """Bytes of a new task's reader of a given size."""
    model = Ground(ground.host, None, ground.device, ground.make_host, size, ground.space).pathway_model("stream")
    return measure(model)["reader_bytes"]


@contextmanager
def _cache_of_its_own() -> Iterator[Path]:
    """Context with a temporary cache, so that a benchmark leaves no states or maps behind."""
    before = os.environ.get("UNIHYPERLORA_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNIHYPERLORA_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["UNIHYPERLORA_CACHE"]
            else:
                os.environ["UNIHYPERLORA_CACHE"] = before


if __name__ == "__main__":  # a process of ``memory``
    print(json.dumps(memory_of_one(*sys.argv[1:])))
