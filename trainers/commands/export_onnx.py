"""Write host and adapter as one ONNX file, and score it beside the torch model it came from.

    unihyperlora export-onnx runs/conll2003 conll2003.onnx --model_name_or_path HOST \
        --validation_file dev.jsonl --record conll2003-onnx.json

Without --validation_file nothing is scored. Scores are for tags of words; the formats are those of run_ner.py. Needs
pip install 'unihyperlora[onnx]'.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from transformers import DataCollatorForTokenClassification, EvalPrediction

from modeling_unihyperlora import UniHyperLoraForTokenClassification
from modeling_unihyperlora.storage import write_json
from modeling_unihyperlora.words import load_tokenizer

from ..decoding import IGNORED, token_scores
from ..ner_data import read_file
from ..ner_windows import SentenceWindows, entity_scores

BATCH = 32


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unihyperlora export-onnx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("adapter", help="Folder or Hub id of the adapter.")
    add("path", help="The ONNX file to write.")
    add("--model_name_or_path", help="Host, if not the adapter's own.")
    add("--router", choices=("static",), help="For an injected update: the fixed mask, which alone can be exported.")
    add("--validation_file", help="Tagged sentences to score both on.")
    add("--max_eval_samples", type=int, help="Use the first sentences only.")
    add("--record", help="Where to write what was found, as JSON.")
    return parser


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Export and score; returns what was found."""
    arguments = parser().parse_args(command_line)
    changes = {"router": arguments.router} if arguments.router else {}
    model = UniHyperLoraForTokenClassification.from_pretrained(
        arguments.adapter, base_model_name_or_path=arguments.model_name_or_path, **changes
    )
    start = time.perf_counter()
    model.export_onnx(arguments.path)
    found: dict[str, object] = {
        "kind": "onnx",
        "adapter": Path(arguments.adapter).name,
        "host": Path(model.config.base_model_name_or_path).name,
        "onnx_bytes": Path(arguments.path).stat().st_size,
        "export_seconds": round(time.perf_counter() - start, 1),
    }
    if arguments.validation_file:
        found |= compare(model, arguments.path, arguments.validation_file, arguments.max_eval_samples)
    if arguments.record:
        write_json(Path(arguments.record), found)
    print(json.dumps(found, indent=2, sort_keys=True))
    return found


def compare(model, path: str, file: str, limit: int | None) -> dict[str, object]:
    """F1 of both on the same sentences, the largest difference of a logit, and the share of equal tags."""
    import onnxruntime

    tokenizer = load_tokenizer(model.config.base_model_name_or_path)
    sentences = read_file(file, label_names=model.labels)[:limit]
    scheme = model.config.tasks[model.config.active_task].get("scheme")
    windows = SentenceWindows(sentences, tokenizer, model.labels, 128, scheme)
    collate = DataCollatorForTokenClassification(tokenizer, padding="max_length", max_length=128)
    session = onnxruntime.InferenceSession(path)
    score = entity_scores(windows)
    rows, labels, largest = {"torch": [], "onnx": []}, [], 0.0
    for first in range(0, len(windows), BATCH):
        batch = collate([windows[number] for number in range(first, min(first + BATCH, len(windows)))])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = {"torch": model(**inputs).logits}
        [out] = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        logits["onnx"] = torch.from_numpy(out)
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
