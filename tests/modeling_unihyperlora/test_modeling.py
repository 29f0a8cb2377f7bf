"""The models through the interface of transformers: Auto classes, hosts of any size, wrong arguments, a pipeline."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from modeling_unihyperlora import (
    AdapterFileError,
    ConfigError,
    HostError,
    MergeError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
    UniHyperLoraModel,
)

FAMILIES = ["bert", "distilbert", "mpnet"]
LABELS = ["O", "B-A", "I-A", "B-B", "I-B"]
SENTIMENTS = ["bad", "so-so", "good"]


@pytest.fixture
def host_folder(make_host, tmp_path):
    make_host().save_pretrained(tmp_path / "host")
    return tmp_path / "host"


@pytest.fixture
def adapter_folder(make_model, host_folder, tmp_path):
    """A token classifier that names its host."""
    model = make_model(host=AutoModel.from_pretrained(host_folder))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def is_untouched(host) -> bool:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())
    return hooks == 0 and all(p.requires_grad for p in host.parameters())


class TestAutoClasses:
    def test_token_classification(self, adapter_folder, make_model, make_host, make_batch):
        model = AutoModelForTokenClassification.from_pretrained(adapter_folder)
        assert type(model) is UniHyperLoraForTokenClassification and not model.training
        batch = make_batch()
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, make_model(host=make_host())(**batch).logits)
        assert model.config.id2label == dict(enumerate(LABELS)) and model.config.num_labels == 5
        assert model.config.source_hosts[0]["hidden_size"] == 32

    def test_without_a_head(self, adapter_folder, make_batch):
        model, whole = (auto.from_pretrained(adapter_folder) for auto in (AutoModel, AutoModelForTokenClassification))
        assert type(model) is UniHyperLoraModel
        batch = make_batch()
        with torch.no_grad():
            out, expected = model(**batch), whole(**batch, output_hidden_states=True)
            plain = model.host(**batch).last_hidden_state
        assert torch.equal(out.last_hidden_state, expected.hidden_states[-1])
        assert torch.equal(out.expected_atoms, expected.expected_atoms)
        assert not torch.allclose(out.last_hidden_state, plain, atol=1e-3)

    def test_sequence_classification(self, make_model, host_folder, make_batch, tmp_path):
        host = AutoModel.from_pretrained(host_folder)
        model = make_model(host=host, cls=UniHyperLoraForSequenceClassification, labels=SENTIMENTS, task="mood")
        model.save_pretrained(tmp_path / "mood")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mood")
        assert type(loaded) is UniHyperLoraForSequenceClassification
        batch = make_batch()
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)

    def test_config(self, adapter_folder):
        config = AutoConfig.from_pretrained(adapter_folder)
        assert type(config) is UniHyperLoraConfig and config.atoms == 16 and config.tasks["ner"]["labels"] == LABELS

    def test_another_host_by_name(self, adapter_folder, make_host, tmp_path, make_batch):
        make_host("mpnet", width=48, layers=2).save_pretrained(tmp_path / "other")
        model = AutoModelForTokenClassification.from_pretrained(
            adapter_folder, base_model_name_or_path=str(tmp_path / "other")
        )
        assert model.injection.map.family == "mpnet" and model.host.config.hidden_size == 48
        assert model(**make_batch()).logits.shape == (2, 7, 5)
        assert model.config.base_model_name_or_path == str(tmp_path / "other")

    @pytest.mark.parametrize("auto", [True, False])
    def test_the_revision_of_its_own_host_is_not_asked_of_another(self, auto, adapter_folder, make_host, tmp_path):
        path = adapter_folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_revision": "abc123"}))
        make_host("bert", width=48).save_pretrained(tmp_path / "other")
        load = (AutoModelForTokenClassification if auto else UniHyperLoraForTokenClassification).from_pretrained
        other = {"base_model_name_or_path": str(tmp_path / "other")}
        assert load(adapter_folder, **other).config.base_model_revision is None
        assert load(adapter_folder, **other, base_model_revision="v2").config.base_model_revision == "v2"
        assert load(adapter_folder).config.base_model_revision == "abc123"

    def test_another_host_as_a_module(self, adapter_folder, make_host):
        host = make_host("distilbert", width=48)
        assert AutoModelForTokenClassification.from_pretrained(adapter_folder, host=host).host is host

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
    def test_dtype_is_that_of_the_host(self, dtype, adapter_folder, make_batch):
        model = AutoModelForTokenClassification.from_pretrained(adapter_folder, dtype=dtype)
        assert {p.dtype for p in model.host.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.adapter.parameters()} == {torch.float32}
        assert torch.isfinite(model(**make_batch()).logits).all()

    @pytest.mark.parametrize("auto", [True, False])
    def test_static_router_can_be_asked_for(self, auto, adapter_folder, make_batch):
        load = (AutoModelForTokenClassification if auto else UniHyperLoraForTokenClassification).from_pretrained
        model = load(adapter_folder, router="static")
        with torch.no_grad():
            before = model(**make_batch()).logits
            model.merge()
            torch.testing.assert_close(model(**make_batch()).logits, before, atol=1e-5, rtol=1e-5)


class TestOtherHosts:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("width,layers", [(32, 3), (64, 1), (20, 5), (48, 12)])
    def test_any_width_depth_and_family(
        self, family, width, layers, adapter_folder, make_host, make_batch, make_model, reference
    ):
        """The same file follows the formula on hosts that it was not made on."""
        model = UniHyperLoraForTokenClassification.from_pretrained(
            adapter_folder, host=make_host(family, width=width, layers=layers, seed=layers)
        )
        assert f"{6 * layers}/{6 * layers} sites" in model.describe()
        batch = make_batch(tokens=4, seed=width)
        with torch.no_grad():
            logits, expected = model(**batch).logits, reference(model, batch)
        torch.testing.assert_close(logits.double(), expected.logits, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_token_types_go_to_hosts_that_know_them(self, family, make_model, make_batch):
        model, batch = make_model(family), make_batch()
        types = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            with_types, without = model(**batch, token_type_ids=types).logits, model(**batch).logits
        assert torch.equal(with_types, without) == (family != "bert")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_embeddings_in_place_of_ids(self, family, make_model, make_batch):
        model, batch = make_model(family), make_batch(sentences=1)
        embedded = model.host.get_input_embeddings()(batch["input_ids"])
        mask = {"attention_mask": batch["attention_mask"]}
        positions = {}
        if family == "mpnet":  # counts positions from the ids, so they have to be given
            positions = {"position_ids": torch.arange(2, 9)[None]}
        with torch.no_grad():
            from_ids, given = model(**batch, **positions), model(inputs_embeds=embedded, **mask, **positions)
        torch.testing.assert_close(given.logits, from_ids.logits)

    def test_without_a_mask_every_token_is_real(self, make_model, make_batch):
        model, ids = make_model(), make_batch(sentences=1)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, model(ids, torch.ones_like(ids)).logits)


class TestArguments:
    load = staticmethod(UniHyperLoraForTokenClassification.from_pretrained)

    @pytest.mark.parametrize("auto", [True, False])
    def test_a_misspelt_one_is_named(self, auto, adapter_folder):
        load = AutoModelForTokenClassification.from_pretrained if auto else self.load
        with pytest.raises(ConfigError, match="base_model_name_or_pth"):
            load(adapter_folder, base_model_name_or_pth="bert-base-uncased")

    def test_a_misspelt_configuration_key_is_named(self):
        with pytest.raises(ConfigError, match="'atom'.*Known keys: .*atoms"):
            UniHyperLoraConfig(atom=64)

    @pytest.mark.parametrize("auto", [True, False])
    @pytest.mark.parametrize("name,value", [("router", "best"), ("router_top_k", 7)])
    def test_a_bad_choice_is_refused(self, name, value, auto, adapter_folder, make_host):
        load, host = AutoModelForTokenClassification.from_pretrained if auto else self.load, make_host()
        with pytest.raises(ConfigError, match=f"{name}={value!r} is not allowed"):
            load(adapter_folder, host=host, **{name: value})
        assert is_untouched(host)

    def test_no_host_named(self, make_model, make_host, tmp_path):
        make_model(host=make_host()).save_pretrained(tmp_path)  # a host made here has no name
        with pytest.raises(HostError, match="base_model_name_or_path"):
            self.load(tmp_path)

    @pytest.mark.parametrize("name", ["no_such_folder", "nobody/no-such-model"])
    def test_host_that_is_not_there(self, name, adapter_folder):
        with pytest.raises(HostError, match=f"'{name}' cannot be loaded"):
            self.load(adapter_folder, base_model_name_or_path=name)

    def test_damaged_host(self, adapter_folder, host_folder):
        (host_folder / "model.safetensors").write_bytes(b"not a model")
        with pytest.raises(HostError, match="cannot be loaded"):
            self.load(adapter_folder)

    def test_unknown_family(self, adapter_folder, make_host):
        host = make_host("rembert")
        with pytest.raises(HostError, match="'rembert'.*bert.*mpnet.*layout="):
            self.load(adapter_folder, host=host)
        assert is_untouched(host)

    def test_adapter_in_place_of_the_host(self, adapter_folder, host_folder):
        with pytest.raises(HostError, match="give the encoder"):
            self.load(adapter_folder, base_model_name_or_path=str(adapter_folder))

    def test_host_in_place_of_the_adapter(self, host_folder):
        with pytest.raises(AdapterFileError, match="not the configuration of a UniHyperLoRA adapter"):
            self.load(host_folder)

    @pytest.mark.parametrize("auto", [True, False])
    def test_a_model_of_another_type(self, auto, adapter_folder, make_host):
        auto_class = AutoModelForSequenceClassification if auto else UniHyperLoraForSequenceClassification
        host = make_host()
        with pytest.raises(ConfigError, match="token_classification.*does sequence_classification"):
            auto_class.from_pretrained(adapter_folder, host=host)
        assert is_untouched(host)


class TestTasks:
    def test_of_both_types_in_one_adapter(self, make_model, make_batch, make_host, tmp_path):
        words = make_model()
        words.config.tasks["mood"] = {"type": "sequence_classification", "labels": SENTIMENTS}
        sentences = UniHyperLoraForSequenceClassification(words.config, host=make_host())
        sentences.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"tasks of that type are \['mood'\]"):
            UniHyperLoraForSequenceClassification.from_pretrained(tmp_path, host=make_host())
        loaded = UniHyperLoraForSequenceClassification.from_pretrained(tmp_path, host=make_host(), task="mood")
        assert loaded(**make_batch()).logits.shape == (2, 3) and loaded.labels == SENTIMENTS
        with pytest.raises(ConfigError, match="'ner' is token_classification"):
            loaded.set_task("ner")
        with pytest.raises(ConfigError, match="'ner' is token_classification"):
            loaded(**make_batch(), task="ner")
        assert loaded.config.active_task == "mood"

    @pytest.mark.parametrize("attempt", ["load", "set", "forward"])
    def test_unknown(self, attempt, make_model, make_batch, adapter_folder, make_host):
        model, host = make_model(), make_host()
        with pytest.raises(ConfigError, match="No task 'pos'.*ner"):
            if attempt == "load":
                UniHyperLoraForTokenClassification.from_pretrained(adapter_folder, host=host, task="pos")
            elif attempt == "set":
                model.set_task("pos")
            else:
                model(**make_batch(), task="pos")
        assert is_untouched(host) and model.config.active_task == "ner"

    @pytest.mark.parametrize(
        "name,labels,match",
        [
            ("ner", LABELS, "exists already"),
            ("", LABELS, "not allowed"),
            ("a/b", LABELS, "not allowed"),
            ("a.b", LABELS, "not allowed"),
            ("x" * 65, LABELS, "not allowed"),
            ("train", LABELS, "PyTorch reserves"),
            ("keys", LABELS, "PyTorch reserves"),
            ("pos", ["only"], "at least two"),
            ("pos", ["a", "a"], "twice"),
            ("pos", "abc", "at least two"),
            ("pos", [1, 2], "at least two"),
        ],
    )
    def test_that_cannot_be_added(self, name, labels, match, make_model):
        model = make_model()
        before = set(model.state_dict())
        with pytest.raises(ConfigError, match=match):
            model.add_task(name, labels)
        assert set(model.state_dict()) == before and sorted(model.config.tasks) == ["ner"]

    def test_model_without_a_head_takes_none(self, make_host):
        model = UniHyperLoraModel.from_host(make_host(), config=UniHyperLoraConfig(pathway="inject"))
        with pytest.raises(ConfigError, match="no head"):
            model.add_task("ner", LABELS)

    def test_a_new_one_starts_as_nothing(self, make_model, make_batch):
        model = make_model()
        model.add_task("pos", ["x", "y"])
        own = model.adapter.tasks["pos"]
        assert not own.delta().any() and own.delta().shape == (8, 16)
        assert model.config.active_task == "pos" and model.config.label2id == {"x": 0, "y": 1}


class TestTrainScope:
    def trained(self, model) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    def test_source(self, make_model):
        model = make_model()
        model.add_task("other", LABELS)
        model.set_task("ner")
        model.set_train_scope("task")
        expected = {
            name
            for name, _ in model.named_parameters()
            if name.startswith("adapter.") and "tasks.other" not in name and "delta" not in name
        }
        assert self.trained(model) == expected and len(expected) == 11

    @pytest.mark.parametrize("trained_before", [True, False])
    def test_delta(self, trained_before, make_model):
        model = make_model()
        model.add_task("other", LABELS)
        model.config.tasks["other"]["trained"] = trained_before
        model.set_train_scope("task")
        model.set_train_scope("delta")
        head = set() if trained_before else {"head_weight", "head_bias"}
        assert self.trained(model) == {f"adapter.tasks.other.{leaf}.latent" for leaf in {"delta"} | head}

    @pytest.mark.parametrize("scope", ["task", "delta"])
    def test_what_is_merged_cannot_be_trained(self, scope, make_model):
        model = make_model(router="static")
        model.merge()
        with pytest.raises(MergeError, match="unmerge"):
            model.set_train_scope(scope)

    def test_unknown(self, make_model):
        model = make_model()
        before = self.trained(model)
        with pytest.raises(ConfigError, match="'everything'"):
            model.set_train_scope("everything")
        assert self.trained(model) == before


class TestLoss:
    def test_mean_over_labelled_tokens(self, make_model, make_batch):
        model, batch = make_model(), make_batch()
        labels = torch.tensor([[0, 1, -100, 2, -100, -100, 4], [3, -100, -100, -100, -100, -100, -100]])
        out = model(**batch, labels=labels)
        logits = out.logits.detach().double()
        losses = [
            -torch.log(torch.exp(logits[b, t, labels[b, t]]) / torch.exp(logits[b, t]).sum())
            for b, t in (labels != -100).nonzero().tolist()
        ]
        assert len(losses) == 5
        torch.testing.assert_close(out.loss.double(), sum(losses) / 5, atol=1e-6, rtol=1e-6)
        shared = model(**batch, labels=labels, num_items_in_batch=20).loss
        torch.testing.assert_close(shared.double(), sum(losses) / 20, atol=1e-6, rtol=1e-6)

    def test_without_any_label_it_is_zero_and_not_nan(self, make_model, make_batch):
        model, batch = make_model(), make_batch()
        loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss
        assert loss.item() == 0
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.adapter.parameters() if p.grad is not None)

    def test_without_labels_there_is_none(self, make_model, make_batch):
        assert make_model()(**make_batch()).loss is None


class TestSequenceClassification:
    @pytest.fixture
    def model(self, make_model):
        return make_model(cls=UniHyperLoraForSequenceClassification, labels=SENTIMENTS, task="mood")

    def test_is_the_formula_on_means_over_real_tokens(self, model, make_batch, reference):
        batch = make_batch(sentences=3)
        with torch.no_grad():
            expected = reference(model, batch).logits
            torch.testing.assert_close(model(**batch).logits.double(), expected, atol=1e-4, rtol=1e-4)

    def test_padding_does_not_count(self, model, make_batch):
        batch = make_batch(sentences=1, tokens=5)
        padded = {
            "input_ids": torch.cat([batch["input_ids"], torch.ones(1, 4, dtype=torch.long)], dim=1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(1, 4, dtype=torch.long)], dim=1),
        }
        with torch.no_grad():
            torch.testing.assert_close(model(**padded).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
            longer = {name: x[:, :7] | (name == "attention_mask") for name, x in padded.items()}
            assert not torch.allclose(model(**longer).logits, model(**batch).logits, atol=1e-3)

    def test_loss(self, model, make_batch):
        labels = torch.tensor([2, 0])
        out = model(**make_batch(), labels=labels)
        log_probability = torch.log_softmax(out.logits.double(), dim=-1)
        torch.testing.assert_close(out.loss.double(), -(log_probability[0, 2] + log_probability[1, 0]) / 2)


class TestPipeline:
    @pytest.mark.parametrize("loaded", [True, False])
    def test_token_classification(self, loaded, tiny_host, tokenizer, tmp_path, stir):
        model = UniHyperLoraForTokenClassification.from_host(
            str(tiny_host), labels=LABELS, config=UniHyperLoraConfig(pathway="inject")
        )
        stir(model.eval())
        if loaded:
            model.save_pretrained(tmp_path)
            model = AutoModelForTokenClassification.from_pretrained(tmp_path)
        words = "anna lives in paris"
        found = pipeline("token-classification", model=model, tokenizer=tokenizer)(words)
        encoded = tokenizer(words, return_tensors="pt")
        with torch.no_grad():
            best = model(**encoded).logits.argmax(dim=-1)[0].tolist()[1:-1]
        expected = [(word, LABELS[b]) for word, b in zip(words.split(), best, strict=True) if LABELS[b] != "O"]
        assert expected and [(token["word"], token["entity"]) for token in found] == expected

    def test_text_classification(self, tiny_host, tokenizer, stir):
        model = UniHyperLoraForSequenceClassification.from_host(
            str(tiny_host), labels=SENTIMENTS, config=UniHyperLoraConfig(pathway="inject")
        )
        stir(model.eval())
        found = pipeline("text-classification", model=model, tokenizer=tokenizer)("anna lives in paris")
        with torch.no_grad():
            best = model(**tokenizer("anna lives in paris", return_tensors="pt")).logits.argmax().item()
        assert found[0]["label"] == SENTIMENTS[best]
