"""In which order a stream reads its training sentences, and as which host."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

OWN_SHARE = 0.5  # of the sentences that are read as the host itself, and not as a copy of it
TOGETHER = 64  # neighbouring sentences that an epoch has in the same view, so that one product makes it for all


class SentenceSampler(Sampler[int]):
    """Every sentence once an epoch, in random order, those of a block of ``TOGETHER`` in one of their views at random.

    What an epoch looks like depends on its number and the seed alone, so that a run that was interrupted sees what it
    would have seen.

    Args:
        sentences: how many there are.
        views: of a sentence; the first is its host itself, the others are copies.
        seed: of the run.

    Yields:
        ``view * sentences + index``.
    """

    def __init__(self, sentences: int, views: int, seed: int):
        self.sentences = sentences
        self.views = views
        self.seed = seed
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
            view[torch.rand(blocks, generator=generator) < OWN_SHARE] = 0
            order += view[order // TOGETHER] * self.sentences
        return iter(order.tolist())
