"""Where the time of a stream goes, what many tasks cost, and what a process costs from start to answer.

``parts`` and ``many`` are races (see ``race``); ``start`` runs ``unihyperlora tag`` in fresh processes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.hosts import call_host
from modeling_unihyperlora.measure.accounting import host_multiply_adds
from modeling_unihyperlora.reader import Words
from modeling_unihyperlora.sites import HostMap
from modeling_unihyperlora.space import HostFit, nearness
from scripts.research.race import race, rounded
from scripts.research.speed_contenders import LABELS, LORA_RANK, Ground
from trainers.baselines import require_peft

PART_SHAPES = ((1, 16), (8, 128))
MANY_SHAPE = (32, 32)  # sentences, tokens
TASKS = (1, 10, 100)
PASSES = 10  # passes of LoRA, one for each of so many tasks
START_ROUNDS = 3
SENTENCE = "Angela Merkel met Tim Cook in Berlin."


# ---- parts of a stream ----


def parts(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Time of each part of a stream's forward pass over that of the bare host, and its multiply-adds.

    A part runs alone here, with its weights in the processor's cache, so the parts take less than the whole.
    """
    model, host = ground.pathway_model("stream"), ground.new_host()
    cells = []
    for sentences, tokens in PART_SHAPES:
        batch = ground.batch(sentences, tokens)
        with torch.inference_mode():
            contenders = {"host": lambda batch=batch: host(**batch), "stream": lambda batch=batch: model(**batch)}
            contenders |= contenders_of_parts(model, **batch)
            cells.append({"batch": sentences, "tokens": tokens} | race(contenders, args.seconds, args.device))
    share = 100 / host_multiply_adds(model, 128)
    adds = {name: rounded(share * number) for name, number in multiply_adds_of_parts(model).items()}
    return {"first": "host", "cells": cells, "multiply_adds_pct_at_128_tokens": adds}


def contenders_of_parts(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Callable]:
    """The parts as functions without arguments, on what the parts before them gave."""
    stream, task = model.bound_stream, model.config.active_task
    fit, values = stream.map_on(input_ids.device), model.adapter.values(task)
    run = stream.read(attention_mask, {"input_ids": input_ids})
    hidden, at = run.hidden_states, run.places.read
    rows = torch.arange(len(at), device=at.device)[:, None]
    states = {layer: hidden[layer][rows, at].flatten(0, 1) for layer in fit.layers}
    linear, landmarks, by_nearness = HostFit(fit.knots, None), fit.landmarks, {}
    if landmarks is not None:
        query = landmarks.query(states.values())
        by_nearness["query"] = lambda: landmarks.query(states.values())
        by_nearness["landmarks"] = lambda: nearness(query, landmarks.at) @ landmarks.weights.T
    cells = (torch.arange(at.shape[1], device=at.device) < run.lengths[:, None]).flatten().nonzero().squeeze(1)
    z = run.z.flatten(0, 1)[cells]
    words = Words(run.lengths)
    features = run.features(task)

    def head() -> torch.Tensor:
        return F.linear(features, values.head_weight, values.head_bias)

    return {
        "host_with_states": lambda: call_host(
            model.host, attention_mask, output_hidden_states=True, input_ids=input_ids
        ),
        "places": lambda: stream.words.places(input_ids, attention_mask),
        "linear_map": lambda: linear(states),
        **by_nearness,
        "reader": lambda: model.adapter.tasks[task](z, words, values),
        "head": head,
    }


def multiply_adds_of_parts(model) -> dict[str, int]:
    """Multiply-adds for each word, by part."""
    fit = model.bound_stream.fit
    landmarks, by_nearness = fit.landmarks, {}
    if landmarks is not None:
        by_nearness = {
            "query": landmarks.matrix.numel(),
            "landmarks": landmarks.at.numel() + landmarks.weights.numel(),
        }
    own = model.config.tasks[model.config.active_task]
    shape, coordinates = own["reader"], sum(knot.offset.numel() for knot in fit.knots)
    recurrent = 8 * shape["hidden"] * (shape["width"] + shape["hidden"])
    return {
        "linear_map": sum(knot.matrix.numel() for knot in fit.knots),
        **by_nearness,
        "reader": coordinates * shape["width"] + recurrent,
        "head": 2 * shape["hidden"] * len(own["labels"]),
    }


# ---- many tasks ----


def many(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """Many tasks over one host, beside as many passes of LoRA and PEFT's batch of mixed adapters."""
    sentences, tokens = MANY_SHAPE
    batch, host = ground.batch(sentences, tokens), ground.new_host()
    model = stream_of_tasks(ground, max(TASKS))
    merged, unmerged = ground._forward_model("lora_merged"), lora_of_tasks(ground, PASSES)
    adapters = [f"t{number % PASSES}" for number in range(sentences)]

    def passes_merged() -> None:
        for _ in range(PASSES):
            merged(**batch)

    def passes() -> None:
        for number in range(PASSES):
            unmerged.set_adapter(f"t{number}")
            unmerged(**batch)

    contenders: dict[str, Callable] = {"host": lambda: host(**batch)}
    for count in TASKS:
        names = [f"t{number}" for number in range(count)]
        contenders[f"one_pass_{count}"] = lambda names=names: model(**batch, tasks=names)
    for count in TASKS[1:]:
        names = [f"t{number % count}" for number in range(sentences)]
        contenders[f"mixed_{count}"] = lambda names=names: model(**batch, task_ids=names)
    contenders |= {
        f"lora_merged_passes_{PASSES}": passes_merged,
        f"lora_passes_{PASSES}": passes,
        f"lora_mixed_{PASSES}": lambda: unmerged(**batch, adapter_names=adapters),
    }
    with torch.inference_mode():
        raced = race(contenders, args.seconds, args.device)
    return {"first": "host", "batch": sentences, "tokens": tokens} | raced


def stream_of_tasks(ground: Ground, count: int):
    """A stream with tasks t0, t1, … of random values, each with a reader of the size that is asked for."""
    model = ground.fresh_stream("t0")
    for number in range(1, count):
        model.add_task(f"t{number}", LABELS, reader=ground.reader)
    generator = torch.Generator(device=ground.device).manual_seed(0)
    with torch.no_grad():
        for task in model.adapter.tasks.values():
            task.head_weight.latent.normal_(0, 0.05, generator=generator)
    return model.eval()


def lora_of_tasks(ground: Ground, count: int) -> nn.Module:
    """A host with adapters t0, t1, … of LoRA on all its linear layers."""
    require_peft()
    from peft import LoraConfig, get_peft_model

    host = ground.new_host()
    sites = [site.linear for site in HostMap(host).sites]
    targets = [name for name, module in host.named_modules() if any(module is linear for linear in sites)]

    def config() -> LoraConfig:
        return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)

    model = get_peft_model(host, config(), adapter_name="t0")
    for number in range(1, count):
        model.add_adapter(f"t{number}", config())
    return model.eval()


# ---- from start to answer ----


def start(ground: Ground, args: argparse.Namespace) -> dict[str, object]:
    """CPU seconds and peak memory of ``unihyperlora tag`` on one sentence, with torch and from ONNX files.

    Raises:
        ConfigError: no trained adapter is given.
    """
    if args.adapter is None:
        raise ConfigError("start needs a trained adapter: --adapter DIR")
    with tempfile.TemporaryDirectory() as folder:
        reader, host = (str(Path(folder) / name) for name in ("reader.onnx", "host.onnx"))
        given = ["--host", args.model_name_or_path, "--host_file", host]
        process_cost(["export-onnx", args.adapter, reader, *given])
        commands = {
            "torch": ["tag", args.adapter, SENTENCE, "--json", "--host", args.model_name_or_path],
            "onnx": ["tag", reader, SENTENCE, "--json", "--host", host, "--runtime", "onnx"],
        }
        costs: dict[str, list[dict]] = {name: [] for name in commands}
        for number, name in itertools.product(range(1 + START_ROUNDS), commands):
            cost = process_cost(commands[name])
            if number:  # in the first round the host is lined up, and files are read from the disk
                costs[name].append(cost)
        found = {name: json.loads(own[-1].pop("printed")) for name, own in costs.items()}
        sizes = {"host_bytes": Path(host).stat().st_size, "reader_bytes": Path(reader).stat().st_size}
    spans = [[(e["text"], e["type"]) for e in of["entities"]] for of in found.values()]
    figures = {
        name: {key: rounded(statistics.median(cost[key] for cost in own)) for key in ("cpu_seconds", "peak_mb")}
        for name, own in costs.items()
    }
    return {"rounds": START_ROUNDS, "equal_entities": spans[0] == spans[1]} | sizes | figures


# A small process between this one and the measured one: a child's peak memory begins with that of its parent.
LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
cost = {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss * 1024 / 1e6}
print(json.dumps(cost | {"status": done.returncode, "printed": done.stdout, "said": done.stderr}))
"""


def process_cost(typed: list[str], module: str = "trainers.commands", threads: int = 1) -> dict[str, float | str]:
    """Run a module with these arguments in a fresh process; CPU seconds, peak megabytes, and what it printed.

    Raises:
        RuntimeError: the process failed.
    """
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", module, *typed]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    cost = json.loads(done.stdout)
    if cost.pop("status"):
        raise RuntimeError(f"{module} {typed[0]} failed:\n{cost['said'][-2000:]}")
    return cost
