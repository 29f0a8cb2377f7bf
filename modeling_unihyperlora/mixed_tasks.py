"""Sentences of several tasks in one batch: the host reads them together, and each has its own δθ, router and head.

Letters: B sentences, Q different tasks among them, C labels of the task that has most, F inputs of a head.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn


class OwnValues(NamedTuple):
    """What one task has of its own, as its file holds it."""

    delta: torch.Tensor  # (8, M)
    embedding: torch.Tensor  # (D,)
    head_weight: torch.Tensor  # (C, F)
    head_bias: torch.Tensor  # (C,)


class MixedTasks:
    """Which task each sentence of a batch is of.

    Attributes:
        names: the Q different tasks.
        rows: (B,) which of them a sentence is of.
    """

    def __init__(self, names: list[str], rows: torch.Tensor):
        self.names = names
        self.rows = rows

    def of(self, tasks: nn.ModuleDict) -> "StackedTasks":
        return StackedTasks([tasks[name] for name in self.names], self.rows)


class StackedTasks:
    """The parameters of Q tasks side by side, by the names that one task has for them."""

    def __init__(self, tasks: list[nn.Module], rows: torch.Tensor):
        self.rows = rows
        self._tasks = tasks

    @cached_property
    def _values(self) -> list[OwnValues]:
        return [_values_of(task) for task in self._tasks]

    def delta(self) -> torch.Tensor:
        """(Q, 8, M)."""
        return torch.stack([own.delta for own in self._values])

    def embedding(self) -> torch.Tensor:
        """(Q, D)."""
        return torch.stack([own.embedding for own in self._values])

    def head_weight(self) -> torch.Tensor:
        """(Q, C, F), 0 for labels that a task does not have."""
        return nn.utils.rnn.pad_sequence([own.head_weight for own in self._values], batch_first=True)

    def head_bias(self) -> torch.Tensor:
        """(Q, C), -inf for labels that a task does not have."""
        biases = [own.head_bias for own in self._values]
        return nn.utils.rnn.pad_sequence(biases, batch_first=True, padding_value=-torch.inf)

    @property
    def mean_gate(self) -> torch.Tensor:
        """(Q, M)."""
        return torch.stack([task.mean_gate for task in self._tasks])

    def linear(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Each sentence by its own task's weights: (B, …, F), (Q, C, F) → (B, …, C)."""
        own = weight[self.rows].transpose(1, 2)
        return states @ own if states.dim() == 3 else (states.unsqueeze(1) @ own).squeeze(1)

    def of_sentences(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(Q, C) → (B, …, C), for states (B, …, F)."""
        own = values[self.rows]
        return own.unsqueeze(1) if like.dim() == 3 else own


def _values_of(task: nn.Module) -> OwnValues:
    """Kept with the task between passes that need no gradient, until one of its parameters has changed."""
    stored = (task.delta, task.embedding, task.head_weight, task.head_bias)
    latents = [tensor.latent for tensor in stored]
    if torch.is_grad_enabled() or any(latent.is_inference() for latent in latents):
        return OwnValues(*(tensor() for tensor in stored))
    state = [(latent._version, latent.data_ptr(), latent.device) for latent in latents]
    kept = task.__dict__.get("_kept_values")
    if kept is None or kept[0] != state:
        kept = task.__dict__["_kept_values"] = (state, OwnValues(*(tensor() for tensor in stored)))
    return kept[1]
