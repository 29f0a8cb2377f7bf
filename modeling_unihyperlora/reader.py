"""Tasks of a stream: each has a small recurrent reader of canonical states, a head, and δθ.

Letters: B sentences, W words of a sentence, N words of a batch, K knots, D coordinates per knot, M atoms, F features
of a word, C labels.

The reader of a task takes the coordinates z of a word at all knots. It is a linear map, GELU, and a bidirectional LSTM
over the words of the sentence. The head is linear. δθ is tuned on one host: it changes the coordinates from that
host's map along the atoms of the space, before the reader, at every knot k:

    z_k ← z_k + Σ_j δθ(k)_j · u_j (v_jᵀ z_k)

Nothing here depends on the host's width, depth or tokenizer.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .errors import ConfigError
from .space import KNOTS, CanonicalSpace
from .storage import Grid, Half, RowInteger, StoredTensor
from .words import Continuation

HEAD_BITS = 8
DELTA_ROWS = 8  # rows of δθ: one for all knots, one for their depth, one for each of up to six knots
TOGETHER = 8  # sentences in a group that the CPU reads together, padded to the longest of the group

# Width of the linear map and of each direction of the LSTM.
READERS = {"small": (64, 32), "medium": (96, 64), "large": (160, 128)}


class Words(NamedTuple):
    """Layout of the words of B sentences in N rows; the words of a sentence are consecutive.

    Attributes:
        lengths: (B,) number of words of each sentence.
        width: rows per sentence; rows after a sentence's last word are padding. None: there is no padding.
        is_full: whether all sentences are known to have the same number of words, without padding.
    """

    lengths: torch.Tensor
    width: int | None = None
    is_full: bool = False

    def starts(self) -> torch.Tensor:
        """First row of each sentence, (B,)."""
        if self.width is None:
            return self.lengths.cumsum(dim=0) - self.lengths
        return torch.arange(len(self.lengths), device=self.lengths.device) * self.width

    def of_rows(self, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sentence of each row, and position of the row's word in its sentence, (N,) each; ``total`` is N."""
        if self.width is not None:
            rows = torch.arange(total, device=self.lengths.device)
            return rows // self.width, rows % self.width
        numbers = torch.arange(len(self.lengths), device=self.lengths.device)
        sentence = numbers.repeat_interleave(self.lengths, output_size=total)
        return sentence, torch.arange(total, device=self.lengths.device) - self.starts()[sentence]


class Reader(nn.Module):
    """Linear map, GELU, bidirectional LSTM over words.

    Args:
        inputs: K·D.
        width: output width of the linear map.
        hidden: width of each direction of the LSTM; F = 2·hidden.
        bits: bits of the matrices, 4 or 8.
        dropout: dropout before and after the LSTM, in training.
    """

    def __init__(self, inputs: int, width: int, hidden: int, bits: int = 8, dropout: float = 0.2):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        codec = RowInteger(bits)
        self.inward = StoredTensor(torch.randn(width, inputs) / math.sqrt(inputs), codec)
        self.inward_bias = StoredTensor(torch.zeros(width), Half())
        bound = 1 / math.sqrt(hidden)

        def uniform(*shape: int) -> torch.Tensor:
            return torch.empty(shape).uniform_(-bound, bound)

        self.directions = nn.ModuleList(
            nn.ModuleDict(
                {
                    "from_input": StoredTensor(uniform(4 * hidden, width), codec),
                    "from_state": StoredTensor(uniform(4 * hidden, hidden), codec),
                    "bias": StoredTensor(uniform(4 * hidden), Half()),
                }
            )
            for _ in range(2)
        )
        self.hidden = hidden

    def values(self) -> "ReaderValues":
        """Values of the tensors for a forward pass."""
        directions = []
        for direction in self.directions:
            bias = direction["bias"]()
            directions.append([direction["from_input"](), direction["from_state"](), bias, torch.zeros_like(bias)])
        return ReaderValues(self.inward(), self.inward_bias(), directions, packed(directions, self.hidden))

    def forward(self, z: torch.Tensor, words: Words, values: "ReaderValues | None" = None) -> torch.Tensor:
        """Words (N, K·D) → features (N, F); ``values`` is the result of ``values()``, if known.

        The backward direction starts at a sentence's last word, so padding never comes before it; outputs after the
        sentence's first word are not used.
        """
        values = self.values() if values is None else values
        x = self.dropout(F.gelu(F.linear(z, values.inward, values.inward_bias)))
        lengths = words.lengths
        if words.is_full:  # both directions read the same rows
            rows = x.view(len(lengths), -1, x.shape[1])
            return self.dropout(joined([self._read(some, values, (0, 1)) for some in rows.split(_together(lengths))]))
        starts, (sentence, place) = words.starts(), words.of_rows(len(x))
        onward, back = [], []
        rows = torch.zeros_like(lengths)  # first row of each sentence among the outputs of all groups
        done = 0
        for chosen in self._groups(lengths):
            first, count = starts[chosen, None], lengths[chosen, None]
            longest = len(x) // len(lengths) if torch.compiler.is_compiling() else int(count.max())
            step = torch.arange(longest, device=x.device)
            inside = step < count
            ahead = torch.where(inside, first + step, first)
            behind = torch.where(inside, first + count - 1 - step, first)
            onward.append(self._read(x[ahead], values, (0,)))
            back.append(self._read(x[behind], values, (1,)))
            rows[chosen] = done + torch.arange(len(chosen), device=x.device) * longest
            done += inside.numel()
        at, mirrored = rows[sentence], lengths[sentence] - 1 - place
        ends = [joined(onward)[at + place], joined(back)[at + torch.where(mirrored >= 0, mirrored, place)]]
        return self.dropout(torch.cat(ends, dim=-1))

    @staticmethod
    def _groups(lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Groups of sentences of similar length to read together."""
        together = _together(lengths)
        if torch.compiler.is_compiling() or len(lengths) <= together:
            return (torch.arange(len(lengths), device=lengths.device),)
        return lengths.argsort(descending=True).split(together)

    def _read(self, x: torch.Tensor, values: "ReaderValues", which: tuple[int, ...]) -> torch.Tensor:
        """Directions of the LSTM, (0,), (1,), or (0, 1) with the second one backwards: (b, w, …) → (b·w, …)."""
        is_packed = values.packed is not None and not self.training and not torch.is_grad_enabled()
        if is_packed and not torch.is_autocast_enabled(x.device.type):
            steps, state = x.transpose(0, 1).contiguous(), x.new_zeros(len(x), self.hidden)
            out = [
                _packed_lstm(steps, state, values.packed[number], backwards=at == 1) for at, number in enumerate(which)
            ]
            return torch.cat(out, dim=-1).transpose(0, 1).flatten(0, 1)
        weights = [weight for number in which for weight in values.directions[number]]
        state = x.new_zeros(len(which), len(x), self.hidden)
        out, _, _ = torch.lstm(x, (state, state), weights, True, 1, 0.0, self.training, len(which) == 2, True)
        return out.flatten(0, 1)


def _together(lengths: torch.Tensor) -> int:
    """How many sentences are read together; on the CPU a small group."""
    return TOGETHER if lengths.device.type == "cpu" else max(1, len(lengths))


class ReaderValues(NamedTuple):
    """The values of a reader, as its file holds them."""

    inward: torch.Tensor  # (width, K·D)
    inward_bias: torch.Tensor  # (width,)
    directions: list[list[torch.Tensor]]  # of the LSTM, as torch.lstm takes them
    packed: list[list[torch.Tensor]] | None  # the same in the order that the CPU's library reads, see ``packed``


def packed(directions: list[list[torch.Tensor]], hidden: int) -> list[list[torch.Tensor]] | None:
    """Weights of an LSTM, rearranged once for oneDNN; torch.lstm rearranges them in every call.

    Returns:
        None where oneDNN is not used: in training, in compiled code, on a GPU, and without oneDNN.
    """
    first = directions[0][0]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or first.device.type != "cpu":
        return None
    rearrange = getattr(torch.ops.mkldnn, "_reorder_mkldnn_rnn_layer_weight", None)
    if rearrange is None or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    return [[*rearrange(into, own, hidden, False, True, False), *biases] for into, own, *biases in directions]


def _packed_lstm(
    steps: torch.Tensor, state: torch.Tensor, weights: list[torch.Tensor], backwards: bool
) -> torch.Tensor:
    """One direction: steps (w, b, width) and the first state (b, hidden) → (w, b, hidden)."""
    lstm, layers = 2, 1  # 2 is torch's number for an LSTM among the kinds of recurrent layers
    how = ([], lstm, state.shape[1], layers, True, False, False, False)
    return torch.mkldnn_rnn_layer(steps, *weights, state, state, backwards, *how)[0]


class StreamTask(nn.Module):
    """Parameters of one task: a reader, a head (C, F) with bias (C,), and δθ (8, M).

    Args:
        inputs: K·D.
        labels: C.
        atoms: M.
        shape: "width", "hidden" and "bits" of the reader.
        delta_step: step size of the 4-bit δθ.
    """

    def __init__(self, inputs: int, labels: int, atoms: int, shape: dict[str, int], delta_step: float, dropout: float):
        super().__init__()
        self.reader = Reader(inputs, **shape, dropout=dropout)
        self.head_weight = StoredTensor(torch.zeros(labels, 2 * self.reader.hidden), RowInteger(HEAD_BITS))
        self.head_bias = StoredTensor(torch.zeros(labels), Half())
        self.delta = StoredTensor(torch.zeros(DELTA_ROWS, atoms), Grid(delta_step))

    def values(self, space: nn.Module, labels: list[str]) -> "TaskValues":
        """Values of the task's parameters for a forward pass; ``labels`` are the task's own."""
        own = self.amended(space), self.reader.values(), self.head_weight(), self.head_bias()
        return TaskValues(*own, Continuation.of(labels, self.delta.latent.device))

    def amended(self, space: nn.Module) -> torch.Tensor | None:
        """Matrices (K, D, D) by which δθ changes z to z + z @ amended; None if δθ is zero."""
        delta = self.delta()
        if not torch.compiler.is_compiling() and not delta.requires_grad and not delta.any():
            return None
        places = knot_features(torch.tensor(KNOTS, device=delta.device))
        atoms_in, atoms_out = space.atoms_in(), space.atoms_out()
        return torch.einsum("md,km,me->kde", atoms_in, places @ delta, atoms_out)

    def forward(self, z: torch.Tensor, words: Words, values: "TaskValues") -> torch.Tensor:
        """Words (N, K, D) → features (N, F)."""
        if values.amended is not None:
            by_knot = z.transpose(0, 1)  # (K, N, D)
            z = torch.baddbmm(by_knot, by_knot, values.amended).transpose(0, 1)
        return self.reader(z.flatten(1), words, values.reader)


class TaskValues(NamedTuple):
    """The values of a task, as its file holds them."""

    amended: torch.Tensor | None  # (K, D, D): δθ changes z to z + z @ amended; None if δθ is zero
    reader: ReaderValues
    head_weight: torch.Tensor  # (C, F)
    head_bias: torch.Tensor  # (C,)
    continuation: Continuation


def knot_features(knots: torch.Tensor) -> torch.Tensor:
    """Factors of the rows of δθ at each knot, [1, depth, one-hot of the knot]: (K,) → (K, 8)."""
    which = torch.eye(len(knots), DELTA_ROWS - 2, device=knots.device)
    return torch.cat([torch.ones_like(knots)[:, None], knots[:, None], which], dim=-1)


class Adapter(nn.Module):
    """Base class of the adapters of both pathways: tasks by name, and values cached between passes."""

    tasks: nn.ModuleDict

    def __init__(self, config):
        super().__init__()
        self.config = config
        self._kept: dict[str, tuple[Watch, dict[Hashable, Any]]] = {}  # task → watch on its tensors, what was made

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # packed weights cannot be copied

    def keep(self, task: str, name: Hashable, make: Callable[[], Any]) -> Any:
        """Result of ``make`` without autocast, cached under ``name`` between forward passes without gradients.

        ``make`` may use one task and the parts that all tasks share. Its result is made anew after a tensor of these
        has changed, and always with gradients. Other tasks, of which there may be thousands, are not checked.
        """
        if torch.compiler.is_compiling():  # a compiled graph cannot use the cache
            return self._make(make)
        if torch.is_grad_enabled():
            self._kept = {}
            return self._make(make)
        modules = [self.tasks[task], *(part for part_name, part in self._modules.items() if part_name != "tasks")]
        if task not in self._kept or not self._kept[task][0].holds(modules):
            watch = Watch(modules)
            if watch.is_blind:
                return self._make(make)
            self._kept[task] = (watch, {})
        kept = self._kept[task][1]
        if name not in kept:
            kept[name] = self._make(make)
        return kept[name]

    def _make(self, make: Callable[[], Any]) -> Any:
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return make()


class Watch:
    """Notices that a tensor of some modules was changed, moved or replaced; every pass asks, so it has to be fast.

    Attributes:
        is_blind: whether there is an inference tensor, whose changes cannot be noticed.
    """

    def __init__(self, modules: list[nn.Module]):
        self._modules = modules
        self._places: list[tuple[dict, str, nn.Module | torch.Tensor | None]] = []
        below = list(modules)
        for module in below:  # the loop also reaches the modules that it appends
            for owner in (module._parameters, module._buffers, module._modules):
                self._places.extend((owner, name, value) for name, value in owner.items())
            below.extend(part for part in module._modules.values() if part is not None)
        self._tensors = [value for _, _, value in self._places if isinstance(value, torch.Tensor)]
        self.is_blind = any(tensor.is_inference() for tensor in self._tensors)
        self._state = None if self.is_blind else self._read()

    def holds(self, modules: list[nn.Module]) -> bool:
        """Whether these are the watched modules, with the tensors and values that they had."""
        if modules != self._modules:
            return False
        for owner, name, value in self._places:
            if owner.get(name) is not value:
                return False
        return self._read() == self._state

    def _read(self) -> list[tuple[int, int]]:
        return [(tensor._version, tensor.data_ptr()) for tensor in self._tensors]


class StreamAdapter(Adapter):
    """A canonical space and its tasks."""

    def __init__(self, config, space: CanonicalSpace | None = None):
        super().__init__(config)
        self.space = CanonicalSpace(**config.space) if space is None else space
        self.tasks = nn.ModuleDict()
        for name in config.tasks:
            self.add(name)

    def add(self, name: str) -> None:
        """Add the parameters of a task that the configuration describes."""
        task, space = self.config.tasks[name], self.space.shape()
        sizes = (len(KNOTS) * space["dim"], len(task["labels"]), space["atoms"])
        own = StreamTask(*sizes, task["reader"], self.config.delta_step, self.config.dropout)
        self.tasks[name] = own.to(self.space.text.device).train(self.training)

    def values(self, task: str) -> TaskValues:
        labels = self.config.tasks[task]["labels"]
        return self.keep(task, ("values", *labels), lambda: self.tasks[task].values(self.space, labels))


def sentences_by_task(
    task_ids: torch.Tensor | Sequence[str], known: list[str], sentences: int, device: torch.device
) -> tuple[list[str], torch.Tensor]:
    """The different tasks of a batch, and the index (B,) of each sentence's task among them.

    Args:
        task_ids: B names, or (B,) indices into ``known``.
        known: names of the adapter's tasks.
        sentences: B.

    Raises:
        ConfigError: the number of tasks differs from the number of sentences, or the adapter lacks a task.
    """
    ids = task_ids.tolist() if isinstance(task_ids, torch.Tensor) else list(task_ids)
    if not isinstance(ids, list) or len(ids) != sentences:
        given = len(ids) if isinstance(ids, list) else "one number"
        raise ConfigError(f"task_ids must name one task for each of the {sentences} sentences; given: {given}.")
    rows: dict[str, int] = {}
    for value in dict.fromkeys(ids):
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and not 0 <= value < len(known):
            raise ConfigError(f"task_ids has {value}; the adapter has {len(known)} tasks, numbered from 0.")
        if not is_number and value not in known:
            raise ConfigError(f"task_ids has {value!r}, which is not a task of the adapter; it has {known[:10]}.")
        rows[value] = len(rows)
    names = [known[value] if isinstance(value, int) else value for value in rows]
    return names, torch.tensor([rows[value] for value in ids], device=device)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts one after the other; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(words: torch.Tensor, cells: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Put values of words (N, …) into (B, W, …) at the flat positions ``cells`` (N,); other positions are 0."""
    padded = words.new_zeros(shape[0] * shape[1], *words.shape[1:])
    return padded.index_copy(0, cells, words).view(*shape, *words.shape[1:])
