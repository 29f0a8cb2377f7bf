"""Search spaces: the default ones, and the checks of a run config's ``search_space``.

A hyperparameter's name is a key of the run config's ``adapter`` or ``training`` block (``lambda_F``, ``batch_size``)
or a flag of the script (``router_learning_rate``, ``reader``). A name that the run does not read is an error.
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
}  # for an injected update; a baseline uses the first two
TASK_SPACE = {
    "learning_rate": {"type": "loguniform", "low": 1e-3, "high": 2e-2},
    "batch_size": {"type": "categorical", "choices": [16, 32, 64]},
    "fidelity": {"type": "uniform", "low": 0.5, "high": 1.0},
    "reader": {"type": "categorical", "choices": ["small", "medium", "large"]},
}  # for a task of a stream
DELTA_SPACE = {
    "learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1e-1},
    "batch_size": {"type": "categorical", "choices": [16, 32, 64]},
    "lambda_Q": {"type": "loguniform", "low": 1e-6, "high": 1e-4},
}  # for δθ alone

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
SHAPE_FLAGS = "atoms anchor_dim space anchor_file".split()  # fixed once the adapter exists
READER_FLAGS = ("reader", "reader_bits")  # fixed once the task exists


def seed_of_draw(seed: int, trials: int) -> int:
    """Seed of a sampler after a number of trials, so that a resumed search repeats no draw."""
    return int(np.random.SeedSequence([seed, trials]).generate_state(1)[0])


@dataclass(frozen=True)
class Knob:
    """One hyperparameter of the search.

    Attributes:
        name: its name in the search space.
        flag: its flag of the script, without dashes.
        space: its distribution, as in the run config.
        convert: converts a value of the search space to a value of the flag.
    """

    name: str
    flag: str
    space: Mapping[str, Any]
    convert: Callable[[Any], Any] | None = None

    def suggest(self, trial) -> Any:
        """Let the trial choose a value from the distribution."""
        space = {key: value for key, value in self.space.items() if key != "type"}
        kind = self.space["type"]
        if kind == "categorical":
            return trial.suggest_categorical(self.name, space["choices"])
        if kind == "int":
            return trial.suggest_int(self.name, **space)
        return trial.suggest_float(self.name, **space, **({"log": True} if kind == "loguniform" else {}))

    def typed(self, value: Any) -> list[str]:
        """The value as command-line arguments."""
        value = self.convert(value) if self.convert else value
        return [f"--{self.flag}", str(value).lower() if isinstance(value, bool) else str(value)]

    def some_values(self) -> list[Any]:
        """Both ends of the range, or all choices; if a run accepts these, it accepts the whole distribution."""
        return list(self.space.get("choices") or (self.space["low"], self.space["high"]))


def knobs_of(space: Mapping[str, Any], keys: Mapping[str, Any], method: str, where: str) -> list[Knob]:
    """Check a search space and return its hyperparameters.

    Args:
        space: name → distribution.
        keys: keys of the run config's training and adapter blocks, as ``run_config.Key``.
        method: method of the run.
        where: prefix of error messages.

    Raises:
        ConfigError: a run of this method does not read a name, or a distribution is not usable.
    """
    flags = [*TRAINING_FLAGS, *(ADAPTER_FLAGS if method == "unihyperlora" else ["lora_r"] if method == "lora" else [])]
    named = {
        name: key
        for name, key in keys.items()
        if key.flag in flags or (key.kind in (int, float) and not key.allowed)  # any number that is not fixed
    }
    searchable = sorted({*named, *flags})
    knobs: list[Knob] = []
    for name, distribution in space.items():
        what = f"{where}: 'optuna.search_space.{name}'"
        if name not in searchable:
            nearest = difflib.get_close_matches(str(name), searchable, n=1, cutoff=0)[0]
            raise ConfigError(
                f"{what} is unknown: a run with --method {method} does not read it. The nearest name is '{nearest}'; "
                f"all names: {', '.join(searchable)}."
            )
        _check(distribution, what)
        key = named.get(name)
        knob = Knob(name, (key and key.flag) or name, distribution, key.convert if key else None)
        if knob.flag in (other.flag for other in knobs):
            raise ConfigError(f"{what} is a second name for --{knob.flag}; keep one of the two names.")
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
        whole = " The type int needs whole numbers." if kind == "int" else ""
        advice = f"Give low < high (low > 0 with log), and either a step above 0 or log, not both.{whole}"
    if not usable:
        raise ConfigError(f"{what} has no usable range: {dict(space)!r}. {advice}")
