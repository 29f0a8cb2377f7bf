"""The token mixer of the portable stream: what the words of a sentence tell each other, in the canonical space."""

import math

import torch
from torch import nn

from .quantization import Half, RowInteger, StoredTensor

STREAM_BITS = 8


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

    def forward(self, z: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(B, W, K·D) and the words of each sentence (B,) → (B, W, F); zero beyond a sentence's end."""
        x = self.dropout(nn.functional.gelu(nn.functional.linear(z, self.inward(), self.inward_bias())))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        weights = []
        for direction in self.directions:
            bias = direction["bias"]()
            weights += [direction["from_input"](), direction["from_state"](), bias, torch.zeros_like(bias)]
        state = x.new_zeros(2, len(lengths), self.hidden)
        out, _, _ = torch.lstm(
            packed.data,
            packed.batch_sizes,
            (state, state),
            weights,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=self.training,
            bidirectional=True,
        )
        packed = nn.utils.rnn.PackedSequence(out, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return self.dropout(nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=z.shape[1])[0])
