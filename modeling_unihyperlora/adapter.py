"""The adapter itself, and the way of one token through it.

Letters in shapes: B batch, T tokens of a sentence, N tokens of a batch (B·T), w width of a host vector, D canonical
width d0, M atoms, k active atoms, L blocks, S = 6 module types, C labels.

A token with state x at the input of a block is routed once (``routing.route``): scores of all atoms, of which at most
k that beat the null choice stay. At each of the block's six linear layers are added (``routing.write_atoms``)

    ΔW x = Σ_{j in top-k} gate_j · (g_θ + δθ)(ℓ/L, type)_j · P_out u_j (v_jᵀ P_in x)

The atoms are projected into the host's width once a forward pass (``UniHyperLoraAdapter.project``), so a token costs
one product with M rows a block and 2k short vectors a layer.

On top of a stream (pathway "both") the atoms are the stream's own, P_in and P_out are fixed cosines, every gate is 1
and g_θ is left out: the update is δθ's alone, the same for every token, and zero until δθ is tuned on one host.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .anchors import Anchors
from .configuration_unihyperlora import UniHyperLoraConfig
from .hosts import MODULE_TYPES
from .mixed_tasks import MixedTasks, StackedTasks
from .projectors import CosineProjector, DimensionProjector
from .quantization import Grid, Half, RowInteger, StoredTensor, as_stored
from .routing import Routing, rms
from .token_mixer import TokenMixer

DICTIONARY_BITS = 8
ROUTER_BITS = 8
HEAD_BITS = 8
MIXER_BITS = 4
MEAN_GATE_MOMENTUM = 0.01
KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # relative depths whose states the head reads


def knot_layers(num_layers: int) -> list[int]:
    """Which of the L+1 hidden states is nearest to each knot."""
    return [int(knot * num_layers + 0.5) for knot in KNOTS]


def near_layers(num_layers: int) -> list[list[int]]:
    """For each knot the layers beside it that a calibration reads: its own, the one before and the one after."""
    return [[near for near in (at - 1, at, at + 1) if 0 <= near <= num_layers] for at in knot_layers(num_layers)]


class ProjectedAtoms(NamedTuple):
    """The adapter in the coordinates of one host, for one task, or for Q of them in Q rows."""

    read: dict[Hashable, torch.Tensor]  # projector key → (M, w): rows v_jᵀ P_in
    write: dict[Hashable, torch.Tensor]  # projector key → (M, w): rows P_out u_j
    router_rows: dict[Hashable, torch.Tensor]  # projector key of a block's input → (M, w)
    router_bias: dict[Hashable, torch.Tensor]  # the same key → (M,) or (Q, M)
    mean_gate: torch.Tensor  # (M,) or (Q, M)
    coefficients: torch.Tensor  # (L, S, M) or (L, S, Q, M): (g_θ + δθ)(ℓ/L, type)


class Mixer(nn.Module):
    """g_θ: (relative depth, one-hot of the module type) → weights of the M atoms; two layers with a sine between."""

    def __init__(self, hidden: int, atoms: int, bits: int = MIXER_BITS):
        super().__init__()
        self.hidden = StoredTensor(torch.randn(hidden, 1 + len(MODULE_TYPES) + 1) * 1.5, RowInteger(bits))
        self.output = StoredTensor(torch.randn(atoms, hidden + 1) / math.sqrt(hidden + 1), RowInteger(bits))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(…, 8) place features → (…, M)."""
        wave = torch.sin(features @ self.hidden().T)
        return append_one(wave) @ self.output().T


def place_features(depths: torch.Tensor) -> torch.Tensor:
    """[1, ℓ/L, one-hot of the type] for every place: (L,) → (L, S, 8)."""
    types = torch.eye(len(MODULE_TYPES), device=depths.device).expand(len(depths), -1, -1)
    depth = depths.view(-1, 1, 1).expand(-1, len(MODULE_TYPES), 1)
    return torch.cat([torch.ones_like(depth), depth, types], dim=-1)


def knot_features(knots: torch.Tensor) -> torch.Tensor:
    """The same for the stream, where a place is a knot: [1, its depth, which one it is], (K,) → (K, 8)."""
    which = torch.eye(len(knots), len(MODULE_TYPES), device=knots.device)
    return torch.cat([torch.ones_like(knots)[:, None], knots[:, None], which], dim=-1)


def append_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def atom_width(config: UniHyperLoraConfig) -> int:
    """Coordinates that the router reads, and an atom has: of the canonical space, the stream in it, or the host."""
    if config.projector == "host":
        return config.bound_host["hidden_size"]
    return config.anchor_dim if config.pathway == "inject" else config.stream_dim


def head_inputs(config: UniHyperLoraConfig, window: int | None = None) -> int:
    """Numbers that a head reads: the states of all knots in those coordinates, or the features of the stream.

    With a window the coordinates of a word come after its features, and those of so many words on both sides of it.
    """
    coordinates = len(KNOTS) * atom_width(config)
    if config.pathway == "inject":
        return coordinates
    return 2 * config.stream_hidden + (0 if window is None else (2 * window + 1) * coordinates)


class TaskParameters(nn.Module):
    """What one task adds: δθ (8, M), its embedding for the router, a head on the canonical state, its mean gate.

    With pathway "both" there is a second δθ, ``delta_injected`` (8, M), of the update in the host's linear layers.
    """

    def __init__(self, config: UniHyperLoraConfig, labels: int, window: int | None = None):
        super().__init__()
        width = atom_width(config)
        self.delta = _zero_delta(config)
        self.delta_injected: StoredTensor | None = None
        if config.pathway == "both":
            self.begin_injection(config)
        self.embedding = StoredTensor(torch.zeros(width), Half())
        self.head_weight = StoredTensor(torch.zeros(labels, head_inputs(config, window)), RowInteger(HEAD_BITS))
        self.head_bias = StoredTensor(torch.zeros(labels), Half())
        self.register_buffer("mean_gate", torch.full((config.atoms,), config.router_top_k / config.atoms))

    def begin_injection(self, config: UniHyperLoraConfig) -> None:
        """A second δθ, at zero."""
        self.delta_injected = _zero_delta(config).to(self.delta.latent.device)

    def deltas(self) -> list[StoredTensor]:
        """All of δθ."""
        return [self.delta] if self.delta_injected is None else [self.delta, self.delta_injected]

    @torch.no_grad()
    def track_mean_gate(self, routing: Routing, real: torch.Tensor) -> None:
        """Move the running mean of the gates towards that of the ``real`` (N,) tokens of one block."""
        total = torch.zeros_like(self.mean_gate, dtype=routing.gates.dtype)
        total.index_add_(0, routing.atoms.reshape(-1), (routing.gates * real.unsqueeze(-1)).reshape(-1))
        self.mean_gate.lerp_((total / real.sum().clamp_min(1)).to(self.mean_gate.dtype), MEAN_GATE_MOMENTUM)


def _zero_delta(config: UniHyperLoraConfig) -> StoredTensor:
    return StoredTensor(torch.zeros(2 + len(MODULE_TYPES), config.atoms), Grid(config.delta_step))


class UniHyperLoraAdapter(nn.Module):
    """Dictionary U, V; projector ψ; mixer θ; router φ; and the parameters of each task."""

    def __init__(self, config: UniHyperLoraConfig):
        super().__init__()
        self.config = config
        self._make_parts(config)
        self.tasks = nn.ModuleDict(
            {name: TaskParameters(config, len(t["labels"]), t.get("window")) for name, t in config.tasks.items()}
        )
        self._kept: dict[str, tuple[object, dict[Hashable, Any]]] = {}  # task → state of the tensors, what was made

    def _make_parts(self, config: UniHyperLoraConfig) -> None:
        """Everything but the tasks."""
        shape = (config.atoms, atom_width(config))
        scale = 1 / math.sqrt(shape[1])
        self.atoms_in = StoredTensor(torch.randn(shape) * scale, RowInteger(DICTIONARY_BITS))  # V
        # An injected U starts at zero, so that a fresh adapter leaves its host's function unchanged. In the stream
        # there is nothing to leave unchanged, and δθ is to find atoms in all directions.
        u_scale = 0.0 if config.pathway == "inject" else scale
        self.atoms_out = StoredTensor(torch.randn(shape) * u_scale, RowInteger(DICTIONARY_BITS))
        if config.pathway == "inject":
            self.projector = DimensionProjector(config.anchor_dim)
        else:
            self.projector = CosineProjector(config.stream_dim)  # for an injected update on top
            self.anchors = Anchors(config, len(KNOTS))
            inputs = len(KNOTS) * config.stream_dim
            self.token_mixer = TokenMixer(inputs, config.stream_width, config.stream_hidden, config.stream_dropout)
        self.mixer = Mixer(config.mixer_hidden, config.atoms)
        self.router_weight = StoredTensor(torch.randn(shape) * scale, RowInteger(ROUTER_BITS))
        self.router_bias = StoredTensor(torch.zeros(config.atoms), Half())

    def keep(self, task: str, name: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returns without autocast, kept under a name between forward passes that need no gradient.

        It is made of what all tasks share and of one task: anew after any tensor of these changed, and whenever a
        gradient may be needed. The other tasks, of which there may be thousands, are not looked at.
        """
        if torch.compiler.is_compiling():  # a compiled program has no place for what changes under it
            return self._make(make)
        parts = [part for part_name, part in self._modules.items() if part_name != "tasks"]
        tensors = [tensor for part in (*parts, self.tasks[task]) for tensor in _tensors_of(part)]
        if torch.is_grad_enabled() or any(t.is_inference() for t in tensors):  # those have no version
            self._kept = {}
            return self._make(make)
        state = [(t._version, t.device, id(t)) for t in tensors]
        if task not in self._kept or self._kept[task][0] != state:
            self._kept[task] = (state, {})
        kept = self._kept[task][1]
        if name not in kept:
            kept[name] = self._make(make)
        return kept[name]

    def _make(self, make: Callable[[], Any]) -> Any:
        with torch.autocast(self.router_bias.latent.device.type, enabled=False):
            return make()

    def project(
        self, reads: Iterable[Hashable], writes: Iterable[Hashable], routes: Iterable[Hashable], depths, task: str
    ) -> ProjectedAtoms:
        """Bring the atoms into host coordinates; see ``keep``.

        Args:
            reads, writes, routes: projector keys that the host's sites and block inputs need.
            depths: relative depth of each block.
            task: whose δθ and embedding apply.
        """

        def make() -> ProjectedAtoms:
            places = place_features(torch.tensor(depths, device=self.router_bias.latent.device))
            return self._in_host_coordinates(reads, writes, routes, places, self.tasks[task])

        return self.keep(task, ("projected", *depths), make)

    def _in_host_coordinates(self, reads, writes, routes, places: torch.Tensor, own: TaskParameters) -> ProjectedAtoms:
        """``project`` with the features (L, S, 8) of the places, and nothing kept."""
        if self.config.pathway == "both":
            return self._on_top_of_stream(reads, writes, places, own)
        inward = {key: self.projector.inward(key) for key in {*reads, *routes}}
        atoms_in, atoms_out, router = self.atoms_in(), self.atoms_out(), self.router_weight()
        bias = self.router_bias() + router @ own.embedding()
        return ProjectedAtoms(
            read={key: atoms_in @ inward[key] for key in reads},
            write={key: atoms_out @ self.projector.outward(key).T for key in writes},
            router_rows={key: router @ inward[key] for key in routes},
            router_bias=dict.fromkeys(routes, bias),
            mean_gate=as_stored(own.mean_gate, Half()),
            coefficients=self.mixer(places) + places @ own.delta(),
        )

    def _on_top_of_stream(self, reads, writes, places: torch.Tensor, own: TaskParameters) -> ProjectedAtoms:
        """The same for an injected update on top of a stream: no router, no gate, and of the mixer δθ alone."""
        atoms_in, atoms_out = self.atoms_in(), self.atoms_out()
        return ProjectedAtoms(
            read={key: atoms_in @ self.projector.inward(key).to(atoms_in) for key in reads},
            write={key: atoms_out @ self.projector.outward(key).T.to(atoms_out) for key in writes},
            router_rows={},
            router_bias={},
            mean_gate=torch.ones_like(own.mean_gate),
            coefficients=places @ own.delta_injected(),
        )

    def project_mixed(
        self,
        reads: Iterable[Hashable],
        writes: Iterable[Hashable],
        routes: Iterable[Hashable],
        depths,
        own: StackedTasks,
    ) -> ProjectedAtoms:
        """``project`` for several tasks; the atoms are those of any task, and kept likewise."""
        shared = self.project(reads, writes, routes, depths, next(iter(self.tasks)))
        places = place_features(torch.tensor(depths, device=self.router_bias.latent.device))

        def make() -> ProjectedAtoms:
            return shared._replace(
                router_bias=dict.fromkeys(routes, self.router_bias() + own.embedding() @ self.router_weight().T),
                mean_gate=as_stored(own.mean_gate, Half()),
                coefficients=self.mixer(places).unsqueeze(2) + torch.einsum("lsf,qfm->lsqm", places, own.delta()),
            )

        return self._make(make)

    def own(self, task: str | MixedTasks) -> TaskParameters | StackedTasks:
        """The parameters of a task, or of several side by side."""
        return task.of(self.tasks) if isinstance(task, MixedTasks) else self.tasks[task]

    def logits(self, states: list[torch.Tensor], keys: list[Hashable], task: str | MixedTasks) -> torch.Tensor:
        """A linear head on the canonical states P_in h / rms(h) of the knots.

        Args:
            states: one (…, w) host state for each knot.
            keys: the projector key of each.

        Returns:
            (…, C) float32.
        """
        if isinstance(task, MixedTasks):
            own = self.own(task)
            logits = own.of_sentences(own.head_bias(), states[0])
            for state, weight in zip(states, self.head_weights(keys, task), strict=True):
                logits = logits + own.linear(state.float(), weight) / rms(state.float())
            return logits
        weights, logits = self.keep(
            task, ("head", *keys), lambda: (self.head_weights(keys, task), self.tasks[task].head_bias())
        )
        for state, weight in zip(states, weights, strict=True):
            state = state.float()
            logits = logits + F.linear(state, weight) / rms(state)
        return logits

    def head_weights(self, keys: list[Hashable], task: str | MixedTasks) -> list[torch.Tensor]:
        """A head in the coordinates of the host: (C, w) for the state of each knot, whose projector keys are given."""
        blocks = self.own(task).head_weight().chunk(len(KNOTS), dim=-1)
        inward = {key: self.projector.inward(key) for key in set(keys)}
        return [block @ inward[key] for block, key in zip(blocks, keys, strict=True)]

    def parts(self) -> dict[str, list[nn.Module]]:
        """Part name → its stored tensors and buffers' owners; the names of learning rates and byte tables."""
        stored = {name: module for name, module in self.named_modules() if isinstance(module, StoredTensor)}
        parts: dict[str, list[nn.Module]] = {name: [] for name in PARTS}
        for name, module in stored.items():
            parts[part_of(name)].append(module)
        return parts


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, as a module's own iterators but several times as fast: it is asked in every pass."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor
    for child in module._modules.values():
        yield from _tensors_of(child)


PARTS = ("dictionary", "projector", "mixer", "router", "anchors", "stream", "delta", "head")


def part_of(name: str) -> str:
    """The part that a tensor of the adapter belongs to, by its name in the file or in the state dict."""
    if name.startswith("atoms_"):
        return "dictionary"
    if name.startswith("tasks."):
        leaf = name.split(".")[2]
        parts = {"delta": "delta", "delta_injected": "delta", "head_weight": "head", "head_bias": "head"}
        return parts.get(leaf, "router")
    part = name.split(".")[0].split("_")[0]
    return "stream" if part == "token" else part
