"""The computations in the ONNX files: torch modules with the host, for torch's exporter, and the reader's ONNX graph.

Letters: B batch, T tokens, W words, K knots, D canonical width, C labels, d host width, F features of a word.

The reader's graph is written operation by operation, because torch's exporter supports neither ONNX's bidirectional
LSTM for sentences of different lengths nor int8 matrices.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from ..reader import StreamTask
from ..space import fit_on
from ..storage import StoredTensor
from ..words import Continuation, begins_of, word_places

GATES = (0, 3, 1, 2)  # torch's LSTM has input, forget, cell, output; ONNX has input, output, forget, cell


class _Graph(nn.Module):
    """Base class of both pathways: computes the host's states from ids and mask."""

    def __init__(self, model):
        super().__init__()
        self.host = model.host
        self.takes_types = "token_type_ids" in inspect.signature(model.host.forward).parameters

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        types = {"token_type_ids": torch.zeros_like(input_ids)} if self.takes_types else {}
        out = self.host(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True, **types
        )
        return out.hidden_states


class InjectedGraph(_Graph):
    """The merged host, and the head that reads its knots."""

    def __init__(self, model, task: str):
        from .weights import host_head

        super().__init__(model)
        self.sentence = model.config.tasks[task]["type"] == "sequence_classification"
        self.layers = model.injection.knot_layers
        self.register_buffer("head_weight", host_head(model, task)[0])
        self.register_buffer("head_bias", model.adapter.tasks[task].head_bias().detach())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.states(input_ids, attention_mask)
        knots = torch.stack([states[layer] for layer in self.layers], dim=-2)  # (B, T, K, d)
        if self.sentence:
            real = attention_mask[:, :, None, None].to(knots.dtype)
            knots = (knots * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
        knots = knots / knots.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
        return torch.einsum("...kd,ckd->...c", knots, self.head_weight) + self.head_bias


class HostGraph(_Graph):
    """The host of a stream and its map, without δθ; the output has W = T positions for words."""

    OUTPUTS = ("canonical_states", "lengths", "word_of", "begins")

    def __init__(self, model):
        super().__init__(model)
        stream = model.bound_stream
        self.register_buffer("rules", stream.words.rules.cpu())
        self.fit, self.causal = fit_on("cpu", stream.fit), stream.words.causal

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = self.states(input_ids, attention_mask)
        begins, inside = begins_of(self.rules, input_ids, attention_mask)
        places = word_places(begins, inside, self.causal, input_ids.shape[1])
        at = places.read[:, :, None]  # (B, W, 1), 0 after a sentence's last word
        of_words = {
            layer: states[layer].gather(1, at.expand(-1, -1, states[layer].shape[2])).flatten(0, 1)
            for layer in self.fit.layers
        }  # (B·W, d) each
        z = self.fit(of_words).view(*input_ids.shape, len(self.fit.knots), -1)
        return z, places.lengths, places.word_of, begins


def reader_model(model, task: str, opset: int):
    """Build the ONNX model of a task: δθ, the reader and the head.

    If δθ is not zero, it is folded into the reader's first matrix, which is then float32.
    """
    from onnx import TensorProto, checker, helper

    own, told = model.adapter.tasks[task], model.config.tasks[task]
    graph = _Builder()
    float32, int64, boolean = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
    knots, dim = len(model.bound_stream.fit.knots), model.config.space["dim"]
    inputs = [("canonical_states", float32, ["batch", "words", knots, dim]), ("lengths", int64, ["batch"])]
    features = _features(graph, own, _amended(own, model.adapter.space))
    head, bias = graph.matrix("head", own.head_weight), graph.constant("head_bias", _array(own.head_bias()))
    if told["type"] == "sequence_classification":
        shape = ["batch", len(told["labels"])]
        features = _mean(graph, features)
    else:
        shape = ["batch", "tokens", len(told["labels"])]
        inputs += [("word_of", int64, ["batch", "tokens"]), ("begins", boolean, ["batch", "tokens"])]
    logits = graph.add("Add", graph.add("MatMul", features, head), bias)
    if told["type"] != "sequence_classification":
        logits = _of_tokens(graph, logits, Continuation.of(told["labels"]))
    graph.add("Identity", logits, name="logits")
    made = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "reader",
            [helper.make_tensor_value_info(*given) for given in inputs],
            [helper.make_tensor_value_info("logits", float32, shape)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
        producer_name="unihyperlora",
    )
    checker.check_model(made, full_check=True)
    return made


class _Builder:
    """Collects the nodes and constants of an ONNX graph in the order of insertion; names begin with "reader."."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operation: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes) -> str:
        """Add a node; returns the name of its first output."""
        from onnx import helper

        own = name or f"reader.{operation.lower()}_{len(self.nodes)}"
        names = [own, *(f"{own}.{number}" for number in range(1, outputs))]
        self.nodes.append(helper.make_node(operation, list(inputs), names, name=own, **attributes))
        return own

    def constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), f"reader.{name}"))
        return f"reader.{name}"

    def matrix(self, name: str, stored: StoredTensor) -> str:
        """Add a stored matrix, transposed; returns its name."""
        codes, scale = stored.codec.codes(stored.latent.detach().float())
        return self.coded(name, codes.T, scale.T)

    def coded(self, name: str, codes: torch.Tensor, scale: torch.Tensor) -> str:
        """Add int8 codes times their scales; every runtime computes the product once, when it loads the file.

        With DequantizeLinear before MatMul, onnxruntime might also round the other factor to int8.
        """
        codes = self.constant(f"{name}.codes", _array(codes).astype(np.int8))
        return self.add("Mul", self.add("Cast", codes, to=1), self.constant(f"{name}.scale", _array(scale)))


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _amended(task: StreamTask, space: nn.Module) -> torch.Tensor | None:
    """Matrices (K, D, D) that δθ multiplies z by; None if δθ is zero."""
    with torch.no_grad():
        amended = task.amended(space)
    return None if amended is None else amended + torch.eye(amended.shape[-1])


def _features(graph: _Builder, task: StreamTask, amended: torch.Tensor | None) -> str:
    """Add the reader's layers: canonical states (B, W, K, D) → features (B, W, F)."""
    reader = task.reader
    if amended is None:
        inward = graph.matrix("inward", reader.inward)
    else:
        by_knot = reader.inward().detach().unflatten(1, (len(amended), -1))  # (width, K, D)
        folded = torch.einsum("wke,kde->kdw", by_knot, amended).flatten(0, 1)
        inward = graph.constant("inward", _array(folded))
    flat = graph.add("Reshape", "canonical_states", graph.constant("flat", np.array([0, 0, -1])))
    bias = graph.constant("inward_bias", _array(reader.inward_bias()))
    x = graph.add("Gelu", graph.add("Add", graph.add("MatMul", flat, inward), bias))
    x = graph.add("Transpose", x, perm=[1, 0, 2])  # (W, B, width)
    weights = [_both_directions(graph, reader, name) for name in ("from_input", "from_state")]
    biases = torch.stack([_by_gate(d["bias"]().detach()) for d in reader.directions])
    biases = graph.constant("bias", _array(torch.cat([biases, torch.zeros_like(biases)], dim=1)))
    lengths = graph.add("Cast", "lengths", to=6)  # int32
    given = {"direction": "bidirectional", "hidden_size": reader.hidden}
    out = graph.add("LSTM", x, *weights, biases, lengths, **given)  # (W, 2, B, hidden)
    out = graph.add("Transpose", out, perm=[2, 0, 1, 3])
    return graph.add("Reshape", out, graph.constant("features", np.array([0, 0, 2 * reader.hidden])))


def _both_directions(graph: _Builder, reader: nn.Module, name: str) -> str:
    """Add the matrices of both LSTM directions, (2, 4·hidden, …), with rows in ONNX's order."""
    made = [d[name].codec.codes(d[name].latent.detach().float()) for d in reader.directions]
    codes, scale = (torch.stack([_by_gate(part) for part in parts]) for parts in zip(*made, strict=True))
    return graph.coded(name, codes, scale)


def _by_gate(rows: torch.Tensor) -> torch.Tensor:
    """Reorder rows from torch's order of the gates to ONNX's."""
    gates = rows.unflatten(0, (4, -1))
    return gates[list(GATES)].flatten(0, 1)


def _mean(graph: _Builder, features: str) -> str:
    """Add the mean over the words of each sentence: (B, W, F) → (B, F)."""
    one, zero = graph.constant("one", np.array(1)), graph.constant("zero", np.array(0))
    last = graph.constant("last_axis", np.array([-1]))
    words = graph.add("Squeeze", graph.add("Shape", features, start=1, end=2))
    number = graph.add("Range", zero, words, one)
    inside = graph.add("Less", number, graph.add("Unsqueeze", "lengths", last))  # (B, W)
    nothing = graph.constant("nothing", np.array(0, np.float32))
    kept = graph.add("Where", graph.add("Unsqueeze", inside, last), features, nothing)
    total = graph.add("ReduceSum", kept, graph.constant("words_axis", np.array([1])), keepdims=0)
    count = graph.add("Cast", graph.add("Unsqueeze", "lengths", last), to=1)  # float32
    return graph.add("Div", total, count)


def _of_tokens(graph: _Builder, logits: str, further: Continuation) -> str:
    """Add the step from logits of words (B, W, C) to logits of tokens (B, T, C); see ``words.Continuation``."""
    last = graph.constant("last_axis", np.array([-1]))
    labels = graph.constant("labels", np.array([1, 1, len(further.partner)]))
    index = graph.add("Expand", graph.add("Unsqueeze", "word_of", last), labels)
    logits = graph.add("GatherElements", logits, index, axis=1)
    if not bool(further.inner.any()):
        return logits
    other = graph.add("Gather", logits, graph.constant("partner", _array(further.partner)), axis=2)
    better, worse = (graph.add(operation, logits, other) for operation in ("Max", "Min"))
    moved = graph.add("Where", graph.constant("inner", _array(further.inner)), better, worse)
    return graph.add("Where", graph.add("Unsqueeze", "begins", last), logits, moved)
