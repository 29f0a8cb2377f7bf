"""Batches with sentences of several tasks: one pass of the host, with each sentence's own δθ, router term and head.

Letters: B sentences, Q different tasks in the batch, C labels of the task with the most labels, F inputs of a head.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from .reader import Watch


class OwnValues(NamedTuple):
    """Values of one task's parameters, as the file holds them."""

    delta: torch.Tensor  # (8, M)
    embedding: torch.Tensor  # (D,)
    head_weight: torch.Tensor  # (C, F)
    head_bias: torch.Tensor  # (C,)


class MixedTasks:
    """The tasks of the sentences of a batch.

    Attributes:
        names: names of the Q different tasks.
        rows: (B,) index of each sentence's task in ``names``.
    """

    def __init__(self, names: list[str], rows: torch.Tensor):
        self.names = names
        self.rows = rows

    def of(self, tasks: nn.ModuleDict) -> "StackedTasks":
        return StackedTasks([tasks[name] for name in self.names], self.rows)


class StackedTasks:
    """Parameters of Q tasks, stacked; they have the same names as the parameters of one task."""

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
        """(Q, C, F), 0 for missing labels of a task."""
        return nn.utils.rnn.pad_sequence([own.head_weight for own in self._values], batch_first=True)

    def head_bias(self) -> torch.Tensor:
        """(Q, C), -inf for missing labels of a task."""
        biases = [own.head_bias for own in self._values]
        return nn.utils.rnn.pad_sequence(biases, batch_first=True, padding_value=-torch.inf)

    @property
    def mean_gate(self) -> torch.Tensor:
        """(Q, M)."""
        return torch.stack([task.mean_gate for task in self._tasks])

    def linear(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply each sentence by its task's weights: states (B, …, F), weight (Q, C, F) → (B, …, C)."""
        own = weight[self.rows].transpose(1, 2)
        return states @ own if states.dim() == 3 else (states.unsqueeze(1) @ own).squeeze(1)

    def of_sentences(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Each sentence's own values: (Q, C) → (B, …, C), with the dimensions of ``like`` (B, …, F)."""
        own = values[self.rows]
        return own.unsqueeze(1) if like.dim() == 3 else own


def _values_of(task: nn.Module) -> OwnValues:
    """Values of a task; without gradients they are cached at the task until one of its parameters changes."""
    stored = [task.delta, task.embedding, task.head_weight, task.head_bias]
    kept = None if torch.is_grad_enabled() else task.__dict__.get("_kept_values")
    if kept is None or not kept[0].holds(stored):
        values = OwnValues(*(tensor() for tensor in stored))
        if torch.is_grad_enabled() or (watch := Watch(stored)).is_blind:
            return values
        kept = task.__dict__["_kept_values"] = (watch, values)
    return kept[1]
