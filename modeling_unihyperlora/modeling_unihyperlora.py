"""UniHyperLoRA models: a frozen host, an adapter beside it, and a head for every task.

Letters: B batch, T tokens, W words, K knots, D canonical width, C labels, d host width.

How a stream processes text: the host reads the tokens once. ``words`` finds the words among the tokens, ``space`` maps
the host's states of each word to coordinates in the canonical space, and ``reader`` turns the coordinates into logits
for every requested task. The host is never modified.

With pathway "inject", an update inside the host takes the place of the stream (``injection``). Its code is published
only with such adapters.
"""

import contextlib
import copy
import importlib
import inspect
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import extract_commit_hash

from .configuration_unihyperlora import UniHyperLoraConfig, check_task, read_config, reader_shape
from .errors import ConfigError, HostError, MergeError, UniHyperLoraError
from .hosts import Hold, NoHost, call_host, describe_host, encoder_of, explain_ids, load_host
from .reader import Adapter, StreamAdapter, TaskValues, Words, joined, sentences_by_task, unpack
from .space import AT_ONCE, KNOTS, LOW_FIT, CanonicalSpace, HostFit, fit_on, line_up
from .storage import (
    WEIGHTS_NAME,
    adapter_file,
    check_same_layout,
    load_adapter,
    replacing,
    save_adapter,
    take_over,
)
from .words import WordPlaces, WordReader, load_tokenizer, warn_of_scheme

logger = logging.getLogger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_unihyperlora.UniHyperLoraConfig",
    "AutoModel": "modeling_unihyperlora.UniHyperLoraModel",
    "AutoModelForTokenClassification": "modeling_unihyperlora.UniHyperLoraForTokenClassification",
    "AutoModelForSequenceClassification": "modeling_unihyperlora.UniHyperLoraForSequenceClassification",
}
# Arguments of ``save_pretrained`` that transformers and accelerate pass to every model, and those with only one
# possible value:
_SAVE_ARGUMENTS = ("is_main_process", "push_to_hub", "repo_id", "state_dict", "save_function", "max_shard_size")
_SAVE_ARGUMENTS += ("save_peft_format", "save_original_format")
_ONE_VALUE = {"safe_serialization": True, "variant": None}
_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "subfolder")
_LOADING_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation")  # of a host, besides those of the Hub
_IGNORED_ARGUMENTS = (
    "trust_remote_code",
    "code_revision",
    "adapter_kwargs",
    "low_cpu_mem_usage",  # an adapter needs a megabyte
    "_from_auto",
    "_commit_hash",
    "_from_pipeline",
)


@dataclass
class UniHyperLoraOutput(BaseModelOutput):
    """An injected update also has ``expected_atoms`` and ``active_atoms``, (B, T) means over the blocks."""

    expected_atoms: torch.Tensor | None = None
    active_atoms: torch.Tensor | None = None


@dataclass
class UniHyperLoraTokenClassifierOutput(TokenClassifierOutput):
    """As ``UniHyperLoraOutput``; with ``tasks=`` the logits are a dict of task → tensor."""

    expected_atoms: torch.Tensor | None = None
    active_atoms: torch.Tensor | None = None


@dataclass
class UniHyperLoraSequenceClassifierOutput(SequenceClassifierOutput):
    """As ``UniHyperLoraOutput``; with ``tasks=`` the logits are a dict of task → tensor."""

    expected_atoms: torch.Tensor | None = None
    active_atoms: torch.Tensor | None = None


class Stream:
    """A host that is aligned with an adapter's space.

    Args:
        adapter: the space and the tasks.
        host: any model that returns its hidden states.
        tokenizer: the host's fast tokenizer.
        states: result of ``space.anchor_states`` for the space's anchors, if known.

    Attributes:
        words: reader of the host's words.
        fit: the host's map into the canonical space.
        refined: number of words and SHA-256 of the text that the map was refined on, or None.
        seconds, cpu_seconds: time to find the map, or to read it from the cache.
    """

    def __init__(self, adapter: StreamAdapter, host: nn.Module, tokenizer, states: torch.Tensor | None = None):
        self.adapter, self.host = adapter, host
        start, start_cpu = time.perf_counter(), time.process_time()
        self.words = WordReader(host, tokenizer)
        self.fit = line_up(adapter.space, host, self.words, states)
        self.seconds, self.cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        self.refined: dict[str, int | str] | None = None
        self._on_device: tuple[HostFit, HostFit] | None = None  # ``fit``, and the same on the model's device

    def map_on(self, device: torch.device) -> HostFit:
        """The host's map, with its tensors on a device."""
        if self._on_device is None or self._on_device[0] is not self.fit or self._on_device[1].device != device:
            self._on_device = self.fit, fit_on(device, self.fit)
        return self._on_device[1]

    def canonical_states(
        self, hidden_states: Sequence[torch.Tensor] | Mapping[int, torch.Tensor], at: torch.Tensor
    ) -> torch.Tensor:
        """Coordinates (B, W, K, D) float32 of words; from layer → states (B, T, d), and the words' tokens (B, W)."""
        tokens = hidden_states[self.fit.knots[0].layer].shape[1]
        cells = at if len(at) == 1 else at + torch.arange(len(at), device=at.device)[:, None] * tokens
        return self.states_at(hidden_states, cells.flatten()).reshape(*at.shape, len(KNOTS), -1)

    def states_at(
        self, hidden_states: Sequence[torch.Tensor] | Mapping[int, torch.Tensor], cells: torch.Tensor
    ) -> torch.Tensor:
        """Coordinates (N, K·D) float32 of some tokens, which are given by their numbers among all B·T tokens, (N,)."""
        fit = self.map_on(cells.device)
        flat = {layer: hidden_states[layer].flatten(0, 1) for layer in fit.layers}
        several = cells.split(max(1, AT_ONCE // fit.widest))
        made = [fit({layer: every.index_select(0, some) for layer, every in flat.items()}) for some in several]
        return joined(made)

    @torch.no_grad()
    def read(self, attention_mask: torch.Tensor | None, inputs: dict) -> "StreamRun":
        """Run the host on token ids (B, T); returns the words' coordinates and positions, and the host's states."""
        inputs = inputs.copy()
        word_index = inputs.pop("word_index", None)
        if inputs.get("input_ids") is None:
            raise ConfigError(
                f"The stream finds words from token ids, but the call gave {sorted(inputs)} without input_ids. Give "
                "input_ids, or canonical_states."
            )
        ids = inputs["input_ids"]
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            given = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ConfigError(f"input_ids must be a tensor of integers; given: {given}. Use return_tensors='pt'.")
        named = (("input_ids", ids), ("attention_mask", attention_mask), ("word_index", word_index))
        shapes = [(name, tensor.shape) for name, tensor in named if tensor is not None]
        if ids.dim() != 2 or any(shape != ids.shape for _, shape in shapes):
            given = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes)
            raise ConfigError(f"input_ids, attention_mask and word_index must be (B, T); given: {given}.")
        if ids.numel() == 0:
            raise ConfigError(f"The batch {tuple(ids.shape)} has no tokens. Leave empty texts out.")
        try:
            places = self.words.places(ids, attention_mask, word_index)  # before the host, so that a GPU does not wait
            out = call_host(self.host, attention_mask, output_hidden_states=True, **inputs)
        except (IndexError, RuntimeError) as error:
            explain_ids(self.host, ids, error)
            raise
        z = self.canonical_states(out.hidden_states, places.read)
        return StreamRun(self.adapter, z, places.lengths, places, out.hidden_states)


class StreamRun(NamedTuple):
    """Result of one pass of a host, from which tasks compute logits; tokens have the logits of their words.

    Attributes:
        z: (B, W, K, D) coordinates.
        lengths: (B,) number of words per sentence.
        places, hidden_states: positions of the words among the tokens, and the host's states; None if the caller gave
            canonical states.
    """

    adapter: StreamAdapter
    z: torch.Tensor
    lengths: torch.Tensor
    places: WordPlaces | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None

    def features(self, task: str, values: TaskValues | None = None) -> torch.Tensor:
        """Features (B, W, F) for the head of a task; 0 beyond a sentence's words."""
        (batch, width), flat = self.z.shape[:2], self.z.flatten(0, 1)
        own, values = self.adapter.tasks[task], self.adapter.values(task) if values is None else values
        if torch.compiler.is_compiling():  # compiled code has fixed shapes, so it also computes the padding
            out = own(flat, Words(self.lengths, width), values).view(batch, width, -1)
            return out.masked_fill(self._padding()[..., None], 0)
        if min(self.lengths.tolist()) == width:
            return own(flat, Words(self.lengths, width, is_full=True), values).view(batch, width, -1)
        cells = (~self._padding()).flatten().nonzero().squeeze(1)
        return unpack(own(flat.index_select(0, cells), Words(self.lengths), values), cells, (batch, width))

    def _padding(self) -> torch.Tensor:
        """Positions (B, W) beyond a sentence's words."""
        return torch.arange(self.z.shape[1], device=self.z.device) >= self.lengths[:, None]

    def logits(self, task: str) -> torch.Tensor:
        """Logits of a task: (B, C) for sentences, from the mean of their words' features; (B, T, C) for tokens.

        A token has the logits of its word; on the further tokens of a word, B-X becomes I-X. With given canonical
        states, logits are (B, W, C).
        """
        values, own = self.adapter.values(task), self.adapter.config.tasks[task]
        features = self.features(task, values)
        if own["type"] == "sequence_classification":
            return F.linear(features.sum(dim=1) / self.lengths.unsqueeze(-1), values.head_weight, values.head_bias)
        logits = F.linear(features, values.head_weight, values.head_bias)
        if self.places is None:
            return logits
        index = self.places.word_of.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        return values.continuation(logits.gather(1, index), self.places.begins)

    def mixed_logits(self, names: list[str], rows: torch.Tensor) -> torch.Tensor:
        """Logits of each sentence for its own task, ``names[rows]``; -inf for labels that the task does not have."""
        most = max(len(self.adapter.config.tasks[name]["labels"]) for name in names)
        parts, order = [], []
        for number, name in enumerate(names):
            chosen = (rows == number).nonzero().squeeze(1)
            places = self.places and self.places._replace(
                **{field: value[chosen] for field, value in self.places._asdict().items()}
            )
            run = self._replace(z=self.z[chosen], lengths=self.lengths[chosen], places=places)
            logits = run.logits(name)
            parts.append(F.pad(logits, (0, most - logits.shape[-1]), value=-torch.inf))
            order.append(chosen)
        return torch.cat(parts)[torch.cat(order).argsort()]


class UniHyperLoraPreTrainedModel(PreTrainedModel):
    """Base class of the three models: puts the adapter on a host, saves, loads, manages tasks, detaches.

    ``save_pretrained`` writes only the adapter; ``from_pretrained`` reads it and puts it on its own or another host.

    Args:
        config: the adapter's configuration.
        host: a model of transformers; by default loaded from ``config.base_model_name_or_path``.
        adapter: the adapter that the configuration describes; by default a new one.

    Raises:
        HostError: the host cannot be loaded, or does not support the adapter.
    """

    config_class = UniHyperLoraConfig
    base_model_prefix = "host"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    task_type: str | None = None
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: UniHyperLoraConfig, host: nn.Module | None = None, adapter: Adapter | None = None):
        super().__init__(config)
        if host is None:
            host = load_host(config.base_model_name_or_path, revision=config.base_model_revision)
        self.host = encoder_of(host)
        Hold.check(self.host)
        self.adapter = (make_adapter(config) if adapter is None else adapter).to(self.host.device)
        self.stream: Stream | None = None  # set by ``calibrate``
        self.injection = None
        if config.pathway == "inject":
            self.injection = _part("injection").inject(self.adapter, self.host)  # may raise
        Hold.take(self.host, self)
        if self.injection is not None:
            self.injection.attach()
        self._host_arguments = set(inspect.signature(self.host.forward).parameters)
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: the host is trained, and the adapter's parts initialise themselves."""

    # ---- making, loading ----

    @classmethod
    def from_host(
        cls,
        host: str | Path | nn.Module,
        labels: list[str] | None = None,
        task: str = "default",
        config: UniHyperLoraConfig | None = None,
        *,
        reader: str | dict[str, int] = "large",
        space: CanonicalSpace | str | Path | None = None,
        anchor_file: str | Path | None = None,
        revision: str | None = None,
        tokenizer=None,
        layout=None,
        **host_kwargs,
    ) -> Self:
        """Make a new adapter on a host; the host itself does not change.

        Args:
            host: Hub id, folder, or a loaded transformers model; ``NoHost()`` to compute on given canonical states.
            labels: label names of the first task; may be None for the model without a head.
            task: name of that task.
            config: shapes and choices; defaults to ``UniHyperLoraConfig()``, which is a stream.
            reader: of the task, see ``add_task``.
            space: the canonical space of a stream, or its file; the package's own when None.
            anchor_file: in place of a space, anchor text (one sentence a line) from which one is made on this host.
            revision: commit, tag or branch of the host.
            tokenizer: the host's tokenizer, for a stream; loaded by the host's name when None.
            layout: of an injected update, where the host's family keeps its linear layers if the package does not
                know it (``HostLayout``); it is saved with the adapter.
            **host_kwargs: ``dtype``, ``attn_implementation``, ``cache_dir``, ``token``, ``local_files_only`` for
                loading the host.

        Raises:
            HostError: the host cannot be loaded, or cannot carry the adapter.
            ConfigError: labels, reader or layout are not usable, space and anchor_file were both given, or an argument
                is unknown.
            DataError: the anchor file cannot be used.
        """
        config = UniHyperLoraConfig() if config is None else config
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(f"config must be a UniHyperLoraConfig; got {type(config).__name__}.")
        if space is not None and anchor_file is not None:
            raise ConfigError("Give space, or anchor_file to make a new space; not both.")
        if unknown := sorted(host_kwargs.keys() - {*_HUB_ARGUMENTS, *_LOADING_ARGUMENTS}):
            raise ConfigError(
                f"from_host has no argument {unknown[0]!r}; see its docstring. Choices of the adapter, such as "
                "pathway, go into config=UniHyperLoraConfig(…)."
            )
        if isinstance(host, nn.Module):
            _check_not_loading(host_kwargs)
            name = encoder_of(host).config.name_or_path
        else:
            name, host = str(host), load_host(str(host), revision=revision, **host_kwargs)
        config.base_model_name_or_path, config.base_model_revision = name or None, revision
        if config.pathway == "inject":
            _part("injection").describe_target(config, host, layout)
            model = cls(config, host)
            config.source_hosts = [describe_host(model.host, name or None, model.injection.map.num_layers)]
        else:
            if tokenizer is None and not isinstance(host, NoHost):
                own = {key: value for key, value in host_kwargs.items() if key in _HUB_ARGUMENTS}
                tokenizer = load_tokenizer(name, revision=revision or "main", **own)
            if anchor_file is not None:
                space = CanonicalSpace.make([encoder_of(host)], anchor_file, tokenizers=[tokenizer])
            elif isinstance(space, CanonicalSpace):
                space = copy.deepcopy(space)  # models that share a space may be on different devices
            else:
                space = CanonicalSpace.default() if space is None else CanonicalSpace.load(space)
            config.space = space.shape()
            config.check()
            model = cls(config, host, StreamAdapter(config, space))
            model._calibrate_or_detach(tokenizer)
            if model.stream is not None:
                config.source_hosts = [describe_host(model.host, name or None, model.stream.words.num_layers)]
        if labels is not None:
            try:
                model.add_task(task, labels, reader)
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
        layout=None,
        **kwargs,
    ) -> Self:
        """Read an adapter and put it on a host.

        Args:
            pretrained_model_name_or_path: the adapter's folder or Hub id.
            config: its configuration, if already read.
            host: a loaded host; by default one is loaded by name. ``NoHost()`` to compute on given canonical states.
            base_model_name_or_path: the host's folder or Hub id; the adapter's own host by default.
            base_model_revision: that host's revision.
            task: the task to activate.
            revision: the adapter's revision.
            dtype: of a host that is loaded here (also ``torch_dtype``).
            tokenizer: the host's tokenizer, for a stream; loaded by the host's name when None.
            layout: of an injected update, where the linear layers of this host's family are, see ``from_host``.
            **kwargs: ``cache_dir``, ``force_download``, ``local_files_only``, ``token``, ``subfolder``;
                ``attn_implementation`` of the host; ``device_map`` with one device; ``output_loading_info``;
                ``num_labels``, ``id2label`` and ``label2id`` that fit the task; ``router`` and ``router_top_k`` of an
                injected update.

        Raises:
            AdapterFileError: no adapter there, or its file is damaged or does not fit its configuration.
            HostError: the host cannot be loaded or carry the adapter.
            ConfigError: an argument or a configuration key is unknown or not allowed, or the format is another one.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        for name in _IGNORED_ARGUMENTS:
            kwargs.pop(name, None)
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in ("router", "router_top_k")}
        names = {name: kwargs.pop(name) for name in ("num_labels", "id2label", "label2id") if name in kwargs}
        loading = _given(dtype=kwargs.pop("torch_dtype", None) if dtype is None else dtype)
        loading |= _given(attn_implementation=kwargs.pop("attn_implementation", None))
        device, with_info = _one_device(kwargs.pop("device_map", None)), kwargs.pop("output_loading_info", False)
        if kwargs.pop("use_safetensors", None) is False:
            raise ConfigError("use_safetensors=False is not possible: only safetensors files are read.")
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ConfigError(
                "ignore_mismatched_sizes=True is not supported: an adapter's file must fit. Leave it out."
            )
        if isinstance(host, str | Path):
            raise ConfigError(f"host must be a loaded model; give the name as base_model_name_or_path='{host}'.")
        if kwargs:
            raise ConfigError(f"from_pretrained has no argument {sorted(kwargs)[0]!r}; see its docstring.")
        config_file = adapter_file(pretrained_model_name_or_path, CONFIG_NAME, revision, hub)
        commit = extract_commit_hash(str(config_file), None)  # a branch may change between two downloads
        weights = adapter_file(pretrained_model_name_or_path, WEIGHTS_NAME, commit or revision, hub)
        stored = read_config(config_file)
        if config is None:
            config = stored
        else:  # as the Auto classes do, which also add label names and attn_implementation to it
            if config.base_model_name_or_path != stored.base_model_name_or_path:
                if config.base_model_revision == stored.base_model_revision:
                    config.base_model_revision = None  # it was the revision of the adapter's own host
            if config.id2label != stored.id2label:
                names = {"id2label": config.id2label} | names
            elif config.label2id != stored.label2id:
                names = {"label2id": config.label2id} | names
            asked = getattr(config, "_attn_implementation_internal", None)
            loading = _given(attn_implementation=asked) | loading
        for name, value in changes.items():
            setattr(config, name, value)
        config.check()
        _check_outputs(config)
        if task is not None:
            config.activate(task)
        if config.active_task is not None:
            cls._check_type(config, config.active_task)
            _rename_labels(config, **names)
        if base_model_name_or_path is not None:
            config.base_model_name_or_path = str(base_model_name_or_path)
            config.base_model_revision = base_model_revision
        if host is None:
            name, own = config.base_model_name_or_path, {"revision": config.base_model_revision or "main"}
            own |= {key: value for key, value in hub.items() if key not in ("subfolder", "force_download")}
            host = load_host(name, **loading, **own)
            if config.pathway == "stream" and tokenizer is None:
                tokenizer = load_tokenizer(name, **own)
        else:
            _check_not_loading(loading)
        if config.pathway == "inject":
            _part("injection").describe_target(config, host, layout, binds=False)
        adapter = make_adapter(config)  # before the host is touched, so that a bad file does not change it
        load_adapter(adapter, weights)
        model = cls(config, host, adapter)
        if config.pathway == "stream":
            model._calibrate_or_detach(tokenizer)
        else:
            _part("injection").warn_where_untrained(model)
        if device is not None:
            model.to(device)
        model.eval()
        logger.info(model.describe())
        if with_info:
            return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return model

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load a state dict as any module does, or the encoded tensors of an adapter's file.

        transformers' own ``Trainer`` calls this with the content of ``model.safetensors`` and ``strict=False``, for
        the best checkpoint and for the one to resume from.

        Raises:
            AdapterFileError: the tensors belong to another adapter, or to none.
        """
        if not state_dict or any(name.startswith(("adapter.", "host.")) for name in state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        take_over(self.adapter, state_dict, "The given state dict")
        return _IncompatibleKeys([], [])

    # ---- saving ----

    def save_files(self, folder: str | Path) -> None:
        """Write only ``config.json`` and ``model.safetensors``, as for checkpoints.

        Raises:
            AdapterFileError: values are not finite, or the folder cannot be written; earlier files stay.
            ConfigError: the configuration was changed and no longer describes the adapter.
        """
        _take_names(self.config)
        self.config.architectures = [type(self).__name__]
        try:
            content = json.loads(self.config.to_json_string(use_diff=False))
        except TypeError as error:
            raise ConfigError(
                f"The configuration has a value that JSON cannot hold ({error}). Give plain numbers, strings, lists "
                "and dicts."
            ) from error
        own = {*UniHyperLoraConfig.__annotations__, "architectures", "model_type", "transformers_version"}
        more = {"id2label", "label2id"}
        auto_map = AUTO_MAP if self.config.pathway == "stream" else _part("injection").AUTO_MAP
        content = {name: value for name, value in content.items() if name in own | more}
        content |= {"auto_map": auto_map, "tasks": self.config.tasks}  # keeps their order
        again = type(self.config)(**json.loads(json.dumps(content)) | {"id2label": None, "label2id": None})
        check_same_layout(self.adapter, make_adapter(again))  # checks that the file can be read again
        save_adapter(self.adapter, content, Path(folder))

    def save_pretrained(self, save_directory: str | Path, *, tasks: list[str] | None = None, **kwargs) -> None:
        """Write the adapter, the code that loads it, the licence and a model card, but no tensor of the host.

        A README.md that a user has edited is not changed.

        Args:
            save_directory: output folder; created if needed.
            tasks: names of tasks to write; by default all.
            **kwargs: ``is_main_process``, ``push_to_hub``, ``repo_id`` and the arguments of ``push_to_hub`` are used.
                ``max_shard_size``, ``state_dict``, ``save_function`` and the like, which accelerate and the Trainer
                pass to every model, change nothing.

        Raises:
            AdapterFileError: values are not finite, or the folder cannot be written; earlier files stay.
            ConfigError: a task does not exist.
            HubError: the push failed.
        """
        unread = kwargs.keys() - {*_SAVE_ARGUMENTS, *_ONE_VALUE, *_PUSH_ARGUMENTS}
        unread |= {name for name, only in _ONE_VALUE.items() if kwargs.get(name) not in (None, only)}
        if unread:
            raise ConfigError(
                f"save_pretrained does not support {sorted(unread)[0]}={kwargs[sorted(unread)[0]]!r}: an adapter is "
                "one safetensors file with a fixed name. Leave it out."
            )
        if not kwargs.get("is_main_process", True):
            return
        if tasks is not None:
            with self._only(tasks):
                self.save_pretrained(save_directory, **kwargs)
            return
        folder = Path(save_directory)
        self.save_files(folder)
        try:
            bundle = _from_package("publish.bundle", "A model card")
        except UniHyperLoraError:  # this code came with an adapter: copy it, without card and licence
            for file in Path(__file__).parent.glob("[!_]*.py"):
                with replacing(folder / file.name) as temporary:
                    shutil.copyfile(file, temporary)
            return
        bundle.complete(folder, self.config.pathway)
        if kwargs.get("push_to_hub", False):
            push = {name: kwargs[name] for name in _PUSH_ARGUMENTS if kwargs.get(name) is not None}
            repo_id = kwargs.get("repo_id") or folder.absolute().name
            _from_package("publish.hub", "Pushing").push_folder(folder, repo_id, **push)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Push weights, configuration, code, card and licence in one commit; see ``publish.hub.push_model``.

        Args:
            repo_id: "user/name", or a name under the logged-in user.
            **kwargs: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr``,
                and ``base_model_name_or_path``, the Hub id of a host that was loaded from a folder.

        Returns:
            The URL of the commit.

        Raises:
            HubError: the push failed; the repository is unchanged.
        """
        return _from_package("publish.hub", "Pushing").push_model(self, repo_id, **kwargs)

    # ---- tasks ----

    @property
    def labels(self) -> list[str]:
        """Label names of the active task, by id."""
        return self.config.tasks[self._task(None)]["labels"]

    def add_task(self, name: str, labels: list[str], reader: str | dict[str, int] = "large", bits: int = 4) -> None:
        """Add a task and make it the active task.

        Args:
            name: name of the task.
            labels: label names, by id.
            reader: for a stream: size of the task's reader, "small", "medium" or "large", or a dict with "width" and
                "hidden".
            bits: bits of the reader's matrices, 4 or 8.

        Raises:
            ConfigError: the name exists or is not allowed, or the labels or the reader are not usable.
            MergeError: the update of another task is merged into the host.
        """
        if self.task_type is None:
            raise ConfigError(
                f"{type(self).__name__} has no head; add tasks to a …ForTokenClassification or "
                "…ForSequenceClassification."
            )
        if name in self.config.tasks:
            raise ConfigError(f"Task {name!r} exists already; the adapter has {sorted(self.config.tasks)}.")
        if self.merged:
            raise MergeError("The update of another task is merged into the host; call unmerge() first.")
        check_task(name, self.task_type, labels)
        task = {"type": self.task_type, "labels": list(labels)}
        if self.config.pathway == "stream":
            task["reader"] = reader_shape(reader, bits)
        self.config.tasks[name] = task
        self.adapter.add(name)
        self.config.activate(name)

    def load_task(self, adapter: str | Path, task: str | None = None, name: str | None = None, **hub) -> None:
        """Copy a task from another adapter of the same space into this adapter.

        Args:
            adapter: folder or Hub id of the other adapter.
            task: name of the task there; by default its active task.
            name: name of the task here; by default the same name.
            **hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

        Raises:
            ConfigError: the task does not exist, the name exists or is not allowed, or the other adapter has another
                space or another step of δθ.
            AdapterFileError: there is no adapter, or it is damaged.
        """
        revision = hub.pop("revision", "main")
        config = read_config(adapter_file(adapter, CONFIG_NAME, revision, hub))
        task = task or config.active_task
        if task not in config.tasks:
            raise ConfigError(f"No task {task!r} in {adapter}; it has {sorted(config.tasks)}.")
        name = name or task
        check_task(name, config.tasks[task]["type"], config.tasks[task]["labels"])
        if name in self.config.tasks:
            raise ConfigError(f"Task {name!r} exists already; give it another name with name=.")
        if config.pathway != "stream" or self.config.pathway != "stream":
            raise ConfigError("Only tasks of streams can share a file; an injected update has its own atoms.")
        other = make_adapter(config)
        load_adapter(other, adapter_file(adapter, WEIGHTS_NAME, revision, hub))
        if other.space.digest != self.adapter.space.digest:
            raise ConfigError(
                f"{adapter} has the space '{other.space.name}' ({other.space.digest}), this adapter has "
                f"'{self.adapter.space.name}' ({self.adapter.space.digest}): their coordinates mean different things. "
                "Train the task on this space."
            )
        if config.delta_step != self.config.delta_step and bool(other.tasks[task].delta().any()):
            raise ConfigError(
                f"δθ of task {task!r} has the step {config.delta_step:g}, but this adapter has "
                f"{self.config.delta_step:g}, which would change δθ. Make both adapters with the same delta_step."
            )
        self.config.tasks[name] = config.tasks[task]
        self.adapter.add(name)
        self.adapter.tasks[name].load_state_dict(other.tasks[task].state_dict())

    def delete_task(self, name: str) -> None:
        """Delete a task; if it was active, the next fitting task becomes active.

        Raises:
            ConfigError: the task does not exist.
        """
        if name not in self.config.tasks:
            raise ConfigError(f"No task {name!r} in this adapter; it has {sorted(self.config.tasks)}.")
        del self.config.tasks[name], self.adapter.tasks[name]
        if self.config.active_task == name:
            self.config.active_task = None
            fitting = [n for n, task in self.config.tasks.items() if self.task_type in (None, task["type"])]
            if fitting:
                self.config.activate(fitting[0])

    def set_task(self, name: str) -> None:
        """Make ``name`` the active task.

        Raises:
            ConfigError: the task does not exist, or is of another type than this model.
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
            if fitting:
                wanted = f"The adapter's tasks of that type are {fitting}: choose one with task=."
            else:
                is_tags = config.tasks[name]["type"] == "token_classification"
                kind, command = ("TokenClassification", "tag") if is_tags else ("SequenceClassification", "classify")
                wanted = f"For this one use UniHyperLoraFor{kind}, or on the command line `unihyperlora {command}`."
            raise ConfigError(
                f"Task {name!r} is {config.tasks[name]['type']}, but {cls.__name__} does {cls.task_type}. {wanted}"
            )

    # ---- alignment, detaching ----

    def calibrate(self, tokenizer=None, states: torch.Tensor | None = None) -> None:
        """Align the host with the adapter's space, without labels or gradients, in seconds.

        Args:
            tokenizer: the host's fast tokenizer; by default loaded by the host's name.
            states: result of ``space.anchor_states`` for the space's anchors, if known.

        Raises:
            HostError: the tokenizer cannot be loaded or does not mark words, or too few anchors can be read.
        """
        tokenizer = load_tokenizer(self.host.config.name_or_path) if tokenizer is None else tokenizer
        self.stream = Stream(self.adapter, self.host, tokenizer, states)
        fit = self.stream.fit.r2
        if sum(fit) / len(fit) < LOW_FIT:
            logger.warning(
                "This host fits the adapter's canonical space badly (R² per knot: %s): expect low scores. Check that "
                "the host reads text of the same language.",
                ", ".join(f"{value:.2f}" for value in fit),
            )
        for name, task in self.config.tasks.items():
            if task.get("refined"):
                logger.warning(
                    "δθ of task '%s' was tuned with a map that was refined on unlabelled text (%s words). The file "
                    "does not hold that map: call refine(sentences, source) with the same text.",
                    name,
                    task["refined"]["words"],
                )

    def _calibrate_or_detach(self, tokenizer) -> None:
        if isinstance(self.host, NoHost):
            return
        try:
            self.calibrate(tokenizer)
        except UniHyperLoraError:
            self.detach()  # restores the host
            raise

    def refine(self, sentences: list[list[str]], source: "UniHyperLoraPreTrainedModel") -> None:
        """Align the host again, on the anchors and on unlabelled text similar to the text that it will read.

        ``source``, on a host that the adapter was trained on, computes the coordinates of the text's words. The map is
        cached on disk, but not saved in the adapter: call this again after loading.

        Args:
            sentences: lists of words, one per sentence, with at least 256 words; of more than 20,000 words only every
                n-th sentence is read.
            source: a model with the same space, on a host that the adapter was trained on.

        Raises:
            ConfigError: a model is not a stream, or the spaces differ.
            HostError: the adapter was not trained on the host of ``source``.
            DataError: the text is too short.
        """
        _from_package("space_making.refinement", "Refining a map").refine(self, sentences, source)

    def detach(self) -> nn.Module:
        """Remove the adapter and return the host in its original state; this model cannot be used afterwards."""
        if self.injection is not None:
            self.injection.remove()
        Hold.release(self.host, self)
        return self.host

    def describe(self) -> str:
        """One line with the host, the fit of its alignment or its sites, and the tasks."""
        name = self.host.config.name_or_path or type(self.host).__name__
        if self.injection is not None:
            return f"UniHyperLoRA on {name} ({self.injection.describe()}, tasks {sorted(self.config.tasks)}"
        fit = "not aligned" if self.stream is None else " ".join(f"{r2:.2f}" for r2 in self.stream.fit.r2)
        blocks = "?" if self.stream is None else self.stream.words.num_layers
        space = self.adapter.space
        if isinstance(self.host, NoHost):
            return (
                f"UniHyperLoRA without a host: space {space.name} {space.version}, tasks {sorted(self.config.tasks)}"
            )
        return (
            f"UniHyperLoRA on {name} ({self.host.config.model_type}, {blocks} blocks x "
            f"{self.host.config.hidden_size}): space {space.name} {space.version} ({space.digest}), R² per knot "
            f"{fit}, tasks {sorted(self.config.tasks)}"
        )

    # ---- training ----

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the adapter; the host stays in evaluation mode, without dropout."""
        super().train(mode)
        self.host.eval()
        return self

    def set_train_scope(self, scope: str) -> None:
        """Choose the parameters that require gradients.

        Args:
            scope: "task" trains reader and head of the active task, or all parts of an injected update except δθ.
                "delta" trains only δθ of the active task, and its head if that was never trained.

        Raises:
            ConfigError: the scope is not allowed, or not supported by this adapter.
            MergeError: the update is merged into the host.
        """
        if scope not in ("task", "delta"):
            raise ConfigError(f"train_scope={scope!r} is not allowed; choose 'task' or 'delta'.")
        if scope == "delta" and self.config.projector == "host":
            raise ConfigError(
                "train_scope='delta' tunes a universal adapter to a host, but this adapter is bound to its host. "
                "Choose train_scope='task'."
            )
        if self.merged:
            raise MergeError("A merged update cannot be trained; call unmerge() first.")
        name = self._task(None)
        own, head_is_new = self.adapter.tasks[name], not self.config.tasks[name].get("trained", False)
        self.adapter.requires_grad_(scope == "task" and self.config.pathway == "inject")
        for other, task in self.adapter.tasks.items():
            task.requires_grad_(scope == "task" and other == name)
        own.delta.requires_grad_(scope == "delta")
        if scope == "delta" and head_is_new:
            own.head_weight.requires_grad_(True)
            own.head_bias.requires_grad_(True)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters a trainer may change, as PEFT's models do; the host is among all of them."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        trained, total = sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Recompute the host's blocks in the backward pass, which saves memory with an injected update.

        This has no effect on a stream, whose gradients do not pass through its host.

        Args:
            gradient_checkpointing_kwargs: arguments of ``torch.utils.checkpoint.checkpoint``.
            **kwargs: ``every_n_layers``: recompute only every n-th block.

        Raises:
            ConfigError: reentrant checkpointing or offloading, which a frozen host does not support.
        """
        if self.injection is not None:
            self.injection.enable_checkpointing(gradient_checkpointing_kwargs or {}, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Turn gradient checkpointing off."""
        if self.injection is not None:
            self.injection.checkpoint = None

    # ---- merging, exporting ----

    @property
    def merged(self) -> bool:
        """Whether an update is merged into the host's weights."""
        return self.injection is not None and self.injection.merged

    def merge(self) -> None:
        """Merge the active task's update into the host's weights; exact, and without cost at inference.

        Raises:
            MergeError: the router chooses atoms for each token, so fixed weights cannot replace the update; or the
                model is a stream, which has no update.
        """
        if self.injection is None:
            raise MergeError("A stream computes beside the host, so it has no update to merge. Leave merge() out.")
        if not self.merged:
            self.injection.merge(self._task(None))

    def unmerge(self) -> None:
        """Restore the host's own weights, bit for bit; the update is then computed beside them again."""
        if self.injection is not None:
            self.injection.unmerge()

    def merge_and_save(self, folder: str | Path, tokenizer=None) -> None:
        """Write a transformers encoder with the active task's update merged; see ``publish.weights``."""
        _from_package("publish.weights", "Exporting").merge_and_save(self, folder, tokenizer)

    def export_lora(self, folder: str | Path, rank: int) -> dict[str, float]:
        """Write the active task's update as a LoRA for PEFT; returns its errors, see ``publish.weights``."""
        return _from_package("publish.weights", "Exporting").export_lora(self, folder, rank)

    def export_onnx(self, path: str | Path, host_path: str | Path | None = None) -> None:
        """Write host and adapter as one ONNX file, or as two; see ``publish.onnx_file``."""
        _from_package("publish.onnx_file", "Exporting").export_onnx(self, path, host_path)

    # ---- forward ----

    def pipeline(self, **kwargs):
        """A pipeline of transformers with this model and its host's tokenizer, which the library cannot guess.

        Args:
            **kwargs: those of ``transformers.pipeline``, such as ``aggregation_strategy``.
        """
        from transformers import pipeline  # a second's worth of imports

        kinds = {"token_classification": "token-classification", "sequence_classification": "text-classification"}
        if "tokenizer" not in kwargs and self.stream is not None:
            kwargs["tokenizer"] = self.stream.words.tokenizer
        elif "tokenizer" not in kwargs:
            revision = self.config.base_model_revision or "main"
            kwargs["tokenizer"] = load_tokenizer(self.config.base_model_name_or_path, revision=revision)
        warn_of_scheme(self.config.active_task, self.config.tasks)
        return pipeline(kinds.get(self.task_type, "feature-extraction"), model=self, **kwargs)

    def run(
        self,
        task: str | None,
        attention_mask: torch.Tensor | None,
        output_hidden_states: bool | None = None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        **inputs,
    ) -> dict[str, Any]:
        """Run the host once, and compute the logits of the requested tasks.

        Inputs that the host does not accept are ignored (such as token types for a host without them).

        Args:
            task: task of all sentences; by default the active task.
            task_ids: one task per sentence: B names, or (B,) indices into ``list(config.tasks)``.
            tasks: names of tasks; every sentence is scored for all of them.

        Returns:
            ``logits`` (a tensor, or with ``tasks`` a dict of task → tensor), ``hidden_states``, ``last_hidden_state``;
            with an injected update also ``expected_atoms`` and ``active_atoms``.

        Raises:
            ConfigError: arguments contradict each other, inputs are missing, or a task does not fit.
        """
        if sum(given is not None for given in (task, task_ids, tasks)) > 1:
            raise ConfigError(
                "Give only one of task (the same for all sentences), task_ids (one per sentence) and tasks (all of "
                "them for every sentence)."
            )
        if tasks is not None and (isinstance(tasks, str) or not tasks):
            raise ConfigError(f"tasks={tasks!r} must be a list of names; the adapter has {sorted(self.config.tasks)}.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        known = self._host_arguments | {"canonical_states", "word_index"}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        reads = {self.host.main_input_name, "inputs_embeds"}
        if self.injection is None:
            reads.add("canonical_states")
        if not inputs.keys() & known & reads:
            raise ConfigError(
                f"This host reads {self.host.main_input_name}; the call gave {sorted(inputs) or 'nothing'}."
            )
        inputs = {name: value for name, value in inputs.items() if name in known}
        if self.injection is not None:
            if tasks is not None:
                raise ConfigError("Only a stream can score several tasks in one pass (tasks=). Use task_ids=.")
            return self.injection.outputs(self, task, task_ids, attention_mask, output_hidden_states, inputs)
        if "canonical_states" in inputs:
            z, shape = inputs["canonical_states"], (len(KNOTS), self.adapter.space.shape()["dim"])
            if z.dim() != 4 or z.shape[2:] != shape or len(inputs) > 1:
                raise ConfigError(
                    f"canonical_states must be (B, W, {shape[0]}, {shape[1]}) and replace all other inputs; "
                    f"given: {tuple(z.shape)}, with {sorted(inputs.keys() - {'canonical_states'}) or 'nothing else'}."
                )
            mask = torch.ones(z.shape[:2], device=z.device) if attention_mask is None else attention_mask
            if mask.shape != z.shape[:2]:
                wanted, given = tuple(z.shape[:2]), tuple(mask.shape)
                raise ConfigError(f"With canonical_states, attention_mask must be (B, W) = {wanted}; given: {given}.")
            run = StreamRun(self.adapter, z, (mask > 0).sum(dim=1))
        else:
            run = self.bound_stream.read(attention_mask, inputs)
        outputs = {
            "hidden_states": run.hidden_states if output_hidden_states else None,
            "last_hidden_state": run.hidden_states and run.hidden_states[-1],
        }
        if self.task_type is None and tasks is None:
            return outputs
        if tasks is not None:
            for name in tasks:
                UniHyperLoraPreTrainedModel._check_type(self.config, name)
            return outputs | {"logits": {name: run.logits(name) for name in tasks}}
        if task_ids is None:
            return outputs | {"logits": run.logits(self._task(task))}
        names, rows = sentences_by_task(task_ids, list(self.config.tasks), len(run.z), run.z.device)
        for name in names:
            self._task(name)
        return outputs | {"logits": run.mixed_logits(names, rows)}

    def read(
        self, texts: Sequence[str] | Sequence[list[str]] | Mapping[str, Sequence], column: str | None = None, **how
    ) -> dict[str, list]:
        """Compute the canonical states of words. They can be used for training and prediction without a host.

        ``Dataset.map(model.read, batched=True)`` works, with ``fn_kwargs={"column": …}`` for another column.

        Args:
            texts: raw texts, which are split into words; or lists of words; or a batch of a data set.
            column: column of the batch to read; by default "tokens", "words", "text" or "sentence".
            **how: ``max_seq_length``, the maximum number of sub-tokens that the host reads at once (128), and
                ``batch_size`` (32). Longer texts are read in overlapping windows.

        Returns:
            ``words``, a list per text, and ``states``, (W, K, D) float16 per text.

        Raises:
            ConfigError: the column does not exist, or ``max_seq_length`` leaves no room for a word.
            DataError: a row is neither a text nor a list of words.
            HostError: the model is not a stream that is aligned with a host.
        """
        return _from_package("corpus.reading", "Reading a corpus").read(self, texts, column, **how)

    @property
    def bound_stream(self) -> Stream:
        if self.stream is None and isinstance(self.host, NoHost):
            raise HostError("The model has no host in memory, so it cannot read text: load the adapter on a host.")
        if self.stream is None:
            raise HostError("The stream is not aligned with its host yet; call calibrate(tokenizer).")
        return self.stream

    def _output(self, kind: type, run: dict[str, Any], loss: torch.Tensor | None, return_dict: bool | None):
        names = ("logits", "hidden_states", "expected_atoms", "active_atoms")
        out = kind(loss=loss, **{name: run.get(name) for name in names})
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    @contextlib.contextmanager
    def _only(self, tasks: list[str]) -> Iterator[None]:
        """Context in which the adapter has only these tasks."""
        config, adapter = self.config, self.adapter
        unknown = [name for name in tasks if name not in config.tasks]
        if unknown or not tasks:
            asked = f"No task {unknown[0]!r} in this adapter" if unknown else "tasks=[] names no task of this adapter"
            raise ConfigError(f"{asked}; it has {sorted(config.tasks)}.")
        all_tasks, active, parameters = config.tasks, config.active_task, adapter.tasks
        config.tasks = {name: config.tasks[name] for name in tasks}
        adapter.tasks = nn.ModuleDict({name: adapter.tasks[name] for name in tasks})
        try:
            config.activate(active if active in tasks else tasks[0])
            yield
        finally:
            config.tasks, config.active_task, adapter.tasks = all_tasks, active, parameters
            if active is not None:
                config.activate(active)


class UniHyperLoraModel(UniHyperLoraPreTrainedModel):
    """The host with the active task's update and without a head; returns states. A stream does not change them."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        word_index: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task: str | None = None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> UniHyperLoraOutput:
        """Token ids (B, T), or images for a ViT → states (B, T, d)."""
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs |= {"inputs_embeds": inputs_embeds, "pixel_values": pixel_values, "word_index": word_index}
        run = self.run(task, attention_mask, output_hidden_states, task_ids, tasks, **inputs)
        names = ("last_hidden_state", "hidden_states", "expected_atoms", "active_atoms")
        out = UniHyperLoraOutput(**{name: run.get(name) for name in names})
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


class UniHyperLoraForTokenClassification(UniHyperLoraPreTrainedModel):
    """Predicts a label for each token."""

    task_type = "token_classification"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        word_index: torch.Tensor | None = None,
        canonical_states: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task: str | None = None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> UniHyperLoraTokenClassifierOutput:
        """Token ids (B, T) and labels (B, T), -100 for no label → logits (B, T, C) and mean cross-entropy.

        Args:
            word_index: (B, T) word of each token, or ``words.NO_WORD``, as a prepared tokenizer returns it for given
                words. Without it, a stream finds the words from the ids. On the further tokens of a word, B-X becomes
                I-X if that label exists.
            num_items_in_batch: the loss is the sum divided by this number, so that the parts of a batch add up.
            canonical_states: (B, W, K, D), for a stream, instead of ids. Attention mask and labels are then (B, W),
                and logits (B, W, C).
            task_ids: one task per sentence: B names, or (B,) indices into ``list(config.tasks)``. C is then the
                largest number of labels; a task has -inf for labels that it lacks.
            tasks: names of tasks of either type; every sentence is scored for all of them in one pass of the host, and
                ``logits`` is a dict of task → tensor.
        """
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs |= {"inputs_embeds": inputs_embeds, "word_index": word_index, "canonical_states": canonical_states}
        run = self.run(task, attention_mask, output_hidden_states, task_ids, tasks, **inputs)
        loss = loss_of(run["logits"], labels, num_items_in_batch)
        return self._output(UniHyperLoraTokenClassifierOutput, run, loss, return_dict)


class UniHyperLoraForSequenceClassification(UniHyperLoraPreTrainedModel):
    """Predicts a label for each sequence, from the mean over its words (tokens with an injected update)."""

    task_type = "sequence_classification"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        word_index: torch.Tensor | None = None,
        canonical_states: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task: str | None = None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> UniHyperLoraSequenceClassifierOutput:
        """Token ids (B, T), images or canonical states, and labels (B,) → logits (B, C) and mean cross-entropy.

        All arguments are as for ``UniHyperLoraForTokenClassification``.
        """
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs |= {"inputs_embeds": inputs_embeds, "pixel_values": pixel_values}
        inputs |= {"word_index": word_index, "canonical_states": canonical_states}
        run = self.run(task, attention_mask, output_hidden_states, task_ids, tasks, **inputs)
        loss = loss_of(run["logits"], labels, num_items_in_batch)
        return self._output(UniHyperLoraSequenceClassifierOutput, run, loss, return_dict)


def make_adapter(config: UniHyperLoraConfig) -> Adapter:
    """Make the adapter that a configuration describes.

    Raises:
        ConfigError: the configuration has no space.
    """
    if config.pathway == "inject":
        return _part("injection").make_adapter(config)
    if config.space is None:
        raise ConfigError("The configuration has no space. Make the adapter with from_host.")
    return StreamAdapter(config)


def loss_of(logits, labels: torch.Tensor | None, num_items: torch.Tensor | int | None) -> torch.Tensor | None:
    """Cross-entropy of logits (…, C) and labels (…), -100 ignored: the mean, or the sum divided by ``num_items``."""
    if labels is None:
        return None
    if isinstance(logits, dict):
        raise ConfigError("labels belong to one task, but tasks= asks for several. Leave labels out.")
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    items = (labels != -100).sum() if num_items is None else torch.as_tensor(num_items, device=logits.device)
    return total / items.clamp_min(1)


def _rename_labels(config: UniHyperLoraConfig, num_labels=None, id2label=None, label2id=None) -> None:
    """Rename the labels of the active task with the caller's names.

    Raises:
        ConfigError: the number of names differs from the number of labels, or ids are missing.
    """
    labels = config.tasks[config.active_task]["labels"]
    if id2label is None and label2id is not None:
        id2label = {number: label for label, number in label2id.items()}
    number = num_labels if id2label is None else len(id2label)
    if number is not None and number != len(labels):
        raise ConfigError(
            f"Task '{config.active_task}' has {len(labels)} labels ({', '.join(labels)}), but the call gave {number}. "
            "Leave num_labels and id2label out, or add a new task with add_task."
        )
    if id2label is not None:
        given = {int(key): str(value) for key, value in id2label.items()}
        if given.keys() != set(range(len(labels))):
            raise ConfigError(f"id2label={id2label!r} does not name the ids 0 to {len(labels) - 1}.")
        task = config.tasks[config.active_task]
        task["labels"] = [given[at] for at in range(len(labels))]
        check_task(config.active_task, task["type"], task["labels"])
        config.activate(config.active_task)


def _take_names(config: UniHyperLoraConfig) -> None:
    """Copy label names that a caller has set on the configuration to the active task."""
    if config.active_task is None:
        return
    ids = dict(enumerate(config.tasks[config.active_task]["labels"]))
    given = {int(number): label for number, label in (config.id2label or {}).items()}
    if given == ids and config.label2id != {label: number for number, label in ids.items()}:
        _rename_labels(config, label2id=config.label2id)
    elif given != ids:
        _rename_labels(config, id2label=given)


def _check_outputs(config: UniHyperLoraConfig) -> None:
    """Raise ``ConfigError`` if the configuration asks for outputs or a loss that an adapter does not have."""
    if config.output_attentions:
        raise ConfigError("output_attentions=True: only the host has attention weights; get them from model.host.")
    kind = getattr(config, "problem_type", None)
    if kind not in (None, "single_label_classification"):
        raise ConfigError(f"problem_type={kind!r} is not possible: a text or a word has one label. Leave it out.")


def _one_device(device_map) -> torch.device | str | None:
    """The device of a ``device_map``.

    Raises:
        ConfigError: the map has several devices, or none that can hold a host.
    """
    if isinstance(device_map, dict) and len({*map(str, device_map.values())}) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return None
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or "cpu"
    if not isinstance(device_map, str | int | torch.device):
        raise ConfigError(
            f"device_map={device_map!r} spreads the host over several devices. Load the host yourself and pass host=."
        )
    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        raise ConfigError(f"device_map={device_map!r} names no device. Give 'auto', 'cpu', 'cuda:0' …") from error
    if device.type == "meta":
        raise ConfigError("device_map='meta' keeps no values, but the host's are needed. Give 'auto' or 'cpu'.")
    return device


def _check_not_loading(arguments: dict) -> None:
    """Refuse arguments for loading a host where the caller gave a loaded host."""
    if arguments:
        raise ConfigError(
            f"{sorted(arguments)[0]} is for a host that is loaded here, but a loaded host was given. Leave it out."
        )


def _given(**kwargs) -> dict:
    return {name: value for name, value in kwargs.items() if value is not None}


def _part(module: str):
    """Import a module of this package that only adapters with an injected update include."""
    return importlib.import_module(f".{module}", __package__)


def _from_package(module: str, what: str):
    """Import a module of the installed package.

    Raises:
        UniHyperLoraError: the package is not installed: this code came with an adapter.
    """
    try:
        return importlib.import_module(f"modeling_unihyperlora.{module}")
    except ImportError as error:
        raise UniHyperLoraError(
            f"{what} needs the package ({error}); the code that came with this adapter only loads and scores. Run: "
            "pip install unihyperlora"
        ) from error
