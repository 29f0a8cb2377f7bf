"""Lining a host up with the canonical space, against float64 and the closed forms that it is made of."""

import numpy as np
import pytest
import torch

from modeling_unihyperlora import HostError
from modeling_unihyperlora.calibration import (
    LINEAR,
    RIDGES,
    ROUNDS,
    _means,
    canonical_coordinates,
    fit_host,
)
from tests.conftest import mapped


def fit_tensors(fit) -> list[torch.Tensor]:
    return [x for part in (*fit.knots, fit.landmarks) for x in part if isinstance(x, torch.Tensor)]


def as_float(array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def root_of(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return vectors * values**0.5 @ vectors.T


class TestCalibration:
    @pytest.mark.parametrize("width,seed", [(48, 0), (40, 1), (31, 2)])
    def test_is_kernel_ridge_regression_with_the_penalty_that_predicts_best(self, width, seed):
        """All again in float64, with a kernel matrix instead of features: 400 anchors are all landmarks."""
        generator = np.random.default_rng(seed)
        states = generator.normal(size=(3, 400, width)) * generator.uniform(0.1, 9, width) + 3
        target = states[:2, :, :7] / 9 + generator.normal(size=(2, 400, 7))
        near = [[0, 1], [1, 2]]
        target[0] += np.tanh(states[0, :, :7] - 3)
        fit = fit_host(as_float(states), near, [0, 1], as_float(target))
        mine = mapped(fit, as_float(states.transpose(1, 0, 2)), [0, 1, 2]).numpy()
        out = np.arange(400) // 50 % 5 == 4

        def standard(layers):
            x = np.concatenate([states[i] for i in layers], axis=1)
            return (x - x.mean(0)) / x.std(0, ddof=1)

        query = standard([0, 1])
        apart = ((query[:, None] - query[None]) ** 2).sum(-1) / (2 * (query**2).sum(1).mean())
        centring = np.eye(400) - 1 / 400
        for k in range(2):
            x, y = standard(near[k]), target[k] - target[k].mean(0)
            kernel = LINEAR / x.shape[1] * x @ x.T + centring @ np.exp(-apart) @ centring

            def predict(rows, ridge, kernel=kernel, y=y):
                inside = kernel[np.ix_(rows, rows)] + ridge * np.eye(rows.sum())
                return kernel[:, rows] @ np.linalg.solve(inside, y[rows])

            errors = [((predict(~out, ridge)[out] - y[out]) ** 2).sum() for ridge in RIDGES]
            best = RIDGES[int(np.argmin(errors))]
            predicted = predict(out >= 0, best)
            wanted = root_of(np.cov(y.T))
            stretch = wanted @ np.linalg.inv(root_of(wanted @ np.cov(predicted.T) @ wanted)) @ wanted
            stretch *= y.std(0, ddof=1) / (predict(~out, best)[out] @ stretch).std(0, ddof=1)
            np.testing.assert_allclose(mine[:, k], predicted @ stretch + target[k].mean(0), rtol=2e-2, atol=2e-2)
            total = ((y[out] - y[out].mean(0)) ** 2).sum()
            assert fit.r2[k] == pytest.approx(1 - min(errors) / total, abs=2e-3)

    def test_landmarks_are_told_by_the_leading_components_where_there_are_many(self):
        """1,500 words of width 300 and falling variance: 1,024 landmarks of width 96."""
        states = torch.randn(1, 1500, 300) * 0.97 ** torch.arange(300)
        states = states @ torch.linalg.qr(torch.randn(300, 300))[0]
        fit = fit_host(states, [[0]], [0], torch.randn(1, 1500, 4))
        assert fit.landmarks.at.shape == (1024, 96)
        standard = (states[0] - states[0].mean(0)) / states[0].std(0)
        best = torch.linalg.svdvals(standard)[:96].square().sum()
        query = states[0] @ fit.landmarks.matrix.T + fit.landmarks.offset
        assert query.square().sum() / query.square().sum(1).mean() == pytest.approx(1500)
        assert torch.pdist(query).square().mean() == pytest.approx(1, abs=0.01)
        rotation = torch.linalg.lstsq(query, standard).solution
        kept = (query @ rotation).square().sum()
        assert kept / best > 0.98

    def test_landmarks_are_the_means_of_the_anchors_next_to_them(self):
        """Lloyd's rounds again in float64, one group after the other."""
        points = torch.randn(300, 5)
        expected = points[torch.randperm(300, generator=torch.Generator().manual_seed(0))[:20]].double().numpy()
        first = expected.copy()
        for _ in range(ROUNDS):
            apart = ((points.double().numpy()[:, None] - expected[None]) ** 2).sum(-1).argmin(1)
            for group in range(20):
                if (apart == group).any():
                    expected[group] = points.double().numpy()[apart == group].mean(0)
        np.testing.assert_allclose(_means(points, 20).numpy(), expected, rtol=1e-4, atol=1e-4)
        assert np.abs(expected - first).max() > 0.1
        assert torch.equal(_means(points, 300).sort(dim=0).values, points.sort(dim=0).values), "none to bring together"

    def test_finds_what_is_not_linear(self):
        """The product of two dimensions, of which a line sees nothing."""
        states = torch.randn(1, 3000, 4)
        fit = fit_host(states, [[0]], [0], states[:, :, :1] * states[:, :, 1:2])
        assert fit.r2[0] > 0.8

    def test_predictions_are_correlated_as_what_they_predict(self):
        """Also where one direction of the coordinates shows much less in the host than the others."""
        states = torch.randn(1, 3000, 30)
        target = states[:, :, :5] * torch.tensor([3.0, 1, 1, 1, 0.3]) + torch.randn(1, 3000, 5)
        target = target @ torch.linalg.qr(torch.randn(5, 5))[0]
        z = mapped(fit_host(states, [[0]], [0], target), states.transpose(0, 1), [0])[:, 0]
        assert (z - target[0]).norm() > 0.3 * target.norm()
        correlations = z.T.corrcoef(), target[0].T.corrcoef()
        torch.testing.assert_close(*correlations, rtol=1e-3, atol=1e-3)
        assert (correlations[1] - torch.eye(5)).abs().max() > 0.1
        torch.testing.assert_close(z.std(dim=0), target[0].std(dim=0), rtol=0.1, atol=0.1)
        torch.testing.assert_close(z.mean(dim=0), target[0].mean(dim=0), rtol=1e-3, atol=1e-3)

    def test_one_host_has_one_map(self):
        states, target = torch.randn(1, 300, 20), torch.randn(1, 300, 4)
        first = fit_host(states, [[0]], [0], target)
        before = torch.get_rng_state()
        again = fit_host(states, [[0]], [0], target)
        assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers are its own"
        assert all(torch.equal(a, b) for a, b in zip(fit_tensors(first), fit_tensors(again), strict=True))

    def test_canonical_coordinates_are_whitened_principal_components(self):
        states = torch.randn(1, 300, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
        z = canonical_coordinates(states.float(), 5)[0].double()
        standard = (states[0] - states[0].mean(0)) / states[0].std(0)
        eigenvalues, vectors = np.linalg.eigh(np.cov(standard.numpy().T))
        top = standard.numpy() @ vectors[:, ::-1][:, :5] / np.sqrt(eigenvalues[::-1][:5])
        np.testing.assert_allclose(np.abs(np.corrcoef(z.T.numpy(), top.T)[:5, 5:].diagonal()), 1, atol=1e-4)
        np.testing.assert_allclose(np.cov(z.T.numpy()), np.eye(5), atol=1e-2)

    def test_fit_is_high_where_there_is_something_to_find_and_not_elsewhere(self):
        states = torch.randn(1, 500, 30)
        known = states @ torch.randn(30, 4)
        known = (known - known.mean(1, keepdim=True)) / known.std(1, keepdim=True)
        assert fit_host(states, [[0]], [0], known).r2[0] > 0.9
        assert fit_host(states, [[0]], [0], known[:, torch.randperm(500)]).r2[0] < 0.1

    def test_anchors_that_a_host_cannot_read_are_left_out_or_refused(self):
        states, target = torch.randn(1, 50, 6), torch.randn(1, 50, 3)
        states[0, 10:20] = torch.nan
        kept = torch.cat([states[:, :10], states[:, 20:]], dim=1), torch.cat([target[:, :10], target[:, 20:]], dim=1)
        one, other = fit_host(states, [[0]], [0], target), fit_host(kept[0], [[0]], [0], kept[1])
        assert all(torch.equal(a, b) for a, b in zip(fit_tensors(one), fit_tensors(other), strict=True))
        states[0, 3:] = torch.nan
        with pytest.raises(HostError, match="Only 3 of 50 anchors"):
            fit_host(states, [[0]], [0], target)
