"""All host families, feature by feature; scripts/research/host_families.py makes a table of these tests.

A test's name is the pathway and the name of the feature.
"""

import copy

import pytest
import torch

from modeling_unihyperlora import (
    CanonicalSpace,
    MergeError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.hosts import encoder_of
from modeling_unihyperlora.layouts import LAYOUTS
from modeling_unihyperlora.storage import StoredTensor
from tests.conftest import piece_tokenizer
from tests.modeling_unihyperlora.families import DECODERS, STREAM_ONLY, VOCABULARY, tiny_host

# What differs from another family in nothing that matters here is left to the slow tests, and so to the table.
LIKE_BERT = {"camembert", "electra", "nomic_bert", "roberta", "xlm-roberta"}
LIKE_LLAMA = {"mistral", "qwen2"}
LIKE_IN_STATES = LIKE_BERT | {"bert", "big_bird", "deberta", "distilbert", "mobilebert", "nystromformer", "rembert"}


def families(names: set[str], slow: set[str]) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in sorted(names)]


INJECT = families({*LAYOUTS}, LIKE_BERT | LIKE_LLAMA)
TEXT = families({*LAYOUTS, *STREAM_ONLY, *DECODERS} - {"vit"}, LIKE_IN_STATES)
LABELS = ["O", "B-A", "I-A"]
NO_MERGE = {"albert", "deberta-v2", "squeezebert"}


def state_of(host) -> tuple:
    """Everything that an adapter could change on a host: weights, hooks, attributes, flags."""
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs), sorted(vars(m)))
        for name, m in host.named_modules()
    ]
    flags = [p.requires_grad for p in host.parameters()], [m.training for m in host.modules()]
    return hooks, flags, {name: tensor.clone() for name, tensor in host.state_dict().items()}


def assert_as_before(host, before: tuple) -> None:
    after = state_of(host)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(after[2][name], tensor) for name, tensor in before[2].items())


def inputs(family: str, sentences: int = 2, tokens: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if family == "vit":
        return {"pixel_values": torch.randn(sentences, 3, 8, 8, generator=generator)}
    ids = torch.randint(4, VOCABULARY, (sentences, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, tokens - 2 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def labels_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"] % len(LABELS) if "input_ids" in batch else torch.tensor([0, 1])


@pytest.fixture
def injected(stir):
    """injected(family) → a model for the family's task, with random values in all parts of its adapter."""

    def make(family: str, host=None, seed: int = 0, **config):
        cls = UniHyperLoraForSequenceClassification if family == "vit" else UniHyperLoraForTokenClassification
        host = tiny_host(family, layers=2, seed=seed) if host is None else host
        config = UniHyperLoraConfig(pathway="inject", atoms=12, anchor_dim=8, mixer_hidden=4, **config)
        return stir(cls.from_host(host, labels=LABELS, task="ner", config=config).eval(), seed + 1)

    return make


@pytest.mark.parametrize("family", INJECT)
class TestInject:
    def test_inject_all_sites(self, family, injected):
        assert injected(family).injection.map.coverage() == "12/12"

    def test_inject_formula(self, family, injected, reference):
        """The paper's formula in float64, layer by layer; it differs from the plain host."""
        model, batch = injected(family), inputs(family)
        with torch.no_grad():
            out, expected = model(**batch), reference(model, batch)
            plain = model.host(**batch).last_hidden_state
        torch.testing.assert_close(out.logits.double(), expected.logits, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(out.active_atoms.double(), expected.active_atoms, atol=1e-6, rtol=1e-6)
        assert (expected.hidden - plain).abs().max() > 0.05, "the update did nothing"

    def test_inject_save_load(self, family, injected, tmp_path):
        model, batch = injected(family), inputs(family)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, host=tiny_host(family, layers=2))
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)

    def test_inject_gradient_scope(self, family, injected):
        """Only parameters of the train scope have a gradient; the host has none."""
        model, batch = injected(family), inputs(family)
        for scope, head_is_new in (("task", True), ("delta", True), ("delta", False)):
            model.config.tasks["ner"]["trained"] = not head_is_new
            model.set_train_scope(scope)
            model.zero_grad(set_to_none=True)
            out = model.train()(**batch, labels=labels_of(batch))
            (out.loss + out.expected_atoms.mean()).backward()
            own = {name for name, p in model.adapter.named_parameters() if p.grad is not None and p.grad.any()}
            if scope == "task":
                expected = {name for name, _ in model.adapter.named_parameters() if not name.endswith("delta.latent")}
            else:
                expected = {"tasks.ner.delta.latent"}
                if head_is_new:
                    expected |= {"tasks.ner.head_weight.latent", "tasks.ner.head_bias.latent"}
            assert own == expected
            assert all(torch.isfinite(p.grad).all() for p in model.adapter.parameters() if p.grad is not None)
            assert all(p.grad is None for p in model.host.parameters())

    def test_inject_detach(self, family, injected):
        """The host is restored bit for bit, with its hooks and flags, also after an aborted forward pass."""
        host, batch = tiny_host(family, layers=2).train(), inputs(family)
        next(host.parameters()).requires_grad_(False)
        before = state_of(host)
        with torch.no_grad():
            plain = host(**batch).last_hidden_state
            model = injected(family, host=host)
            run = model.run(None, batch.get("attention_mask"), None, **batch_without_mask(batch))
            assert not torch.equal(run["last_hidden_state"], plain)
            broken = list(model.injection.map.sites)[-1].linear.register_forward_pre_hook(_fail)
            with pytest.raises(ZeroDivisionError):
                model(**batch)
            broken.remove()
            assert torch.equal(host(**batch).last_hidden_state, plain)
            assert model.detach() is host
            assert_as_before(host, before)
            assert torch.equal(host(**batch).last_hidden_state, plain)

    def test_inject_merge(self, family, injected):
        """Merging is exact with the static router, or refused with a reason; unmerging restores all bits."""
        model, batch = injected(family, router="static"), inputs(family)
        before = {name: tensor.clone() for name, tensor in model.host.state_dict().items()}
        with torch.no_grad():
            beside = model(**batch).logits
            if family in NO_MERGE:
                with pytest.raises(MergeError, match="update cannot be merged into the weights"):
                    model.merge()
            else:
                model.merge()
                assert any(not torch.equal(t, before[name]) for name, t in model.host.state_dict().items())
                torch.testing.assert_close(model(**batch).logits, beside, atol=1e-4, rtol=1e-4)
                model.unmerge()
            assert torch.equal(model(**batch).logits, beside)
        assert all(torch.equal(t, before[name]) for name, t in model.host.state_dict().items())

    def test_inject_two_adapters(self, family, injected):
        """Two adapters on one host compute the same as alone, in whatever order they are detached."""
        host, batch = tiny_host(family, layers=2), inputs(family)
        before = state_of(host)
        with torch.no_grad():
            alone = [injected(family, host=tiny_host(family, layers=2), seed=seed)(**batch).logits for seed in (1, 2)]
            first, second = (injected(family, host=host, seed=seed) for seed in (1, 2))
            assert torch.equal(first(**batch).logits, alone[0]) and torch.equal(second(**batch).logits, alone[1])
            first.detach()
            assert not any(p.requires_grad for p in host.parameters())
            assert torch.equal(second(**batch).logits, alone[1])
            second.detach()
        assert_as_before(host, before)

    def test_inject_bfloat16(self, family, injected):
        model, batch = injected(family), inputs(family)
        low = injected(family, host=tiny_host(family, layers=2).to(torch.bfloat16))
        low_batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad():
            out, out_low = model(**batch), low(**low_batch)
        assert torch.isfinite(out_low.logits).all() and out_low.expected_atoms.dtype == torch.float32
        assert (out_low.logits - out.logits).norm() < 0.5 * out.logits.norm()

    def test_inject_deepcopy(self, family, injected):
        model, batch = injected(family), inputs(family)
        with torch.no_grad():
            before = model(**batch).logits
            twin = copy.deepcopy(model)
            assert torch.equal(twin(**batch).logits, before)
            twin.adapter.atoms_out.latent.zero_()
            assert not torch.equal(twin(**batch).logits, before)
            assert torch.equal(model(**batch).logits, before)
            twin.detach()
            assert all(p.requires_grad for p in twin.host.parameters())
            assert not any(p.requires_grad for p in model.host.parameters())
            assert torch.equal(model(**batch).logits, before)

    @pytest.mark.slow  # seconds a family
    def test_inject_compile(self, family, injected):
        """torch.compile traces the host with its hooks and gives the same result."""
        model, batch = injected(family), inputs(family)
        with torch.no_grad():
            expected = model(**batch).logits
            compiled = torch.compile(model, backend="eager", dynamic=False)
            torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        torch.compiler.reset()


def _fail(module, args):
    raise ZeroDivisionError


def batch_without_mask(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "attention_mask"}


# ---- the stream: one adapter file, made on a BERT, on every family ----


@pytest.fixture(scope="module")
def tokenizer():
    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(VOCABULARY - 6)), "un", "##known"]
    return piece_tokenizer(pieces, 32)


@pytest.fixture(scope="module")
def stream_folder(tokenizer, stir, tmp_path_factory):
    """A saved stream adapter, made on a BERT of 3 blocks."""
    folder = tmp_path_factory.mktemp("stream")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, VOCABULARY - 6, (40, 8), generator=generator).tolist()
    text = "\n".join(" ".join(f"word{i}" for i in line) for line in words)
    (folder / "anchors.txt").write_text(text + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIHYPERLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        host = tiny_host("bert")
        space = CanonicalSpace.make([host], folder / "anchors.txt", dim=8, atoms=12, tokenizers=[tokenizer])
        own = {"reader": {"width": 8, "hidden": 6}, "space": space, "tokenizer": tokenizer}
        model = UniHyperLoraForTokenClassification.from_host(host, labels=LABELS, task="ner", **own)
        stir(model, 1).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def streamed(stream_folder, tokenizer, tmp_path_factory, monkeypatch):
    """streamed(host) → the stream adapter aligned with the host; nothing is shared between tests."""
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path_factory.mktemp("cache")))

    def load(host, folder=stream_folder):
        return UniHyperLoraForTokenClassification.from_pretrained(folder, host=host, tokenizer=tokenizer)

    return load


@pytest.mark.parametrize("family", TEXT)
class TestStream:
    def test_stream_save_load(self, family, streamed, tmp_path):
        """A second load with a new alignment gives the same logits bit for bit; so does a saved copy."""
        batch = inputs(family)
        model = streamed(tiny_host(family, layers=2))
        model.save_pretrained(tmp_path)
        again = streamed(tiny_host(family, layers=2), tmp_path)
        with torch.no_grad():
            logits = model(**batch).logits
            assert torch.equal(again(**batch).logits, logits)
            assert torch.isfinite(logits).all() and logits.std() > 0.01
            for name, module in model.adapter.named_modules():
                if isinstance(module, StoredTensor) and name == "tasks.ner.reader.inward":
                    module.latent.neg_()
            assert not torch.equal(model(**batch).logits, logits), "the stream did nothing"

    def test_stream_gradient_scope(self, family, streamed):
        """Only parameters of the train scope have a gradient; the space and the host have none."""
        batch, model = inputs(family), streamed(tiny_host(family, layers=2))
        of_task = {name for name, _ in model.adapter.named_parameters() if name.startswith("tasks.ner.")}
        head = {"tasks.ner.head_weight.latent", "tasks.ner.head_bias.latent"}
        for scope, head_is_new in (("task", True), ("delta", True), ("delta", False)):
            model.config.tasks["ner"]["trained"] = not head_is_new
            model.set_train_scope(scope)
            model.zero_grad(set_to_none=True)
            model.train()(**batch, labels=labels_of(batch)).loss.backward()
            own = {name for name, p in model.adapter.named_parameters() if p.grad is not None and p.grad.any()}
            delta = {"tasks.ner.delta.latent"}
            assert own == (of_task - delta if scope == "task" else delta | head if head_is_new else delta)
            assert all(p.grad is None for p in model.host.parameters())

    def test_stream_detach(self, family, streamed):
        host, batch = tiny_host(family, layers=2), inputs(family)
        own = {name: value for name, value in batch.items() if family != "fnet" or name != "attention_mask"}
        host(**own, output_hidden_states=True)  # transformers leaves hooks of its own on some
        host.train()
        before = state_of(host)
        with torch.no_grad():
            plain = host.eval()(**own).last_hidden_state
            host.train()
            model = streamed(host)
            model(**batch)
            assert model.detach() is host
            assert_as_before(host, before)
            assert torch.equal(host.eval()(**own).last_hidden_state, plain)

    def test_stream_bfloat16(self, family, streamed):
        if family == "fnet":
            pytest.skip("torch has no Fourier transform in bfloat16 on a CPU, so the host itself does not run")
        batch, model = inputs(family), streamed(tiny_host(family, layers=2))
        low = streamed(tiny_host(family, layers=2).to(torch.bfloat16))
        with torch.no_grad():
            out, out_low = model(**batch).logits, low(**batch).logits
        assert torch.isfinite(out_low).all()
        assert (out_low - out).norm() < 0.5 * out.norm()

    def test_stream_task_model(self, family, streamed):
        """The host inside a task model is used, and the task model is unchanged afterwards."""
        from transformers import AutoModelForSequenceClassification

        config = tiny_host(family, layers=2).config
        whole = AutoModelForSequenceClassification.from_config(config).eval()
        model = streamed(whole)
        assert model.host is encoder_of(whole)
        with torch.no_grad():
            assert torch.isfinite(model(**inputs(family)).logits).all()
