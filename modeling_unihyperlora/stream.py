"""The portable stream: computation in the canonical space, on states that the host leaves untouched.

Letters: B batch, T tokens, W words, K knots, D canonical width of the stream, M atoms, F features of a word.

What a word is, ``words`` says. At each knot the host's states of a word, those of
neighbouring layers side by side, become z = P_in(h), by the host's calibration. δθ, which is tuned on one host, amends
that map in the directions of all atoms. Then z is routed as a token is in the injected update, and its own atoms act:

    z ← z + Σ_{all j} δθ(τ)_j · u_j (v_jᵀ z)
    z ← z + Σ_{j in top-k} gate_j · g_θ(τ)_j · u_j (v_jᵀ z)

where τ names the knot instead of a module type. The knots side by side feed a bidirectional recurrent layer over the
words of the sentence, whose outputs the head reads. A task that comes to a trained stream finds that layer made for
another one; its head reads the coordinates of the word and of its neighbours as well. Nothing of this depends on the
host's width, depth or tokenizer, and the host is never modified.

With pathway "both" the host's pass has an injected update in it, on the one host that it was tuned on: the map of that
host stays what it was without the update, and the states that it reads are moved.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging as hf_logging

from .adapter import KNOTS, UniHyperLoraAdapter, head_inputs, knot_features, knot_layers, near_layers
from .anchors import word_states
from .calibration import HostFit, HostToKnots, cache_folder, cached_fit, fit_host, full_precision, kept, layers_of
from .errors import ConfigError
from .hosts import call_host, fingerprint, linear_multiply_adds, num_layers_of
from .injection import Injection
from .mixed_tasks import MixedTasks, StackedTasks
from .routing import AT_ONCE, read_atoms, route, write_atoms
from .token_mixer import Words, with_neighbours
from .words import Continuation, WordPlaces, WordReader


@dataclass
class StreamRun:
    """One forward pass of the stream, and what the heads read of it; tokens have what their words have.

    With cached states there is no host pass: T is then W, and the host's states are None.
    """

    tables: "Tables"
    features: torch.Tensor  # (B, W, F)
    continuation: Continuation  # of the task's labels, or of those of each sentence's task
    lengths: torch.Tensor  # (B,) words a sentence
    expected_atoms: torch.Tensor  # (B, T) mean over the knots
    active_atoms: torch.Tensor  # (B, T)
    places: WordPlaces | None = None  # of the words among the tokens
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    mixed: StackedTasks | None = None  # whose heads these are, where sentences are of several tasks

    def token_logits(self) -> torch.Tensor:
        """(B, T, C): a token has its word's scores, with I-X for B-X on further tokens. Of cached states (B, W, C)."""
        logits = _spread(self._logits(self.features), self.places)
        return logits if self.places is None else self.continuation(logits, self.places.begins)

    def sentence_logits(self) -> torch.Tensor:
        """(B, C) from the mean of a sentence's features."""
        return self._logits(self.features.sum(dim=1) / self.lengths.unsqueeze(-1))

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        if self.mixed is not None:
            own = self.mixed
            return own.linear(features, own.head_weight()) + own.of_sentences(own.head_bias(), features)
        return F.linear(features, self.tables.head_weight, self.tables.head_bias)


class Tables(NamedTuple):
    """What the stream computes with, for one task."""

    amended: torch.Tensor  # (K, D, D): what δθ adds to the map, as a matrix to the right of z
    rows_in: torch.Tensor  # (M, D)
    rows_out: torch.Tensor  # (M, D)
    router: torch.Tensor  # (M, D)
    bias: torch.Tensor  # (M,)
    coefficients: torch.Tensor  # (K, M)
    mixer: list[torch.Tensor]
    head_weight: torch.Tensor  # (C, F)
    head_bias: torch.Tensor  # (C,)


class Stream:
    """Binds an adapter's stream to one host.

    Args:
        adapter: whose anchors are set.
        host: any encoder that returns its hidden states.
        tokenizer: the host's fast tokenizer.
        anchor_states: the host's states of the anchors, as ``read_anchor_states`` gives them, if known already.

    Attributes:
        fit: the host's map into the canonical space.
        injection: the update in the host's linear layers, if there is one on top of the stream.
        refined: which text the map was refined on, its number of words and SHA-256, or None.
        seconds: that finding it took, or reading it from the cache.
        disturbs: whether coordinates are disturbed in training.
    """

    def __init__(
        self, adapter: UniHyperLoraAdapter, host: nn.Module, tokenizer, anchor_states: torch.Tensor | None = None
    ):
        self.adapter = adapter
        self.host = host
        self.num_layers: int = num_layers_of(host)
        self.hidden_size: int = host.config.hidden_size
        self.near = near_layers(self.num_layers)
        self.layers = layers_of(self.near)
        self.disturbs = True
        self.injection: Injection | None = None
        self.refined: dict[str, int | str] | None = None
        self._to_knots: HostToKnots | None = None
        self._host_linear = linear_multiply_adds(host)
        self.words = WordReader(host, tokenizer)

        def compute() -> HostFit:
            states = anchor_states
            if states is None:
                states = read_anchor_states(host, self.words, adapter.anchors.sentences())
            coordinates = adapter.anchors.canonical().detach().cpu()
            return fit_host(states, self.near, knot_layers(self.num_layers), coordinates)

        start = time.perf_counter()
        self.fit = cached_fit(fingerprint(host), self.words.key(), adapter.anchors, compute)
        self.seconds = time.perf_counter() - start

    def canonical_states(
        self, hidden_states: Sequence[torch.Tensor] | Mapping[int, torch.Tensor], positions: torch.Tensor
    ) -> torch.Tensor:
        """P_in of the words' states: by layer (B, T, d), positions (B, W) → (B, W, K, D) float32."""
        cells = positions + torch.arange(len(positions), device=positions.device)[:, None] * hidden_states[0].shape[1]
        return self._at_knots(hidden_states, cells.flatten()).reshape(*positions.shape, len(KNOTS), -1)

    def _at_knots(
        self, hidden_states: Sequence[torch.Tensor] | Mapping[int, torch.Tensor], cells: torch.Tensor
    ) -> torch.Tensor:
        """The same for tokens by their number in the batch: (N,) of B·T → (N, K·D)."""
        kept = self._to_knots
        if kept is None or kept.fit is not self.fit or kept.offset.device != cells.device:
            kept = self._to_knots = HostToKnots.of(self.fit, cells.device)
        flat = {layer: hidden_states[layer].flatten(0, 1) for layer, *_ in kept.layers}
        several = cells.split(max(1, AT_ONCE // len(self.fit.landmarks.at)))
        return torch.cat([kept({at: every.index_select(0, some) for at, every in flat.items()}) for some in several])

    def run(
        self, task: str | MixedTasks, attention_mask: torch.Tensor | None, output_hidden_states, inputs: dict
    ) -> StreamRun:
        """The stream of ``task`` on the host's states of token ids, or on cached states of words.

        Args:
            attention_mask: (B, T) of sub-tokens, or (B, W) of words where their states are given.
            inputs: what the host reads, or ``canonical_states`` (B, W, K, D).
        """
        if self.injection is not None and isinstance(task, MixedTasks):
            raise ConfigError(
                "task_ids mixes tasks in a batch, and on top of a stream the host computes with the injected update "
                "of one task at a time. Give each task a batch of its own."
            )
        if "canonical_states" in inputs:
            if self.injection is not None:
                raise ConfigError(
                    "canonical_states are those of the host alone, and this adapter moves the host's states by an "
                    "injected update. Give input_ids."
                )
            return self.follow(inputs["canonical_states"], attention_mask.sum(dim=1), task)
        z, places, hidden = self.read_host(attention_mask, inputs, task)
        run = self.follow(z, places.lengths, task)
        run.expected_atoms, run.active_atoms = (
            _spread(count, places) for count in (run.expected_atoms, run.active_atoms)
        )
        run.places, run.last_hidden_state = places, hidden[-1]
        run.hidden_states = hidden if output_hidden_states else None
        return run

    def read_host(self, attention_mask: torch.Tensor | None, inputs: dict, task: str | None = None) -> tuple:
        """Canonical states of words (B, W, K, D), where the words are, host states.

        With an injected update the host computes with that of ``task`` in it, and gradients go through the host.
        """
        inputs = inputs.copy()
        word_index = inputs.pop("word_index", None)
        if inputs.get("input_ids") is None:
            raise ConfigError(
                f"The stream tells words by their token ids, and the call gave {sorted(inputs)} without input_ids. "
                "Give input_ids, or canonical_states."
            )
        if inputs["input_ids"].shape[1] == 0:
            raise ConfigError("The text is empty: it has no token for the host to read. Leave empty texts out.")
        updating = contextlib.nullcontext()
        if self.injection is not None and task is not None:
            updating = self.injection.running(task, attention_mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.injection is not None):
            with updating:
                out = call_host(self.host, attention_mask, output_hidden_states=True, **inputs)
            places = self.words.places(inputs["input_ids"], attention_mask, word_index)
            z = self.canonical_states(out.hidden_states, self.words.read_at(places))
            return z, places, out.hidden_states

    def follow(self, z: torch.Tensor, lengths: torch.Tensor, task: str | MixedTasks) -> StreamRun:
        """The way of words with canonical states (B, W, K, D), ``lengths`` (B,) of them in each sentence."""
        adapter, config, (batch, width, knots, dim) = self.adapter, self.adapter.config, z.shape
        mixed = adapter.own(task) if isinstance(task, MixedTasks) else None
        name = task if mixed is None else next(iter(adapter.tasks))  # all but what is of a task serves any
        tables: Tables = adapter.keep(name, "stream", lambda: self._tables(name))
        inside = torch.arange(width, device=z.device) < lengths[:, None]  # (B, W)
        flat = z.flatten(0, 1)
        if torch.compiler.is_compiling():  # a program of fixed shapes computes the padding as well
            cells, words = None, Words.in_rows(lengths, width)
        else:
            cells = inside.flatten().nonzero().squeeze(1)
            words, flat = Words.one_after_the_other(lengths, len(cells)), flat.index_select(0, cells)
        if adapter.training and self.disturbs:
            flat = disturb(flat, words.sentence, batch, config.stream_fidelity)
        at_knots = flat.transpose(0, 1)  # (K, N, D)
        if mixed is None:
            at_knots, bias = torch.baddbmm(at_knots, at_knots, tables.amended).flatten(0, 1), tables.bias
        else:
            at_knots, bias = self._amend_each(at_knots, mixed, tables, cells, width)
        routing = route(at_knots, tables.router, bias, config.router_top_k)
        own = routing.atoms.view(knots, -1)
        weights = routing.gates * tables.coefficients.gather(1, own).view_as(routing.gates)
        dots = read_atoms(at_knots, tables.rows_in, routing)
        moved = at_knots + write_atoms(dots, tables.rows_out, routing, weights)
        coordinates = moved.view(knots, -1, dim).transpose(0, 1).flatten(1)  # (N, K·D)
        features = adapter.token_mixer(coordinates, words, tables.mixer)
        if more := (tables.head_weight.shape[1] if mixed is None else mixed.head_inputs) - features.shape[1]:
            beside = with_neighbours(coordinates, words.place, words.lengths[words.sentence], more)
            features = torch.cat([features, *beside], dim=-1)
        counts = (routing.probabilities, (routing.gates > 0).float())
        expected, active = (count.sum(dim=-1).view(knots, -1).mean(dim=0) for count in counts)
        values = (features, expected, active)
        if cells is None:
            values = (x.view(batch, width, *x.shape[1:]) for x in values)
            values = (x.masked_fill(~(inside[..., None] if x.dim() == 3 else inside), 0) for x in values)
        else:
            values = (unpack(x, cells, (batch, width)) for x in values)
        features, expected, active = values
        return StreamRun(tables, features, self._continuation(task, mixed), lengths, expected, active, mixed=mixed)

    def _continuation(self, task: str | MixedTasks, mixed: StackedTasks | None) -> Continuation:
        labels = {name: own["labels"] for name, own in self.adapter.config.tasks.items()}
        if mixed is None:
            return Continuation.of(labels[task])
        most = max(len(labels[name]) for name in task.names)
        parts = zip(*(Continuation.of(labels[name], most) for name in task.names), strict=True)
        return Continuation(*(torch.stack(part).to(mixed.rows.device)[mixed.rows] for part in parts))

    def _amend_each(
        self, at_knots: torch.Tensor, own: StackedTasks, tables: Tables, cells: torch.Tensor | None, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Words (K, N, D) amended by the δθ of their own tasks → (K·N, D), and the router's bias (K·N, M) of each."""
        row = own.rows.repeat_interleave(width) if cells is None else own.rows[cells // width]  # (N,)
        places = knot_features(torch.tensor(KNOTS, device=at_knots.device))
        amendments = (places @ own.delta()).transpose(0, 1)[:, row]  # (K, N, M)
        amended = at_knots + (at_knots @ tables.rows_in.T * amendments) @ tables.rows_out
        bias = self.adapter.router_bias() + own.embedding() @ tables.router.T
        return amended.flatten(0, 1), bias[row].repeat(len(at_knots), 1)

    def _tables(self, task: str) -> Tables:
        adapter = self.adapter
        own = adapter.tasks[task]
        rows_in, rows_out, router = adapter.atoms_in(), adapter.atoms_out(), adapter.router_weight()
        places = knot_features(torch.tensor(KNOTS, device=rows_in.device))
        return Tables(
            amended=torch.einsum("md,km,me->kde", rows_in, places @ own.delta(), rows_out),
            rows_in=rows_in,
            rows_out=rows_out,
            router=router,
            bias=adapter.router_bias() + router @ own.embedding(),
            coefficients=adapter.mixer(places),
            mixer=adapter.token_mixer.weights(),
            head_weight=own.head_weight(),
            head_bias=own.head_bias(),
        )

    def host_multiply_adds(self, sequence_length: int) -> int:
        """Multiply-adds a token of the host: its linear layers but the pooler's, QKᵀ and the weighted sum of V."""
        attention = 2 * sequence_length * self.hidden_size * self.num_layers
        return self._host_linear + attention

    def added_multiply_adds(self, labels: int) -> int:
        """Multiply-adds a word that the stream and its head add; a token has at most one word to itself.

        An injected update on top counts, unless it is merged.
        """
        config, knots = self.adapter.config, len(KNOTS)
        project = config.stream_dim * self.hidden_size * sum(map(len, self.near))
        landmarks = len(self.fit.landmarks.at) * (self.fit.landmarks.at.shape[1] + knots * config.stream_dim)
        landmarks += len(self.fit.landmarks.offset) * self.hidden_size * len(self.fit.landmarks.layers)
        atoms = knots * config.stream_dim * (config.atoms + 1 + 2 * config.router_top_k + config.stream_dim)
        inward = knots * config.stream_dim * config.stream_width
        recurrent = 2 * 4 * config.stream_hidden * (config.stream_width + config.stream_hidden)
        update = 0 if self.injection is None else self.injection.update_multiply_adds()
        window = config.tasks.get(config.active_task, {}).get("window")
        return project + landmarks + atoms + inward + recurrent + labels * head_inputs(config, window) + update

    def held_tensors(self, task: str) -> list[torch.Tensor]:
        """The map of this host, by knot and by layer, its table of word beginnings, the values of the file, and the
        atoms of an injected update."""
        made = HostToKnots.of(self.fit, self.words.flags.device)
        by_layer = [made.offset, *(matrix for *_, matrix in made.layers)]
        *tables, mixer, head_weight, head_bias = self._tables(task)
        parts = (*self.fit.knots, self.fit.landmarks)
        by_knot = [tensor for part in parts for tensor in part if isinstance(tensor, torch.Tensor)]
        update = [] if self.injection is None else self.injection.held_tensors(task)
        return [*by_knot, *by_layer, self.words.flags, *tables, *mixer, head_weight, head_bias, *update]


def unpack(words: torch.Tensor, cells: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Values of words (N, …) → (B, W, …) by their cells in it, the others 0."""
    padded = words.new_zeros(shape[0] * shape[1], *words.shape[1:])
    return padded.index_copy(0, cells, words).view(*shape, *words.shape[1:])


def _spread(words: torch.Tensor, places: WordPlaces | None) -> torch.Tensor:
    """Values of words (B, W, …) → of tokens (B, T, …)."""
    if places is None:
        return words
    word_of = places.word_of
    index = word_of.reshape(*word_of.shape, *[1] * (words.dim() - 2)).expand(*word_of.shape, *words.shape[2:])
    return words.gather(1, index)


def disturb(z: torch.Tensor, sentence: torch.Tensor, sentences: int, fidelity: float) -> torch.Tensor:
    """What another host would do to the coordinates: each correlates less with the source's.

    A calibrated host has coordinates of unit variance whose correlation with the source's is some ρ < 1. A sentence
    draws its ρ from U(``fidelity``, 1) and gets ρ·z + √(1 - ρ²)·noise.

    Args:
        z: (N, K, D) coordinates of unit variance.
        sentence: (N,) the one that each word is of, from 0 to ``sentences`` - 1.
        fidelity: the least ρ; 1 leaves the coordinates alone.
    """
    rho = torch.empty(sentences, 1, 1, device=z.device).uniform_(fidelity, 1)[sentence]
    return rho * z + (1 - rho.square()).sqrt() * torch.randn_like(z)


def read_anchor_states(host: nn.Module, words: WordReader, sentences: list[list[str]]) -> torch.Tensor:
    """The host's states of the anchors in every layer that a knot uses: (layers, N, d), see ``word_states``."""
    layers = layers_of(near_layers(num_layers_of(host)))
    progress = hf_logging.tqdm(total=len(sentences), desc="Reading anchors", unit="sentence", leave=False)
    with progress as bar, full_precision(host.device):
        return word_states(host, words, sentences, layers, progress=bar.update)


def what_is_read(host: nn.Module, words: WordReader, sentences: list[list[str]]) -> str:
    """All that the host's states of the sentences depend on."""
    return json.dumps([fingerprint(host), words.key(), sentences])


def kept_anchor_states(host: nn.Module, words: WordReader, sentences: list[list[str]]) -> torch.Tensor:
    """``read_anchor_states``, read once and kept in the cache, 4·layers·N·d bytes; training asks for it often."""
    layers, said = layers_of(near_layers(num_layers_of(host))), what_is_read(host, words, sentences)
    path = cache_folder() / f"anchors-{hashlib.sha256(f'{layers} {said}'.encode()).hexdigest()[:24]}.safetensors"
    return kept(
        path,
        lambda: {"states": read_anchor_states(host, words, sentences)},
        lambda tensors: tensors["states"],
    )


def at_knots(anchor_states: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Of ``read_anchor_states`` those of the layers nearest to the knots: (K, N, d); the host has L blocks."""
    layers = layers_of(near_layers(num_layers))
    return anchor_states[[layers.index(layer) for layer in knot_layers(num_layers)]]


def states_of_words(
    hidden_states: tuple[torch.Tensor, ...], layers: list[int], positions: torch.Tensor
) -> torch.Tensor:
    """L+1 states (B, T, d) and the token to read of each word (B, W) → (B, W, layers, d)."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    return torch.stack([hidden_states[layer][rows, positions] for layer in layers], dim=2)
