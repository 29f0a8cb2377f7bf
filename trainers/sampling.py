"""The order in which a stream reads its training sentences, and the view (host or copy) of each sentence."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

CAUSAL_SHARE = 0.4  # share of the causal copies among the copies, where there are any
TOGETHER = 64  # neighbouring sentences that share a view in an epoch, so that one matrix product serves all of them


class SentenceSampler(Sampler[int]):
    """Yields every sentence once an epoch, in random order. Each block of ``TOGETHER`` sentences has one random view.

    The order depends only on the seed and the number of the epoch, so a resumed run reads the same sentences.

    Args:
        sentences: number of sentences.
        views: number of views of a sentence; view 0 is the host itself, the others are narrow copies of it.
        seed: random seed of the run.
        copy_share: share of the sentences that are read with copies, where there are any.
        causal: whether as many views of a causal copy follow. They have ``CAUSAL_SHARE`` of the copies; half of these
            are the causal copy itself, the others narrow copies of it.

    Yields:
        ``view * sentences + index``.
    """

    def __init__(self, sentences: int, views: int, seed: int, copy_share: float = 0.6, causal: bool = False):
        self.sentences = sentences
        self.views = views
        self.seed = seed
        self.copy_share = copy_share
        self.causal = causal
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.sentences

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.sentences, generator=generator)
        if self.views > 1:
            blocks = -(-self.sentences // TOGETHER)
            narrow = torch.randint(1, self.views, (blocks,), generator=generator)
            drawn = torch.rand(blocks, generator=generator)
            causal_share = CAUSAL_SHARE * self.copy_share if self.causal else 0.0
            is_causal = drawn < causal_share
            is_whole = torch.where(is_causal, drawn < causal_share / 2, drawn >= self.copy_share)
            view = torch.where(is_whole, 0, narrow) + is_causal * self.views
            order += view[order // TOGETHER] * self.sentences
        return iter(order.tolist())
