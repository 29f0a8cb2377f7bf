"""The adapter of an injected update.

Letters in shapes: B batch, T tokens of a sentence, N tokens of a batch (B·T), w width of a host vector, D canonical
width d0, M atoms, k active atoms, L blocks, S = 6 module types, C labels.

In each block, a token with state x at the block's input is routed once (``routing.route``): all atoms are scored, and
up to k of them that beat the null choice are kept. Each of the block's six linear layers then adds
(``routing.write_atoms``)

    ΔW x = Σ_{j in top-k} gate_j · (g_θ + δθ)(ℓ/L, type)_j · P_out u_j (v_jᵀ P_in x)

The atoms are projected to the host's width once per forward pass (``UniHyperLoraAdapter.project``). So a token costs
one product with M rows per block and 2k short vectors per layer.
"""

import math
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .layouts import MODULE_TYPES
from .mixed_tasks import MixedTasks, StackedTasks
from .projectors import DimensionProjector
from .reader import Adapter
from .routing import Routing, rms
from .space import KNOTS
from .storage import Grid, Half, RowInteger, StoredTensor, as_stored

DICTIONARY_BITS = 8
ROUTER_BITS = 8
HEAD_BITS = 8
MIXER_BITS = 4
MEAN_GATE_MOMENTUM = 0.01


class ProjectedAtoms(NamedTuple):
    """The adapter in the coordinates of one host, for one task or for Q tasks."""

    read: dict[Hashable, torch.Tensor]  # projector key → (M, w): rows v_jᵀ P_in
    write: dict[Hashable, torch.Tensor]  # projector key → (M, w): rows P_out u_j
    router_rows: dict[Hashable, torch.Tensor]  # projector key of a block's input → (M, w)
    router_bias: dict[Hashable, torch.Tensor]  # projector key of a block's input → (M,) or (Q, M)
    mean_gate: torch.Tensor  # (M,) or (Q, M)
    coefficients: torch.Tensor  # (L, S, M) or (L, S, Q, M): (g_θ + δθ)(ℓ/L, type)


class Mixer(nn.Module):
    """g_θ: maps relative depth and one-hot module type to weights of the M atoms; two layers with a sine between."""

    def __init__(self, hidden: int, atoms: int, bits: int = MIXER_BITS):
        super().__init__()
        self.hidden = StoredTensor(torch.randn(hidden, 1 + len(MODULE_TYPES) + 1) * 1.5, RowInteger(bits))
        self.output = StoredTensor(torch.randn(atoms, hidden + 1) / math.sqrt(hidden + 1), RowInteger(bits))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Place features (…, 8) → weights (…, M)."""
        wave = torch.sin(features @ self.hidden().T)
        return append_one(wave) @ self.output().T


def place_features(depths: torch.Tensor) -> torch.Tensor:
    """Features [1, ℓ/L, one-hot of the type] of every block and module type: depths (L,) → (L, S, 8)."""
    types = torch.eye(len(MODULE_TYPES), device=depths.device).expand(len(depths), -1, -1)
    depth = depths.view(-1, 1, 1).expand(-1, len(MODULE_TYPES), 1)
    return torch.cat([torch.ones_like(depth), depth, types], dim=-1)


def append_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def atom_width(config) -> int:
    """Width of an atom and of the router's input: canonical width, or the host's hidden size for SAT-LoRA."""
    return config.bound_host["hidden_size"] if config.projector == "host" else config.anchor_dim


class TaskParameters(nn.Module):
    """Parameters of one task: δθ (8, M), embedding for the router, head on the canonical states, mean gate."""

    def __init__(self, config, labels: int):
        super().__init__()
        width = atom_width(config)
        self.delta = StoredTensor(torch.zeros(2 + len(MODULE_TYPES), config.atoms), Grid(config.delta_step))
        self.embedding = StoredTensor(torch.zeros(width), Half())
        self.head_weight = StoredTensor(torch.zeros(labels, len(KNOTS) * width), RowInteger(HEAD_BITS))
        self.head_bias = StoredTensor(torch.zeros(labels), Half())
        self.register_buffer("mean_gate", torch.full((config.atoms,), config.router_top_k / config.atoms))

    @torch.no_grad()
    def track_mean_gate(self, routing: Routing, real: torch.Tensor) -> None:
        """Update the running mean of the gates with one block's tokens; ``real`` (N,) is 0 for padding."""
        total = torch.zeros_like(self.mean_gate, dtype=routing.gates.dtype)
        total.index_add_(0, routing.atoms.reshape(-1), (routing.gates * real.unsqueeze(-1)).reshape(-1))
        self.mean_gate.lerp_((total / real.sum().clamp_min(1)).to(self.mean_gate.dtype), MEAN_GATE_MOMENTUM)


class UniHyperLoraAdapter(Adapter):
    """Dictionary U, V; projector ψ; mixer θ; router φ; parameters of each task."""

    def __init__(self, config):
        super().__init__(config)
        self._make_parts(config)
        self.tasks = nn.ModuleDict()
        for name in config.tasks:
            self.add(name)

    def add(self, name: str) -> None:
        """Add the parameters of a task that the configuration describes."""
        own = TaskParameters(self.config, len(self.config.tasks[name]["labels"]))
        self.tasks[name] = own.to(self.router_bias.latent.device).train(self.training)

    def _make_parts(self, config) -> None:
        """Make all parts except the tasks."""
        shape = (config.atoms, atom_width(config))
        scale = 1 / math.sqrt(shape[1])
        self.atoms_in = StoredTensor(torch.randn(shape) * scale, RowInteger(DICTIONARY_BITS))  # V
        self.atoms_out = StoredTensor(torch.zeros(shape), RowInteger(DICTIONARY_BITS))  # U; 0: no update at first
        self.projector = DimensionProjector(config.anchor_dim)
        self.mixer = Mixer(config.mixer_hidden, config.atoms)
        self.router_weight = StoredTensor(torch.randn(shape) * scale, RowInteger(ROUTER_BITS))
        self.router_bias = StoredTensor(torch.zeros(config.atoms), Half())

    def project(
        self, reads: Iterable[Hashable], writes: Iterable[Hashable], routes: Iterable[Hashable], depths, task: str
    ) -> ProjectedAtoms:
        """Project the atoms to the host's coordinates; the result is cached, see ``keep``.

        Args:
            reads, writes, routes: projector keys of the host's sites and block inputs.
            depths: relative depth of each block.
            task: task whose δθ and embedding apply.
        """

        def make() -> ProjectedAtoms:
            places = place_features(torch.tensor(depths, device=self.router_bias.latent.device))
            return self._in_host_coordinates(reads, writes, routes, places, self.tasks[task])

        return self.keep(task, ("projected", *depths), make)

    def _in_host_coordinates(self, reads, writes, routes, places: torch.Tensor, own: TaskParameters) -> ProjectedAtoms:
        """``project`` without the cache; ``places`` (L, S, 8) from ``place_features``."""
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

    def project_mixed(
        self,
        reads: Iterable[Hashable],
        writes: Iterable[Hashable],
        routes: Iterable[Hashable],
        depths,
        own: StackedTasks,
    ) -> ProjectedAtoms:
        """``project`` for several tasks, which share the cached atoms."""
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
        """Parameters of one task, or of several tasks stacked."""
        return task.of(self.tasks) if isinstance(task, MixedTasks) else self.tasks[task]

    def logits(self, states: list[torch.Tensor], keys: list[Hashable], task: str | MixedTasks) -> torch.Tensor:
        """Logits of a linear head on the canonical states P_in h / rms(h) of the knots.

        Args:
            states: host state (…, w) of each knot.
            keys: projector key of each knot.

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
        """Head weights (C, w) in the host's coordinates, for the state of each knot; ``keys`` as for ``logits``."""
        blocks = self.own(task).head_weight().chunk(len(KNOTS), dim=-1)
        inward = {key: self.projector.inward(key) for key in set(keys)}
        return [block @ inward[key] for block, key in zip(blocks, keys, strict=True)]
