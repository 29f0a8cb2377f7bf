"""Exports an adapter with its host to ONNX: as one file, or as separate files for the host and a reader.

Letters: B batch, T tokens, W words, K knots, D canonical width, C labels.

- One file: ``input_ids`` and ``attention_mask`` (B, T) int64 → ``logits``, (B, T, C) or (B, C) for sentences.
- The host's file: ids and mask → ``canonical_states`` (B, W, K, D), ``lengths`` (B,) words per sentence, ``word_of``
  (B, T) the word of each token, ``begins`` (B, T) whether a token is the first of its word. W equals T; states after a
  sentence's last word are undefined. The file serves every task of the space. Its tokenizer is written beside it.
- A reader's file: canonical states and lengths, for a tagger also ``word_of`` and ``begins``, → ``logits`` as above.
  Its matrices are int8, as in the adapter's file.

The single file of a stream joins these two. The metadata of each file name its space, host and task, so that
``trainers.onnx_runtime`` can refuse two files that do not belong together.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ExportError, first_line
from ..hosts import fingerprint, window_of
from ..space import HostFit, to_tensors
from ..storage import content_digest, replacing
from ..words import CUT
from .onnx_graphs import HostGraph, InjectedGraph, reader_model

FORMAT = "1"  # version of the metadata and of the tensors that pass from the host's file to a reader's
OPSET = 20  # the first opset with GELU
KEY = "unihyperlora"  # key of the metadata, which are JSON


def export_onnx(model, path: str | Path, host_path: str | Path | None = None) -> None:
    """Write the active task of a model as ONNX, with dynamic batch size and length.

    The host's token types are all 0, as for a single sentence.

    Args:
        model: a stream, or an injected update with the static router; an update is merged for the export.
        path: file to write, completely or not at all. With ``host_path`` it contains only the reader.
        host_path: file for the host of a stream; the tokenizer is written beside it (``tokenizer_path``).

    Raises:
        ExportError: an injected update has the token router, or two files were asked for it; the onnx packages are
            missing or fail; or torch fixed the input's size, which may happen in a process that exported before.
        HostError: the stream is not calibrated.
    """
    task = model._task(None)
    if model.injection is not None and host_path is not None:
        raise ExportError("An injected update is inside its host, so both are one file. Leave host_path out.")
    if model.injection is not None and not model.injection.static:
        raise ExportError(
            "Hooks compute an injected update with the token router, and ONNX does not see hooks. Load the adapter "
            "with router='static', and evaluate it that way before you export it."
        )
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ExportError("The model is not on the CPU. Call model.cpu() before the export.")
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ExportError(
            f"ONNX export needs more packages ({error}). Run: pip install 'unihyperlora[onnx]'"
        ) from error
    if model.injection is not None:
        _save(_merged_host(model, task), path)
        return
    reader = reader_model(model, task, OPSET)
    _describe(reader, reader_metadata(model, task))
    host = _traced(HostGraph(model), list(HostGraph.OUTPUTS))
    if host_path is None:
        passed = [(name.name, name.name) for name in reader.graph.input]
        joined = onnx.compose.merge_models(host, reader, passed, outputs=["logits"])
        _save(joined, path)
        return
    tokenizer = tokenizer_text(model.bound_stream.words.tokenizer)
    _describe(host, host_metadata(model, tokenizer))
    with replacing(tokenizer_path(host_path)) as temporary:
        Path(temporary).write_text(tokenizer, encoding="utf-8")
    _save(host, host_path)
    _save(reader, path)


def tokenizer_path(host_path: str | Path) -> Path:
    """Path of the tokenizer of a host's file: host.onnx → host.tokenizer.json."""
    return Path(host_path).with_suffix(".tokenizer.json")


def tokenizer_text(tokenizer) -> str:
    """Content of tokenizer.json for a prepared tokenizer: it pads with the pad token and does not truncate."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return backend.to_str()


def host_metadata(model, tokenizer: str) -> dict[str, Any]:
    """Metadata of the host's file."""
    stream = model.bound_stream
    own = stream.words.tokenizer
    unknown = [own.unk_token_id, own.mask_token_id, own.eos_token_id]
    return _metadata(model, "host") | {
        "map": map_digest(stream.fit),
        "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "window": window_of(model.host, own),
        "cut": CUT,
        "unknown_id": next((number for number in unknown if number is not None), None),
    }


def reader_metadata(model, task: str) -> dict[str, Any]:
    """Metadata of a reader's file; ``map`` is None unless δθ was tuned for the map of one host."""
    own, tuned = model.config.tasks[task], bool(model.adapter.tasks[task].delta().any())
    return _metadata(model, "reader") | {
        "map": map_digest(model.bound_stream.fit) if tuned else None,
        "task": task,
        "type": own["type"],
        "labels": own["labels"],
        "scheme": own.get("scheme"),
    }


def _metadata(model, kind: str) -> dict[str, Any]:
    """Metadata that both files have."""
    space = model.adapter.space
    return {
        "kind": kind,
        "format": FORMAT,
        "space": space.digest,
        "space_name": f"{space.name} {space.version}",
        "host": Path(model.host.config.name_or_path or type(model.host).__name__).name,
        "fingerprint": fingerprint(model.host),
    }


def map_digest(fit: HostFit) -> str:
    """SHA-256 of a host's map (16 hex digits)."""
    return content_digest(to_tensors(fit), {})[:16]


def _describe(model, metadata: dict[str, Any]) -> None:
    from onnx import helper

    helper.set_model_props(model, {KEY: json.dumps(metadata, ensure_ascii=False)})


def _save(model, path: str | Path) -> None:
    from google.protobuf.message import EncodeError

    try:
        content = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ExportError(f"This host exceeds the 2 GB limit of an ONNX file ({first_line(error)}).") from error
    with replacing(Path(path)) as temporary:
        Path(temporary).write_bytes(content)


def _merged_host(model, task: str):
    """Build the ONNX model of an injected update that is merged into its host."""
    was_merged = model.merged
    graph = InjectedGraph(model, task)
    model.merge()
    try:
        return _traced(graph, ["logits"])
    finally:
        if not was_merged:
            model.unmerge()


def _traced(graph: nn.Module, outputs: list[str]):
    """Export a module that reads ids and mask; returns the ONNX model."""
    example = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    training = [module for module in graph.modules() if module.training]
    try:
        program = torch.onnx.export(
            graph.eval(),
            example,
            input_names=["input_ids", "attention_mask"],
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes=(free, free),
            verbose=False,
        )
    except ModuleNotFoundError as error:
        raise ExportError(
            f"ONNX export needs more packages ({error}). Run: pip install 'unihyperlora[onnx]'"
        ) from error
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch cannot export this host ({first_line(error)}).") from error
    finally:
        for module in training:
            module.training = True
    if any(isinstance(size, int) for size in program.model.graph.inputs[0].shape):
        raise ExportError("torch fixed the input size to the example's. Export in a new process.")
    return program.model_proto
