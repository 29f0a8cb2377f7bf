"""The order of an epoch: all sentences, in views that differ, and the same again after an interruption."""

import numpy as np

from trainers.sampling import OWN_SHARE, SentenceSampler


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


def test_views_are_the_host_itself_and_its_copies():
    views, sentences = np.divmod(list(SentenceSampler(6000, 4, seed=0)), 6000)
    assert sorted(sentences) == list(range(6000))
    shares = np.bincount(views, minlength=4) / 6000
    np.testing.assert_allclose(shares, [OWN_SHARE, *[(1 - OWN_SHARE) / 3] * 3], atol=0.03)
    assert abs(np.corrcoef(views, sentences)[0, 1]) < 0.05, "which copy is read does not depend on the sentence"
