"""The canonical space: its file, making it, and aligning a host with it, each against float64."""

import json
import math

import numpy as np
import pytest
import torch

from modeling_unihyperlora import (
    AdapterFileError,
    CanonicalSpace,
    ConfigError,
    DataError,
    HostError,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora import space as space_module
from modeling_unihyperlora.space import (
    KNOTS,
    LANDMARKS,
    LINEAR,
    PACKAGE_SPACE,
    QUERY_WIDTH,
    RIDGES,
    ROUNDS,
    _means,
    fit_host,
    from_tensors,
    knot_layers,
    read_anchors,
    to_tensors,
    word_states,
)
from modeling_unihyperlora.space_making.make import PACKAGE_ANCHORS, RIDGE, common_coordinates, make_space
from modeling_unihyperlora.storage import write_checked
from modeling_unihyperlora.words import WordReader
from tests.conftest import mapped
from tests.modeling_unihyperlora.small_streams import (
    LABELS,
    READER,
    TOKENIZER,
    D,
    batch,
    bert,
    distilbert,
    small_space,
    small_stream,
    tensors_of,
    text,
)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(folder))
    return folder


@pytest.fixture
def anchor_file(tmp_path):
    path = tmp_path / "anchors.txt"
    path.write_text("\n".join(map(" ".join, text(5))), encoding="utf-8")
    return path


def same_fit(one, other) -> bool:
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)


def as_float(array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def root_of(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return vectors * values**0.5 @ vectors.T


class TestFile:
    def test_what_was_saved_is_loaded(self, tmp_path):
        space = small_space()
        space.save(tmp_path / "space.safetensors")
        again = CanonicalSpace.load(tmp_path / "space.safetensors")
        assert again.shape() == space.shape() and again.digest == space.digest
        assert again.sentences() == space.sentences() == text(5)
        assert torch.equal(again.canonical(), space.canonical())
        for name, tensor in space.tensors().items():
            assert torch.equal(again.tensors()[name], tensor), name

    def test_coordinates_take_two_bits_and_have_four_values(self):
        space = small_space()
        assert space.tensors()["coordinates"].numel() == len(KNOTS) * 480 * D // 4
        assert set(space.canonical().unique().tolist()) == {-1.5, -0.5, 0.5, 1.5}

    def test_the_digest_is_of_the_contents_and_of_no_name(self, anchor_file):
        given = {"dim": D, "atoms": 16, "tokenizers": [TOKENIZER]}
        named = make_space([bert()], anchor_file, name="other", version=7, **given)
        assert named.digest == small_space().digest and (named.name, named.version) == ("other", 7)
        assert make_space([bert()], anchor_file, **given | {"dim": D - 1}).digest != named.digest
        assert make_space([bert()], anchor_file, **given | {"atoms": 17}).digest != named.digest
        assert make_space([bert(seed=1)], anchor_file, **given).digest != named.digest
        anchor_file.write_text(anchor_file.read_text("utf-8") + "\nword1 word2", encoding="utf-8")
        assert make_space([bert()], anchor_file, **given).digest != named.digest

    def test_a_damaged_file_is_refused(self, tmp_path):
        path = tmp_path / "space.safetensors"
        small_space().save(path)
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[-40] ^= 1
        for content, message in (
            (bytes(changed), "damaged"),
            (whole[:-10], "not a readable"),
            (b"", "not a readable"),
            (b"no space at all", "not a readable"),
        ):
            path.write_bytes(content)
            with pytest.raises(AdapterFileError, match=message):
                CanonicalSpace.load(path)
        path.unlink()
        with pytest.raises(AdapterFileError, match=str(path)):
            CanonicalSpace.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors, shape: tensors.pop("atoms_in"),
            lambda tensors, shape: tensors.pop("text"),
            lambda tensors, shape: tensors.update(coordinates=tensors["coordinates"][:-8]),
            lambda tensors, shape: shape.pop("dim"),
            lambda tensors, shape: shape.update(dim="many"),
            lambda tensors, shape: shape.update(more=1),
            lambda tensors, shape: shape.update(anchor_words=-3),
        ],
        ids=["no atoms", "no text", "few coordinates", "no dim", "a word for dim", "another key", "less than none"],
    )
    def test_a_file_that_holds_no_space_is_refused(self, tmp_path, change):
        tensors, shape = small_space().tensors(), small_space().shape()
        change(tensors, shape)
        write_checked(tmp_path / "space.safetensors", tensors, {"space": json.dumps(shape)})
        with pytest.raises(AdapterFileError, match="holds no canonical space"):
            CanonicalSpace.load(tmp_path / "space.safetensors")

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(AdapterFileError, match="No canonical space '.*none'"):
            CanonicalSpace.load(tmp_path / "none")

    def test_an_adapters_file_is_no_space(self, tmp_path):
        small_stream().save_pretrained(tmp_path)
        with pytest.raises(AdapterFileError, match="holds no canonical space"):
            CanonicalSpace.load(tmp_path / "model.safetensors")

    def test_the_packages_own(self):
        space = CanonicalSpace.default()
        assert space.shape()["dim"] == 64 and len(space.sentences()) >= 500
        assert not any(parameter.requires_grad for parameter in space.parameters())
        assert PACKAGE_SPACE.stat().st_size < 750_000, "an adapter under 1 MB has room for tasks beside it"
        variance = space.canonical().var(dim=1)
        assert 0.5 < float(variance.min()) and float(variance.max()) < 1.2, "of unit variance, in four values"


class TestAnchors:
    def test_package_text_is_plain_and_large_enough(self):
        sentences = read_anchors(PACKAGE_ANCHORS)
        assert 500 <= len(sentences) <= 600 and 8000 <= sum(map(len, sentences)) <= 8500
        assert all(word.isascii() for sentence in sentences for word in sentence)

    def test_too_few_words_or_no_text_are_refused(self, tmp_path):
        (tmp_path / "few.txt").write_text("only four words here", encoding="utf-8")
        (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        for name, message in (("few.txt", "has 4 words"), ("bytes.txt", "UTF-8"), ("none.txt", "cannot be read")):
            with pytest.raises(DataError, match=message):
                read_anchors(tmp_path / name)

    def test_states_are_those_of_first_sub_tokens(self):
        host = bert()
        sentences = [["word1", "unknown", "word3"], ["word7"]]
        states = word_states(host, WordReader(host, TOKENIZER), sentences, [0, 4])
        with torch.no_grad():
            ids = TOKENIZER("word1 unknown word3", return_tensors="pt")["input_ids"]
            hidden = host(ids, output_hidden_states=True).hidden_states
        for k, layer in enumerate((0, 4)):
            torch.testing.assert_close(states[k, :3], hidden[layer][0, [1, 2, 4]], rtol=1e-4, atol=1e-5)

    def test_words_beyond_the_window_have_no_state(self):
        host = bert()
        states = word_states(host, WordReader(host, TOKENIZER), [["word1"] * 70, ["word2"]], [0])
        read = torch.isfinite(states).all(dim=-1)[0]
        assert read.tolist() == [True] * 62 + [False] * 8 + [True]


class TestCommonCoordinates:
    def test_of_one_host_they_are_whitened_principal_components(self):
        states = torch.randn(len(KNOTS), 300, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
        z = common_coordinates([states.float()], 5).double()
        for k in range(len(KNOTS)):
            standard = ((states[k] - states[k].mean(0)) / states[k].std(0)).numpy()
            eigenvalues, vectors = np.linalg.eigh(np.cov(standard.T))
            top = standard @ vectors[:, ::-1][:, :5] / np.sqrt(eigenvalues[::-1][:5])
            np.testing.assert_allclose(np.abs((z[k].T.numpy() @ top / 300).diagonal()), 1, atol=1e-2)
            np.testing.assert_allclose(np.cov(z[k].T.numpy()), np.eye(5), atol=1e-2)

    def test_of_several_hosts_they_are_the_directions_that_the_hosts_share(self):
        """Float64 reference: left singular vectors are eigenvectors of the sum of the hosts' ridge projections."""
        generator = np.random.default_rng(0)
        shared = generator.normal(size=(400, 6))
        hosts = [
            np.stack(
                [
                    (shared @ generator.normal(size=(6, width)) + generator.normal(size=(400, width)))
                    * generator.uniform(0.1, 9, width)
                    + 3
                    for _ in KNOTS
                ]
            )
            for width in (20, 31, 24)
        ]
        z = common_coordinates([as_float(own) for own in hosts], 5).double().numpy()
        for k in range(len(KNOTS)):
            total = np.zeros((400, 400))
            for own in hosts:
                x = (own[k] - own[k].mean(0)) / own[k].std(0, ddof=1)
                values, vectors = np.linalg.eigh(x.T @ x)
                shrunk = (vectors / (values + RIDGE * values.mean())) @ vectors.T
                total += x @ shrunk @ x.T
            values, vectors = np.linalg.eigh(total)
            assert (np.diff(values[-6:]) > 1e-3).all(), "the directions are told apart"
            expected = vectors[:, ::-1][:, :5] * 400**0.5
            np.testing.assert_allclose(np.abs((z[k].T @ expected / 400).diagonal()), 1, atol=1e-4)
            np.testing.assert_allclose(z[k].T @ z[k] / 400, np.eye(5), atol=1e-4)
            ours = np.linalg.lstsq(np.c_[z[k], np.ones(400)], shared, rcond=None)
            assert 1 - ours[1].sum() / ((shared - shared.mean(0)) ** 2).sum() > 0.7

    def test_an_anchor_that_a_host_cannot_read_is_an_average_one(self):
        states = [torch.randn(len(KNOTS), 100, width) for width in (9, 7)]
        states[0][2, 10] = torch.nan
        states[1][:, 20:23] = torch.inf
        z = common_coordinates(states, 4)
        left_out = [10, 20, 21, 22]
        assert torch.isfinite(z).all() and not z[:, left_out].any()
        kept = torch.ones(100, dtype=torch.bool)
        kept[left_out] = False
        torch.testing.assert_close(z[:, kept], common_coordinates([own[:, kept] for own in states], 4))

    def test_more_coordinates_than_there_are_dimensions_are_refused(self):
        with pytest.raises(HostError, match="20 canonical coordinates need"):
            common_coordinates([torch.randn(len(KNOTS), 100, 8)], 20)
        with pytest.raises(HostError, match="10 anchors can be read"):
            common_coordinates([torch.randn(len(KNOTS), 10, 80)], 20)
        assert common_coordinates([torch.randn(len(KNOTS), 100, 8), torch.randn(len(KNOTS), 100, 12)], 20).any()


class TestMaking:
    def test_holds_what_its_hosts_say_of_the_anchors(self, anchor_file):
        hosts = [bert(), bert(24, 7, seed=2), distilbert()]
        space = CanonicalSpace.make(hosts, anchor_file, dim=8, atoms=16, tokenizers=[TOKENIZER] * 3)
        states = []
        for host in hosts:
            layers = knot_layers(len(host.encoder.layer) if hasattr(host, "encoder") else 3)
            states.append(word_states(host, WordReader(host, TOKENIZER), text(5), layers))
        expected = common_coordinates(states, 8)
        apart = (space.canonical() - expected).abs()
        assert float(apart[expected.abs() < 2].max()) <= 0.5 + 1e-5, "the nearest of the four values"
        assert space.sentences() == text(5) and space.shape()["name"] == "own"

    def test_names_of_hosts_are_as_good_as_hosts(self, tiny_host, tmp_path):
        lines = ["anna lives in paris . ben works near rome ."] * 30 + ["carla flew from oslo to lima ."] * 10
        (tmp_path / "anchors.txt").write_text("\n".join(lines), encoding="utf-8")
        space = CanonicalSpace.make([str(tiny_host)], tmp_path / "anchors.txt", dim=8)
        from transformers import BertModel

        host = BertModel.from_pretrained(tiny_host).eval()
        assert CanonicalSpace.make([host], tmp_path / "anchors.txt", dim=8).digest == space.digest

    def test_no_host_or_no_text_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="at least one host"):
            CanonicalSpace.make([])
        with pytest.raises(DataError, match="cannot be read"):
            CanonicalSpace.make([bert()], tmp_path / "none.txt", tokenizers=[TOKENIZER])
        with pytest.raises(HostError, match="need hosts with at least"):
            (tmp_path / "anchors.txt").write_text("\n".join(map(" ".join, text(5))), encoding="utf-8")
            CanonicalSpace.make([bert()], tmp_path / "anchors.txt", dim=64, tokenizers=[TOKENIZER])

    def test_from_host_makes_one_or_takes_one(self, anchor_file, tmp_path):
        given = {"labels": LABELS, "reader": READER, "tokenizer": TOKENIZER}
        small_space().save(tmp_path / "space.safetensors")
        by_file = UniHyperLoraForTokenClassification.from_host(bert(), space=tmp_path / "space.safetensors", **given)
        assert by_file.adapter.space.digest == small_space().digest
        wide = bert(64, 2)
        own = UniHyperLoraForTokenClassification.from_host(wide, anchor_file=anchor_file, **given)
        made = CanonicalSpace.make([wide], anchor_file, tokenizers=[TOKENIZER])
        assert own.adapter.space.digest == made.digest and own.config.space["dim"] == 64
        with pytest.raises(ConfigError, match="not both"):
            UniHyperLoraForTokenClassification.from_host(bert(), space=small_space(), anchor_file=anchor_file, **given)


class TestLiningUp:
    def test_once_for_ten_adapters_of_a_space(self, own_cache, tmp_path, monkeypatch):
        """New and loaded adapters on copies of a host compute the regression once and read the anchors once."""
        narrow = small_space(dim=D - 1)  # made before anything is counted
        calls = {"fit_host": 0, "word_states": 0}

        def counted(name):
            own = getattr(space_module, name)

            def call(*args, **kwargs):
                calls[name] += 1
                return own(*args, **kwargs)

            monkeypatch.setattr(space_module, name, call)

        for name in calls:
            counted(name)
        fits = []
        for number in range(5):
            labels = ["O", *(f"L{i}" for i in range(number + 1))]
            made = small_stream(bert(24, 3, seed=1), labels=labels, task=f"task{number}")
            made.save_pretrained(tmp_path / str(number))
            again = UniHyperLoraForTokenClassification.from_pretrained(
                tmp_path / str(number), host=bert(24, 3, seed=1), tokenizer=TOKENIZER
            )
            fits += [made.stream.fit, again.stream.fit]
        assert calls == {"fit_host": 1, "word_states": 1}
        for fit in fits[1:]:
            assert all(torch.equal(*pair) for pair in zip(tensors_of(fit), tensors_of(fits[0]), strict=True))
        small_stream(bert(24, 3, seed=2))  # another host
        assert calls == {"fit_host": 2, "word_states": 2}
        small_stream(bert(24, 3, seed=1), space=narrow)  # another space with the same anchors
        assert calls == {"fit_host": 3, "word_states": 2}

    def test_is_kept_by_content_and_made_again_when_damaged(self, own_cache, tmp_path, monkeypatch):
        model = small_stream()
        model.save_pretrained(tmp_path)
        (kept,) = own_cache.glob("map-*")
        first, host = model.stream.fit, model.detach()
        monkeypatch.setattr("modeling_unihyperlora.space.anchor_states", None)  # it would have to run the host
        load = {"host": host, "tokenizer": TOKENIZER}
        again = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, **load)
        assert same_fit(again.stream.fit, first)
        weight = host.encoder.layer[0].output.dense.weight.data
        before = weight.clone()
        weight.mul_(1.01)  # same name, other weights
        with pytest.raises(TypeError):
            UniHyperLoraForTokenClassification.from_pretrained(tmp_path, **load)
        weight.copy_(before)
        monkeypatch.undo()
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(own_cache))
        kept.write_bytes(kept.read_bytes()[:-100])
        again = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, **load)
        assert same_fit(again.stream.fit, first)

    def test_a_cache_that_cannot_be_written_does_no_harm(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "file" / "cache"))
        model = small_stream()
        first = model.stream.fit
        model.calibrate(TOKENIZER)
        assert same_fit(model.stream.fit, first)

    def test_the_host_that_the_space_was_made_on_finds_its_coordinates_again(self):
        model = small_stream()
        assert min(model.stream.fit.r2) > 0.5
        states = word_states(model.host, model.stream.words, text(5), [0, 1, 2, 3, 4])
        z = mapped(model.stream.fit, states.transpose(0, 1), [0, 1, 2, 3, 4])
        target = small_space().canonical().transpose(0, 1)
        assert float((z - target).square().mean()) < 0.25 * float(target.square().mean())

    def test_one_space_object_serves_models_that_are_changed_apart(self):
        space = CanonicalSpace(**small_space().shape())
        space.load_state_dict(small_space().state_dict())
        one, other = (small_stream(space=space) for _ in range(2))
        expected = one(**batch()).logits
        other.adapter.space.atoms_out.latent.data.zero_()
        assert torch.equal(one(**batch()).logits, expected)
        assert space.digest == small_space().digest


class TestFit:
    @pytest.mark.parametrize("linear", [False, True])
    @pytest.mark.parametrize("width,seed", [(48, 0), (40, 1), (31, 2)])
    def test_is_kernel_ridge_regression_with_the_penalty_that_predicts_best(self, width, seed, linear, monkeypatch):
        """Recomputed in float64 with a kernel matrix instead of features; all 400 anchors are landmarks, or none."""
        monkeypatch.setattr(space_module, "WORTH", math.inf if linear else -math.inf)
        generator = np.random.default_rng(seed)
        states = generator.normal(size=(3, 400, width)) * generator.uniform(0.1, 9, width) + 3
        target = states[:2, :, :7] / 9 + generator.normal(size=(2, 400, 7))
        target[0] += np.tanh(states[0, :, :7] - 3)
        fit = fit_host(as_float(states), [0, 2], as_float(target), [0, 1, 2])
        assert (fit.landmarks is None) == linear
        mine = mapped(fit, as_float(states.transpose(1, 0, 2)), [0, 1, 2]).numpy()
        out = np.arange(400) // 50 % 5 == 4

        def standard(layers):
            x = np.concatenate([states[i] for i in layers], axis=1)
            return (x - x.mean(0)) / x.std(0, ddof=1)

        query = standard([0, 2])
        apart = ((query[:, None] - query[None]) ** 2).sum(-1) / (2 * (query**2).sum(1).mean())
        centring = np.eye(400) - 1 / 400
        for k in range(2):
            x, y = standard([2 * k]), target[k] - target[k].mean(0)
            kernel = LINEAR / x.shape[1] * x @ x.T
            if not linear:
                kernel += centring @ np.exp(-apart) @ centring

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

    def test_landmarks_are_told_by_the_leading_components_where_there_are_many(self, monkeypatch):
        """1,500 words of width 300 and falling variance: fewer landmarks than words, and narrower."""
        monkeypatch.setattr(space_module, "WORTH", -math.inf)
        states = torch.randn(1, 1500, 300) * 0.97 ** torch.arange(300)
        states = states @ torch.linalg.qr(torch.randn(300, 300))[0]
        fit = fit_host(states, [0], torch.randn(1, 1500, 4))
        assert fit.landmarks.at.shape == (LANDMARKS, QUERY_WIDTH)
        standard = (states[0] - states[0].mean(0)) / states[0].std(0)
        best = torch.linalg.svdvals(standard)[:QUERY_WIDTH].square().sum()
        query = states[0] @ fit.landmarks.matrix.T + fit.landmarks.offset
        assert query.square().sum() / query.square().sum(1).mean() == pytest.approx(1500)
        assert torch.pdist(query).square().mean() == pytest.approx(1, abs=0.01)
        rotation = torch.linalg.lstsq(query, standard).solution
        kept = (query @ rotation).square().sum()
        assert kept / best > 0.98

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_has_landmarks_where_they_predict_more(self, share):
        """Coordinates that are linear in the states, or products of two of them."""
        states = torch.randn(1, 900, 12)
        target = (1 - share) * states[..., :4] + share * states[..., :4] * states[..., 4:8]
        fit = fit_host(states, [0], target + 0.1 * torch.randn(1, 900, 4))
        assert (fit.landmarks is None) == (share == 0)
        again = from_tensors(to_tensors(fit))
        assert len(again.parts) == len(fit.parts)
        assert all(torch.equal(*pair) for pair in zip(tensors_of(again), tensors_of(fit), strict=True))
        assert (again.r2, again.layers) == (fit.r2, fit.layers)

    def test_landmarks_are_the_means_of_the_anchors_next_to_them(self):
        """Lloyd's rounds recomputed in float64, one cluster after the other."""
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
        """The map finds the product of two dimensions, which a linear map cannot find."""
        states = torch.randn(1, 3000, 4)
        fit = fit_host(states, [0], states[:, :, :1] * states[:, :, 1:2])
        assert fit.r2[0] > 0.8

    def test_predictions_are_correlated_as_what_they_predict(self):
        """Also if the host shows one direction of the coordinates much less than the others."""
        states = torch.randn(1, 3000, 30)
        target = states[:, :, :5] * torch.tensor([3.0, 1, 1, 1, 0.3]) + torch.randn(1, 3000, 5)
        target = target @ torch.linalg.qr(torch.randn(5, 5))[0]
        z = mapped(fit_host(states, [0], target), states.transpose(0, 1), [0])[:, 0]
        assert (z - target[0]).norm() > 0.3 * target.norm()
        correlations = z.T.corrcoef(), target[0].T.corrcoef()
        torch.testing.assert_close(*correlations, rtol=1e-3, atol=1e-3)
        assert (correlations[1] - torch.eye(5)).abs().max() > 0.1
        torch.testing.assert_close(z.std(dim=0), target[0].std(dim=0), rtol=0.1, atol=0.1)
        torch.testing.assert_close(z.mean(dim=0), target[0].mean(dim=0), rtol=1e-3, atol=1e-3)

    def test_one_host_has_one_map(self):
        states, target = torch.randn(1, 300, 20), torch.randn(1, 300, 4)
        first = fit_host(states, [0], target)
        before = torch.get_rng_state()
        again = fit_host(states, [0], target)
        assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers are its own"
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(again), strict=True))

    def test_fit_is_high_where_there_is_something_to_find_and_not_elsewhere(self):
        states = torch.randn(1, 500, 30)
        known = states @ torch.randn(30, 4)
        known = (known - known.mean(1, keepdim=True)) / known.std(1, keepdim=True)
        assert fit_host(states, [0], known).r2[0] > 0.9
        assert fit_host(states, [0], known[:, torch.randperm(500)]).r2[0] < 0.1

    def test_anchors_that_a_host_cannot_read_are_left_out_or_refused(self):
        states, target = torch.randn(1, 50, 6), torch.randn(1, 50, 3)
        states[0, 10:20] = torch.nan
        kept = torch.cat([states[:, :10], states[:, 20:]], dim=1), torch.cat([target[:, :10], target[:, 20:]], dim=1)
        one, other = fit_host(states, [0], target), fit_host(kept[0], [0], kept[1])
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))
        states[0, 3:] = torch.nan
        with pytest.raises(HostError, match="only 3 of 50 anchors"):
            fit_host(states, [0], target)
