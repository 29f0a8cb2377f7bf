"""Sentences of several tasks in one batch: each is scored as if its task were alone."""

import pytest
import torch

from modeling_unihyperlora import (
    CanonicalSpace,
    ConfigError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from tests.conftest import piece_tokenizer

WORDS = [f"w{number}" for number in range(40)]
READERS = {"people": {"width": 10, "hidden": 6}, "places": {"width": 8, "hidden": 4}, "all": {"width": 6, "hidden": 8}}
PATHWAYS = {
    "inject": {"pathway": "inject"},
    "static": {"pathway": "inject", "router": "static"},
    "sat_lora": {"pathway": "inject", "projector": "host"},
    "sat_lora, a set a block": {"pathway": "inject", "projector": "host", "share_across_layers": False},
    "stream": {},
}
LABELS = {"people": ["O", "B-P", "I-P"], "places": ["O", "B-L"], "all": ["O", "B-P", "B-L", "B-X", "I-X"]}
TASK_IDS = ["places", "all", "people", "places", "people"]


@pytest.fixture(params=PATHWAYS)
def model_of(request, make_host, stir, tmp_path, monkeypatch):
    """model_of(class) → an adapter of three tasks with 3, 2 and 5 labels, with random values in all parts."""
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(1)
    lines = [" ".join(WORDS[i] for i in torch.randint(40, (8,), generator=generator)) for _ in range(40)]
    anchors = tmp_path / "anchors.txt"
    anchors.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make(cls):
        host, own = make_host("bert"), PATHWAYS[request.param]
        more = {}
        if own:
            config = UniHyperLoraConfig(atoms=16, anchor_dim=12, mixer_hidden=5, **own)
        else:
            config = UniHyperLoraConfig()
            pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS[:20], *(f"##{word}" for word in WORDS[20:36])]
            tokenizer = piece_tokenizer(pieces, 64)
            space = CanonicalSpace.make([host], anchors, dim=8, atoms=16, tokenizers=[tokenizer])
            more = {"tokenizer": tokenizer, "space": space}
        model = cls.from_host(host, config=config, **more)
        for name, labels in LABELS.items():
            model.add_task(name, labels, READERS[name])
        return stir(model).eval()

    return make


@pytest.mark.parametrize("cls", [UniHyperLoraForTokenClassification, UniHyperLoraForSequenceClassification])
def test_each_sentence_is_scored_as_if_its_task_were_alone(cls, model_of, make_batch):
    model, batch = model_of(cls), make_batch(sentences=5, tokens=9)
    numbers = torch.tensor([list(model.config.tasks).index(name) for name in TASK_IDS])
    with torch.no_grad():
        mixed = model(**batch, task_ids=TASK_IDS)
        assert torch.equal(model(**batch, task_ids=numbers).logits, mixed.logits)
        alone = {name: model(**batch, task=name) for name in LABELS}
    assert mixed.logits.shape[-1] == 5
    for row, name in enumerate(TASK_IDS):
        own = len(LABELS[name])
        torch.testing.assert_close(mixed.logits[row, ..., :own], alone[name].logits[row], atol=1e-5, rtol=1e-5)
        assert (mixed.logits[row, ..., own:] == -torch.inf).all()
        if model.injection is None:
            assert mixed.active_atoms is None
        else:
            torch.testing.assert_close(mixed.active_atoms[row], alone[name].active_atoms[row])
    other = alone["people"].logits[0] - alone["places"].logits[0, ..., :1]
    assert other.abs().max() > 1e-2, "the tasks do the same, so the test says nothing"


def test_a_changed_task_is_seen(model_of, make_batch):
    model, batch = model_of(UniHyperLoraForTokenClassification), make_batch(sentences=5)
    with torch.no_grad():
        before = model(**batch, task_ids=TASK_IDS).logits
        model.adapter.tasks["places"].head_bias.latent += 1.0
        after = model(**batch, task_ids=TASK_IDS).logits
    torch.testing.assert_close(after[0, :, :2], before[0, :, :2] + 1.0, atol=2e-3, rtol=0)
    assert torch.equal(after[1], before[1])


def test_refusals(make_model, make_batch):
    model, batch = make_model(), make_batch(sentences=2)
    for task_ids, expected in [
        (["ner"], "each of the 2 sentences; given: 1"),
        (["ner", "x"], "'x', which is not a task"),
        (torch.tensor([0, 1]), "has 1; the adapter has 1 tasks"),
        (torch.tensor(0), "given: one number"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            model(**batch, task_ids=task_ids)
    with pytest.raises(ConfigError, match="Give only one of"):
        model(**batch, task="ner", task_ids=["ner", "ner"])
