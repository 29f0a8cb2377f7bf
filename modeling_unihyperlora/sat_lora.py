"""SAT-LoRA: an injected update whose atoms have the widths of one host and work on that host only.

It is the baseline of the universal adapter. Router, mixer, sparse choice of atoms and file are those of
``injected_adapter``, but there is no canonical space and no projector. Each shape (in, out) of the host's linear
layers has M atoms, shared by all layers of that shape in the host or in one block. With P sets of atoms (P = 1 or L),
the tensors are (P, M, in) and (P, M, out) for each shape and (P, M, d) for the router, int8 with one scale per atom.
The mixer learns the depths of this host. The file holds δθ only because of its format; δθ is never trained.
"""

import math
from collections.abc import Hashable

import torch
from torch import nn

from .configuration_unihyperlora import UniHyperLoraConfig
from .errors import HostError
from .injected_adapter import (
    DICTIONARY_BITS,
    ROUTER_BITS,
    Mixer,
    ProjectedAtoms,
    TaskParameters,
    UniHyperLoraAdapter,
)
from .layouts import MODULE_TYPES
from .mixed_tasks import MixedTasks, StackedTasks
from .projectors import Side
from .sites import HostMap, identify_host, unlike
from .space import KNOTS
from .storage import Half, RowInteger, StoredTensor


def bind(config: UniHyperLoraConfig, host: nn.Module) -> None:
    """Record the host of the atoms in ``config``: family, sizes, weights, shapes of linear layers."""
    found = HostMap(host, config.host_layouts)
    shapes = {(s.widths["input"], s.widths["output"]) for s in found.sites}
    config.bound_host = identify_host(host, found.num_layers) | {"shapes": sorted(map(list, shapes))}
    config.check()


def check_bound(config: UniHyperLoraConfig, host: nn.Module) -> None:
    """Raise ``HostError`` if an adapter is bound to another host than this one; see ``sites.unlike``."""
    bound = config.bound_host
    if bound is None:
        return
    here = UniHyperLoraConfig(pathway="inject", projector="host", host_layouts=config.host_layouts)
    bind(here, host)
    if differences := unlike(bound, here.bound_host):
        raise HostError(
            f"This SAT-LoRA adapter is bound to the host that it was trained on ({_described(bound)}). The given host "
            f"({_described(here.bound_host)}) has another {', '.join(differences)}. Give the adapter's own host, "
            "train an adapter for this host with --method sat_lora, or use a universal adapter (pathway='stream')."
        )


def _described(host: dict) -> str:
    return f"{host['family']}, {host['num_layers']} blocks x {host['hidden_size']}, weights {host['fingerprint']}"


class HostProjector:
    """Stands in for a projector but projects nothing; its keys select the atoms.

    The key of a block is the number of its set of atoms. The key of a linear layer is its shape and that number.
    """

    def __init__(self, config: UniHyperLoraConfig):
        self.blocks = config.bound_host["num_layers"]
        self.shared = config.share_across_layers

    def sides(self, module_type: str) -> tuple[Side, Side]:
        return "input", "output"

    def key(self, width: int, depth: float) -> Hashable:
        return 0 if self.shared else max(round(depth * self.blocks), 1) - 1

    def site_keys(self, module_type: str, widths: dict[Side, int], depth: float) -> tuple[Hashable, Hashable]:
        key = (shape_name(widths["input"], widths["output"]), self.key(widths["input"], depth))
        return key, key


def shape_name(inward: int, outward: int) -> str:
    return f"{inward}x{outward}"


class HostBoundAdapter(UniHyperLoraAdapter):
    """Atoms for each shape, mixer, router and the parameters of each task, all for one host."""

    def _make_parts(self, config: UniHyperLoraConfig) -> None:
        self.projector = HostProjector(config)
        host = config.bound_host
        sets = (1 if config.share_across_layers else host["num_layers"], config.atoms)
        self.atoms_in, self.atoms_out = nn.ModuleDict(), nn.ModuleDict()
        for inward, outward in host["shapes"]:
            name, row = shape_name(inward, outward), RowInteger(DICTIONARY_BITS)
            self.atoms_in[name] = StoredTensor(torch.randn(*sets, inward) / math.sqrt(inward), row)
            self.atoms_out[name] = StoredTensor(torch.zeros(*sets, outward), row)  # 0: no update at first
        self.mixer = Mixer(config.mixer_hidden, config.atoms, bits=8)
        width = host["hidden_size"]
        self.router_weight = StoredTensor(torch.randn(*sets, width) / math.sqrt(width), RowInteger(ROUTER_BITS))
        self.router_bias = StoredTensor(torch.zeros(sets), Half())

    def _in_host_coordinates(self, reads, writes, routes, places: torch.Tensor, own: TaskParameters) -> ProjectedAtoms:
        read, write = ({name: stored() for name, stored in x.items()} for x in (self.atoms_in, self.atoms_out))
        router = self.router_weight()
        bias = self.router_bias() + router @ own.embedding()
        targets = self.config.target_modules or MODULE_TYPES
        scale = places.new_tensor([self.config.atom_scale * (kind in targets) for kind in MODULE_TYPES])
        return ProjectedAtoms(
            read={(name, number): read[name][number] for name, number in reads},
            write={(name, number): write[name][number] for name, number in writes},
            router_rows={number: router[number] for number in routes},
            router_bias={number: bias[number] for number in routes},
            mean_gate=own.mean_gate,
            coefficients=self.mixer(places) * scale[:, None],
        )

    def project_mixed(self, reads, writes, routes, depths, own: StackedTasks) -> ProjectedAtoms:
        """``project`` for several tasks, which share SAT-LoRA's atoms and their weights."""
        shared = self.project(reads, writes, routes, depths, next(iter(self.tasks)))
        bias = self.router_bias() + torch.einsum("smd,qd->qsm", self.router_weight(), own.embedding())
        return shared._replace(
            router_bias={number: bias[:, number] for number in routes},
            mean_gate=own.mean_gate,
            coefficients=shared.coefficients.unsqueeze(2).expand(-1, -1, len(bias), -1),
        )

    def head_weights(self, keys: list[Hashable], task: str | MixedTasks) -> list[torch.Tensor]:
        """Weights (C, w) of the head for the state of each knot; they are in the host's coordinates already."""
        return list(self.own(task).head_weight().chunk(len(KNOTS), dim=-1))
