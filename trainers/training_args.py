"""Training arguments: those of transformers, and the train scope, loss weights, budgets and learning rate per part.

The parts need very different learning rates: the atoms of a zero-initialised dictionary a high one, the waves of the
projector and the router a low one. So each part's rate is ``learning_rate`` times its factor in
``LEARNING_RATE_FACTORS``, and each rate can also be set separately.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from modeling_unihyperlora.errors import ConfigError
from modeling_unihyperlora.measure.accounting import MAX_ADAPTER_BYTES, MAX_FLOPS_OVERHEAD_PCT

from .launching import processes

LEARNING_RATE_FACTORS = {
    **{"dictionary": 1.0, "projector": 0.1, "mixer": 1.0, "router": 0.2},
    **{"reader": 0.8, "delta": 1.0, "head": 1.0},
}

NOISE_FLAGS = ("fidelity", "copy_fidelity", "copy_share", "consistency")  # read only where a reader is trained

RANGES = {  # allowed ranges of arguments that transformers does not check in advance
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, float("inf"))),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), (1, float("inf"))),
    **dict.fromkeys(("dataloader_num_workers", "weight_decay", "max_grad_norm", "eval_delay"), (0, float("inf"))),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "label_smoothing_factor": (0, 0.99),
    **dict.fromkeys(("learning_rate", "num_train_epochs"), (0, float("inf"))),
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), (1e-9, float("inf"))),  # < 1: share of all
}


@dataclass
class UniHyperLoraTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the arguments of the adapter.

    If a part's learning rate is None, it is ``learning_rate`` times the part's factor in ``LEARNING_RATE_FACTORS``.
    """

    learning_rate: float = field(
        default=5e-3, metadata={"help": "Learning rate; each part of the adapter multiplies it by its own factor."}
    )
    train_scope: str = field(
        default="task",
        metadata={
            "help": "What to train: 'task' (reader and head of the task; all parts of an injected update) or 'delta' "
            "(only δθ; with an injected update also the head of a new task).",
            "choices": ["task", "delta"],
        },
    )
    lambda_f: float = field(
        default=1e-3,
        metadata={"help": "Weight λ_F of E[k], the expected atoms per token (injected update)."},
    )
    lambda_q: float = field(default=1e-5, metadata={"help": "Weight λ_Q of the squared norm of δθ."})
    dictionary_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the atoms (injected update)."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector (injected update)."}
    )
    mixer_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mixer (injected update)."}
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the router (injected update)."}
    )
    reader_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the reader (stream)."}
    )
    head_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the head."})
    delta_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of δθ."})
    fidelity: float = field(
        default=0.95,
        metadata={
            "help": "Noise on the canonical states in training: lowest correlation of noisy and original states; 1 "
            "means no noise."
        },
    )
    copy_fidelity: float = field(
        default=0.7, metadata={"help": "As --fidelity, for copies of the source host with fewer blocks or dimensions."}
    )
    copy_share: float = field(
        default=0.6,
        metadata={
            "help": "Share of the sentences that are read with copies of the source host; 0 trains faster and better "
            "for the source alone."
        },
    )
    consistency: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the consistency of a reader's predictions under two samples of dropout (R-Drop); 0 "
            "trains in about half of the time."
        },
    )
    max_adapter_bytes: int | None = field(
        default=MAX_ADAPTER_BYTES,
        metadata={
            "help": "Maximum size of the weights file, in bytes; a larger one stops the run before training. "
            "Baselines have no limit by default."
        },
    )
    max_flops_overhead_pct: float | None = field(
        default=MAX_FLOPS_OVERHEAD_PCT,
        metadata={
            "help": "Maximum extra multiply-adds per token, in per cent of the host's; more stop the run before "
            "training. Baselines have no limit by default."
        },
    )

    def __post_init__(self):
        if self.train_scope not in ("task", "delta"):
            raise ConfigError(f"train_scope={self.train_scope!r} is not allowed; choose 'task' or 'delta'.")
        for name in ("fidelity", "copy_fidelity", "copy_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; it must be a number from 0 to 1.")
        for name in ("lambda_f", "lambda_q", "consistency"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; it must be zero or positive.")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not (least <= value <= most and math.isfinite(value)):
                allowed = f"{least} or more, and finite" if most == float("inf") else f"from {least} to {most}"
                raise ConfigError(f"{name}={value!r} is not allowed; it must be {allowed}.")
        if processes() > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise accelerate does not connect the processes, and each trains alone
        super().__post_init__()
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to copy to, of which torch would warn
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ConfigError(
                f"hub_strategy={self.hub_strategy.value!r} would push training state to the Hub, but only the adapter "
                "is pushed. Choose 'every_save' or 'end'."
            )

    def learning_rate_of(self, part: str, common: float | None = None) -> float:
        """Learning rate of a part of the adapter.

        Args:
            part: one of ``measure.accounting.PARTS``.
            common: replaces ``learning_rate``.
        """
        own = getattr(self, f"{part}_learning_rate")
        common = self.learning_rate if common is None else common
        return common * LEARNING_RATE_FACTORS[part] if own is None else own

    def learning_rates_given(self) -> list[str]:
        """Names of the learning rates of parts that were set."""
        names = [f"{part}_learning_rate" for part in LEARNING_RATE_FACTORS]
        return [name for name in names if getattr(self, name) is not None]
