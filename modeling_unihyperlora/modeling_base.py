"""What the UniHyperLoRA models share: the adapter on a frozen host, its file, its tasks, taking it off again.

``save_pretrained`` writes the adapter alone; ``from_pretrained`` reads it and puts it on a host, its own or any other.
"""

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import extract_commit_hash

from .adapter import TaskParameters
from .anchors import join_anchors, read_anchors
from .calibration import LOW_FIT, canonical_coordinates
from .configuration_unihyperlora import WINDOWS, UniHyperLoraConfig, check_task
from .errors import ConfigError, HostError, MergeError, UniHyperLoraError
from .hold import Hold
from .host_bound import bind, check_bound, make_adapter
from .hosts import describe_host, encoder_of, is_among, load_host, num_layers_of
from .injection import InjectedRun, Injection
from .layouts import HostLayout, layout_from
from .mixed_tasks import MixedTasks
from .publishing import Publishing, from_package
from .storage import WEIGHTS_NAME, adapter_file, load_adapter, read_config, take_over
from .stream import Stream, StreamRun, at_knots, kept_anchor_states
from .tuning import Tuning
from .words import WordReader, load_tokenizer

logger = logging.getLogger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "subfolder")
_IGNORED_ARGUMENTS = (
    "trust_remote_code",
    "use_safetensors",  # nothing else is ever read
    "code_revision",
    "adapter_kwargs",
    "_from_auto",
    "_commit_hash",
    "_from_pipeline",
)


class UniHyperLoraPreTrainedModel(Publishing, Tuning, PreTrainedModel):
    """What the three models share: putting the adapter on a host, saving, loading, tasks, detaching.

    Args:
        config: the adapter's configuration.
        host: an encoder or task model of transformers; loaded from ``config.base_model_name_or_path`` when None.

    Raises:
        HostError: the host cannot be loaded or its family is unknown.
    """

    config_class = UniHyperLoraConfig
    base_model_prefix = "host"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    task_type: str | None = None
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: UniHyperLoraConfig, host: nn.Module | None = None):
        super().__init__(config)
        if host is None:
            host = load_host(config.base_model_name_or_path, revision=config.base_model_revision)
        self.host = encoder_of(host)
        Hold.check(self.host)
        check_bound(config, self.host)
        self.adapter = make_adapter(config).to(self.host.device)
        self.stream: Stream | None = None  # bound by ``calibrate``
        self.injection: Injection | None = None
        if config.pathway == "inject" or (config.pathway == "both" and self._is_injected_host()):
            self.injection = Injection(self.adapter, self.host)  # refuses an unknown family, the host still untouched
        Hold.take(self.host, self)
        if self.injection is not None:
            self.injection.attach()
        self._host_arguments = set(inspect.signature(self.host.forward).parameters)
        self.post_init()

    def init_weights(self) -> None:
        """Nothing to do: the host comes trained and the adapter's parts initialise themselves."""

    # ---- making, saving, loading ----

    @classmethod
    def from_host(
        cls,
        host: str | Path | nn.Module,
        labels: list[str] | None = None,
        task: str = "default",
        config: UniHyperLoraConfig | None = None,
        revision: str | None = None,
        tokenizer=None,
        anchor_file: str | Path | None = None,
        layout: HostLayout | dict | None = None,
        **host_kwargs,
    ) -> "UniHyperLoraPreTrainedModel":
        """A fresh adapter on a host; until it is trained the host computes what it always did.

        Args:
            host: Hub id, folder, or a loaded transformers model.
            labels: label names of the first task; may be None for the model without a head.
            task: name of that task.
            config: shapes and choices; defaults to ``UniHyperLoraConfig()``, which is a stream.
            revision: commit, tag or branch of the host.
            tokenizer: the host's tokenizer, for the stream; loaded by the host's name when None.
            anchor_file: anchor text for the stream, one sentence a line; the package's own when None.
            layout: where the host's family keeps its linear layers, for the injected update on a family that the
                package does not know; it is saved with the adapter.
            **host_kwargs: ``dtype``, ``cache_dir``, ``token``, ``local_files_only`` for loading the host.

        Raises:
            HostError, ConfigError
        """
        config = UniHyperLoraConfig() if config is None else config
        if config.pathway == "both":
            raise ConfigError(
                "pathway='both' is not made afresh: load a trained stream with from_pretrained on the host that it is "
                "to be tuned to, and call add_injection()."
            )
        if isinstance(host, nn.Module):
            name = encoder_of(host).config.name_or_path
        else:
            name, host = str(host), load_host(str(host), revision=revision, **host_kwargs)
        config.base_model_name_or_path, config.base_model_revision = name or None, revision
        _keep_layout(config, layout, host)
        if config.projector == "host":
            bind(config, encoder_of(host))
        if config.pathway == "stream":
            if tokenizer is None:
                own = {key: value for key, value in host_kwargs.items() if key != "dtype"}
                tokenizer = load_tokenizer(name, revision=revision or "main", **own)
            sentences = read_anchors(anchor_file)
            config.anchor_words = sum(map(len, sentences))
            config.anchor_text_bytes = len(join_anchors(sentences))
        model = cls(config, host=host)
        config.source_hosts = [describe_host(model.host, name or None)]
        if config.pathway == "stream":
            states = kept_anchor_states(model.host, WordReader(model.host, tokenizer), sentences)
            model.adapter.anchors.set(
                sentences,
                canonical_coordinates(at_knots(states, num_layers_of(model.host)), config.stream_dim),
            )
            model.calibrate(tokenizer, states)
        if labels is not None:
            try:
                model.add_task(task, labels)
            except ConfigError:
                model.detach()
                raise
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: UniHyperLoraConfig | None = None,
        host: nn.Module | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        task: str | None = None,
        revision: str = "main",
        dtype: torch.dtype | str | None = None,
        tokenizer=None,
        layout: HostLayout | dict | None = None,
        **kwargs,
    ) -> "UniHyperLoraPreTrainedModel":
        """Read an adapter and put it on a host.

        Args:
            pretrained_model_name_or_path: the adapter's folder or Hub id.
            config: its configuration, if already read.
            host: a loaded host; otherwise one is loaded by name.
            base_model_name_or_path: the host's folder or Hub id; the adapter's own host by default.
            base_model_revision: that host's revision.
            task: the task to activate.
            revision: the adapter's revision.
            dtype: of a host that is loaded here.
            tokenizer: the host's tokenizer, for the stream; loaded by the host's name when None.
            layout: where the linear layers of this host's family are, see ``from_host``.
            **kwargs: ``cache_dir``, ``force_download``, ``local_files_only``, ``token``, ``subfolder``.

        Raises:
            AdapterFileError: no adapter there, or its file is damaged or does not fit its configuration.
            HostError: the host cannot be loaded or carry the adapter.
            ConfigError: an argument or a configuration key is unknown, or the file is of a newer format.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        for name in _IGNORED_ARGUMENTS:
            kwargs.pop(name, None)
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in ("router", "router_top_k")}
        if kwargs:
            raise ConfigError(f"from_pretrained has no argument {sorted(kwargs)[0]!r}; see its docstring.")
        config_file = adapter_file(pretrained_model_name_or_path, CONFIG_NAME, revision, hub)
        commit = extract_commit_hash(str(config_file), None)  # a branch may move between one file and the next
        weights = adapter_file(pretrained_model_name_or_path, WEIGHTS_NAME, commit or revision, hub)
        stored = read_config(config_file)
        if config is None:
            config = stored
        elif config.base_model_name_or_path != stored.base_model_name_or_path:  # as the Auto classes do it
            if config.base_model_revision == stored.base_model_revision:
                config.base_model_revision = None  # the revision was that of the adapter's own host
        for name, value in changes.items():
            setattr(config, name, value)
        config.check()
        if task is not None:
            config.activate(task)
        if config.active_task is not None:
            cls._check_type(config, config.active_task)
        if base_model_name_or_path is not None:
            config.base_model_name_or_path, config.base_model_revision = base_model_name_or_path, base_model_revision
        if host is None:
            name, own = config.base_model_name_or_path, {"revision": config.base_model_revision or "main"}
            own |= {key: value for key, value in hub.items() if key not in ("subfolder", "force_download")}
            host = load_host(name, **_given(dtype=dtype), **own)
            if config.pathway != "inject" and tokenizer is None:
                tokenizer = load_tokenizer(name, **own)
        _keep_layout(config, layout, host)
        adapter = make_adapter(config)  # before the host is touched: a bad file leaves it as it was
        load_adapter(adapter, weights)
        model = cls(config, host=host)
        model.adapter.load_state_dict(adapter.state_dict())
        if config.pathway != "inject":
            try:
                model.calibrate(tokenizer)
            except UniHyperLoraError:
                model.detach()  # the host as it was given
                raise
        elif config.projector != "host" and config.source_hosts and not is_among(model.host, config.source_hosts):
            logger.warning(
                "This adapter is an injected update that was not trained on %s, and such an update does not carry "
                "over to other hosts: expect what an untrained adapter would score. Train it here, or train one with "
                "pathway='stream', which serves hosts that it has not seen.",
                config.base_model_name_or_path or "this host",
            )
        model.eval()
        logger.info(model.describe())
        return model

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As of any module; the tensors of the adapter's own file, by their names there, are decoded.

        transformers' own ``Trainer`` reads ``model.safetensors`` and calls this, with ``strict=False``, for the best
        checkpoint and for the one that it resumes from.

        Raises:
            AdapterFileError: the tensors are of another adapter, or of no adapter at all.
        """
        if not state_dict or any(name.startswith(("adapter.", "host.")) for name in state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        take_over(self.adapter, state_dict, "The state that was given")
        return _IncompatibleKeys([], [])

    # ---- tasks ----

    @property
    def labels(self) -> list[str]:
        """Label names of the active task, by id."""
        return self.config.tasks[self._task(None)]["labels"]

    def add_task(self, name: str, labels: list[str]) -> None:
        """Add a task with its own δθ (zero), router embedding and head, and make it the active one.

        In a stream that was trained before on another task, the head reads the words' coordinates as well.

        Raises:
            ConfigError: the name is taken or not allowed, or the labels are not usable.
        """
        if self.task_type is None:
            raise ConfigError(
                f"{type(self).__name__} has no head; add tasks to a …ForTokenClassification and the like."
            )
        if name in self.config.tasks:
            raise ConfigError(f"Task {name!r} exists already; the adapter has {sorted(self.config.tasks)}.")
        if self.merged:
            raise MergeError("The update of another task is merged into the host; call unmerge() first.")
        check_task(name, self.task_type, labels)
        task = {"type": self.task_type, "labels": list(labels)}
        if self.config.pathway != "inject" and any(other.get("trained") for other in self.config.tasks.values()):
            task["window"] = WINDOWS[self.task_type]
        parameters = TaskParameters(self.config, len(labels), task.get("window"))
        self.adapter.tasks[name] = parameters.to(self.adapter.router_bias.latent.device)
        self.config.tasks[name] = task
        self.config.activate(name)

    def set_task(self, name: str) -> None:
        """Make ``name`` the task of the next forward passes.

        Raises:
            ConfigError: no such task, or it is of another type than this model.
        """
        self.config.activate(self._task(name))

    def _task(self, name: str | None) -> str:
        name = self.config.active_task if name is None else name
        if name is None:
            raise ConfigError(
                "The adapter has no task yet. Call add_task(name, labels) of a …ForTokenClassification or "
                "…ForSequenceClassification."
            )
        self._check_type(self.config, name)
        if self.injection is not None and self.injection.merged_task not in (None, name):
            raise MergeError("The update of another task is merged into the host; call unmerge() first.")
        return name

    @classmethod
    def _check_type(cls, config: UniHyperLoraConfig, name: str) -> None:
        if name not in config.tasks:
            raise ConfigError(f"No task {name!r} in this adapter; it has {sorted(config.tasks)}.")
        if cls.task_type not in (None, config.tasks[name]["type"]):
            fitting = sorted(other for other, task in config.tasks.items() if task["type"] == cls.task_type)
            raise ConfigError(
                f"Task {name!r} is {config.tasks[name]['type']}, {cls.__name__} does {cls.task_type}; the adapter's "
                f"tasks of that type are {fitting}. Choose one with task=."
            )

    # ---- taking off ----

    def detach(self) -> nn.Module:
        """Take the adapter off and return the host as it was given; this model cannot be used afterwards."""
        if self.injection is not None:
            self.injection.remove()
        Hold.release(self.host, self)
        return self.host

    def describe(self) -> str:
        """Host, sites found or fit of the calibration, and pathway, in one line."""
        if self.config.pathway != "inject":
            fit = "not calibrated" if self.stream is None else " ".join(f"{r2:.2f}" for r2 in self.stream.fit.r2)
            sites = "" if self.injection is None else f" and an update at {self.injection.map.coverage()} sites"
            return (
                f"UniHyperLoRA on {self.host.config.name_or_path or type(self.host).__name__} "
                f"({self.host.config.model_type}, {num_layers_of(self.host)} blocks x "
                f"{self.host.config.hidden_size}): pathway stream{sites}, R² a knot {fit}, "
                f"tasks {sorted(self.config.tasks)}"
            )
        found = self.injection.map
        return (
            f"UniHyperLoRA on {self.host.config.name_or_path or type(self.host).__name__} "
            f"({found.family}, {found.num_layers} blocks x {found.hidden_size}): {found.coverage()} sites, "
            f"pathway {self.config.pathway}, projector {self.config.projector}, "
            f"router {self.config.router}, tasks {sorted(self.config.tasks)}"
        )

    # ---- forward ----

    def run(
        self,
        task: str | None,
        attention_mask: torch.Tensor | None,
        output_hidden_states: bool | None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
        **inputs,
    ) -> InjectedRun | StreamRun:
        """The host's forward pass with what the adapter does in it or beside it.

        Sentences may be of different tasks: ``task_ids`` then has a name for each, or its number in
        ``list(config.tasks)``. Inputs that the host does not know are left out (a tokenizer may give token types to a
        host without them).
        """
        known = self._host_arguments | {"canonical_states", "word_index"}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        reads = {self.host.main_input_name, "inputs_embeds", "canonical_states"}
        if not inputs.keys() & known & reads:
            raise ConfigError(
                f"This host reads {self.host.main_input_name}; the call gave {sorted(inputs) or 'nothing'}."
            )
        inputs = {name: value for name, value in inputs.items() if name in known}
        if task_ids is not None:
            if task is not None:
                raise ConfigError("Give task, for all sentences, or task_ids, one for each; not both.")
            first = next(inputs[name] for name in reads if name in inputs)
            mixed = MixedTasks.of_sentences(task_ids, list(self.config.tasks), len(first), first.device)
            for name in mixed.names:
                self._task(name)
            return self.path.run(mixed, attention_mask, output_hidden_states, inputs)
        return self.path.run(self._task(task), attention_mask, output_hidden_states, inputs)

    @property
    def path(self) -> Injection | Stream:
        """What computes the features that the heads read."""
        return self.injection if self.config.pathway == "inject" else self.bound_stream

    @property
    def bound_stream(self) -> Stream:
        if self.stream is None:
            raise HostError("The stream is not lined up with its host yet; call calibrate(tokenizer).")
        return self.stream

    def calibrate(self, tokenizer=None, anchor_states: torch.Tensor | None = None) -> None:
        """Line the host up with the adapter's anchors: no label, no gradient, seconds.

        Args:
            tokenizer: the host's fast tokenizer; loaded by the host's name when None.
            anchor_states: the host's states of the anchors, if known already (``stream.read_anchor_states``).

        Raises:
            HostError: the tokenizer cannot be loaded or marks no words, or too few anchors can be read.
            MergeError: an update is merged into the host, whose states are then not its own.
        """
        self.stream = Stream(self.adapter, self.host, self._tokenizer_to_line_up_with(tokenizer), anchor_states)
        self.stream.injection = self.injection
        fit = self.stream.fit.r2
        if sum(fit) / len(fit) < LOW_FIT:
            logger.warning(
                "This host fits the adapter's canonical space badly (R² a knot: %s): expect low scores. Is it of "
                "another language, or trained for something else than text?",
                ", ".join(f"{value:.2f}" for value in fit),
            )
        for name, task in self.config.tasks.items():
            if task.get("refined"):
                logger.warning(
                    "δθ of task '%s' was tuned on a map that was refined on unlabelled text (%s words), and the file "
                    "does not hold that map: call refine(sentences, source) with the same text.",
                    name,
                    task["refined"]["words"],
                )

    def refine(
        self,
        sentences: list[list[str]],
        source: "UniHyperLoraPreTrainedModel",
        tokenizer=None,
        source_tokenizer=None,
    ) -> None:
        """Line the host up once more, on unlabelled text of the kind that it is to read as well as on the anchors.

        A host that the adapter was trained on says where the words lie in the canonical space. The map is kept in the
        cache, not in the adapter: call this again after loading.

        Args:
            sentences: lists of words, one a sentence; of a text of more than 20,000 words every n-th sentence is read.
            source: the same adapter, on a host that it was trained on.
            tokenizer, source_tokenizer: the hosts' fast tokenizers; loaded by the hosts' names when None.

        Raises:
            ConfigError: no stream, or another adapter.
            HostError: ``source`` is on a host that the adapter was not trained on, or a tokenizer cannot be loaded.
            DataError: too little text.
            MergeError: an update is merged into a host, whose states are then not its own.
        """
        tokenizers = self._tokenizer_to_line_up_with(tokenizer), source._tokenizer_to_line_up_with(source_tokenizer)
        from_package("refinement", "Refining a map").refine(self, sentences, source, *tokenizers)

    def _tokenizer_to_line_up_with(self, tokenizer):
        """The one given, or the host's own; ``MergeError`` where the host's states are not its own."""
        if self.merged:
            raise MergeError("A host is lined up as it is, without an update in its weights; call unmerge() first.")
        return load_tokenizer(self.host.config.name_or_path) if tokenizer is None else tokenizer


def _keep_layout(config: UniHyperLoraConfig, layout: HostLayout | dict | None, host: nn.Module) -> None:
    """Note a user's layout in the configuration, under the family of the host that it came with."""
    if layout is not None:
        family = encoder_of(host).config.model_type
        content = dataclasses.asdict(layout_from(layout, family))
        config.host_layouts = config.host_layouts | {family: content}


def _given(**kwargs) -> dict:
    return {name: value for name, value in kwargs.items() if value is not None}
