"""An adapter on its host as ONNX: one file, or the host and a reader apart.

Letters: B batch, T tokens, W words, K knots, D canonical width, C labels.

- One file: ``input_ids`` and ``attention_mask`` (B, T) int64 → ``logits``, (B, T, C) or (B, C) for sentences.
- The host's file: ids and mask → ``canonical_states`` (B, W, K, D), ``lengths`` (B,) words a sentence, ``word_of``
  (B, T) the word of each token, ``begins`` (B, T) whether it is the first token of its word. W is T; states beyond a
  sentence's words mean nothing. It serves every task of the space. Its tokenizer is written beside it.
- A reader's file: canonical states and lengths, of a tagger also ``word_of`` and ``begins``, → ``logits`` as above.
  Its matrices are int8 as in the adapter's file.

The one file of a stream is the two, joined. The metadata of each file say which space, host and task it is of, so that
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

FORMAT = "1"  # of the metadata and of what passes from the host's file to a reader's
OPSET = 20  # the first with GELU
KEY = "unihyperlora"  # of the metadata, which are JSON


def export_onnx(model, path: str | Path, host_path: str | Path | None = None) -> None:
    """Write the active task of a model as ONNX; batch and length are free.

    A host's token types are those of a single sentence.

    Args:
        model: a stream, or an injected update with the static router; an update is merged for the export.
        path: of the file; written whole or not at all. With ``host_path`` it has the reader alone.
        host_path: of a stream, where to write the host; its tokenizer is written beside it (``tokenizer_path``).

    Raises:
        ExportError: the token router of an injected update, or two files of one; the onnx packages are missing or
            fail, or torch has fixed the input's size, as it may in a process that has exported before.
        HostError: the stream is not calibrated.
    """
    task = model._task(None)
    if model.injection is not None and host_path is not None:
        raise ExportError("An injected update is inside its host, so both are one file. Leave host_path out.")
    if model.injection is not None and not model.injection.static:
        raise ExportError(
            "The injected update with the token router is computed in hooks that ONNX does not see. Load the adapter "
            "with router='static', and score it so before you export it."
        )
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ExportError("The model is not on the CPU; export it from there: model.cpu().")
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
    """Where the tokenizer of a host's file lies: host.onnx → host.tokenizer.json."""
    return Path(host_path).with_suffix(".tokenizer.json")


def tokenizer_text(tokenizer) -> str:
    """A prepared tokenizer as its tokenizer.json, which pads with its pad token and cuts nothing off."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return backend.to_str()


def host_metadata(model, tokenizer: str) -> dict[str, Any]:
    """What the host's file says of itself."""
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
    """What a reader's file says of itself; ``map`` is None unless δθ amends the map of one host."""
    own, tuned = model.config.tasks[task], bool(model.adapter.tasks[task].delta().any())
    return _metadata(model, "reader") | {
        "map": map_digest(model.bound_stream.fit) if tuned else None,
        "task": task,
        "type": own["type"],
        "labels": own["labels"],
        "scheme": own.get("scheme"),
    }


def _metadata(model, kind: str) -> dict[str, Any]:
    """What both files say."""
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
    """Of a host's map, SHA-256 (16 hex digits)."""
    return content_digest(to_tensors(fit), {})[:16]


def _describe(model, metadata: dict[str, Any]) -> None:
    from onnx import helper

    helper.set_model_props(model, {KEY: json.dumps(metadata, ensure_ascii=False)})


def _save(model, path: str | Path) -> None:
    from google.protobuf.message import EncodeError

    try:
        content = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ExportError(f"This host is too large for one ONNX file, 2 GB at most ({first_line(error)}).") from error
    with replacing(Path(path)) as temporary:
        Path(temporary).write_bytes(content)


def _merged_host(model, task: str):
    """The ONNX model of an injected update, merged into its host."""
    was_merged = model.merged
    graph = InjectedGraph(model, task)
    model.merge()
    try:
        return _traced(graph, ["logits"])
    finally:
        if not was_merged:
            model.unmerge()


def _traced(graph: nn.Module, outputs: list[str]):
    """The ONNX model of a module that reads ids and mask."""
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
        raise ExportError("torch fixed the size of the input to that of its example. Export in a fresh process.")
    return program.model_proto
