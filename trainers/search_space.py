"""What a search may vary, and how: the ``search_space`` of a run config, checked, and what is varied by default.

A name is a key of the run config's ``adapter`` or ``training`` block (``lambda_F``, ``batch_size``) or a flag of the
script (``router_learning_rate``, ``reader``). A name that a run would not read is an error.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_unihyperlora.errors import ConfigError

PAPER_SPACE = {
    "learning_rate": {"type": "loguniform", "low": 5e-5, "high": 5e-4},
    "batch_size": {"type": "categorical", "choices": [32, 64, 128]},
    "lambda_F": {"type": "uniform", "low": 0.01, "high": 0.1},
    "lambda_Q": {"type": "loguniform", "low": 1e-6, "high": 1e-4},
    "router_top_k": {"type": "int", "low": 1, "high": 3},
}  # of an injected update; a baseline has the first two
TASK_SPACE = {
    "learning_rate": {"type": "loguniform", "low": 1e-3, "high": 2e-2},
    "batch_size": {"type": "categorical", "choices": [16, 32, 64]},
    "fidelity": {"type": "uniform", "low": 0.5, "high": 1.0},
    "reader": {"type": "categorical", "choices": ["small", "medium", "large"]},
}  # of a stream's task
DELTA_SPACE = {
    "learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1e-1},
    "batch_size": {"type": "categorical", "choices": [16, 32, 64]},
    "lambda_Q": {"type": "loguniform", "low": 1e-6, "high": 1e-4},
}  # of δθ alone

_KEYS = {
    "uniform": {"low", "high", "log", "step"},
    "loguniform": {"low", "high"},
    "int": {"low", "high", "log", "step"},
    "categorical": {"choices"},
}

TRAINING_FLAGS = (
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps "
    "warmup_steps lr_scheduler_type optim per_device_train_batch_size gradient_accumulation_steps "
    "label_smoothing_factor seed"
).split()
STREAM_FLAGS = "reader reader_bits space anchor_file fidelity copy_fidelity reader_learning_rate".split()
INJECTED_FLAGS = (
    "lambda_f atoms anchor_dim router_top_k dictionary_learning_rate projector_learning_rate mixer_learning_rate "
    "router_learning_rate"
).split()
ADAPTER_FLAGS = [*INJECTED_FLAGS, "lambda_q", "delta_learning_rate", "head_learning_rate", *STREAM_FLAGS]
SHAPE_FLAGS = "atoms anchor_dim space anchor_file".split()  # fixed once there is an adapter
READER_FLAGS = ("reader", "reader_bits")  # fixed once there is the task


def seed_of_draw(seed: int, trials: int) -> int:
    """Seed of a sampler that goes on after so many trials: no draw is repeated when a search goes on."""
    return int(np.random.SeedSequence([seed, trials]).generate_state(1)[0])


@dataclass(frozen=True)
class Knob:
    """One thing that is varied.

    Attributes:
        name: as the search space calls it.
        flag: of the script, without dashes.
        space: its distribution, as in the run config.
        convert: from a value of the space to one of the flag.
    """

    name: str
    flag: str
    space: Mapping[str, Any]
    convert: Callable[[Any], Any] | None = None

    def suggest(self, trial) -> Any:
        """The trial's value, in the terms of the space."""
        space = {key: value for key, value in self.space.items() if key != "type"}
        kind = self.space["type"]
        if kind == "categorical":
            return trial.suggest_categorical(self.name, space["choices"])
        if kind == "int":
            return trial.suggest_int(self.name, **space)
        return trial.suggest_float(self.name, **space, **({"log": True} if kind == "loguniform" else {}))

    def typed(self, value: Any) -> list[str]:
        """The value as it would be typed."""
        value = self.convert(value) if self.convert else value
        return [f"--{self.flag}", str(value).lower() if isinstance(value, bool) else str(value)]

    def some_values(self) -> list[Any]:
        """The ends of the range, or all choices: what has to be usable for the whole to be."""
        return list(self.space.get("choices") or (self.space["low"], self.space["high"]))


def knobs_of(space: Mapping[str, Any], keys: Mapping[str, Any], method: str, where: str) -> list[Knob]:
    """The knobs of a search space.

    Args:
        space: name → distribution.
        keys: of the run config's training and adapter blocks; each a ``run_config.Key``.
        method: of the run.
        where: what an error says in front.

    Raises:
        ConfigError: a run of this method reads no such name, or its distribution is not usable.
    """
    flags = [*TRAINING_FLAGS, *(ADAPTER_FLAGS if method == "unihyperlora" else ["lora_r"] if method == "lora" else [])]
    named = {
        name: key
        for name, key in keys.items()
        if key.flag in flags or (key.kind in (int, float) and not key.allowed)  # a size of the method
    }
    searchable = sorted({*named, *flags})
    knobs: list[Knob] = []
    for name, distribution in space.items():
        what = f"{where}: 'optuna.search_space.{name}'"
        if name not in searchable:
            nearest = difflib.get_close_matches(str(name), searchable, n=1, cutoff=0)[0]
            raise ConfigError(
                f"{what} is nothing that a run reads, with --method {method}. The nearest name is '{nearest}'; all: "
                f"{', '.join(searchable)}."
            )
        _check(distribution, what)
        key = named.get(name)
        knob = Knob(name, (key and key.flag) or name, distribution, key.convert if key else None)
        if knob.flag in (other.flag for other in knobs):
            raise ConfigError(f"{what} names --{knob.flag} for the second time; keep one of the names.")
        knobs.append(knob)
    return knobs


def _check(space: Any, what: str) -> None:
    kind = space.get("type") if isinstance(space, Mapping) else None
    if kind not in _KEYS:
        raise ConfigError(f"{what} needs a type, one of {', '.join(_KEYS)}; got {space!r}.")
    unknown = set(space) - _KEYS[kind] - {"type"}
    if unknown:
        raise ConfigError(f"{what}: unknown key '{min(unknown)}'; {kind} takes {sorted(_KEYS[kind])}.")
    if kind == "categorical":
        choices = space.get("choices")
        usable = isinstance(choices, list) and len(choices) > 0
        usable = usable and all(isinstance(choice, bool | int | float | str) for choice in choices)
        advice = "Give choices: a list of numbers or names."
    else:
        low, high, step = space.get("low"), space.get("high"), space.get("step")
        log = kind == "loguniform" or space.get("log", False)
        numbers = int if kind == "int" else int | float
        usable = all(isinstance(x, numbers) and not isinstance(x, bool) for x in (low, high))
        usable = usable and isinstance(log, bool) and low < high and (not log or low > 0)
        usable = usable and (step is None or (isinstance(step, numbers) and 0 < step <= high - low and not log))
        whole = " Whole numbers for int." if kind == "int" else ""
        advice = f"Give low < high (above 0 where log), and a step above 0 or log, not both.{whole}"
    if not usable:
        raise ConfigError(f"{what} has no usable range: {dict(space)!r}. {advice}")
