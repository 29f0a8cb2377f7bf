"""Configuration of a UniHyperLoRA adapter."""

import dataclasses
import re
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig

from .errors import ConfigError
from .host_tokenizer import HostTokenizer
from .layouts import MODULE_TYPES, layout_from
from .untrusted import MAX_WEIGHTS_BYTES

FORMAT_VERSION = 1
TASK_TYPES = ("token_classification", "sequence_classification")
TAG_SCHEMES = ("IOB1", "IOB2", "IOBES", "BILOU", "BMES", "IO")  # IO: an unbroken run of a tag is one entity
WINDOWS = {"token_classification": 1, "sequence_classification": 0}  # of the head of a task that is added later

_ALLOWED = {
    "pathway": ("inject", "stream", "both"),
    "projector": ("dimension", "anchored", "host"),
    "router": ("token", "static"),
    "router_top_k": (1, 2, 3),
}
_MOST_ANCHOR_BYTES = 1_000_000
_MOST_COORDINATES = 10_000_000
_MOST_BLOCKS, _MOST_SHAPES = 256, 64
_LARGEST_SIZE = 4096  # far over any budget; keeps a damaged config.json from asking for all memory


class UniHyperLoraConfig(PreTrainedConfig):
    """Shapes and choices of an adapter; the host is named here but none of its numbers are.

    Args:
        pathway: where the atoms act; "inject" adds the update to the host's linear layers, "stream" computes beside
            the host on its states and works on hosts that it was not trained on; "both" is a stream with an update in
            the linear layers of one host, which ``model.add_injection`` begins and δθ tunes.
        projector: "dimension": one wave network maps any width to the canonical space and back (for "inject");
            "anchored": a closed-form map from each host's states on the anchors (for the stream); "host": none, the
            atoms are of the host's own widths and serve that host alone (SAT-LoRA, for "inject"). None: the one that
            goes with the pathway.
        router: "token" chooses atoms for each token; "static" uses one fixed mask and can be merged.
        router_top_k: atoms a token may use in a block, 1 to 3.
        atoms: M, number of rank-one atoms; with projector "host" that for each shape of linear layer, and for each
            block unless they are shared.
        bound_host: with projector "host" what must be true of the host, see ``host_bound.bind``.
        share_across_layers: with projector "host", whether all blocks use the same atoms.
        target_modules: with projector "host", the module types that are updated; None for all six.
        atom_scale: with projector "host", a fixed factor of the update, as alpha / r of LoRA.
        anchor_dim: d0, width of the canonical space of the injected update.
        mixer_hidden: width of the mixer's sine layer.
        stream_dim: canonical coordinates that the stream uses at each knot.
        stream_width: width of the token mixer's input map.
        stream_hidden: width of each direction of its recurrent layer.
        stream_fidelity: in training a sentence's coordinates are mixed with noise down to a correlation drawn from
            U(stream_fidelity, 1); 1 for none.
        stream_dropout: dropout before and after the recurrent layer in training.
        anchor_words: N, words of the anchor text.
        anchor_text_bytes: its length.
        delta_step: value of one step of the 4-bit δθ; its range is -8 to 7 steps. A larger step than twice the way
            that the optimiser goes (at most learning rate × steps) would never be taken.
        tasks: task name → {"type": one of TASK_TYPES, "labels": list of str}. "trained" says that its head is,
            "window" that the head reads coordinates of a word and of so many on both sides of it as well, "refined"
            which text the map of its δθ was refined on, "scheme" which of TAG_SCHEMES its tags keep to.
        active_task: the task that a forward pass uses unless told otherwise.
        base_model_name_or_path: Hub id or folder of the host that is loaded when none is given.
        base_model_revision: commit, tag or branch of that host.
        source_hosts: what is recorded of the hosts that the adapter was trained on.
        injected_host: with pathway "both" the host that the injected update is for, see ``hosts.identify_host``.
        host_layouts: host family → the ``HostLayout`` that a user gave for it, as a dict.
        format_version: version of the file layout.

    Raises:
        ConfigError: a value or a name is not allowed, or the file is of a newer format.
    """

    model_type = "unihyperlora"
    keys_to_ignore_at_inference = ["expected_atoms", "active_atoms", "hidden_states", "attentions"]

    pathway: str = "inject"
    projector: str | None = None
    router: str = "token"
    router_top_k: int = 2
    atoms: int = 128
    anchor_dim: int = 256
    mixer_hidden: int = 14
    stream_dim: int = 32
    stream_width: int = 160
    stream_hidden: int = 128
    stream_fidelity: float = 0.6
    stream_dropout: float = 0.2
    anchor_words: int = 0
    anchor_text_bytes: int = 0
    delta_step: float = 1 / 32
    tasks: dict[str, dict[str, Any]] | None = None
    active_task: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    source_hosts: list[dict[str, Any]] | None = None
    host_layouts: dict[str, dict[str, Any]] | None = None
    bound_host: dict[str, Any] | None = None
    injected_host: dict[str, Any] | None = None
    share_across_layers: bool = True
    target_modules: list[str] | None = None
    atom_scale: float = 1.0
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self._reject_unknown(kwargs)
        self.check()
        super().__post_init__(**kwargs)
        if self.active_task is not None:
            self.activate(self.active_task)

    def check(self) -> None:
        """Raise ``ConfigError`` unless every value is allowed; needed again after one was set by hand."""
        if type(self.format_version) is not int or self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"This adapter has format_version {self.format_version!r}, this package reads up to {FORMAT_VERSION}. "
                "Update the package: pip install -U unihyperlora."
            )
        if self.projector is None:
            self.projector = "dimension" if self.pathway == "inject" else "anchored"
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; choose one of {allowed}.")
        for name in ("atoms", "anchor_dim", "mixer_hidden", "stream_dim", "stream_width", "stream_hidden"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _LARGEST_SIZE:
                raise ConfigError(f"{name}={value!r} is not allowed; it must be an integer from 1 to {_LARGEST_SIZE}.")
        if (self.pathway == "inject") != (self.projector in ("dimension", "host")):
            raise ConfigError(
                f"pathway={self.pathway!r} does not go with projector={self.projector!r}: the injected update uses "
                "the 'dimension' or the 'host' projector, the stream the 'anchored' one."
            )
        self._check_host_bound()
        self._check_injected_host()
        if self.pathway != "inject" and self.router == "static":
            raise ConfigError(
                "router='static' is for the injected update; the stream routes every word. Leave it out."
            )
        for name, most in (("stream_fidelity", 1), ("stream_dropout", 0.9)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise ConfigError(f"{name}={value!r} is not allowed; it must be a number from 0 to {most}.")
        for name in ("anchor_words", "anchor_text_bytes"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _MOST_ANCHOR_BYTES:
                raise ConfigError(f"{name}={value!r} is not allowed; it must be at most {_MOST_ANCHOR_BYTES}.")
        if self.anchor_words * self.stream_dim > _MOST_COORDINATES:
            raise ConfigError(
                f"anchor_words={self.anchor_words} of stream_dim={self.stream_dim} is not allowed; their product, the "
                f"coordinates a knot, must be at most {_MOST_COORDINATES:,}."
            )
        if self.router_top_k > self.atoms:
            raise ConfigError(f"router_top_k={self.router_top_k} exceeds atoms={self.atoms}.")
        if type(self.delta_step) not in (int, float) or not 1e-6 <= self.delta_step <= 1e6:
            raise ConfigError(f"delta_step={self.delta_step!r} is not allowed; it must be a number from 1e-6 to 1e6.")
        if not isinstance(self.tasks or {}, dict) or not isinstance(self.source_hosts or [], list):
            raise ConfigError("tasks must be a dict of task name → type and labels, source_hosts a list.")
        self.tasks = dict(self.tasks or {})
        self.source_hosts = list(self.source_hosts or [])
        if not isinstance(self.host_layouts or {}, dict):
            raise ConfigError(f"host_layouts must be a dict of host family → layout; got {self.host_layouts!r}.")
        self.host_layouts = dict(self.host_layouts or {})
        for family, layout in self.host_layouts.items():
            layout_from(layout, family)
        for name, task in self.tasks.items():
            if not isinstance(task, dict):
                raise ConfigError(f"Task {name!r} must be a dict with 'type' and 'labels'; got {task!r}.")
            check_task(name, task.get("type"), task.get("labels"))
            window = task.get("window")
            if window is not None and (type(window) is not int or not 0 <= window <= 4 or self.pathway == "inject"):
                raise ConfigError(
                    f"Task {name!r}: window={window!r} is not allowed; an integer from 0 to 4, for a stream alone."
                )
            scheme = task.get("scheme")
            if scheme is not None and (scheme not in TAG_SCHEMES or task["type"] != "token_classification"):
                raise ConfigError(
                    f"Task {name!r}: scheme={scheme!r} is not allowed; one of {', '.join(TAG_SCHEMES)}, for a task of "
                    "type token_classification alone."
                )
            text = task.get("refined", {"words": 0, "sha256": ""})
            if not isinstance(text, dict) or {key: type(text[key]) for key in text} != {"words": int, "sha256": str}:
                raise ConfigError(
                    f"Task {name!r}: refined={text!r} does not describe a text by its 'words' and 'sha256'. Use the "
                    "config.json that was saved with the adapter."
                )
        if self.active_task is not None and self.active_task not in self.tasks:
            raise ConfigError(f"active_task={self.active_task!r} is not among the tasks {sorted(self.tasks)}.")

    def _check_host_bound(self) -> None:
        """What goes with projector "host", and with no other."""
        if self.projector != "host":
            given = (self.bound_host, self.share_across_layers, self.target_modules, self.atom_scale)
            if given != (None, True, None, 1.0):
                raise ConfigError(
                    "bound_host, share_across_layers, target_modules and atom_scale go with projector='host' alone; "
                    f"projector is {self.projector!r}."
                )
            return
        if self.router != "token":
            raise ConfigError("projector='host' goes with router='token' alone; leave router out.")
        if not isinstance(self.share_across_layers, bool):
            raise ConfigError(f"share_across_layers={self.share_across_layers!r} is not allowed; true or false.")
        if type(self.atom_scale) not in (int, float) or not 1e-3 <= self.atom_scale <= 1e3:
            raise ConfigError(f"atom_scale={self.atom_scale!r} is not allowed; it must be a number from 1e-3 to 1e3.")
        if self.target_modules is not None:
            good = isinstance(self.target_modules, list) and self.target_modules
            if not good or not all(name in MODULE_TYPES for name in self.target_modules):
                raise ConfigError(
                    f"target_modules={self.target_modules!r} is not allowed; a list of some of "
                    f"{', '.join(MODULE_TYPES)}."
                )
        if self.bound_host is not None:  # it is there once the adapter was on its host
            check_bound_host(self.bound_host)
            sets = 1 if self.share_across_layers else self.bound_host["num_layers"]
            values = sets * self.atoms * (sum(map(sum, self.bound_host["shapes"])) + self.bound_host["hidden_size"])
            if values > MAX_WEIGHTS_BYTES:
                raise ConfigError(
                    f"atoms={self.atoms} for the host in bound_host is not allowed; the atoms would have {values:,} "
                    f"values, {MAX_WEIGHTS_BYTES:,} is the most."
                )

    def _check_injected_host(self) -> None:
        """What goes with pathway "both", and with no other."""
        if self.pathway != "both":
            if self.injected_host is not None:
                raise ConfigError(f"injected_host goes with pathway='both' alone; pathway is {self.pathway!r}.")
            return
        if self.injected_host is None:
            raise ConfigError(
                "pathway='both' is not trained from nothing: it is a trained stream with an injected update, which δθ "
                "tunes on one host. Load a stream adapter there and call add_injection(), or give --adapter with "
                "--train_scope delta --pathway both."
            )
        check_host_record("injected_host", self.injected_host)

    def _reject_unknown(self, kwargs: dict[str, Any]) -> None:
        """transformers lets any keyword pass into a configuration; a misspelt option must not."""
        known = {"num_labels", "name_or_path", "torch_dtype", "auto_map", "custom_pipelines", "model_type"}
        known |= {"attn_implementation", "experts_implementation", "output_attentions"}
        known |= {
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "use_cache",
        }  # a Trainer sets them
        unknown = [key for key in kwargs if key not in known and not key.startswith("_")]
        if unknown:
            fields = sorted(f.name for f in dataclasses.fields(UniHyperLoraConfig) if f.name in _OWN_FIELDS)
            raise ConfigError(f"Unknown configuration key {unknown[0]!r}. Known keys: {', '.join(fields)}.")

    def activate(self, task: str) -> None:
        """Make ``task`` the active one; ``id2label`` and ``label2id`` become its own."""
        if task not in self.tasks:
            raise ConfigError(f"No task {task!r} in this adapter; it has {sorted(self.tasks)}.")
        self.active_task = task
        labels = self.tasks[task]["labels"]
        self.id2label = dict(enumerate(labels))
        self.label2id = {label: index for index, label in enumerate(labels)}


_OWN_FIELDS = set(UniHyperLoraConfig.__annotations__)
AutoTokenizer.register(UniHyperLoraConfig, fast_tokenizer_class=HostTokenizer, exist_ok=True)


def check_bound_host(host: object) -> None:
    """Raise ``ConfigError`` unless it describes a host as ``host_bound.bind`` does."""
    shapes = host.get("shapes") if isinstance(host, dict) else None
    good = isinstance(shapes, list) and 0 < len(shapes) <= _MOST_SHAPES
    if not good or not all(isinstance(s, list) and len(s) == 2 and all(map(_is_size, s)) for s in shapes):
        raise ConfigError(
            f"bound_host={host!r} does not describe a host with the shapes of its linear layers. Use the config.json "
            "that was saved with the adapter."
        )
    check_host_record("bound_host", {name: value for name, value in host.items() if name != "shapes"})


def check_host_record(name: str, host: object) -> None:
    """Raise ``ConfigError`` unless it describes a host as ``hosts.identify_host`` does."""
    sizes, texts = ("hidden_size", "num_layers"), ("family", "fingerprint", "dtype")
    good = isinstance(host, dict) and host.keys() == {*sizes, *texts}
    good = good and all(_is_size(host[size]) for size in sizes) and host["num_layers"] <= _MOST_BLOCKS
    if not good or not all(isinstance(host[text], str) for text in texts):
        raise ConfigError(
            f"{name}={host!r} does not describe a host: {', '.join((*sizes, *texts))}. Use the config.json that was "
            "saved with the adapter."
        )


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_SIZE * 4


def check_task(name: str, task_type: str | None, labels: list[str] | None) -> None:
    """Raise ``ConfigError`` unless the three make a usable task."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ConfigError(f"Task name {name!r} is not allowed; use up to 64 letters, digits, '-' and '_'.")
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"Task name {name!r} is taken by PyTorch; choose another, such as {name + '-1'!r}.")
    if task_type not in TASK_TYPES:
        raise ConfigError(f"Task {name!r} has type {task_type!r}; choose one of {TASK_TYPES}.")
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or len(labels) < 2:
        raise ConfigError(f"Task {name!r} needs a list of at least two label names; got {labels!r}.")
    if len(set(labels)) != len(labels):
        raise ConfigError(f"Task {name!r} names a label twice: {labels}.")
