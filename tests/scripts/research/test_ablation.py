"""Every row of the ablation does what its name says, on tensors small enough to check."""

import contextlib

import numpy as np
import pytest
import torch

from modeling_unihyperlora import UniHyperLoraConfig, anchors, calibration, stream
from modeling_unihyperlora.adapter import Mixer
from modeling_unihyperlora.routing import Routing, make_bags
from modeling_unihyperlora.token_mixer import TokenMixer, Words
from scripts.research import ablation
from tests.conftest import mapped


def test_rows_have_names_of_their_own(tmp_path):
    names = [row.name for row in ablation.rows(tmp_path)]
    assert len(set(names)) == len(names) and names[0] == "as shipped"
    words = [len((tmp_path / f"{share}_of_the_anchors.txt").read_text().split()) for share in ("half", "quarter")]
    assert words[0] == pytest.approx(2 * words[1], rel=0.1)


def test_without_atoms_nothing_is_written():
    routing = Routing(torch.tensor([[0, 1]]), torch.ones(1, 2), bags=make_bags(1, 2, torch.device("cpu")))
    arguments = (torch.ones(1, 2), torch.ones(3, 4), routing, torch.ones(1, 2))
    assert stream.write_atoms(*arguments).abs().sum() > 0
    with ablation.no_atoms():
        assert torch.equal(stream.write_atoms(*arguments), torch.zeros(1, 4))


def test_without_router_every_word_has_the_same_atoms():
    arguments = (torch.randn(20, 6), torch.randn(9, 6), torch.randn(9).abs(), 2)
    assert len(stream.route(*arguments).atoms.unique(dim=0)) > 1
    with ablation.same_atoms_for_all_words():
        assert len(stream.route(*arguments).atoms.unique(dim=0)) == 1


def test_without_mixer_depth_does_not_matter():
    mixer, places = Mixer(4, 7), torch.rand(5, 8)
    assert mixer(places).std() > 0
    with ablation.no_mixer():
        assert torch.equal(mixer(places), torch.ones(5, 7))


def test_words_alone_do_not_see_their_neighbours():
    mixer = TokenMixer(6, 5, 4, dropout=0.0).eval()
    z, lengths = torch.randn(2, 3, 6), torch.tensor([3, 2])
    other = z.clone()
    other[0, 0] += 1

    def mixed(sentences: torch.Tensor) -> torch.Tensor:
        return mixer(sentences.flatten(0, 1), Words.in_rows(lengths, 3)).view(2, 3, -1)

    assert not torch.equal(mixed(z)[0, 2], mixed(other)[0, 2])
    with ablation.words_alone():
        changed, same = mixed(other), mixed(z)
        assert torch.equal(changed[0, 1:], same[0, 1:]) and not torch.equal(changed[0, 0], same[0, 0])


def test_matching_stretches_predictions_by_itself_or_together_or_not_at_all():
    generator = np.random.default_rng(0)
    x, noise = (torch.tensor(generator.normal(size=(6000, n)), dtype=torch.float32) for n in (20, 3))
    y = (x[:, :3] * torch.tensor([1.0, 0.4, 0.4]) + noise) @ torch.linalg.qr(torch.randn(3, 3))[0]
    ways = {"none": ablation.no_stretch, "alone": ablation.variances_alone, "together": contextlib.nullcontext}
    found = {}
    for name, way in ways.items():
        with way():
            fit = calibration._fit_knot(x[:, :10], x[:, 10:], y, 0.3)
        z = x[:, :10] @ fit.matrix.T + x[:, 10:] @ fit.weights + fit.offset
        torch.testing.assert_close(z.mean(dim=0), y.mean(dim=0), rtol=1e-4, atol=1e-4)
        found[name] = z
    assert (found["none"].std(dim=0) < 0.9 * y.std(dim=0)).all()
    for name in ("alone", "together"):
        torch.testing.assert_close(found[name].std(dim=0), y.std(dim=0), rtol=0.1, atol=0.1)
    torch.testing.assert_close(found["together"].T.corrcoef(), y.T.corrcoef(), rtol=1e-3, atol=1e-3)
    assert (found["alone"].T.corrcoef() - y.T.corrcoef()).abs().max() > 0.02


def test_without_stretch_predictions_are_least_squares():
    generator = np.random.default_rng(0)
    x, y = (torch.tensor(generator.normal(size=(600, n)), dtype=torch.float32) for n in (20, 3))
    y = x[:, :3] * 0.4 + y
    with ablation.no_stretch():
        fit = calibration._fit_knot(x[:, :10], x[:, 10:], y, 0.3)
    z = x[:, :10] @ fit.matrix.T + x[:, 10:] @ fit.weights + fit.offset
    assert (z.std(dim=0) < 0.6 * y.std(dim=0)).all()
    error, slope = y - z, ((z - z.mean(0)) * (y - z)).mean(dim=0) / z.var(dim=0)
    assert slope.abs().max() < 5e-3  # what the smallest ridge shrinks
    assert error.mean(dim=0).abs().max() < 1e-4


def test_without_landmarks_the_map_is_linear():
    states = torch.randn(1, 3000, 6)
    target = states[:, :, :1] * states[:, :, 1:2]
    with ablation.no_landmarks():
        fit = calibration.fit_host(states, [[0]], [0], target)
        z = mapped(fit, states.transpose(0, 1), [0])
        far = mapped(fit, 2 * states.transpose(0, 1), [0])
        origin = mapped(fit, torch.zeros(1, 1, 6), [0])
    torch.testing.assert_close(far - z, z - origin)
    assert fit.r2[0] < 0.1


def test_four_bits_are_sixteen_values():
    config = UniHyperLoraConfig(pathway="stream", anchor_words=1000, anchor_text_bytes=10)
    coordinates = torch.randn(5, 1000, config.stream_dim)
    values = {}
    for name, change in (("2 bits", contextlib.nullcontext), ("4 bits", ablation.four_bits)):
        with change():
            kept = anchors.Anchors(config, knots=5)
        kept.set([["word"]], coordinates)
        values[name] = len(kept.canonical().unique())
    assert values == {"2 bits": 4, "4 bits": 16}


def test_knots_that_are_left_out_are_zero():
    knot = calibration.KnotFit([0], torch.eye(2), torch.ones(2), 1.0)
    landmarks = calibration.Landmarks([0], torch.eye(2), torch.zeros(2), torch.zeros(1, 2), torch.ones(10, 1))
    fit = calibration.HostFit([knot] * 5, landmarks)
    with ablation.only_knots(0, 2, 4)():
        cached = mapped(fit, torch.ones(3, 1, 2), [0])
        bound = object.__new__(stream.Stream)
        bound.fit, bound._to_knots = fit, None
        read = bound.canonical_states((torch.ones(1, 3, 2),), torch.arange(3)[None])[0]
    for z in (cached, read):
        assert [bool(z[:, knot].any()) for knot in range(5)] == [True, False, True, False, True]
