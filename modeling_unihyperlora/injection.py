"""The injected update: hooks that add ΔW x to a host's linear layers during a forward pass of the adapter.

The hooks act only inside ``Injection.running``; a host that is called on its own computes what it always did.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .adapter import KNOTS, ProjectedAtoms, Routing, UniHyperLoraAdapter, knot_layers, read_atoms, route, write_atoms
from .errors import HostError
from .hosts import MODULE_TYPES, HostMap, Site


class Pass:
    """State of one forward pass: projected atoms, the current block's routing, counts of active atoms.

    ``expected_atoms`` and ``active_atoms`` are (N,) sums over the blocks.
    """

    def __init__(self, atoms: ProjectedAtoms, task: str, real: torch.Tensor | None):
        self.atoms = atoms
        self.task = task
        self.real = real  # (N,) 1.0 for tokens, 0.0 for padding; None: all are tokens
        self.routing: Routing | None = None
        self.knot_states: dict[int, torch.Tensor] = {}  # number of blocks passed → state (B, T, d)
        self.expected_atoms: torch.Tensor | float = 0.0
        self.active_atoms: torch.Tensor | float = 0.0
        self._read: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def read(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``read_atoms``, shared by layers that take the very same input (query, key and value)."""
        if self._read is None or self._read[0] is not x or self._read[1] is not rows:
            self._read = (x, rows, read_atoms(x.flatten(0, -2), rows, self.routing))
        return self._read[2]


@dataclass
class InjectedRun:
    """One forward pass of a host with the update in it, and what the heads read of it."""

    adapter: UniHyperLoraAdapter
    task: str
    last_hidden_state: torch.Tensor  # (B, T, d)
    hidden_states: tuple[torch.Tensor, ...] | None
    knot_states: list[torch.Tensor]  # (B, T, d) for each knot
    knot_keys: list[Hashable]
    expected_atoms: torch.Tensor  # (B, T) mean over the blocks
    active_atoms: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor | None

    def token_logits(self) -> torch.Tensor:
        """(B, T, C)."""
        return self.adapter.logits(self.knot_states, self.knot_keys, self.task)

    def sentence_logits(self) -> torch.Tensor:
        """(B, C) from the mean state of a sentence's tokens at each knot."""
        hidden, mask = self.last_hidden_state, self.attention_mask
        mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        means = [(state * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1) for state in self.knot_states]
        return self.adapter.logits(means, self.knot_keys, self.task)


class Injection:
    """Binds an adapter to the sites of one host.

    Raises:
        HostError: the host's family has no layout.
    """

    def __init__(self, adapter: UniHyperLoraAdapter, host: nn.Module):
        self.adapter = adapter
        self.host = host
        self.map = HostMap(host)
        self.depths = [self.map.depth(block) for block in range(self.map.num_layers)]
        self.plans = {site: self._plan(site) for site in self.map.sites}
        self.route_keys = [adapter.projector.key(self.map.hidden_size, depth) for depth in self.depths]
        self.knot_layers = knot_layers(self.map.num_layers)
        self.current: Pass | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[Site, torch.Tensor] = {}
        self.merged_task: str | None = None

    def _plan(self, site: Site) -> tuple[str, object, str, object]:
        """Side and projector key for reading, then for writing."""
        width = {"input": site.linear.in_features, "output": site.linear.out_features}
        read, write = self.adapter.projector.sides(site.module_type)
        depth = self.depths[site.block]
        key = self.adapter.projector.key
        return read, key(width[read], depth), write, key(width[write], depth)

    # ---- hooks ----

    def attach(self) -> None:
        """Hooks are partials of bound methods, not closures, so that a deep copy of the model uses its own adapter."""
        for block, module in enumerate(self.map.blocks):
            self._handles.append(module.register_forward_pre_hook(partial(self._route, block), with_kwargs=True))
        for site in self.map.sites:
            self._handles.append(site.linear.register_forward_hook(partial(self._update, site)))

    def remove(self) -> None:
        self.unmerge()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def running(self, task: str, attention_mask: torch.Tensor | None) -> Iterator[Pass]:
        """Within it the host computes with the update; yields the counts of active atoms."""
        real = None if attention_mask is None else (attention_mask.reshape(-1) > 0).float()
        self.current = Pass(self.project(task), task, real)
        try:
            yield self.current
        finally:
            self.current = None

    def run(
        self, task: str, attention_mask: torch.Tensor | None, output_hidden_states: bool | None, inputs: dict
    ) -> InjectedRun:
        """The host's own forward with the update of ``task`` in it."""
        if output_hidden_states is not None:
            inputs = inputs | {"output_hidden_states": output_hidden_states}
        with self.running(task, attention_mask) as current:
            out = self.host(attention_mask=attention_mask, return_dict=True, **inputs)
        last = out.last_hidden_state
        states = current.knot_states | {self.map.num_layers: last}

        def mean(total: torch.Tensor | float) -> torch.Tensor:
            total = torch.as_tensor(total, device=last.device).float() / self.map.num_layers
            return total.expand(last.shape[:2].numel()).view(last.shape[:2])

        return InjectedRun(
            self.adapter,
            task,
            last,
            out.hidden_states,
            [states[layer] for layer in self.knot_layers],
            [self.adapter.projector.key(self.map.hidden_size, knot) for knot in KNOTS],
            mean(current.expected_atoms),
            mean(current.active_atoms),
            attention_mask,
        )

    def project(self, task: str) -> ProjectedAtoms:
        reads = {plan[1] for plan in self.plans.values()}
        writes = {plan[3] for plan in self.plans.values()}
        device = self.adapter.atoms_in.latent.device.type
        with torch.autocast(device, enabled=False):  # what is kept serves passes with and without autocast
            return self.adapter.project(reads, writes, set(self.route_keys), self.depths, task)

    def _route(self, block: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        run, config = self.current, self.adapter.config
        if run is None:
            return
        state = args[0] if args else kwargs["hidden_states"]
        if block in self.knot_layers:
            run.knot_states[block] = state
        if config.router == "static":
            run.routing = Routing(None, run.atoms.mean_gate)
            run.expected_atoms = run.expected_atoms + float(config.atoms)
            run.active_atoms = run.active_atoms + float(config.atoms)
            return
        rows = run.atoms.router_rows[self.route_keys[block]]
        run.routing = route(state.flatten(0, -2), rows, run.atoms.router_bias, config.router_top_k)
        run.expected_atoms = run.expected_atoms + run.routing.probabilities.sum(dim=-1)
        run.active_atoms = run.active_atoms + (run.routing.gates > 0).sum(dim=-1)
        own = self.adapter.tasks[run.task]
        if own.training and own.head_weight.latent.requires_grad and torch.is_grad_enabled():  # not with δθ alone
            real = run.real if run.real is not None else torch.ones_like(run.routing.gates[:, 0])
            own.track_mean_gate(run.routing, real)

    def _update(self, site: Site, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        run = self.current
        if run is None or self.merged:
            return None
        read_side, read_key, _, write_key = self.plans[site]
        dots = run.read(args[0] if read_side == "input" else output, run.atoms.read[read_key])
        coefficients = run.atoms.coefficients[site.block, MODULE_TYPES.index(site.module_type)]
        update = write_atoms(dots, run.atoms.write[write_key], run.routing, coefficients)
        return output + update.view_as(output).to(output.dtype)

    # ---- costs ----

    def host_multiply_adds(self, sequence_length: int) -> int:
        """Multiply-adds a token of the host's blocks: its linear layers, QKᵀ and the weighted sum of V."""
        linear = sum(site.linear.in_features * site.linear.out_features for site in self.map.sites)
        queries = (site.linear.out_features for site in self.map.sites if site.module_type == "query")
        return linear + sum(2 * sequence_length * width for width in queries)

    def added_multiply_adds(self, labels: int) -> int:
        """Multiply-adds a token that the adapter and its head add; nothing but the head when merged.

        A block scores M atoms once; each layer then reads and writes k atoms (all M with the static router), and
        layers that share an input share the reading. The squares of the norms and the division by them count as well.
        """
        config = self.adapter.config
        total = (labels + 2) * len(KNOTS) * self.map.hidden_size
        if self.merged:
            return total
        used = config.atoms if config.router == "static" else config.router_top_k
        if config.router == "token":
            total += self.map.num_layers * (config.atoms + 1) * self.map.hidden_size
        for site, (read_side, _, write_side, _) in self.plans.items():
            width = {"input": site.linear.in_features, "output": site.linear.out_features}
            shares_reading = read_side == "input" and site.module_type in ("key", "value")
            total += used * (width[write_side] + (0 if shares_reading else width[read_side]))
        return total

    def held_tensors(self, task: str) -> list[torch.Tensor]:
        """The atoms in this host's coordinates."""
        atoms = self.project(task)
        return [*atoms.read.values(), *atoms.write.values(), *atoms.router_rows.values(), atoms.coefficients]

    # ---- merging ----

    def delta_weight(self, site: Site, task: str) -> torch.Tensor:
        """ΔW (out, in) of one site in float64, with the static router's fixed mask."""
        atoms = self.project(task)
        _, read_key, _, write_key = self.plans[site]
        coefficients = atoms.coefficients[site.block, MODULE_TYPES.index(site.module_type)]
        weights = (atoms.mean_gate * coefficients).double()
        return (atoms.write[write_key].double().T * weights) @ atoms.read[read_key].double()

    @property
    def merged(self) -> bool:
        return bool(self._originals)

    @torch.no_grad()
    def merge(self, task: str) -> None:
        """Add ΔW to each site's weight; the original weights are kept for ``unmerge``."""
        updated = {}
        for site in self.map.sites:
            weight = site.linear.weight
            updated[site] = (weight.double() + self.delta_weight(site, task)).to(weight.dtype)
            if not torch.isfinite(updated[site]).all():
                raise HostError(
                    f"Merging would make block {site.block} {site.module_type} not finite; nothing merged."
                )
        for site, weight in updated.items():
            self._originals[site] = site.linear.weight.detach().clone()
            site.linear.weight.copy_(weight)
        self.merged_task = task

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give every site its own weight back, bit for bit."""
        for site, weight in self._originals.items():
            site.linear.weight.copy_(weight)
        self._originals.clear()
        self.merged_task = None
