"""Write host and adapter as one ONNX file or as two, and compare their scores with the torch model.

    unihyperlora export-onnx runs/conll conll.onnx --validation_file dev.jsonl
    unihyperlora export-onnx runs/conll reader.onnx --host_file host.onnx

With --host_file the host gets a separate file, which serves all tasks of the space, and
FILE.onnx has only the reader; unihyperlora tag --runtime onnx runs both. Needs
pip install 'unihyperlora[onnx]'.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import DataCollatorForTokenClassification, EvalPrediction
from transformers.utils import CONFIG_NAME

from modeling_unihyperlora import (
    ConfigError,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.modeling_unihyperlora import UniHyperLoraPreTrainedModel
from modeling_unihyperlora.storage import adapter_file, write_json
from modeling_unihyperlora.words import load_tokenizer

from ..metrics import entity_scores
from ..ner_data import read_file
from ..ner_windows import IGNORED, SentenceWindows, token_scores
from ..onnx_runtime import OnnxReader
from . import new_parser

BATCH = 32


def parser() -> argparse.ArgumentParser:
    own = new_parser("export-onnx", "ADAPTER FILE.onnx", __doc__)
    add = own.add_argument
    add("adapter", help="Folder or Hub id of the adapter.")
    add("path", help="The ONNX file to write.")
    add("--host_file", metavar="FILE", help="Separate file for the host; its tokenizer is written beside it.")
    add("--task", metavar="NAME", help="Task to export; default: the active task.")
    add("--host", help="Folder or Hub id; default: the adapter's own host.")
    add("--router", choices=("static",), help="For an injected update: use the fixed mask.")
    add("--validation_file", metavar="FILE", help="Tagged sentences to score both on.")
    add("--max_eval_samples", type=int, metavar="N", help="Score the first N sentences only.")
    add("--record", metavar="FILE", help="JSON file for the figures.")
    return own


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Export and score; returns the figures."""
    arguments = parser().parse_args(command_line)
    model = load(arguments)
    start = time.perf_counter()
    model.export_onnx(arguments.path, arguments.host_file)
    found: dict[str, object] = {
        "kind": "onnx",
        "adapter": Path(arguments.adapter).name,
        "host": Path(model.config.base_model_name_or_path).name,
        "onnx_bytes": Path(arguments.path).stat().st_size,
        "export_seconds": round(time.perf_counter() - start, 1),
    }
    if arguments.host_file:
        found["host_bytes"] = Path(arguments.host_file).stat().st_size
    if arguments.validation_file:
        scores = scores_of(arguments.path, arguments.host_file)
        found |= compare(model, scores, arguments.validation_file, arguments.max_eval_samples)
    if arguments.record:
        write_json(Path(arguments.record), found)
    print(json.dumps(found, indent=2, sort_keys=True))
    return found


def load(arguments: argparse.Namespace) -> UniHyperLoraPreTrainedModel:
    """Load the adapter on its host, with the model class of its task.

    Raises:
        ConfigError: the task does not exist, or --validation_file is given for a task without tags.
    """
    config = read_config(adapter_file(arguments.adapter, CONFIG_NAME, "main", {}))
    task = arguments.task or config.active_task
    if task not in config.tasks:
        raise ConfigError(f"No task {task!r} in {arguments.adapter}; it has {sorted(config.tasks)}.")
    tags = config.tasks[task]["type"] == "token_classification"
    if arguments.validation_file and not tags:
        raise ConfigError(f"--validation_file is for tags of words, but task {task!r} classifies texts. Leave it out.")
    kind = UniHyperLoraForTokenClassification if tags else UniHyperLoraForSequenceClassification
    changes = {"router": arguments.router} if arguments.router else {}
    return kind.from_pretrained(arguments.adapter, base_model_name_or_path=arguments.host, task=task, **changes)


def scores_of(path: str, host_path: str | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function from ids and mask (B, T) to the logits of the written files."""
    if host_path:
        return OnnxReader(host_path, path).logits
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def compare(model, scores: Callable, file: str, limit: int | None) -> dict[str, object]:
    """F1 of torch and ONNX on the same sentences, largest difference of logits, and number of different tags."""
    tokenizer = load_tokenizer(model.config.base_model_name_or_path)
    sentences = read_file(file, label_names=model.labels)[:limit]
    scheme = model.config.tasks[model.config.active_task].get("scheme")
    windows = SentenceWindows(sentences, tokenizer, model.labels, 128, scheme)
    collate = DataCollatorForTokenClassification(tokenizer, padding="max_length", max_length=128)
    score = entity_scores(windows)
    rows, labels, largest = {"torch": [], "onnx": []}, [], 0.0
    for first in range(0, len(windows), BATCH):
        batch = collate([windows[number] for number in range(first, min(first + BATCH, len(windows)))])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = {"torch": model(**inputs).logits}
        logits["onnx"] = torch.from_numpy(scores(*(tensor.numpy() for tensor in inputs.values())))
        words = batch["labels"] != IGNORED
        largest = max(largest, float((logits["torch"] - logits["onnx"])[words].abs().max()))
        for name, rows_of in rows.items():
            rows_of.append(token_scores(logits[name]))
        labels.append(batch["labels"])
    labels = torch.cat(labels).numpy()
    predicted = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    tags = {name: [*itertools.chain(*windows.tags_of(logits))] for name, logits in predicted.items()}
    return {
        "sentences": len(windows.sentences),
        "words": int((labels != IGNORED).sum()),
        "largest_logit_difference": largest,
        "tags_that_differ": sum(a != b for a, b in zip(tags["torch"], tags["onnx"], strict=True)),
        **{f"{name}_f1": score(EvalPrediction(logits, labels))["f1"] for name, logits in predicted.items()},
    }
