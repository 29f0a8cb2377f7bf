"""The token mixer of the portable stream: what the words of a sentence tell each other, in the canonical space."""

import math

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

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

    def forward(self, words: PackedSequence) -> PackedSequence:
        """The words of the batch's sentences, (N, K·D) → (N, F)."""
        x = self.dropout(nn.functional.gelu(nn.functional.linear(words.data, self.inward(), self.inward_bias())))
        weights = []
        for direction in self.directions:
            bias = direction["bias"]()
            weights += [direction["from_input"](), direction["from_state"](), bias, torch.zeros_like(bias)]
        state = x.new_zeros(2, int(words.batch_sizes[0]), self.hidden)
        out, _, _ = torch.lstm(
            x,
            words.batch_sizes,
            (state, state),
            weights,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=self.training,
            bidirectional=True,
        )
        return words._replace(data=self.dropout(out))
