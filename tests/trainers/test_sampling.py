"""The order of an epoch: all sentences, in different views, and the same order after an interruption."""

import numpy as np
import pytest

from trainers.sampling import CAUSAL_SHARE, TOGETHER, SentenceSampler


def test_every_sentence_once_an_epoch_in_another_order_each_time():
    sampler = SentenceSampler(50, 1, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50)) and first != list(range(50)) and len(sampler) == 50
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(50)) and second != first


def test_an_epoch_depends_on_seed_and_number_alone():
    def epoch(seed: int, number: int) -> list[int]:
        sampler = SentenceSampler(200, 3, seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1, 4) == epoch(1, 4)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("copy_share", [0.5, 0.8])
def test_views_are_the_host_itself_and_its_copies(copy_share):
    sampler, seen = SentenceSampler(1000, 4, seed=0, copy_share=copy_share), []
    for number in range(200):
        sampler.set_epoch(number)
        views, sentences = np.divmod(list(sampler), 1000)
        assert sorted(sentences) == list(range(1000))
        seen.append(views[np.argsort(sentences)])
        for block in np.split(seen[-1], range(TOGETHER, 1000, TOGETHER)):
            assert len(set(block)) == 1, "a block is made in one view"
    shares = np.bincount(np.concatenate(seen), minlength=4) / np.size(seen)
    np.testing.assert_allclose(shares, [1 - copy_share, *[copy_share / 3] * 3], atol=0.03)
    of_blocks = np.array(seen)[:, ::TOGETHER]
    assert all(set(block) == {0, 1, 2, 3} for block in of_blocks.T), "every block is read in every view"
    together = np.corrcoef(of_blocks.T)[~np.eye(of_blocks.shape[1], dtype=bool)]
    assert np.abs(together).max() < 0.3, "blocks draw their views apart"


def test_the_views_of_causal_copies_follow():
    sampler, views = SentenceSampler(6400, 4, seed=0, copy_share=0.6, causal=True), []
    for number in range(60):
        sampler.set_epoch(number)
        views.extend(key // 6400 for key in sampler)
    causal = 0.6 * CAUSAL_SHARE
    shares = [0.4, *[(0.6 - causal) / 3] * 3, causal / 2, *[causal / 6] * 3]
    np.testing.assert_allclose(np.bincount(views) / len(views), shares, atol=0.02)
