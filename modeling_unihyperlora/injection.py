"""The injected update: hooks that add ΔW x to a host's linear layers during a forward pass of the adapter.

The hooks act only inside ``Injection.running``, and only in the thread that entered it. A host that is called directly
gives its usual output.
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

# Entry files of an injected adapter's code; their imports include all other files that the adapter needs.
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
    """Record the update's target in ``config``: the user's layout for the host's family, and for SAT-LoRA the host.

    Pass ``binds`` false if the SAT-LoRA adapter is bound already; ``inject`` then checks the host.
    """
    host = encoder_of(host)
    if layout is not None:
        family = host.config.model_type
        content = dataclasses.asdict(layout_from(layout, family))
        config.host_layouts = config.host_layouts | {family: content}
    if config.projector == "host" and binds:
        bind(config, host)


def make_adapter(config: UniHyperLoraConfig) -> UniHyperLoraAdapter:
    """Make the adapter that a configuration describes.

    Raises:
        ConfigError: a SAT-LoRA adapter is not bound to a host.
    """
    if config.projector == "host" and config.bound_host is None:
        raise ConfigError(
            "projector='host' needs bound_host: make the adapter with from_host, which records the host in the "
            "configuration."
        )
    return HostBoundAdapter(config) if config.projector == "host" else UniHyperLoraAdapter(config)


def inject(adapter: UniHyperLoraAdapter, host: nn.Module) -> "Injection":
    """Bind an adapter to the sites of a host.

    Raises:
        HostError: a SAT-LoRA adapter is bound to another host, or the host's family has no layout.
    """
    check_bound(adapter.config, host)
    return Injection(adapter, host)


def warn_where_untrained(model) -> None:
    """Warn if an injected update is on a host that it was not trained on."""
    config, sources = model.config, model.config.source_hosts
    if config.projector != "host" and sources and not is_among(model.host, model.injection.map.num_layers, sources):
        logger.warning(
            "This adapter is an injected update that was not trained on %s. An injected update does not transfer to "
            "other hosts: expect the score of an untrained adapter. Train it on this host, or train an adapter with "
            "pathway='stream', which works on unseen hosts.",
            config.base_model_name_or_path or "this host",
        )


def _thread() -> int:
    """Id of this thread; 0 in compiled code, which runs in one thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Pass:
    """State of one forward pass: projected atoms, the current block and its routing.

    ``routed`` holds the shape (B, T) of the states and the routing of every block so far. T may exceed the length of
    the input if the host adds padding.
    """

    def __init__(self, atoms: ProjectedAtoms, task: str | MixedTasks, mask: torch.Tensor | None):
        self.atoms = atoms
        self.task = task
        self.mask = mask  # (B, T) above 0 for tokens, 0 for padding; None if all are tokens
        self.block: int | None = None
        self.routing: Routing | None = None
        self.weights: Sequence[torch.Tensor] = ()  # for each module type of the block, see ``Routing.weights``
        self.routed: list[tuple[torch.Size, Routing]] = []
        self.knot_states: dict[int, torch.Tensor] = {}  # number of blocks passed → state (B, T, d)
        self._calls: dict[nn.Module, int] = {}
        self._used: set[nn.Module] = set()
        self._read: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def enter(self, module: nn.Module, blocks: tuple[int, ...]) -> int:
        """Number of the block that this call of a module starts; the module serves ``blocks`` in turn."""
        number = self._calls.get(module, 0)
        self._calls[module] = number + 1
        self._used.clear()
        self.block = blocks[number % len(blocks)]
        return self.block

    def of_block(self) -> "Pass":
        """A copy of this pass, at the start of the current block."""
        one = copy.copy(self)
        one._used, one._read = set(), None
        return one

    def rows(self, state: torch.Tensor) -> torch.Tensor | None:
        """Task index (N,) of each token of a state (B, T, w); None if there is only one task."""
        return self.task.rows.repeat_interleave(state.shape[1]) if isinstance(self.task, MixedTasks) else None

    def first_use(self, linear: nn.Module) -> bool:
        """Whether this is a layer's first call in the block; later calls read relative positions, not tokens."""
        again = linear in self._used
        self._used.add(linear)
        return not again

    def read(self, x: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``read_atoms``, computed once for layers with the same input ``x`` (query, key and value)."""
        if self._read is None or self._read[0] is not x or self._read[1] is not rows:
            self._read = (x, rows, read_atoms(tokens.flatten(0, -2), rows, self.routing))
        return self._read[2]

    def counts(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """E[k] and the number of used atoms, each (B, T) = ``shape``: means over the blocks, without added padding."""
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
    """Result of a host's forward pass with the update, and the inputs of the heads."""

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
        """Logits (B, T, C) of tokens."""
        return self.adapter.logits(self.knot_states, self.knot_keys, self.task)

    def sentence_logits(self) -> torch.Tensor:
        """Logits (B, C) of sentences, from the mean state of a sentence's tokens at each knot."""
        hidden, mask = self.last_hidden_state, self.attention_mask
        mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        means = [(state * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1) for state in self.knot_states]
        return self.adapter.logits(means, self.knot_keys, self.task)


class Injection:
    """Binds an adapter to the sites of one host.

    Attributes:
        checkpoint: ``torch.utils.checkpoint.checkpoint`` if gradient checkpointing is on: the backward pass then
            recomputes every ``every``-th block instead of keeping its activations. None otherwise.

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
        """Whether all tokens get the same update (router "static")."""
        return self.adapter.config.router == "static"

    def describe(self) -> str:
        """One line with the host's family and sizes, the number of sites, and the adapter's settings."""
        found, config = self.map, self.adapter.config
        return (
            f"{found.family}, {found.num_layers} blocks x {found.hidden_size}): {found.coverage()} sites, pathway "
            f"inject, projector {config.projector}, router {config.router}"
        )

    def enable_checkpointing(self, given: dict, every_n_layers: int = 1, offload: bool = False) -> None:
        """Recompute blocks in the backward pass; see ``gradient_checkpointing_enable`` of the model."""
        if given.get("use_reentrant") or offload:
            raise ConfigError(
                "Gradient checkpointing of a frozen host supports neither use_reentrant nor offload; leave both out "
                "of --gradient_checkpointing_kwargs."
            )
        self.checkpoint = partial(checkpoint, **{"use_reentrant": False} | given)
        self.every = every_n_layers

    def outputs(self, model, task, task_ids, attention_mask, output_hidden_states, inputs: dict) -> dict:
        """The outputs of ``model.run``, for one task or for one task per sentence."""
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
        """The current forward pass of this thread; None outside a pass."""
        return self._passes.get(_thread())

    def _plan(self, site: Site) -> tuple[str, object, str, object]:
        """Side and projector key for reading, then side and key for writing."""
        read, write = self.adapter.projector.sides(site.module_types[0])
        depth = self.depths[site.block]
        read_key, write_key = self.adapter.projector.site_keys(site.module_types[0], site.widths, depth)
        return read, read_key, write, write_key

    # ---- hooks ----

    def attach(self) -> None:
        """Register the hooks: partials of bound methods, so that a deep copy of the model uses its own adapter."""
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
        """Context in which the host computes with the update, in this thread; yields the pass."""
        recomputes = self.checkpoint is not None and torch.is_grad_enabled()
        with self._in(Pass(self.project(task), task, attention_mask)) as current:
            with self._checkpointed() if recomputes else nullcontext():
                yield current

    @contextmanager
    def _in(self, current: Pass) -> Iterator[Pass]:
        """Context in which ``current`` is the pass of this thread."""
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
        """Context in which blocks keep only their inputs and are recomputed in the backward pass."""
        forwards = {block: vars(block).get("forward") for block in self.map.blocks}
        for block in forwards:
            block.forward = partial(self._recompute, block.forward)
        try:
            yield
        finally:
            for block, forward in forwards.items():
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _recompute(self, forward: Callable, *args, **kwargs):
        """Run a block with checkpointing; the recomputation uses the same pass, maybe in another thread."""
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
        """The host's forward pass with the update of ``task``."""
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
                "the host with attn_implementation='sdpa', which does not pack sentences into one row."
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
        if own.training and own.head_weight.latent.requires_grad and torch.is_grad_enabled():  # not for δθ alone
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
                f"In block {site.block} the {site.module_types[0]} layer reads {tokens.shape[:-1].numel()} vectors, "
                f"but the block reads {len(run.routing.atoms)}: the update needs one vector per token. Use "
                "pathway='stream'."
            )
        dots, rows = run.read(x, tokens, atoms.read[read_key]), atoms.write[write_key]
        if not torch.is_grad_enabled() and len(types) == 1 and output.is_contiguous() and output.dtype == dots.dtype:
            if not self.map.layout.channels_first:  # in place: nothing else uses the output yet
                add_atoms(output.flatten(0, -2), dots, rows, run.routing, run.weights[types[0]])
                return output
        update = site.join([write_atoms(dots, rows, run.routing, run.weights[number]) for number in types])
        own = self._tokens_last(output)
        return self._tokens_last(own + update.view(own.shape).to(own.dtype))

    def _tokens_last(self, x: torch.Tensor) -> torch.Tensor:
        """Swap (B, d, T) and (B, T, d) if the host's blocks have channels first; else return ``x`` unchanged."""
        return x.transpose(1, 2) if self.map.layout.channels_first else x

    # ---- merging ----

    def delta_weight(self, site: Site, task: str) -> torch.Tensor:
        """ΔW (out, in) of one site in float64; only for the static router, where it is the same for all tokens."""
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
                f"The update cannot be merged into the weights of this host ({self.map.family}): they are shared "
                "between depths or with positions, grouped, or quantised. Use the adapter without merging."
            )
        Hold.check_alone(self.host)
        updated = {}
        for site in self.map.sites:
            weight = site.linear.weight
            updated[site] = (weight.double() + self.delta_weight(site, task)).to(weight.dtype)
            if not torch.isfinite(updated[site]).all():
                raise HostError(
                    f"Merging would make block {site.block} {'/'.join(site.module_types)} not finite, so nothing was "
                    "merged. Train the adapter again with lower learning rates."
                )
        for site, weight in updated.items():
            self._originals[site] = site.linear.weight.detach().clone()
            site.linear.weight.copy_(weight)
        self.merged_task = task
        Hold.on(self.host).merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the original weight of every site, bit for bit."""
        for site, weight in self._originals.items():
            site.linear.weight.copy_(weight)
        if self.merged:
            Hold.on(self.host).merged = False
        self._originals.clear()
        self.merged_task = None
