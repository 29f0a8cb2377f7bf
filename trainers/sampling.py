"""The order in which a stream reads its training sentences, and the view (host or copy) of each sentence."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

TOGETHER = 64  # neighbouring sentences that share a view in an epoch, so that one matrix product serves all of them


class SentenceSampler(Sampler[int]):
    """Yields every sentence once an epoch, in random order. Each block of ``TOGETHER`` sentences has one random view.

    The order depends only on the seed and the number of the epoch, so a resumed run reads the same sentences.

    Args:
        sentences: number of sentences.
        views: number of views of a sentence; view 0 is the host itself, the others are copies of it.
        seed: random seed of the run.
        copy_share: share of the sentences that are read with copies, where there are any.

    Yields:
        ``view * sentences + index``.
    """

    def __init__(self, sentences: int, views: int, seed: int, copy_share: float = 0.5):
        self.sentences = sentences
        self.views = views
        self.seed = seed
        self.copy_share = copy_share
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
            view = torch.randint(1, self.views, (blocks,), generator=generator)
            view[torch.rand(blocks, generator=generator) < 1 - self.copy_share] = 0
            order += view[order // TOGETHER] * self.sentences
        return iter(order.tolist())
