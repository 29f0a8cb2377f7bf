"""Arguments of a Trainer that would be dropped, or would fail after hours: refused before anything is trained.

What transformers' ``TrainingArguments`` offer is honoured or refused here, never ignored. The checks are those of a
Trainer, so that they hold for a script and for Python; what a script alone cannot do is in ``arguments``.
"""

import copy
from collections.abc import Sized

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from modeling_unihyperlora.errors import ConfigError, first_line
from modeling_unihyperlora.measure.accounting import part_of

_OPTIMIZER_OF_ITS_OWN = {"params", "model", "optimizer_dict"}  # what such an optimiser brings in its keywords


def check_trainer(args: TrainingArguments, model: nn.Module | None, train_dataset: Dataset | None) -> None:
    """What no Trainer here can do.

    Raises:
        ConfigError: with the name of the argument and what to do.
    """
    check_reports(args)
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigError(
            "enable_jit_checkpoint goes on after SIGTERM as if training had come to its end. Leave it out: a run here "
            "saves a checkpoint at SIGTERM by itself."
        )
    if train_dataset is None:
        return
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError(
            "use_liger_kernel needs liger-kernel, not installed: pip install liger-kernel. Or leave it out."
        )
    whole = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(train_dataset, Sized) and len(train_dataset) < whole:
        raise ConfigError(
            f"dataloader_drop_last leaves nothing to train on: the data have {len(train_dataset)} items and one batch "
            f"takes {whole}. Leave it out, or give a smaller per_device_train_batch_size."
        )
    if args.lr_scheduler_type.value == "constant" and (args.lr_scheduler_kwargs or args.warmup_steps):
        raise ConfigError(
            "lr_scheduler_type constant reads no warmup_steps and no lr_scheduler_kwargs. Leave them out, or give "
            "constant_with_warmup."
        )
    try:
        asked = Trainer.get_optimizer_cls_and_kwargs(args, model)
        plain = Trainer.get_optimizer_cls_and_kwargs(_without_optim_args(args), model)
    except (ImportError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"optim {args.optim.value} cannot be used here ({first_line(error)}). Correct optim_args, or give "
            "another, such as adamw_torch."
        ) from error
    if args.optim_args and asked == plain:
        raise ConfigError(
            f"optim_args {args.optim_args} is not read by optim {args.optim.value}. Leave it out, or give the "
            "optimiser that is meant."
        )


def _without_optim_args(args: TrainingArguments) -> TrainingArguments:
    args = copy.copy(args)
    args.optim_args = None
    return args


def check_adapter_trainer(args: TrainingArguments, trains: bool, has_sources: bool) -> None:
    """What the Trainer of an adapter cannot do.

    Args:
        trains: whether there is something to train on.
        has_sources: whether a stream is trained on its hosts' kept states.

    Raises:
        ConfigError: with the name of the argument and what to do.
    """
    if args.fp16_full_eval or args.bf16_full_eval:
        name = "fp16_full_eval" if args.fp16_full_eval else "bf16_full_eval"
        raise ConfigError(
            f"{name} would round the adapter itself, which is saved after it. Leave it out; bf16 or fp16 compute in "
            "half precision and leave the adapter as it is."
        )
    if args.label_names not in (None, [], ["labels"]):
        raise ConfigError(
            f"label_names={args.label_names} is not read: an adapter's labels are 'labels'. Leave it out."
        )
    if not trains:
        return
    if args.neftune_noise_alpha is not None:
        raise ConfigError(
            "neftune_noise_alpha would change nothing: the host of an adapter is frozen and never in training mode. "
            "Leave it out; the noise of a stream is fidelity."
        )
    if args.use_liger_kernel:
        raise ConfigError("use_liger_kernel has no kernel for an adapter, and its host stays as it is. Leave it out.")
    if args.optim_target_modules is not None:
        raise ConfigError(
            "optim_target_modules is not read: an adapter's parts have groups of their own. Leave it out."
        )
    if has_sources and args.train_sampling_strategy != "random":
        raise ConfigError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not read: a stream's batches are drawn at "
            "random from the kept states of its hosts. Leave it out."
        )


def check_pathway(args: TrainingArguments, model: nn.Module) -> None:
    """What cannot be trained of this adapter.

    Raises:
        ConfigError: a part's learning rate is given and the adapter has no such part; or δθ alone is to be trained of
            a stream's task whose reader never was.
    """
    config = model.config
    stream, parts = config.pathway == "stream", {part_of(name) for name, _ in model.adapter.named_parameters()}
    for name in args.learning_rates_given():
        if name.removesuffix("_learning_rate") not in parts - {"space"}:
            raise ConfigError(
                f"{name} is not read: an adapter of pathway '{config.pathway}' has no such part. Leave it out; it has "
                f"{', '.join(sorted(parts - {'space'}))}."
            )
    if stream and args.train_scope == "delta" and not config.tasks[config.active_task].get("trained"):
        raise ConfigError(
            f"Task '{config.active_task}' is new: its reader was never trained, and train_scope 'delta' would leave "
            "it as it is. Train the task with train_scope 'task' first, on any host."
        )


def check_optimizer(optimizer_class: type, kwargs: dict[str, object]) -> None:
    """Raise ``ConfigError`` for an optimiser that makes its own groups of parameters, as GaLore and Muon do."""
    plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    if not plain or _OPTIMIZER_OF_ITS_OWN & set(kwargs):
        raise ConfigError(
            f"The optimiser {getattr(optimizer_class, '__name__', optimizer_class)} makes its own groups of "
            "parameters, and an adapter has one for each of its parts. Give another, such as adamw_torch."
        )


def check_reports(args: TrainingArguments) -> None:
    """Raise ``ConfigError`` where ``report_to`` names nothing that is installed."""
    installed = [*get_available_reporting_integrations(), "flyte"]
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to {name} is unknown. Give none, or some of: {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name not in installed:
            raise ConfigError(
                f"report_to {name} needs its package, not installed: pip install {name}. Or give none"
                + (f", or one of: {', '.join(sorted(installed))}." if len(installed) > 1 else ".")
            )
