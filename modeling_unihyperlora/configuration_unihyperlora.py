"""Configuration of a UniHyperLoRA adapter."""

import dataclasses
import importlib
import re
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig

from .errors import AdapterFileError, ConfigError, UniHyperLoraError
from .reader import READERS
from .storage import FORMAT_VERSION, read_json_object
from .words import HostTokenizer

TASK_TYPES = ("token_classification", "sequence_classification")
READER_BITS = (4, 8)
TAG_SCHEMES = ("IOB1", "IOB2", "IOBES", "BILOU", "BMES", "IO")  # IO: an unbroken run of a tag is one entity
_LARGEST_SIZE = 4096  # far above any budget; stops a damaged config.json from allocating all memory
_MOST_COORDINATES = 10_000_000
_SPACE_SIZES = {"version": 10**6, "anchor_words": 10**6, "anchor_text_bytes": 10**6, "dim": 4096, "atoms": 4096}


class UniHyperLoraConfig(PreTrainedConfig):
    """Configuration of an adapter: its shape and its tasks. It names a host but holds none of the host's weights.

    Args:
        pathway: "stream" (default) computes from the host's states, beside the host, and also works on hosts that it
            was not trained on. "inject" adds the paper's update to the linear layers of the training host.
        space: stream only: shape of the canonical space, as arguments of ``CanonicalSpace``.
        tasks: task name → {"type": one of TASK_TYPES, "labels": list of str, …}. A task of a stream also has "reader":
            {"width", "hidden", "bits"}. Optional keys: "trained" (the task was trained), "refined" (the text that the
            host's map was refined on for δθ) and "scheme" (scheme of the tags, one of TAG_SCHEMES).
        active_task: task that a forward pass uses by default.
        dropout: stream only: dropout before and after the recurrent layer of a reader, in training.
        delta_step: step size of the 4-bit δθ; values are -8 to 7 steps. Keep the step below twice the distance that
            the optimiser can move (at most learning rate × steps), or δθ stays zero.
        base_model_name_or_path: Hub id or folder of the host to load if none is given.
        base_model_revision: commit, tag or branch of that host.
        source_hosts: descriptions of the hosts that the adapter was trained on.
        projector: injected update only. "dimension": a wave network maps any width to the canonical space and back.
            "host": no projector; the atoms have the widths of one host and work on that host only (SAT-LoRA).
        router: injected update only. "token" chooses atoms for each token; "static" uses one fixed mask, which can be
            merged.
        router_top_k: injected update only: maximum number of atoms per token and block, 1 to 3.
        atoms: M, number of rank-one atoms. With projector "host": number for each shape of linear layer, and for each
            block if blocks do not share atoms.
        anchor_dim: d0, width of the canonical space of an injected update.
        mixer_hidden: width of the mixer's sine layer.
        bound_host: with projector "host": description of the host, see ``sat_lora.bind``.
        share_across_layers: with projector "host": whether all blocks use the same atoms.
        target_modules: with projector "host": module types to update; None for all six.
        atom_scale: with projector "host": fixed factor of the update, like alpha / r in LoRA.
        host_layouts: host family → the user's ``HostLayout`` for it, as a dict.
        format_version: version of the file format.

    Raises:
        ConfigError: a value or a name is not allowed, or the file has another format.
    """

    model_type = "unihyperlora"
    keys_to_ignore_at_inference = ["expected_atoms", "active_atoms", "hidden_states", "attentions"]

    pathway: str = "stream"
    space: dict[str, Any] | None = None
    tasks: dict[str, dict[str, Any]] | None = None
    active_task: str | None = None
    dropout: float = 0.1
    delta_step: float = 1 / 32
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    source_hosts: list[dict[str, Any]] | None = None
    projector: str | None = None
    router: str | None = None
    router_top_k: int | None = None
    atoms: int = 128
    anchor_dim: int = 256
    mixer_hidden: int = 14
    bound_host: dict[str, Any] | None = None
    share_across_layers: bool = True
    target_modules: list[str] | None = None
    atom_scale: float = 1.0
    host_layouts: dict[str, dict[str, Any]] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self._check_format()  # first: another format may have other keys
        self._reject_unknown(kwargs)
        self.check()
        super().__post_init__(**kwargs)
        if self.active_task is not None:
            self.activate(self.active_task)

    def check(self) -> None:
        """Raise ``ConfigError`` unless every value is allowed; call it again after changing a value."""
        self._check_format()
        if self.pathway not in ("stream", "inject"):
            raise ConfigError(f"pathway={self.pathway!r} is not allowed; choose 'stream' or 'inject'.")
        check_number("delta_step", self.delta_step, 1e-6, 1e6)
        check_number("dropout", self.dropout, 0, 0.9)
        check_size("atoms", self.atoms, _LARGEST_SIZE)
        if not isinstance(self.tasks or {}, dict) or not isinstance(self.source_hosts or [], list):
            raise ConfigError("tasks must be a dict of task name → type and labels; source_hosts must be a list.")
        self.tasks, self.source_hosts = dict(self.tasks or {}), list(self.source_hosts or [])
        for host in self.source_hosts:
            if not isinstance(host, dict) or not {"name", "fingerprint"} <= host.keys():
                raise ConfigError(
                    f"source_hosts has {host!r}, which does not describe a host by 'name' and 'fingerprint'. Use the "
                    "config.json that was saved with the adapter."
                )
        if self.pathway == "stream":
            self._check_stream()
        else:
            importlib.import_module(".injected_configuration", __package__).check_injected(self)
        for name, task in self.tasks.items():
            if not isinstance(task, dict):
                raise ConfigError(f"Task {name!r} must be a dict with 'type' and 'labels'; got {task!r}.")
            check_task(name, task.get("type"), task.get("labels"))
            if self.pathway == "stream":
                check_reader(name, task.get("reader"))
            scheme = task.get("scheme")
            if scheme is not None and (scheme not in TAG_SCHEMES or task["type"] != "token_classification"):
                raise ConfigError(
                    f"Task {name!r}: scheme={scheme!r} is not allowed. Choose one of {', '.join(TAG_SCHEMES)}; only a "
                    "task of type token_classification may have a scheme."
                )
            text = task.get("refined", {"words": 0, "sha256": ""})
            if not isinstance(text, dict) or {key: type(text[key]) for key in text} != {"words": int, "sha256": str}:
                raise ConfigError(
                    f"Task {name!r}: refined={text!r} does not describe a text by 'words' and 'sha256'. Use the "
                    "config.json that was saved with the adapter."
                )
        if self.active_task is not None and self.active_task not in self.tasks:
            raise ConfigError(f"active_task={self.active_task!r} is not among the tasks {sorted(self.tasks)}.")

    def _check_format(self) -> None:
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            newer = type(self.format_version) is int and self.format_version > FORMAT_VERSION
            raise ConfigError(
                f"This adapter has format_version {self.format_version!r}, but this package reads {FORMAT_VERSION}. "
                + ("Update the package." if newer else "Train the adapter again, or install 'unihyperlora<0.2'.")
            )

    def _check_stream(self) -> None:
        """Check the settings of a stream; refuses settings of an injected update."""
        given = [name for name in ("projector", "router", "router_top_k") if getattr(self, name) is not None]
        if given or self.bound_host is not None or self.target_modules is not None or self.host_layouts:
            name = given[0] if given else "bound_host, target_modules or host_layouts"
            raise ConfigError(
                f"{name} is for an injected update, but pathway is 'stream'. Leave it out, or give pathway='inject'."
            )
        if self.space is None:  # set when the adapter is put on a host
            return
        space = self.space
        if (
            not isinstance(space, dict)
            or space.keys() != {"name", *_SPACE_SIZES}
            or not isinstance(space["name"], str)
        ):
            raise ConfigError(f"space={space!r} does not describe a canonical space. Use the saved config.json.")
        for name, most in _SPACE_SIZES.items():
            check_size(f"space['{name}']", space[name], most)
        if space["anchor_words"] * space["dim"] > _MOST_COORDINATES:
            raise ConfigError(f"space={space!r} has more than {_MOST_COORDINATES:,} coordinates per knot.")

    def _reject_unknown(self, kwargs: dict[str, Any]) -> None:
        """Raise ``ConfigError`` for an unknown keyword; transformers would accept a misspelt one."""
        known = {"num_labels", "name_or_path", "torch_dtype", "auto_map", "custom_pipelines", "model_type"}
        known |= {"attn_implementation", "experts_implementation", "output_attentions"}
        known |= {"pad_token_id", "bos_token_id", "eos_token_id", "use_cache"}  # a Trainer sets them
        unknown = [key for key in kwargs if key not in known and not key.startswith("_")]
        if unknown:
            fields = sorted(f.name for f in dataclasses.fields(UniHyperLoraConfig) if f.name in _OWN_FIELDS)
            raise ConfigError(f"Unknown configuration key {unknown[0]!r}. Known keys: {', '.join(fields)}.")

    def activate(self, task: str) -> None:
        """Make ``task`` the active task; sets ``id2label`` and ``label2id`` to its labels."""
        if task not in self.tasks:
            raise ConfigError(f"No task {task!r} in this adapter; it has {sorted(self.tasks)}.")
        self.active_task = task
        labels = self.tasks[task]["labels"]
        self.id2label = dict(enumerate(labels))
        self.label2id = {label: index for index, label in enumerate(labels)}


_OWN_FIELDS = set(UniHyperLoraConfig.__annotations__)
AutoTokenizer.register(UniHyperLoraConfig, fast_tokenizer_class=HostTokenizer, exist_ok=True)


def read_config(path) -> UniHyperLoraConfig:
    """Read a ``config.json``.

    Raises:
        AdapterFileError: the file is not JSON, has a key twice, or is not the configuration of an adapter.
        ConfigError: a key or a value is not allowed, or the file has another format.
    """
    content = read_json_object(path)
    if content.pop("model_type", None) != UniHyperLoraConfig.model_type:
        raise AdapterFileError(f"{path} is not the configuration of a UniHyperLoRA adapter.")
    try:
        return UniHyperLoraConfig(**content)
    except UniHyperLoraError:
        raise
    except Exception as error:  # transformers raises many kinds of error for its own keys
        raise AdapterFileError(f"{path} holds a value that cannot be used ({error}).") from error


def reader_shape(reader: str | dict[str, int], bits: int = 4) -> dict[str, int]:
    """Shape of a reader from its name ("small", "medium" or "large") or from a dict.

    Raises:
        ConfigError: no such reader, or a value is not allowed.
    """
    if isinstance(reader, dict):
        shape = {"bits": bits} | reader
    elif reader in READERS:
        width, hidden = READERS[reader]
        shape = {"width": width, "hidden": hidden, "bits": bits}
    else:
        raise ConfigError(f"reader={reader!r} is not allowed; choose one of {', '.join(READERS)}.")
    check_reader("new", shape)
    return shape


def check_reader(task: str, shape: object) -> None:
    """Raise ``ConfigError`` unless ``shape`` is the shape of a reader."""
    if not isinstance(shape, dict) or shape.keys() != {"width", "hidden", "bits"}:
        raise ConfigError(f"Task {task!r}: reader={shape!r} needs 'width', 'hidden' and 'bits'.")
    check_size(f"the reader's width (task {task!r})", shape["width"], _LARGEST_SIZE)
    check_size(f"the reader's hidden (task {task!r})", shape["hidden"], _LARGEST_SIZE)
    if shape["bits"] not in READER_BITS:
        raise ConfigError(
            f"Task {task!r}: bits={shape['bits']!r} of the reader are not allowed; choose one of {READER_BITS}."
        )


def check_size(name: str, value: object, most: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an integer from 1 to ``most``."""
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{name}={value!r} is not allowed; it must be an integer from 1 to {most}.")


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raise ``ConfigError`` unless ``value`` is a number from ``least`` to ``most``."""
    if type(value) not in (int, float) or not least <= value <= most:
        raise ConfigError(f"{name}={value!r} is not allowed; it must be a number from {least:g} to {most:g}.")


def check_task(name: str, task_type: str | None, labels: list[str] | None) -> None:
    """Raise ``ConfigError`` unless name, type and labels describe a usable task."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ConfigError(f"Task name {name!r} is not allowed; use up to 64 letters, digits, '-' and '_'.")
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"PyTorch reserves the task name {name!r}; choose another, such as {name + '-1'!r}.")
    if task_type not in TASK_TYPES:
        raise ConfigError(f"Task {name!r} has type {task_type!r}; choose one of {TASK_TYPES}.")
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or len(labels) < 2:
        raise ConfigError(f"Task {name!r} needs a list of at least two label names; got {labels!r}.")
    if len(set(labels)) != len(labels):
        raise ConfigError(f"Task {name!r} names a label twice: {labels}.")
