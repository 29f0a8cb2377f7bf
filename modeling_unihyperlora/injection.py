"""The injected update: hooks that add ΔW x to a host's linear layers during a forward pass of the adapter.

The hooks act only inside ``Injection.running`` and only in the thread that is there; a host that is called on its own
computes what it always did.
"""

import copy
import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_unihyperlora import UniHyperLoraConfig
from .errors import ConfigError, HostError, MergeError
from .hosts import Hold, call_host, encoder_of
from .injected_adapter import ProjectedAtoms, UniHyperLoraAdapter
from .layouts import MODULE_TYPES, HostLayout, layout_from
from .mixed_tasks import MixedTasks
from .reader import sentences_by_task
from .routing import Routing, add_atoms, read_atoms, route, write_atoms
from .sat_lora import HostBoundAdapter, bind, check_bound
from .sites import HostMap, Site, is_among
from .space import KNOTS, knot_layers

logger = logging.getLogger(__name__)

# Files whose imports bring the code of an injected update along: that of its configuration, and all of it.
_FILE, _CONFIGURATION_FILE = "injected", "injected_configuration"
AUTO_MAP = {
    "AutoConfig": f"{_CONFIGURATION_FILE}.UniHyperLoraConfig",
    "AutoModel": f"{_FILE}.UniHyperLoraModel",
    "AutoModelForTokenClassification": f"{_FILE}.UniHyperLoraForTokenClassification",
    "AutoModelForSequenceClassification": f"{_FILE}.UniHyperLoraForSequenceClassification",
}


def describe_target(
    config: UniHyperLoraConfig, host: nn.Module, layout: HostLayout | dict | None, binds: bool = True
) -> None:
    """Note in ``config`` where the update goes: a user's layout under its host's family, and for SAT-LoRA the host.

    With ``binds`` false a SAT-LoRA has been bound before, and ``inject`` checks that the host is that one.
    """
    host = encoder_of(host)
    if layout is not None:
        family = host.config.model_type
        content = dataclasses.asdict(layout_from(layout, family))
        config.host_layouts = config.host_layouts | {family: content}
    if config.projector == "host" and binds:
        bind(config, host)


def make_adapter(config: UniHyperLoraConfig) -> UniHyperLoraAdapter:
    """The adapter that a configuration describes."""
    if config.projector == "host" and config.bound_host is None:
        raise ConfigError(
            "projector='host' without bound_host: make such an adapter with from_host, which notes the host in its "
            "configuration."
        )
    return HostBoundAdapter(config) if config.projector == "host" else UniHyperLoraAdapter(config)


def inject(adapter: UniHyperLoraAdapter, host: nn.Module) -> "Injection":
    """An adapter bound to the sites of a host, which has to be its own if the adapter is a SAT-LoRA."""
    check_bound(adapter.config, host)
    return Injection(adapter, host)


def warn_where_untrained(model) -> None:
    """Say so where an injected update is on a host that it was not trained on."""
    config, sources = model.config, model.config.source_hosts
    if config.projector != "host" and sources and not is_among(model.host, model.injection.map.num_layers, sources):
        logger.warning(
            "This adapter is an injected update that was not trained on %s, and such an update does not carry over to "
            "other hosts: expect what an untrained adapter would score. Train it here, or train one with "
            "pathway='stream', which serves hosts that it has not seen.",
            config.base_model_name_or_path or "this host",
        )


def _thread() -> int:
    """Which thread this is; a compiled program has but one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Pass:
    """State of one forward pass: projected atoms, the current block and its routing.

    ``routed`` has the states' shape (B, T) and the routing of every block so far. T may be longer than the sentences,
    where the host pads them further.
    """

    def __init__(self, atoms: ProjectedAtoms, task: str | MixedTasks, mask: torch.Tensor | None):
        self.atoms = atoms
        self.task = task
        self.mask = mask  # (B, T) above 0 for tokens, 0 for padding; None: all are tokens
        self.block: int | None = None
        self.routing: Routing | None = None
        self.weights: Sequence[torch.Tensor] = ()  # of the current block's module types, see ``Routing.weights``
        self.routed: list[tuple[torch.Size, Routing]] = []
        self.knot_states: dict[int, torch.Tensor] = {}  # number of blocks passed → state (B, T, d)
        self._calls: dict[nn.Module, int] = {}
        self._used: set[nn.Module] = set()
        self._read: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def enter(self, module: nn.Module, blocks: tuple[int, ...]) -> int:
        """The block that begins with this call of a module, which serves ``blocks`` in turn."""
        number = self._calls.get(module, 0)
        self._calls[module] = number + 1
        self._used.clear()
        self.block = blocks[number % len(blocks)]
        return self.block

    def of_block(self) -> "Pass":
        """A pass that is in the current block, from the block's first layer on."""
        one = copy.copy(self)
        one._used, one._read = set(), None
        return one

    def rows(self, state: torch.Tensor) -> torch.Tensor | None:
        """Which of several tasks each token (N,) of a state (B, T, w) is of; None where there is one."""
        return self.task.rows.repeat_interleave(state.shape[1]) if isinstance(self.task, MixedTasks) else None

    def first_use(self, linear: nn.Module) -> bool:
        """Whether a layer is used for the first time in its block, on the tokens; then come relative positions."""
        again = linear in self._used
        self._used.add(linear)
        return not again

    def read(self, x: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``read_atoms``, shared by layers that take the very same input ``x`` (query, key and value)."""
        if self._read is None or self._read[0] is not x or self._read[1] is not rows:
            self._read = (x, rows, read_atoms(tokens.flatten(0, -2), rows, self.routing))
        return self._read[2]

    def counts(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """E[k] and the atoms in use, (B, T) means over the blocks for the states' ``shape`` without padding."""
        if not self.routed:  # the static router
            every = torch.full(shape, float(self.atoms.mean_gate.shape[-1]), device=self.atoms.mean_gate.device)
            return every, every
        padded, _ = self.routed[0]
        probabilities = torch.stack([routing.probabilities for _, routing in self.routed])
        gates = torch.stack([routing.gates for _, routing in self.routed])
        found = [probabilities.sum(dim=(0, 2)), (gates > 0).sum(dim=(0, 2))]
        expected, active = ((x.float() / len(self.routed)).view(padded)[:, : shape[1]] for x in found)
        return expected, active


@dataclass
class InjectedRun:
    """One forward pass of a host with the update in it, and what the heads read of it."""

    adapter: UniHyperLoraAdapter
    task: str | MixedTasks
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

    Attributes:
        checkpoint: ``torch.utils.checkpoint.checkpoint`` where every ``every``-th block is computed again on the way
            back, in place of keeping what it needs for it.

    Raises:
        HostError: the host's family has no layout.
    """

    def __init__(self, adapter: UniHyperLoraAdapter, host: nn.Module):
        self.adapter = adapter
        self.host = host
        self.map = HostMap(host, adapter.config.host_layouts)
        self.depths = [self.map.depth(block) for block in range(self.map.num_layers)]
        targets = {*(adapter.config.target_modules or MODULE_TYPES)}
        updated = [site for site in self.map.sites if targets.intersection(site.module_types)]
        self.plans = {site: self._plan(site) for site in updated}
        self._by_call = {
            (site.block, site.linear): (site, *plan, [MODULE_TYPES.index(role) for role in site.module_types])
            for site, plan in self.plans.items()
        }
        self.route_keys = [adapter.projector.key(self.map.hidden_size, depth) for depth in self.depths]
        self.knot_layers = knot_layers(self.map.num_layers)
        self.knot_keys = [adapter.projector.key(self.map.hidden_size, knot) for knot in KNOTS]
        self._passes: dict[int, Pass] = {}  # by thread
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[Site, torch.Tensor] = {}
        self.merged_task: str | None = None
        self.checkpoint: Callable | None = None
        self.every = 1

    @property
    def static(self) -> bool:
        """Whether all tokens get the same update."""
        return self.adapter.config.router == "static"

    def describe(self) -> str:
        """Family, sizes, sites and choices, in one line."""
        found, config = self.map, self.adapter.config
        return (
            f"{found.family}, {found.num_layers} blocks x {found.hidden_size}): {found.coverage()} sites, pathway "
            f"inject, projector {config.projector}, router {config.router}"
        )

    def enable_checkpointing(self, given: dict, every_n_layers: int = 1, offload: bool = False) -> None:
        """Compute blocks again on the way back; see ``gradient_checkpointing_enable`` of the model."""
        if given.get("use_reentrant") or offload:
            raise ConfigError(
                "Gradient checkpointing of a frozen host is done without use_reentrant and without offload; leave "
                "both out of --gradient_checkpointing_kwargs."
            )
        self.checkpoint = partial(checkpoint, **{"use_reentrant": False} | given)
        self.every = every_n_layers

    def outputs(self, model, task, task_ids, attention_mask, output_hidden_states, inputs: dict) -> dict:
        """What ``model.run`` returns, for one task or for a task a sentence."""
        inputs = {name: value for name, value in inputs.items() if name not in ("word_index", "canonical_states")}
        first = next(iter(inputs.values()))
        if task_ids is None:
            asked = model._task(task)
        else:
            names, rows = sentences_by_task(task_ids, list(model.config.tasks), len(first), first.device)
            asked = MixedTasks([model._task(name) for name in names], rows)
        run = self.run(asked, attention_mask, output_hidden_states, inputs)
        names = ("last_hidden_state", "hidden_states", "expected_atoms", "active_atoms")
        outputs = {name: getattr(run, name) for name in names}
        if model.task_type is not None:
            sentence = model.task_type == "sequence_classification"
            outputs["logits"] = run.sentence_logits() if sentence else run.token_logits()
        return outputs

    @property
    def current(self) -> Pass | None:
        """The forward pass that this thread is in."""
        return self._passes.get(_thread())

    def _plan(self, site: Site) -> tuple[str, object, str, object]:
        """Side and projector key for reading, then for writing."""
        read, write = self.adapter.projector.sides(site.module_types[0])
        depth = self.depths[site.block]
        read_key, write_key = self.adapter.projector.site_keys(site.module_types[0], site.widths, depth)
        return read, read_key, write, write_key

    # ---- hooks ----

    def attach(self) -> None:
        """Hooks are partials of bound methods, not closures, so that a deep copy of the model uses its own adapter."""
        for module in dict.fromkeys(self.map.blocks):
            blocks = tuple(number for number, block in enumerate(self.map.blocks) if block is module)
            self._handles.append(module.register_forward_pre_hook(partial(self._route, blocks), with_kwargs=True))
        for linear in dict.fromkeys(site.linear for site in self.plans):
            self._handles.append(linear.register_forward_hook(self._update))

    def remove(self) -> None:
        self.unmerge()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def running(self, task: str | MixedTasks, attention_mask: torch.Tensor | None) -> Iterator[Pass]:
        """Within it the host computes with the update, in this thread; yields the counts of active atoms."""
        twice = self.checkpoint is not None and torch.is_grad_enabled()
        with self._in(Pass(self.project(task), task, attention_mask)) as current:
            with self._checkpointed() if twice else nullcontext():
                yield current

    @contextmanager
    def _in(self, current: Pass) -> Iterator[Pass]:
        """Within it this thread is in a pass."""
        thread = _thread()
        before = self._passes.get(thread)
        self._passes[thread] = current
        try:
            yield current
        finally:
            if before is None:
                del self._passes[thread]
            else:
                self._passes[thread] = before

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Within it blocks keep their inputs alone, and are computed again on the way back."""
        forwards = {block: vars(block).get("forward") for block in self.map.blocks}
        for block in forwards:
            block.forward = partial(self._compute_twice, block.forward)
        try:
            yield
        finally:
            for block, forward in forwards.items():
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _compute_twice(self, forward: Callable, *args, **kwargs):
        """A block, which is in the same pass the second time; that may be another thread's time."""
        run = self.current
        if run is None or run.block % self.every:
            return forward(*args, **kwargs)

        here = run.of_block()

        def compute(*args):
            with self._in(here.of_block()):
                return forward(*args, **kwargs)

        return self.checkpoint(compute, *args)

    def run(
        self, task: str | MixedTasks, attention_mask: torch.Tensor | None, output_hidden_states, inputs: dict
    ) -> InjectedRun:
        """The host's own forward with the update of ``task`` in it."""
        if output_hidden_states is not None:
            inputs = inputs | {"output_hidden_states": output_hidden_states}
        with self.running(task, attention_mask) as current:
            out = call_host(self.host, attention_mask, **inputs)
        last = out.last_hidden_state
        tokens = last.shape[1]
        states = current.knot_states | {self.map.num_layers: last}

        expected, active = current.counts(last.shape[:2])
        return InjectedRun(
            self.adapter,
            task,
            last,
            out.hidden_states,
            [states[layer][:, :tokens] for layer in self.knot_layers],
            self.knot_keys,
            expected,
            active,
            attention_mask,
        )

    def project(self, task: str | MixedTasks) -> ProjectedAtoms:
        reads = {plan[1] for plan in self.plans.values()}
        writes = {plan[3] for plan in self.plans.values()}
        if isinstance(task, MixedTasks):
            own = self.adapter.own(task)
            return self.adapter.project_mixed(reads, writes, set(self.route_keys), self.depths, own)
        return self.adapter.project(reads, writes, set(self.route_keys), self.depths, task)

    def _route(self, blocks: tuple[int, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
        run, config = self.current, self.adapter.config
        if run is None:
            return
        block = run.enter(module, blocks)
        state = self._tokens_last(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
        if state.dim() != 3:
            raise HostError(
                f"Block {block} of the host gets states {tuple(state.shape)}, not (sentences, tokens, width). Load "
                "the host with attn_implementation='sdpa', which does not pack sentences together."
            )
        if block in self.knot_layers:
            run.knot_states[block] = state
        if self.merged:
            return
        if self.static:
            run.routing = Routing(None, run.atoms.mean_gate, rows=run.rows(state))
            run.weights = run.routing.weights(run.atoms.coefficients[block])
            return
        key, tokens, which = self.route_keys[block], state.flatten(0, -2), run.rows(state)
        before = run.routing.bags if run.routing is not None and len(run.routing.atoms) == len(tokens) else None
        rows, bias = run.atoms.router_rows[key], run.atoms.router_bias[key]
        bias = bias if which is None else bias[which]
        run.routing = route(tokens, rows, bias, config.router_top_k, before)._replace(rows=which)
        run.weights = run.routing.weights(run.atoms.coefficients[block]).unbind()
        run.routed.append((state.shape[:-1], run.routing))
        if which is not None:
            return
        own = self.adapter.tasks[run.task]
        if own.training and own.head_weight.latent.requires_grad and torch.is_grad_enabled():  # not with δθ alone
            mask = run.mask if run.mask is not None else state.new_ones(state.shape[:-1])
            real = nn.functional.pad((mask > 0).float(), (0, state.shape[1] - mask.shape[1]))
            own.track_mean_gate(run.routing, real.flatten())

    def _update(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        run = self._passes.get(_thread())
        if run is None or self._originals or (call := self._by_call.get((run.block, module))) is None:
            return None
        if not run.first_use(module):
            return None
        site, read_side, read_key, _, write_key, types = call
        x = args[0] if read_side == "input" else output
        tokens, atoms = self._tokens_last(x), run.atoms
        if run.routing.atoms is not None and tokens.shape[:-1].numel() != len(run.routing.atoms):
            raise HostError(
                f"In block {site.block} the {site.module_types[0]} layer reads {tokens.shape[:-1].numel()} vectors "
                f"and the block {len(run.routing.atoms)}: the update needs one for each token. Use pathway='stream'."
            )
        dots, rows = run.read(x, tokens, atoms.read[read_key]), atoms.write[write_key]
        if not torch.is_grad_enabled() and len(types) == 1 and output.is_contiguous() and output.dtype == dots.dtype:
            if not self.map.layout.channels_first:  # nobody else has seen the output yet
                add_atoms(output.flatten(0, -2), dots, rows, run.routing, run.weights[types[0]])
                return output
        update = site.join([write_atoms(dots, rows, run.routing, run.weights[number]) for number in types])
        own = self._tokens_last(output)
        return self._tokens_last(own + update.view(own.shape).to(own.dtype))

    def _tokens_last(self, x: torch.Tensor) -> torch.Tensor:
        """(B, d, T) → (B, T, d) and back, on a host whose blocks have it so; any other as it is."""
        return x.transpose(1, 2) if self.map.layout.channels_first else x

    # ---- merging ----

    def delta_weight(self, site: Site, task: str) -> torch.Tensor:
        """ΔW (out, in) of one site in float64, where it is the same for all tokens."""
        atoms = self.project(task)
        _, read_key, _, write_key = self.plans[site]
        read, write = atoms.read[read_key].double(), atoms.write[write_key].double()
        parts = []
        for role in site.module_types:
            weights = (atoms.mean_gate * atoms.coefficients[site.block, MODULE_TYPES.index(role)]).double()
            parts.append(read.T * weights @ write)  # (in, w)
        return site.join(parts).T

    @property
    def merged(self) -> bool:
        return bool(self._originals)

    @torch.no_grad()
    def merge(self, task: str) -> None:
        """Add ΔW to each site's weight; the original weights are kept for ``unmerge``.

        Raises:
            MergeError: the router chooses atoms for each token, the host's weights cannot take the update, or other
                adapters are on the host.
            HostError: a weight would not be finite.
        """
        if not self.static:
            raise MergeError(
                "The update depends on each token (router='token'), so it cannot be merged exactly. Load the adapter "
                "with router='static', which uses one fixed mask, the mean gate."
            )
        if not self.map.mergeable():
            raise MergeError(
                f"The weights of this host ({self.map.family}) cannot take the update in: they are shared between "
                "depths or with positions, grouped, or quantised. It is computed beside them instead."
            )
        Hold.check_alone(self.host)
        updated = {}
        for site in self.map.sites:
            weight = site.linear.weight
            updated[site] = (weight.double() + self.delta_weight(site, task)).to(weight.dtype)
            if not torch.isfinite(updated[site]).all():
                raise HostError(
                    f"Merging would make block {site.block} {'/'.join(site.module_types)} not finite; nothing merged."
                )
        for site, weight in updated.items():
            self._originals[site] = site.linear.weight.detach().clone()
            site.linear.weight.copy_(weight)
        self.merged_task = task
        Hold.on(self.host).merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give every site its own weight back, bit for bit."""
        for site, weight in self._originals.items():
            site.linear.weight.copy_(weight)
        if self.merged:
            Hold.on(self.host).merged = False
        self._originals.clear()
        self.merged_task = None
