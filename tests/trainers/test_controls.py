"""Controls: the same adapter on the same host, with a wrong alignment."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from modeling_unihyperlora import CanonicalSpace, ConfigError, UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.storage import adapter_tensors
from trainers.controls import random_coordinates, random_map, shuffle_anchors

NAMES = "anna ben carla david".split()
PLACES = "paris rome oslo lima".split()
D = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def adapter(tiny_host, tmp_path):
    anchors = tmp_path / "anchors.txt"
    lines = [f"{name} flew from {a} to {b} near {c} ." for name in NAMES for a in PLACES for b in PLACES for c in "ab"]
    anchors.write_text("\n".join(lines) + "\n", encoding="utf-8")
    space = CanonicalSpace.make([str(tiny_host)], anchors, dim=D)
    model = UniHyperLoraForTokenClassification.from_host(
        tiny_host, labels=["O", "B-PER"], task="people", space=space, reader="small"
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def other_host(tmp_path, tokenizer):
    torch.manual_seed(7)
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(
        tmp_path / "other"
    )
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def load(folder, host):
    return UniHyperLoraForTokenClassification.from_pretrained(folder, base_model_name_or_path=str(host))


def changed(one, two) -> set[str]:
    before, after = adapter_tensors(one.adapter), adapter_tensors(two.adapter)
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def fits(model) -> list[float]:
    """R² of each knot except the first: a random host's embeddings do not depend on a word's neighbours."""
    return model.stream.fit.r2[1:]


def test_shuffled_anchors_are_the_same_coordinates_at_other_words(adapter, other_host, tmp_path):
    real = load(adapter, other_host)
    control = load(shuffle_anchors(adapter, tmp_path / "control"), other_host)
    assert changed(real, control) == {"space.coordinates"}
    before, after = (model.adapter.space.canonical().detach() for model in (real, control))
    assert (before == after).all(dim=-1).float().mean() < 0.2
    rows = [sorted(map(tuple, x.transpose(0, 1).flatten(1).tolist())) for x in (before, after)]
    assert rows[0] == rows[1]  # an anchor's coordinates at all knots stay together
    assert max(fits(control)) < 0.1 < min(fits(real))


def test_a_random_map_fits_its_host_and_means_nothing(adapter, other_host, tmp_path):
    real = load(adapter, other_host)
    control = load(random_map(adapter, tmp_path / "control", str(other_host)), other_host)
    assert changed(real, control) == {"space.coordinates"}
    assert min(fits(control)) > 0.9
    assert control.config.source_hosts == real.config.source_hosts
    for before, after in zip(*(model.adapter.space.canonical().detach() for model in (real, control)), strict=True):
        same_axis = np.corrcoef(before.T.numpy(), after.T.numpy())[:D, D:].diagonal()
        assert np.abs(same_axis).mean() < 0.5


def test_random_coordinates_have_unit_variance_and_follow_the_states():
    torch.manual_seed(0)
    states = torch.randn(2, 200, 30) * torch.rand(30) * 9 + 4
    states[0, 5] = torch.nan
    coordinates = random_coordinates(states, 50, seed=0)  # more coordinates than the host is wide
    assert not coordinates[:, 5].any() and torch.isfinite(coordinates).all()
    read = torch.arange(200) != 5
    torch.testing.assert_close(coordinates[:, read].std(dim=1), torch.ones(2, 50), atol=1e-4, rtol=0)
    centred = states[:, read] - states[:, read].mean(dim=1, keepdim=True)
    for state, target in zip(centred, coordinates[:, read], strict=True):
        assert torch.linalg.lstsq(state, target).solution.shape == (30, 50)
        torch.testing.assert_close(state @ torch.linalg.lstsq(state, target).solution, target, atol=1e-3, rtol=0)
    assert not torch.equal(coordinates, random_coordinates(states, 50, seed=1))


@pytest.mark.parametrize("control", [shuffle_anchors, lambda a, f: random_map(a, f, "never/loaded")])
def test_an_adapter_without_anchors_is_refused(control, tiny_host, tmp_path):
    model = UniHyperLoraForTokenClassification.from_host(
        tiny_host, labels=["O", "B-A"], task="ner", config=UniHyperLoraConfig(pathway="inject")
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="pathway 'inject'; only a stream has anchors"):
        control(tmp_path / "adapter", tmp_path / "control")
    assert not (tmp_path / "control").exists()
