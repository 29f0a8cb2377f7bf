"""The token mixer of the portable stream: what the words of a sentence tell each other, in the canonical space."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .quantization import Half, RowInteger, StoredTensor

STREAM_BITS = 8
GROUP = 8  # sentences that the CPU reads together, each group padded to its own longest


class Words(NamedTuple):
    """Where the N words of B sentences lie among rows: those of a sentence one after the other.

    ``starts`` and ``lengths`` (B,): first row of a sentence, and how many words it has. ``sentence`` and ``place``
    (N,): of each row the sentence, and how many words of it come before; a row that no sentence counts among its words
    has a place from its length on.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    sentence: torch.Tensor
    place: torch.Tensor

    @classmethod
    def one_after_the_other(cls, lengths: torch.Tensor, total: int) -> "Words":
        """Sentences without a gap, ``total`` words in all."""
        starts = lengths.cumsum(dim=0) - lengths
        numbers = torch.arange(len(lengths), device=lengths.device)
        sentence = numbers.repeat_interleave(lengths, output_size=total)
        place = torch.arange(total, device=lengths.device) - starts[sentence]
        return cls(starts, lengths, sentence, place)

    @classmethod
    def in_rows(cls, lengths: torch.Tensor, width: int) -> "Words":
        """``width`` rows for each sentence, however long it is."""
        cells = torch.arange(len(lengths) * width, device=lengths.device)
        return cls(cells[::width], lengths, cells // width, cells % width)


def with_neighbours(
    z: torch.Tensor, place: torch.Tensor, length: torch.Tensor, total: int, dim: int = 0
) -> list[torch.Tensor]:
    """Rows of words, then of the word before each, of the one after it, of the second before it, and so on.

    Args:
        z: (…, w) whose words lie along ``dim``, those of a sentence one after the other.
        place, length: (…) of each row how many words of its sentence come before it, and how many there are in all.
        total: numbers a word in all that is returned, a multiple of w; rows of words that are not there are 0.
    """
    parts = []
    for number in range(total // z.shape[-1]):
        step = (number + 1) // 2 * (1 if number % 2 == 0 else -1)
        inside = (place + step >= 0) & (place + step < length)
        parts.append(z.roll(-step, dim) * inside.unsqueeze(-1) if step else z)
    return parts


class TokenMixer(nn.Module):
    """Linear map, GELU, bidirectional LSTM over words; all matrices in 8 bits.

    Args:
        inputs: K·D.
        width: of the linear map.
        hidden: of each direction of the LSTM; features F = 2·hidden.
        dropout: before and after the LSTM, in training.
    """

    def __init__(self, inputs: int, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        codec = RowInteger(STREAM_BITS)
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

    def weights(self) -> list[torch.Tensor]:
        """The values of all its tensors: of the linear map, then of both directions."""
        values = [self.inward(), self.inward_bias()]
        for direction in self.directions:
            bias = direction["bias"]()
            values += [direction["from_input"](), direction["from_state"](), bias, torch.zeros_like(bias)]
        return values

    def forward(self, z: torch.Tensor, words: Words, weights: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The words of the batch's sentences, (N, K·D) → (N, F); ``weights`` where they are known already.

        Backwards a sentence is read from its last word on, so that nothing comes before it; what is read after its
        first word is not looked at.
        """
        inward, bias, *weights = self.weights() if weights is None else weights
        x = self.dropout(F.gelu(F.linear(z, inward, bias)))
        starts, lengths, sentence, place = words
        onward, back = [], []
        rows = torch.zeros_like(lengths)  # a sentence's first among the outputs of all groups
        done = 0
        for chosen in self._groups(lengths, len(x)):
            first, count = starts[chosen, None], lengths[chosen, None]
            longest = len(x) // len(lengths) if torch.compiler.is_compiling() else int(count.max())
            step = torch.arange(longest, device=x.device)
            inside = step < count
            ahead = torch.where(inside, first + step, first)
            behind = torch.where(inside, first + count - 1 - step, first)
            onward.append(self._read(x[ahead], weights[:4]))
            back.append(self._read(x[behind], weights[4:]))
            rows[chosen] = done + torch.arange(len(chosen), device=x.device) * longest
            done += inside.numel()
        at, mirrored = rows[sentence], lengths[sentence] - 1 - place
        ends = [torch.cat(onward)[at + place], torch.cat(back)[at + torch.where(mirrored >= 0, mirrored, place)]]
        return self.dropout(torch.cat(ends, dim=-1))

    def _groups(self, lengths: torch.Tensor, words: int) -> tuple[torch.Tensor, ...]:
        """Sentences that are read together: on the CPU a few of similar length."""
        if torch.compiler.is_compiling() or lengths.device.type != "cpu" or len(lengths) <= GROUP:
            return (torch.arange(len(lengths), device=lengths.device),)
        return lengths.argsort(descending=True).split(GROUP)

    def _read(self, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """One direction of the recurrent layer, (b, w, …) → (b·w, hidden)."""
        state = x.new_zeros(1, len(x), self.hidden)
        out, _, _ = torch.lstm(x, (state, state), weights, True, 1, 0.0, self.training, False, True)
        return out.flatten(0, 1)
