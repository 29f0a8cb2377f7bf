"""Agreement on the space's text: what is compared, against a plain reading of each sentence alone."""

import pytest
import torch

from modeling_unihyperlora import UniHyperLoraForSequenceClassification
from modeling_unihyperlora.measure.agreement import agreement, held_out_coordinates, predictions
from modeling_unihyperlora.space import anchor_states, fit_host, knot_layers, layers_read
from tests.modeling_unihyperlora.small_streams import LABELS, MOODS, bert, small_space, small_stream


def states_of(model) -> torch.Tensor:
    return anchor_states(model.host, model.stream.words, model.adapter.space.sentences())


def by_hand(model, z: torch.Tensor, task: str) -> list[list[int]]:
    """Likeliest labels, a sentence at a time through the model itself."""
    found, at = [], 0
    for sentence in model.adapter.space.sentences():
        with torch.no_grad():
            logits = model(canonical_states=z[None, at : at + len(sentence)], task=task).logits[0]
        found.append(logits.argmax(dim=-1).reshape(-1).tolist())
        at += len(sentence)
    return found


def test_predictions_are_those_of_the_model():
    model = small_stream()
    z = model.adapter.space.canonical().transpose(0, 1)
    found = predictions(model.adapter, "people", z, model.adapter.space.sentences())
    assert [row.tolist() for row in found] == by_hand(model, z, "people")


def test_each_half_of_the_text_is_mapped_by_the_other():
    model = small_stream(bert(width=24, blocks=2, seed=3))
    states, space = states_of(model), small_space()
    found = held_out_coordinates(space, states, 2)
    sentence = torch.arange(len(found)) // 8  # of eight words each
    for half in (0, 1):
        held_out = sentence // 8 % 2 == half
        fit = fit_host(states[:, ~held_out], knot_layers(2), space.canonical()[:, ~held_out])
        of_layer = dict(zip(layers_read(2), states[:, held_out], strict=True))
        expected = fit(of_layer).unflatten(1, (5, -1))
        assert torch.allclose(found[held_out], expected, atol=1e-4)


def test_tags_are_compared_where_either_is_a_name():
    model = small_stream(bert(width=24, blocks=2, seed=3))
    z = model.adapter.space.canonical().transpose(0, 1), held_out_coordinates(small_space(), states_of(model), 2)
    first, second = (sum(by_hand(model, own, "people"), []) for own in z)
    outside = LABELS.index("O")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a != outside or b != outside]
    assert 0 < len(pairs) < len(first)
    assert agreement(model, ["people"])["people"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_classes_are_compared_by_sentence():
    model = small_stream(bert(width=24, blocks=2, seed=3), MOODS, "mood", UniHyperLoraForSequenceClassification)
    z = model.adapter.space.canonical().transpose(0, 1), held_out_coordinates(small_space(), states_of(model), 2)
    first, second = (sum(by_hand(model, own, "mood"), []) for own in z)
    expected = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    assert agreement(model, ["mood"])["mood"] == pytest.approx(expected)


def test_a_task_that_names_nothing_has_none():
    model = small_stream()
    with torch.no_grad():
        model.adapter.tasks["people"].head_bias.latent.copy_(torch.tensor([100.0, 0, 0]))
    assert agreement(model, ["people"])["people"] is None


def test_a_word_that_the_host_cannot_read_does_not_count(monkeypatch):
    model = small_stream()
    states = states_of(model)
    states[:, :16] = torch.nan
    monkeypatch.setattr("modeling_unihyperlora.measure.agreement.anchor_states", lambda *_: states)
    z = held_out_coordinates(small_space(), states, model.stream.words.num_layers)
    assert bool((z[:16] == 0).all()) and bool(torch.isfinite(z).all())
    share = agreement(model, ["people"])["people"]
    with torch.no_grad():
        first, second = (
            torch.cat(predictions(model.adapter, "people", own, small_space().sentences()))[16:]
            for own in (small_space().canonical().transpose(0, 1), z)
        )
    outside = LABELS.index("O")
    counted = (first != outside) | (second != outside)
    assert share == pytest.approx(float((first == second)[counted].double().mean()))
