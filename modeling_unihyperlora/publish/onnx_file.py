"""Host and adapter as one ONNX file: token ids and their mask in, logits out.

What the stream does with a batch depends on how many words its sentences have. In the file every sentence has as many
places for words as tokens; the places beyond its words are computed and not read. The recurrent layer runs over whole
rows: backwards from the end of each sentence, which a gather puts at the front.
"""

import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ExportError, first_line
from ..reader import Reader
from ..space import nearness
from ..storage import replacing
from ..words import Continuation, begins_of, word_places

OPSET = 18


def export_onnx(model, path: str | Path) -> None:
    """Write the active task of a model as ONNX; batch and length are free.

    Inputs are ``input_ids`` and ``attention_mask`` (B, T), int64; a host's token types are those of a single sentence.
    Output is ``logits``: (B, T, C), or (B, C) for sentences.

    Args:
        model: a stream, or an injected update with the static router; an update is merged for the
            export.
        path: of the file; written whole or not at all.

    Raises:
        ExportError: the token router of an injected update, the onnx packages are missing or fail, or torch has
            fixed the input's size, as it may in a process that has exported before; nothing is written then.
        HostError: the stream is not calibrated.
    """
    task = model._task(None)
    sentence = model.config.tasks[task]["type"] == "sequence_classification"
    if model.injection is not None and not model.injection.static:
        raise ExportError(
            "The injected update with the token router is computed in hooks that ONNX does not see. Load the adapter "
            "with router='static', and score it so before you export it."
        )
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ExportError("The model is not on the CPU; export it from there: model.cpu().")
    was_training, was_merged = model.training, model.merged
    graph = (_InjectedGraph if model.config.pathway == "inject" else _StreamGraph)(model, task, sentence)
    model.eval()
    if model.injection is not None:
        model.merge()
    example = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    try:
        program = torch.onnx.export(
            graph.eval(),
            example,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamic_shapes=(free, free),
            verbose=False,
        )
        if any(isinstance(size, int) for size in program.model.graph.inputs[0].shape):
            raise ExportError("torch fixed the size of the input to that of its example. Export in a fresh process.")
        with replacing(Path(path)) as temporary:
            program.save(temporary, external_data=False)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"ONNX export needs more packages ({error}). Run: pip install 'unihyperlora[onnx]'"
        ) from error
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch cannot export this host ({first_line(error)}).") from error
    finally:
        if model.injection is not None and not was_merged:
            model.unmerge()
        model.train(was_training)


class _Graph(nn.Module):
    """What both pathways share: the host's states from ids and mask."""

    def __init__(self, model, task: str, sentence: bool):
        super().__init__()
        self.host, self.sentence = model.host, sentence
        self.takes_types = "token_type_ids" in inspect.signature(model.host.forward).parameters
        own = model.adapter.tasks[task]
        self.register_buffer("head_bias", own.head_bias().detach())

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        types = {"token_type_ids": torch.zeros_like(input_ids)} if self.takes_types else {}
        out = self.host(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True, **types
        )
        return out.hidden_states


class _InjectedGraph(_Graph):
    """The merged host and the head on its knots."""

    def __init__(self, model, task: str, sentence: bool):
        from .weights import host_head

        super().__init__(model, task, sentence)
        self.layers = model.injection.knot_layers
        self.register_buffer("head_weight", host_head(model, task)[0])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.states(input_ids, attention_mask)
        knots = torch.stack([states[layer] for layer in self.layers], dim=-2)  # (B, T, K, d)
        if self.sentence:
            real = attention_mask[:, :, None, None].to(knots.dtype)
            knots = (knots * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
        knots = knots / knots.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
        return torch.einsum("...kd,ckd->...c", knots, self.head_weight) + self.head_bias


class _StreamGraph(_Graph):
    """The host, its map amended by δθ, the reader and the head; W = T places for words."""

    def __init__(self, model, task: str, sentence: bool):
        super().__init__(model, task, sentence)
        stream, own = model.bound_stream, model.adapter.tasks[task]
        landmarks, knots = stream.fit.landmarks, stream.fit.knots
        dim = model.config.space["dim"]
        self.near, self.asked = [list(knot.layers) for knot in knots], list(landmarks.layers)
        with torch.enable_grad():  # which gives δθ's amendment also where it is zero
            amended = own.values(model.adapter.space).amended.detach().cpu() + torch.eye(dim)  # (K, D, D)
        values = {
            "flags": stream.words.flags.cpu(),
            "query": landmarks.matrix.cpu(),
            "query_offset": landmarks.offset.cpu(),
            "landmarks": landmarks.at.cpu(),
            "head_weight": own.head_weight(),
        }
        by_knot = landmarks.weights.cpu().unflatten(0, (len(knots), -1))
        for k, (knot, weights, change) in enumerate(zip(knots, by_knot, amended, strict=True)):
            values[f"matrix_{k}"], values[f"offset_{k}"] = change.T @ knot.matrix.cpu(), knot.offset.cpu() @ change
            values[f"weights_{k}"] = change.T @ weights
        values |= Continuation.of(model.config.tasks[task]["labels"])._asdict()
        for name, value in values.items():
            self.register_buffer(name, value.detach().clone())
        self.reader = _ReaderGraph(own.reader)
        self.causal = stream.words.causal

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.states(input_ids, attention_mask)
        begins, inside = begins_of(self.flags, input_ids, attention_mask)
        number = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]
        places = word_places(begins, inside, input_ids.shape[1])
        lengths, word_of = places.lengths, places.word_of
        positions = places.last if self.causal else places.first  # (B, W), 0 beyond a sentence's words
        query = F.linear(self.of_words(self.asked, states, positions), self.query, self.query_offset)
        near = nearness(query.flatten(0, 1), self.landmarks).view(*positions.shape, -1)  # (B, W, R)
        z = torch.cat([self.coordinates(k, states, positions, near) for k in range(len(self.near))], dim=-1)
        features = self.reader(z, lengths)  # (B, W, F)
        inside = (number < lengths[:, None])[:, :, None]
        features = torch.where(inside, features, torch.zeros_like(features))
        if self.sentence:
            return F.linear(features.sum(dim=1) / lengths[:, None], self.head_weight, self.head_bias)
        logits = F.linear(features, self.head_weight, self.head_bias)
        logits = logits.gather(1, word_of[:, :, None].expand(-1, -1, logits.shape[2]))
        return Continuation(self.partner, self.inner)(logits, begins)

    def of_words(self, layers: list[int], states: tuple[torch.Tensor, ...], positions: torch.Tensor) -> torch.Tensor:
        """States of some layers side by side at each word's token: (B, W, len(layers)·d)."""
        index = positions[:, :, None]
        beside = [states[layer].gather(1, index.expand(-1, -1, states[layer].shape[2])) for layer in layers]
        return torch.cat(beside, dim=-1)

    def coordinates(self, k: int, states: tuple[torch.Tensor, ...], positions: torch.Tensor, near: torch.Tensor):
        """Of knot k, with δθ: (B, W, D)."""
        beside = self.of_words(self.near[k], states, positions)
        z = F.linear(beside, getattr(self, f"matrix_{k}"), getattr(self, f"offset_{k}"))
        return z + F.linear(near, getattr(self, f"weights_{k}"))


class _ReaderGraph(nn.Module):
    """``Reader`` without packing; its rows beyond a sentence's end are not to be read."""

    def __init__(self, reader: Reader):
        super().__init__()
        width, inputs = reader.inward().shape
        self.inward = nn.Linear(inputs, width)
        self.directions = nn.ModuleList(nn.LSTM(width, reader.hidden, batch_first=True) for _ in reader.directions)
        with torch.no_grad():
            self.inward.weight.copy_(reader.inward())
            self.inward.bias.copy_(reader.inward_bias())
            for lstm, direction in zip(self.directions, reader.directions, strict=True):
                lstm.weight_ih_l0.copy_(direction["from_input"]())
                lstm.weight_hh_l0.copy_(direction["from_state"]())
                lstm.bias_ih_l0.copy_(direction["bias"]())
                lstm.bias_hh_l0.zero_()

    def forward(self, z: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(B, W, K·D), (B,) → (B, W, F)."""
        x = F.gelu(self.inward(z))
        number = torch.arange(z.shape[1], device=z.device)[None, :]
        mirrored = lengths[:, None] - 1 - number
        mirrored = torch.where(mirrored >= 0, mirrored, number)[:, :, None]  # its own inverse within a sentence
        onward, _ = self.directions[0](x)
        back, _ = self.directions[1](x.gather(1, mirrored.expand(-1, -1, x.shape[2])))
        return torch.cat([onward, back.gather(1, mirrored.expand(-1, -1, back.shape[2]))], dim=-1)
