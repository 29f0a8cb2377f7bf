"""Every step of a token through the adapter against loops in float64, over widths and depths of real hosts."""

import math

import numpy as np
import pytest
import torch

from modeling_unihyperlora import UniHyperLoraConfig
from modeling_unihyperlora.injected_adapter import Mixer, TaskParameters, UniHyperLoraAdapter, place_features
from modeling_unihyperlora.layouts import MODULE_TYPES
from modeling_unihyperlora.measure.accounting import PARTS, part_of
from modeling_unihyperlora.projectors import DimensionProjector
from modeling_unihyperlora.routing import Routing, read_atoms, route, write_atoms
from modeling_unihyperlora.space import KNOTS
from modeling_unihyperlora.storage import adapter_tensors

WIDTHS = [64, 128, 312, 384, 768, 1024]
DEPTHS = [2, 3, 4, 6, 12, 24]
TOP_K = [1, 2, 3]
TASKS = {"ner": {"type": "token_classification", "labels": ["O", "A"]}}


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def routed(width: int, top_k: int, seed: int, tokens: int = 5, atoms: int = 16):
    """A state with its routing and the scores (N, M) in float64."""
    state, rows = draw(tokens, width, seed=seed), draw(atoms, width, seed=seed + 1, scale=1 / math.sqrt(width))
    bias = draw(atoms, seed=seed + 2, scale=0.5) - 1.5  # low enough that the null choice often wins
    x, r, b = array(state), array(rows), array(bias)
    scores = np.array([[np.dot(r[j], t) / np.sqrt(np.mean(t**2)) + b[j] for j in range(atoms)] for t in x])
    return state, rows, bias, route(state, rows, bias, top_k), scores


class TestRoute:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("top_k", TOP_K)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_takes_the_best_atoms_that_beat_the_null_choice(self, width, top_k, seed):
        _, _, _, routing, scores = routed(width, top_k, seed)
        for n, row in enumerate(scores):
            best = sorted(range(len(row)), key=lambda j: -row[j])[:top_k]
            assert routing.atoms[n].tolist() == best
            np.testing.assert_allclose(array(routing.probabilities[n]), [sigmoid(row[j]) for j in best], rtol=1e-4)
            gates = [sigmoid(row[j]) if row[j] > 0 else 0.0 for j in best]
            np.testing.assert_allclose(array(routing.gates[n]), gates, rtol=1e-4)
            assert ((routing.gates[n] == 0) == (torch.tensor(gates) == 0)).all(), "a losing gate is not exactly zero"

    def test_the_samples_hold_both_used_and_unused_atoms(self):
        gates = torch.cat([routed(width, 3, seed)[3].gates.flatten() for width in WIDTHS for seed in range(3)])
        assert 0.1 < (gates > 0).float().mean() < 0.9

    @pytest.mark.parametrize("top_k", TOP_K)
    def test_hard_count_is_at_most_k_and_expected_count_below_it(self, top_k):
        _, _, _, routing, _ = routed(64, top_k, seed=7, tokens=200)
        count = (routing.gates > 0).sum(dim=-1)
        assert count.max() == top_k and count.min() == 0
        assert (routing.probabilities.sum(dim=-1) < top_k).all()

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_length_of_the_state_does_not_matter(self, scale):
        state, rows, bias, routing, _ = routed(128, 2, seed=3)
        again = route(scale * state, rows, bias, 2)
        assert torch.equal(again.atoms, routing.atoms)
        torch.testing.assert_close(again.gates, routing.gates, rtol=1e-4, atol=1e-6)

    def test_state_of_zeros_is_finite(self):
        _, rows, bias, _, _ = routed(64, 2, seed=3)
        routing = route(torch.zeros(3, 64), rows, bias, 2)
        best = bias.topk(2).values
        torch.testing.assert_close(routing.probabilities, torch.sigmoid(best).expand(3, 2))

    @pytest.mark.parametrize("seed", range(3))
    def test_expected_count_and_gates_have_the_gradient_of_the_probability(self, seed):
        """dσ(s)/ds = σ(1-σ) for each of the k best atoms, also below the null choice, so that atoms can reopen."""
        state, rows, bias, _, scores = routed(64, 3, seed)
        weights = draw(5, 3, seed=seed + 9)
        for pick in ("probabilities", "gates"):
            leaves = [x.clone().requires_grad_(True) for x in (state, rows, bias)]
            out = getattr(route(*leaves, 3), pick)
            (out * weights).sum().backward()
            x, r = array(state), array(rows)
            expected_bias, expected_rows = np.zeros(16), np.zeros((16, 64))
            for n, row in enumerate(scores):
                best = sorted(range(16), key=lambda j: -row[j])[:3]
                for i, j in enumerate(best):
                    slope = float(weights[n, i]) * sigmoid(row[j]) * (1 - sigmoid(row[j]))
                    expected_bias[j] += slope
                    expected_rows[j] += slope * x[n] / np.sqrt(np.mean(x[n] ** 2))
            np.testing.assert_allclose(array(leaves[2].grad), expected_bias, atol=1e-5, rtol=1e-4)
            np.testing.assert_allclose(array(leaves[1].grad), expected_rows, atol=1e-5, rtol=1e-4)
            assert leaves[0].grad.abs().max() > 0
            assert r.shape == leaves[1].grad.shape

    def test_expected_count_against_finite_differences(self):
        state, rows, bias, _, _ = routed(64, 2, seed=11)
        leaf = bias.clone().requires_grad_(True)
        route(state, rows, leaf, 2).probabilities.sum().backward()
        step = 1e-2
        for j in leaf.grad.abs().topk(4).indices:
            shift = torch.zeros_like(bias)
            shift[j] = step
            up, down = (route(state, rows, bias + s, 2) for s in (shift, -shift))
            assert torch.equal(up.atoms, down.atoms), "a choice flipped; take a smaller step"
            slope = (up.probabilities.sum() - down.probabilities.sum()) / (2 * step)
            torch.testing.assert_close(leaf.grad[j], slope, rtol=1e-2, atol=1e-4)


class TestReadAndWrite:
    @pytest.mark.parametrize("top_k", TOP_K)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_routed_atoms(self, width, top_k):
        seed = width + top_k
        x, _, _, routing, _ = routed(width, top_k, seed)
        read, write = draw(16, width, seed=seed + 5), draw(16, 2 * width, seed=seed + 6)
        c = draw(16, seed=seed + 7)
        dots = read_atoms(x, read, routing)
        update = write_atoms(dots, write, routing, routing.weights(c[None])[0])
        expected_dots, expected = np.zeros((5, top_k)), np.zeros((5, 2 * width))
        for n in range(5):
            for i, j in enumerate(routing.atoms[n].tolist()):
                for w in range(width):
                    expected_dots[n, i] += float(read[j, w]) * float(x[n, w])
                expected[n] += float(routing.gates[n, i]) * float(c[j]) * expected_dots[n, i] * array(write[j])
        np.testing.assert_allclose(array(dots), expected_dots, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(array(update), expected, atol=2e-3, rtol=1e-4)
        assert np.abs(expected).max() > 0.1

    @pytest.mark.parametrize("width", WIDTHS)
    def test_static_mask_uses_every_atom(self, width):
        x, read, write = draw(5, width, seed=1), draw(16, width, seed=2), draw(16, 2 * width, seed=3)
        gate, c = torch.rand(16, generator=torch.Generator().manual_seed(4)), draw(16, seed=5)
        routing = Routing(None, gate)
        update = write_atoms(read_atoms(x, read, routing), write, routing, routing.weights(c[None])[0])
        expected = np.zeros((5, 2 * width))
        for j in range(16):
            expected += float(gate[j]) * float(c[j]) * np.outer(array(x) @ array(read[j]), array(write[j]))
        np.testing.assert_allclose(array(update), expected, atol=1e-2, rtol=1e-4)

    def test_null_choice_adds_exactly_nothing(self):
        x, rows, bias, _, _ = routed(64, 3, seed=2)
        routing = route(x, rows, bias - 100, 3)
        assert torch.equal(routing.gates, torch.zeros(5, 3))
        dots = read_atoms(x, draw(16, 64, seed=8), routing)
        update = write_atoms(dots, draw(16, 64, seed=9), routing, routing.weights(draw(1, 16, seed=10))[0])
        assert torch.equal(update, torch.zeros(5, 64))

    @pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
    @pytest.mark.parametrize("static", [False, True])
    def test_half_precision_is_near(self, dtype, bound, static):
        x, _, _, routing, _ = routed(384, 2, seed=21)
        routing = Routing(None, torch.rand(16, generator=torch.Generator().manual_seed(4))) if static else routing
        read, write, c = draw(16, 384, seed=5) / 20, draw(16, 384, seed=6) / 20, draw(16, seed=7)
        weights = routing.weights(c[None])[0]
        full = write_atoms(read_atoms(x, read, routing), write, routing, weights)
        low = write_atoms(read_atoms(x.to(dtype), read, routing), write, routing, weights)
        assert low.dtype == dtype
        assert (low.float() - full).norm() < bound * full.norm()

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_gradients_against_float64(self, static, seed):
        """Autograd of the float32 functions against autograd of the plain sum in float64."""
        x, _, _, routing, _ = routed(24, 2, seed)
        gates = torch.rand(16, generator=torch.Generator().manual_seed(seed)) if static else routing.gates
        leaves = [x, draw(16, 24, seed=seed + 5), draw(16, 48, seed=seed + 6), draw(16, seed=seed + 7), gates]
        single = [leaf.detach().clone().requires_grad_(True) for leaf in leaves]
        double = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
        weights = draw(5, 48, seed=seed + 8)

        mask = Routing(None if static else routing.atoms, single[4], bags=routing.bags)
        update = write_atoms(read_atoms(single[0], single[1], mask), single[2], mask, mask.weights(single[3][None])[0])
        (update * weights).sum().backward()
        y, read, write, c, gate = double
        total = torch.zeros(5, 48, dtype=torch.float64)
        for n in range(5):
            for i, j in enumerate(range(16) if static else routing.atoms[n].tolist()):
                g = gate[j] if static else gate[n, i]
                total = total.index_add(0, torch.tensor([n]), (g * c[j] * (read[j] @ y[n]) * write[j])[None])
        (total * weights).sum().backward()
        for name, one, two in zip(["x", "read", "write", "coefficients", "gates"], single, double, strict=True):
            assert two.grad.abs().max() > 0, name
            torch.testing.assert_close(one.grad.double(), two.grad, atol=1e-3, rtol=1e-3, msg=name)


class TestMixer:
    @pytest.mark.parametrize("blocks", DEPTHS)
    def test_place_features(self, blocks):
        depths = [(b + 1) / blocks for b in range(blocks)]
        features = place_features(torch.tensor(depths))
        assert features.shape == (blocks, len(MODULE_TYPES), 8)
        for b in range(blocks):
            for s in range(len(MODULE_TYPES)):
                expected = [1.0, depths[b], *(float(s == t) for t in range(len(MODULE_TYPES)))]
                np.testing.assert_allclose(array(features[b, s]), expected, rtol=1e-6)

    @pytest.mark.parametrize("blocks", DEPTHS)
    def test_two_layers_with_a_sine_between(self, blocks):
        torch.manual_seed(blocks)
        mixer = Mixer(14, 128)
        hidden, output = array(mixer.hidden()), array(mixer.output())
        depths = torch.tensor([(b + 1) / blocks for b in range(blocks)])
        mixed = array(mixer(place_features(depths)))
        assert mixed.shape == (blocks, 6, 128)
        for b in range(blocks):
            for s in range(6):
                place = np.zeros(8)
                place[0], place[1], place[2 + s] = 1, (b + 1) / blocks, 1
                wave = [math.sin(sum(hidden[h, i] * place[i] for i in range(8))) for h in range(14)]
                np.testing.assert_allclose(mixed[b, s], output @ np.array([*wave, 1.0]), atol=1e-5, rtol=1e-4)

    def test_is_small_and_tells_places_apart(self):
        torch.manual_seed(0)
        mixer = Mixer(14, 128)
        assert sum(p.numel() for p in mixer.parameters()) < 2500
        mixed = mixer(place_features(torch.tensor([0.25, 0.5, 1.0]))).flatten(0, 1)
        assert torch.pdist(mixed).min() > 0.1


class TestDimensionProjector:
    @staticmethod
    def random_waves(dim: int, seed: int) -> DimensionProjector:
        projector = DimensionProjector(dim)
        with torch.no_grad():
            for k, waves in enumerate((projector.inward_waves, projector.outward_waves)):
                waves.latent += draw(4, dim, seed=seed + k, scale=0.3)
        return projector

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("dim", [8, 256])
    def test_every_entry(self, dim, width):
        projector = self.random_waves(dim, seed=width)
        for direction, waves in (("inward", projector.inward_waves), ("outward", projector.outward_waves)):
            a, f, p, s = array(waves())
            expected = np.zeros((width, dim))
            for m in range(dim):
                for i in range(width) if dim == 8 else (0, 1, width // 2, width - 1):
                    angle = math.pi * (m + f[m]) * (i + 0.5) / width + p[m] + s[m] * math.log10(width)
                    expected[i, m] = a[m] * math.sqrt(2 / width) * math.sin(angle)
            key = projector.key(width, 0.5)
            actual = array(projector.inward(key)).T if direction == "inward" else array(projector.outward(key))
            assert actual.shape == (width, dim)
            seen = expected != 0
            np.testing.assert_allclose(actual[seen], expected[seen], atol=3e-4 * math.sqrt(2 / width))

    @pytest.mark.parametrize("width", WIDTHS)
    def test_starts_orthogonal(self, width):
        dim = 48
        basis = array(DimensionProjector(dim).outward(width))
        gram = basis.T @ basis
        # π/2 in half precision is 5e-4 off
        np.testing.assert_allclose(gram, np.diag([2.0] + [1.0] * (dim - 1)), atol=1e-3)

    def test_inward_and_outward_are_apart(self):
        projector = self.random_waves(8, seed=1)
        assert not torch.allclose(projector.inward(64).T, projector.outward(64), atol=1e-2)

    def test_reads_the_input_and_writes_the_output_of_every_type(self):
        projector = DimensionProjector(8)
        assert {projector.sides(module_type) for module_type in MODULE_TYPES} == {("input", "output")}

    def test_one_map_serves_a_width_at_every_depth(self):
        projector = DimensionProjector(8)
        assert projector.key(64, 0.25) == projector.key(64, 1.0) != projector.key(128, 0.25)

    def test_is_about_four_kilobytes(self):
        projector = DimensionProjector(256)
        stored = [t for w in (projector.inward_waves, projector.outward_waves) for t in w.encode().values()]
        assert sum(t.numel() * t.element_size() for t in stored) == 4096

    @pytest.mark.parametrize("row", range(4))
    def test_gradient_against_finite_differences(self, row):
        projector = self.random_waves(8, seed=5)
        weights = draw(64, 8, seed=6)
        (projector.outward(64) * weights).sum().backward()
        gradient = projector.outward_waves.latent.grad[row, 3].item()
        base, shifted = array(projector.outward_waves()), []
        for step in (1e-4, -1e-4):
            a, f, p, s = (base + step * (np.arange(4)[:, None] == row) * (np.arange(8) == 3)).copy()
            i = np.arange(64)[:, None] + 0.5
            angle = math.pi * (np.arange(8) + f) * i / 64 + p + s * math.log10(64)
            shifted.append((a * math.sqrt(2 / 64) * np.sin(angle) * array(weights)).sum())
        assert gradient == pytest.approx((shifted[0] - shifted[1]) / 2e-4, rel=1e-3, abs=1e-4)


class TestProject:
    """``project``: the adapter in the coordinates of one host."""

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("blocks", DEPTHS)
    def test_against_matrix_products_in_float64(self, blocks, width):
        torch.manual_seed(blocks * width)
        adapter = UniHyperLoraAdapter(
            UniHyperLoraConfig(pathway="inject", atoms=8, anchor_dim=6, mixer_hidden=3, tasks=TASKS)
        )
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        depths = [(b + 1) / blocks for b in range(blocks)]
        with torch.no_grad():
            atoms = adapter.project({width, 2 * width}, {width}, {width}, depths, "ner")
        own = adapter.tasks["ner"]
        inward, outward = array(adapter.projector.inward(width)), array(adapter.projector.outward(width))
        np.testing.assert_allclose(array(atoms.read[width]), array(adapter.atoms_in()) @ inward, atol=1e-5)
        np.testing.assert_allclose(array(atoms.write[width]), array(adapter.atoms_out()) @ outward.T, atol=1e-5)
        router = array(adapter.router_weight())
        np.testing.assert_allclose(array(atoms.router_rows[width]), router @ inward, atol=1e-5)
        bias = array(adapter.router_bias()) + router @ array(own.embedding())
        np.testing.assert_allclose(array(atoms.router_bias[width]), bias, atol=1e-5)
        delta, mixed = array(own.delta()), array(adapter.mixer(place_features(torch.tensor(depths))))
        for b in range(blocks):
            for s in range(6):
                expected = mixed[b, s] + delta[0] + depths[b] * delta[1] + delta[2 + s]
                np.testing.assert_allclose(array(atoms.coefficients[b, s]), expected, atol=1e-5)
        assert set(atoms.read) == {width, 2 * width} and set(atoms.write) == {width}

    @pytest.mark.parametrize("width", WIDTHS)
    def test_head_reads_the_canonical_state_of_every_knot(self, width):
        torch.manual_seed(width)
        adapter = UniHyperLoraAdapter(UniHyperLoraConfig(pathway="inject", atoms=8, anchor_dim=6, tasks=TASKS))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        states = [draw(3, width, seed=width + knot, scale=1 + knot) for knot in range(len(KNOTS))]
        keys = [adapter.projector.key(width, knot) for knot in KNOTS]
        logits = adapter.logits(states, keys, "ner")
        own, inward = adapter.tasks["ner"], array(adapter.projector.inward(width))
        weight, bias = array(own.head_weight()), array(own.head_bias())
        for n in range(3):
            canonical = [inward @ array(x[n]) / np.sqrt(np.mean(array(x[n]) ** 2)) for x in states]
            np.testing.assert_allclose(array(logits[n]), weight @ np.concatenate(canonical) + bias, atol=1e-4)
        assert logits.std() > 0.1


class TestParts:
    def adapter(self) -> UniHyperLoraAdapter:
        task = {"type": "token_classification", "labels": ["O", "A"]}
        tasks = {"delta": task, "head_weight": task, "mixer": task}  # names that could be taken for parts
        return UniHyperLoraAdapter(UniHyperLoraConfig(pathway="inject", atoms=8, anchor_dim=6, tasks=tasks))

    def test_every_tensor_is_of_one_part(self):
        adapter = self.adapter()
        expected = {
            "atoms_in": "dictionary",
            "atoms_out": "dictionary",
            "projector.inward_waves": "projector",
            "projector.outward_waves": "projector",
            "mixer.hidden": "mixer",
            "mixer.output": "mixer",
            "router_weight": "router",
            "router_bias": "router",
        }
        for task in adapter.tasks:
            expected |= {
                f"tasks.{task}.delta": "delta",
                f"tasks.{task}.embedding": "router",
                f"tasks.{task}.mean_gate": "router",
                f"tasks.{task}.head_weight": "head",
                f"tasks.{task}.head_bias": "head",
            }
        in_state = {name.removesuffix(".latent") for name in adapter.state_dict()}
        assert in_state == set(expected)
        assert {name: part_of(name) for name in expected} == expected
        assert {part_of(name) for name in adapter_tensors(adapter)} == set(PARTS) - {"space", "reader"}

    def test_task_parameters_of_the_design(self):
        own = TaskParameters(UniHyperLoraConfig(pathway="inject"), labels=9)
        assert own.delta.latent.shape == (8, 128) and not own.delta.latent.any()
        assert sum(t.numel() * t.element_size() for t in own.delta.encode().values()) == 512
        assert own.mean_gate.sum().item() == pytest.approx(2)
