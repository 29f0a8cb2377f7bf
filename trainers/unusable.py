"""Refuses training arguments that would be ignored, or would fail after hours, before training starts.

Every argument of transformers' ``TrainingArguments`` is honoured or refused, never ignored. The Trainer runs these
checks, so they hold for scripts and for Python code. Checks that concern only scripts are in ``arguments``.
"""

import copy
import dataclasses
from collections.abc import Callable, Sized

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_liger_kernel_available

from modeling_unihyperlora.errors import ConfigError, first_line
from modeling_unihyperlora.measure.accounting import part_of

from .training_args import NOISE_FLAGS

# Arguments that are read only together with another one: a test whether they are read, and what they need.
_READ_WITH: dict[str, tuple[Callable[[TrainingArguments], object], str]] = {
    "eval_steps": (lambda args: args.eval_strategy == IntervalStrategy.STEPS, "eval_strategy steps"),
    "eval_delay": (lambda args: args.eval_strategy != IntervalStrategy.NO, "eval_strategy steps or epoch"),
    "save_steps": (lambda args: args.save_strategy == SaveStrategy.STEPS, "save_strategy steps"),
    "logging_steps": (lambda args: args.logging_strategy == IntervalStrategy.STEPS, "logging_strategy steps"),
    "greater_is_better": (lambda args: args.metric_for_best_model, "metric_for_best_model"),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        (lambda args: args.gradient_checkpointing or args.activation_checkpointing, "gradient_checkpointing"),
    ),
    **dict.fromkeys(
        ("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        (lambda args: args.dataloader_num_workers > 0, "dataloader_num_workers of 1 or more"),
    ),
    "liger_kernel_config": (lambda args: args.use_liger_kernel, "use_liger_kernel"),
    "fsdp_config": (lambda args: args.fsdp, "fsdp"),
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_OWN_GROUP_KEYWORDS = {"params", "model", "optimizer_dict"}  # of optimisers that make their own parameter groups


def check_trainer(args: TrainingArguments, model: nn.Module | None, train_dataset: Dataset | None) -> None:
    """Check arguments that no Trainer of this package supports.

    Raises:
        ConfigError: names the argument and says what to do.
    """
    check_reports(args)
    for name, (is_read, needs) in _READ_WITH.items():
        if getattr(args, name) != _DEFAULTS[name] and not is_read(args):
            raise ConfigError(
                f"{name}={getattr(args, name)!r} is not read: it needs {needs}. Leave it out, or give {needs} too."
            )
    check_lengths(args, train_dataset)
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigError(
            "enable_jit_checkpoint continues after SIGTERM as if training were finished. Leave it out: this Trainer "
            "saves a checkpoint at SIGTERM by itself."
        )
    if args.torch_compile_mode is not None:
        try:
            torch.compile(
                nn.Identity(), mode=args.torch_compile_mode, backend=args.torch_compile_backend or "inductor"
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(
                f"torch_compile_mode {args.torch_compile_mode} cannot be used ({first_line(error)}). Correct it, or "
                "leave it out."
            ) from error
    if train_dataset is None:
        return
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError(
            "use_liger_kernel needs liger-kernel, which is not installed: pip install liger-kernel. Or leave it out."
        )
    batch_size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(train_dataset, Sized) and len(train_dataset) < batch_size:
        raise ConfigError(
            f"dataloader_drop_last leaves nothing to train on: the data set has {len(train_dataset)} items and one "
            f"batch takes {batch_size}. Leave it out, or give a smaller per_device_train_batch_size."
        )
    if args.lr_scheduler_type.value == "constant" and (args.lr_scheduler_kwargs or args.warmup_steps):
        raise ConfigError(
            "lr_scheduler_type constant ignores warmup_steps and lr_scheduler_kwargs. Leave them out, or give "
            "constant_with_warmup."
        )
    try:
        asked = Trainer.get_optimizer_cls_and_kwargs(args, model)
        plain = Trainer.get_optimizer_cls_and_kwargs(_with(args, optim_args=None), model)
        others = [name for name in _OF_ADAM if getattr(args, name) != _DEFAULTS[name]]
        unread = [
            name
            for name in others
            if asked == Trainer.get_optimizer_cls_and_kwargs(_with(args, **{name: _DEFAULTS[name]}), model)
        ]
    except (ImportError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"optim {args.optim.value} cannot be used here ({first_line(error)}). Correct optim_args, or give "
            "another optimiser, such as adamw_torch."
        ) from error
    if args.optim_args and asked == plain:
        raise ConfigError(
            f"optim {args.optim.value} does not read optim_args {args.optim_args}. Leave optim_args out, or give the "
            "optimiser that reads them."
        )
    if unread:
        raise ConfigError(
            f"{unread[0]}={getattr(args, unread[0])} is not read by optim {args.optim.value}. Leave it out, or give "
            "an optimiser that reads it, such as adamw_torch."
        )


def check_lengths(args: TrainingArguments, train_dataset: Dataset | None) -> None:
    """Raise ``ConfigError`` if ``length_column_name`` was given but is not read."""
    name = args.length_column_name
    if name == _DEFAULTS["length_column_name"]:
        return
    if args.train_sampling_strategy != "group_by_length":
        raise ConfigError(
            f"length_column_name={name!r} is not read: it needs train_sampling_strategy group_by_length. Leave it "
            "out, or give both."
        )
    if train_dataset is not None and name not in (getattr(train_dataset, "column_names", None) or ()):
        raise ConfigError(
            f"length_column_name={name!r} is not read: the training data have no such column. Leave it out; the "
            "Trainer then counts the lengths."
        )


def _with(args: TrainingArguments, **changes) -> TrainingArguments:
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def check_adapter_trainer(args: TrainingArguments, trains: bool, has_sources: bool) -> None:
    """Check arguments that the Trainer of an adapter does not support.

    Args:
        trains: whether the Trainer has training data.
        has_sources: whether a stream is trained on cached states of its source hosts.

    Raises:
        ConfigError: names the argument and says what to do.
    """
    if args.fp16_full_eval or args.bf16_full_eval:
        name = "fp16_full_eval" if args.fp16_full_eval else "bf16_full_eval"
        raise ConfigError(
            f"{name} would round the adapter's own weights, which are saved afterwards. Leave it out; bf16 and fp16 "
            "compute in half precision and do not change the weights."
        )
    if args.label_names not in (None, [], ["labels"]):
        raise ConfigError(
            f"label_names={args.label_names} is not read: an adapter's labels are always 'labels'. Leave it out."
        )
    if args.use_cache:
        raise ConfigError("use_cache is not read: an adapter's host has no key-value cache. Leave it out.")
    if not trains:
        return
    if args.neftune_noise_alpha is not None:
        raise ConfigError(
            "neftune_noise_alpha would change nothing: the host of an adapter is frozen and never in training mode. "
            "Leave it out; fidelity sets the noise of a stream."
        )
    if args.use_liger_kernel:
        raise ConfigError("use_liger_kernel has no kernel for an adapter, and does not change its host. Leave it out.")
    if args.optim_target_modules is not None:
        raise ConfigError(
            "optim_target_modules is not read: each part of an adapter has its own parameter group. Leave it out."
        )
    if has_sources and args.dataloader_persistent_workers:
        raise ConfigError(
            "dataloader_persistent_workers would give every epoch the noise of the first epoch: a stream's noise "
            "depends on the epoch, but such workers do not know it. Leave it out."
        )
    if has_sources and args.train_sampling_strategy != "random":
        raise ConfigError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not read: a stream's batches are drawn at "
            "random from the cached states of its hosts. Leave it out."
        )


def check_noise(args: TrainingArguments, has_sources: bool, has_copies: bool) -> None:
    """Raise ``ConfigError`` if an argument of a reader's training was given and is not read.

    Args:
        has_sources: whether a stream is trained on cached or stored states.
        has_copies: whether a host is in memory, so that there can be copies of it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in NOISE_FLAGS:
        value, why = getattr(args, name), None
        if value == defaults[name]:
            continue
        if not has_sources:
            why = "only the reader of a stream is trained so, on states of its hosts"
        elif args.train_scope == "delta":
            why = "train_scope delta trains no reader"
        elif name.startswith("copy_") and not has_copies:
            why = "stored states come without copies of their host"
        elif name == "copy_fidelity" and not args.copy_share:
            why = "copy_share 0 leaves the copies out"
        if why:
            raise ConfigError(f"{name}={value} is not read: {why}. Leave it out.")


def check_pathway(args: TrainingArguments, model: nn.Module) -> None:
    """Check that the adapter has what the arguments ask to train.

    Raises:
        ConfigError: a learning rate is given for a part that the adapter does not have, or only δθ is to be trained
            but the task's reader was never trained.
    """
    config = model.config
    stream, parts = config.pathway == "stream", {part_of(name) for name, _ in model.adapter.named_parameters()}
    for name in args.learning_rates_given():
        if name.removesuffix("_learning_rate") not in parts - {"space"}:
            raise ConfigError(
                f"{name} is not read: an adapter of pathway '{config.pathway}' has no such part. Leave it out; the "
                f"adapter has {', '.join(sorted(parts - {'space'}))}."
            )
    if stream and args.train_scope == "delta" and not config.tasks[config.active_task].get("trained"):
        raise ConfigError(
            f"Task '{config.active_task}' is new: its reader was never trained, and train_scope 'delta' does not "
            "train it. Train the task with train_scope 'task' first, on any host."
        )


def check_optimizer(optimizer_class: type, kwargs: dict[str, object]) -> None:
    """Raise ``ConfigError`` for an optimiser that makes its own parameter groups, as GaLore and Muon do."""
    plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    if not plain or _OWN_GROUP_KEYWORDS & set(kwargs):
        raise ConfigError(
            f"The optimiser {getattr(optimizer_class, '__name__', optimizer_class)} makes its own groups of "
            "parameters, but an adapter needs one group for each part. Give another, such as adamw_torch."
        )


def check_reports(args: TrainingArguments) -> None:
    """Raise ``ConfigError`` if ``report_to`` names an integration that is unknown or not installed."""
    installed = [*get_available_reporting_integrations(), "flyte"]
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to {name} is unknown. Give none, or one or more of: {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name not in installed:
            raise ConfigError(
                f"report_to {name} needs its package, which is not installed: pip install {name}. Or give none"
                + (f", or one of: {', '.join(sorted(installed))}." if len(installed) > 1 else ".")
            )
