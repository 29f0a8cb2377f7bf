"""Arguments of ``from_pretrained``, and the files that it reads or refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertModel,
    pipeline,
)

from modeling_unihyperlora import (
    AdapterFileError,
    ConfigError,
    HostError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
    words,
)
from modeling_unihyperlora.storage import WEIGHTS_NAME, signed_metadata
from tests.modeling_unihyperlora.small_streams import LABELS, TOKENIZER, batch, bert, small_stream

OTHERS = {0: "nothing", 1: "begin", 2: "inside"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter, and the host that it names."""
    root = tmp_path_factory.mktemp("adapter")
    bert().save_pretrained(root / "host")
    TOKENIZER.save_pretrained(root / "host")
    host = BertModel.from_pretrained(root / "host").eval()
    small_stream(host).save_pretrained(root / "adapter")
    return root / "adapter", root / "host"


@pytest.fixture(scope="module")
def expected(folders):
    return UniHyperLoraForTokenClassification.from_pretrained(folders[0])(**batch()).logits.detach()


def load(folders, **given):
    return UniHyperLoraForTokenClassification.from_pretrained(folders[0], **given)


class TestArguments:
    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    @pytest.mark.parametrize("value", [torch.float64, "float64"])
    def test_dtype_is_of_the_host(self, folders, expected, name, value):
        model = load(folders, **{name: value})
        assert next(model.host.parameters()).dtype == torch.float64
        assert {p.dtype for p in model.adapter.parameters()} == {torch.float32}
        assert torch.equal(model(**batch()).logits.argmax(-1), expected.argmax(-1))

    @pytest.mark.parametrize("value", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}])
    def test_one_device(self, folders, expected, value):
        model = load(folders, device_map=value).cpu()
        assert torch.allclose(model(**batch()).logits, expected, atol=1e-5)

    @pytest.mark.parametrize("value", ["balanced", "balanced_low_0", "sequential"])
    def test_ways_to_spread_a_model_put_so_small_a_one_on_one_device(self, folders, value):
        assert load(folders, device_map=value).device == load(folders, device_map="auto").device

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"device_map": {"embeddings": "cpu", "encoder": "meta"}}, ConfigError, "pass host="),
            ({"device_map": "quick"}, ConfigError, "device_map='quick' names no device"),
            ({"device_map": "meta"}, ConfigError, "device_map='meta' keeps no values"),
            ({"dtype": "half"}, HostError, "cannot be loaded"),
            ({"dtype": "bogus"}, HostError, "cannot be loaded .*bogus"),
            ({"use_safetensors": False}, ConfigError, "only safetensors files are read"),
            ({"variant": "fp16"}, ConfigError, "no argument 'variant'"),
        ],
    )
    def test_what_cannot_be_loaded_so(self, folders, given, error, message):
        if given == {"dtype": "half"}:  # torch knows it
            assert load(folders, **given).host.dtype == torch.float16
            return
        with pytest.raises(error, match=message):
            load(folders, **given)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"output_attentions": True}, "only the host has attention weights"),
            ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification' is not"),
            ({"label2id": {"a": 0, "b": 1}}, "the call gave 2"),
        ],
    )
    def test_what_an_auto_class_puts_into_the_configuration_is_refused(self, folders, given, message):
        with pytest.raises(ConfigError, match=message):
            AutoModelForTokenClassification.from_pretrained(folders[0], **given)

    def test_what_an_auto_class_puts_into_the_configuration_is_honoured(self, folders):
        auto = AutoModelForTokenClassification.from_pretrained
        assert len(auto(folders[0], output_hidden_states=True)(**batch()).hidden_states) == 5
        assert isinstance(auto(folders[0], return_dict=False)(**batch()), tuple)
        assert auto(folders[0], label2id={name: at for at, name in OTHERS.items()}).labels == list(OTHERS.values())
        assert auto(folders[0], problem_type="single_label_classification").labels == LABELS

    def test_sides_of_the_tokenizer(self, folders):
        with pytest.raises(HostError, match="padding_side='left' is not possible"):
            AutoTokenizer.from_pretrained(folders[0], padding_side="left")
        right, left = (AutoTokenizer.from_pretrained(folders[0], truncation_side=side) for side in ("right", "left"))
        words = ["word1", "word2", "word3"]
        assert right(words, is_split_into_words=True, truncation=True, max_length=3)["word_index"] == [-1, 0, -1]
        assert left(words, is_split_into_words=True, truncation=True, max_length=3)["word_index"] == [-1, 2, -1]

    @pytest.mark.parametrize("scheme", ["BILOU", "IOB1"])
    def test_a_pipeline_says_what_tags_it_cannot_join(self, folders, tmp_path, scheme, monkeypatch):
        said = []
        monkeypatch.setattr(words.logger, "warning", lambda text, *_: said.append(text))
        model = load(folders)
        model.config.tasks["people"]["scheme"] = scheme
        model.save_pretrained(tmp_path)
        pipeline("token-classification", model=str(tmp_path))
        model.pipeline()
        assert [f"are {scheme}" in text for text in said] == ([True, True] if scheme == "BILOU" else [])

    def test_a_path_of_the_host_can_be_saved(self, folders, tmp_path):
        load(folders, base_model_name_or_path=folders[1]).save_pretrained(tmp_path)
        assert load([tmp_path]).config.base_model_name_or_path == str(folders[1])

    @pytest.mark.parametrize(
        "given",
        [
            {"low_cpu_mem_usage": True},
            {"low_cpu_mem_usage": False},
            {"use_safetensors": True},
            {"trust_remote_code": True},
            {"ignore_mismatched_sizes": False},
            {"local_files_only": True},
        ],
        ids=str,
    )
    def test_what_changes_nothing(self, folders, expected, given):
        assert torch.equal(load(folders, **given)(**batch()).logits, expected)

    def test_loading_info_is_that_of_a_file_that_fits(self, folders, expected):
        model, info = load(folders, output_loading_info=True)
        assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        assert torch.equal(model(**batch()).logits, expected)

    def test_mismatched_sizes_are_never_ignored(self, folders):
        with pytest.raises(ConfigError, match="file must fit"):
            load(folders, ignore_mismatched_sizes=True)

    @pytest.mark.parametrize("name", ["eager", "sdpa"])
    def test_attention_is_the_hosts(self, folders, expected, name):
        model = load(folders, attn_implementation=name)
        assert model.host.config._attn_implementation == name
        torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-3, atol=1e-3)

    def test_what_is_of_a_host_that_is_loaded_goes_with_no_host(self, folders):
        for given in ({"dtype": torch.float64}, {"attn_implementation": "eager"}):
            with pytest.raises(ConfigError, match="is for a host that is loaded here"):
                load(folders, host=bert(), tokenizer=TOKENIZER, **given)

            with pytest.raises(ConfigError, match="is for a host that is loaded here"):
                UniHyperLoraForTokenClassification.from_host(bert(), LABELS, tokenizer=TOKENIZER, **given)

    def test_unknown_arguments_are_refused(self, folders):
        with pytest.raises(ConfigError, match="no argument 'fidelity'"):
            load(folders, fidelity=0.5)
        for host in (bert(), "no/host"):
            with pytest.raises(ConfigError, match="'pathway'; .* go into config=UniHyperLoraConfig"):
                UniHyperLoraForTokenClassification.from_host(host, LABELS, tokenizer=TOKENIZER, pathway="inject")
        with pytest.raises(ConfigError, match="config must be a UniHyperLoraConfig; got dict"):
            UniHyperLoraForTokenClassification.from_host(bert(), LABELS, config={}, tokenizer=TOKENIZER)
        with pytest.raises(ConfigError, match="base_model_name_or_path='no/host'"):
            load(folders, host="no/host")

    def test_a_host_that_is_not_there(self, folders, tmp_path):
        with pytest.raises(HostError, match="cannot be loaded"):
            load(folders, base_model_name_or_path=str(tmp_path / "none"))

    @pytest.mark.parametrize("kind", ["own class", "auto class"])
    def test_labels_that_fit_are_taken_and_saved(self, folders, expected, kind, tmp_path):
        cls = UniHyperLoraForTokenClassification if kind == "own class" else AutoModelForTokenClassification
        model = cls.from_pretrained(folders[0], id2label=OTHERS, label2id={v: k for k, v in OTHERS.items()})
        assert model.labels == list(OTHERS.values()) and model.config.id2label == OTHERS
        model.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path)
        assert again.labels == list(OTHERS.values()) and again.config.label2id == {v: k for k, v in OTHERS.items()}
        assert json.loads((tmp_path / "config.json").read_text())["tasks"]["people"]["labels"] == list(OTHERS.values())

    @pytest.mark.parametrize(
        "given",
        [
            {"num_labels": 3},
            {"id2label": {str(at): label for at, label in enumerate(LABELS)}},
            {"label2id": {label: at for at, label in enumerate(LABELS)}},
            {"num_labels": 3, "id2label": dict(enumerate(LABELS))},
        ],
    )
    def test_labels_that_are_its_own_change_nothing(self, folders, expected, given):
        model = load(folders, **given)
        assert model.labels == LABELS and torch.equal(model(**batch()).logits, expected)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"num_labels": 2}, "has 3 labels .*the call gave 2"),
            ({"id2label": {0: "a", 1: "b"}}, "the call gave 2"),
            ({"label2id": {"a": 0, "b": 1, "c": 2, "d": 3}}, "the call gave 4"),
            ({"id2label": {0: "a", 1: "b", 5: "c"}}, "does not name the ids 0 to 2"),
            ({"id2label": {0: "a", 1: "b", 2: "a"}}, "names a label twice"),
        ],
    )
    def test_labels_that_contradict_are_refused(self, folders, given, message):
        with pytest.raises(ConfigError, match=message):
            load(folders, **given)

    def test_another_task(self, folders, tmp_path):
        model = load(folders)
        model.add_task("places", ["O", "B-LOC"], reader="small")
        model.save_pretrained(tmp_path)
        again = load([tmp_path], task="people")
        assert again.config.active_task == "people" and again.labels == LABELS
        assert load([tmp_path]).labels == ["O", "B-LOC"]
        with pytest.raises(ConfigError, match="No task 'none'"):
            load([tmp_path], task="none")

    def test_outputs_as_a_tuple(self, folders, expected):
        model = load(folders)
        [logits] = model(**batch(), return_dict=False)
        assert torch.equal(logits, expected)
        labels = torch.zeros_like(batch()["input_ids"])
        loss, logits, states = model(**batch(), labels=labels, output_hidden_states=True, return_dict=False)
        assert loss == model(**batch(), labels=labels).loss and len(states) == 5


class TestInputs:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"input_ids": [[2, 5, 3]]}, ConfigError, "tensor of integers; given: list"),
            ({"input_ids": torch.ones(1, 3)}, ConfigError, "tensor of integers; given: torch.float32"),
            ({"input_ids": torch.tensor([2, 5, 3])}, ConfigError, r"be \(B, T\); given: input_ids \(3,\)\."),
            (
                {"input_ids": torch.ones(1, 3).long(), "word_index": torch.ones(1, 2).long()},
                ConfigError,
                r"input_ids \(1, 3\), word_index \(1, 2\)",
            ),
            (
                {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(2, 3)},
                ConfigError,
                r"input_ids \(1, 3\), attention_mask \(2, 3\)",
            ),
            ({"input_ids": torch.ones(1, 0).long()}, ConfigError, r"\(1, 0\) has no tokens"),
            ({"input_ids": torch.ones(0, 2).long()}, ConfigError, r"\(0, 2\) has no tokens"),
            ({"input_ids": torch.full((1, 100), 5)}, HostError, "100 tokens, but the host .* reads at most 64"),
            (
                {"input_ids": torch.tensor([[2, 999, 3]])},
                HostError,
                "from 2 to 999, but the host .* embeds 0 to 4[0-9]",
            ),
            ({"input_ids": torch.tensor([[2, -100, 3]])}, HostError, "from -100 to 3, but the host"),
            ({"input_ids": torch.full((2, 200), -100)}, HostError, "200 tokens, but the host"),
            ({"input_ids": torch.tensor([[2, -5, 3]])}, HostError, "from -5 to 3, but the host .* embeds 0 to 4[0-9]"),
            ({"canonical_states": torch.zeros(1, 2, 5, 7)}, ConfigError, r"\(B, W, 5, 12\) .*given: \(1, 2, 5, 7\)"),
            (
                {"canonical_states": torch.zeros(1, 2, 5, 12), "input_ids": torch.ones(1, 3).long()},
                ConfigError,
                "replace all other inputs; .*input_ids",
            ),
            (
                {"canonical_states": torch.zeros(1, 2, 5, 12), "attention_mask": torch.ones(1, 3)},
                ConfigError,
                r"attention_mask must be \(B, W\) = \(1, 2\); given: \(1, 3\)",
            ),
            ({**batch(), "tasks": "people"}, ConfigError, "tasks='people' must be a list"),
            ({**batch(), "tasks": []}, ConfigError, r"tasks=\[\] must be a list"),
        ],
    )
    def test_what_cannot_be_read(self, folders, given, error, message):
        with pytest.raises(error, match=message):
            load(folders)(**given)


class TestSaving:
    @pytest.mark.parametrize("kind", ["id2label", "label2id"])
    def test_names_set_on_the_configuration_are_saved(self, folders, kind, tmp_path):
        model = load(folders)
        ids = {name: at for at, name in OTHERS.items()}
        setattr(model.config, kind, OTHERS if kind == "id2label" else ids)
        model.save_pretrained(tmp_path)
        again = load([tmp_path])
        assert again.labels == list(OTHERS.values()) and again.config.label2id == ids

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda config: setattr(config, "num_labels", 5), "has 3 labels .* gave 5"),
            (lambda config: config.space.update(dim=9), "no longer describes the adapter: 'space.atoms_in'"),
            (lambda config: config.tasks["people"]["reader"].update(width=7), "no longer describes the adapter"),
            (lambda config: setattr(config, "delta_step", 0.5), "'tasks.people.delta' is .*0.03125.*0.5"),
            (lambda config: config.tasks["people"].update(note=object()), "value that JSON cannot hold"),
            (lambda config: setattr(config, "source_hosts", [{"name": Path("x")}]), "value that JSON cannot hold"),
        ],
    )
    def test_a_configuration_that_no_longer_fits_is_not_written(self, folders, change, message, tmp_path):
        model = load(folders)
        model.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        change(model.config)
        with pytest.raises(ConfigError, match=message):
            model.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("given", [{"safe_serialization": False}, {"variant": "fp16"}, {"fidelity": 1}], ids=str)
    def test_arguments_that_would_be_dropped(self, folders, given, tmp_path):
        with pytest.raises(ConfigError, match=f"does not support {next(iter(given))}"):
            load(folders).save_pretrained(tmp_path, **given)
        assert not any(tmp_path.iterdir())

    def test_what_accelerate_gives_to_every_model(self, folders, tmp_path):
        model = load(folders)
        model.save_pretrained(
            tmp_path, is_main_process=True, state_dict=model.state_dict(), save_function=torch.save, variant=None
        )
        assert load([tmp_path]).labels == LABELS


class TestConfigurations:
    def test_keys_that_are_not_the_adapters_own_do_no_harm(self, folders, expected, tmp_path):
        """Keys that a pipeline or a user adds to the configuration are not saved, and the file loads."""
        model = load(folders)
        for name, value in {"max_length": 128, "label_names": ["labels"], "my_own_key": {"a": 1}}.items():
            setattr(model.config, name, value)
        model.config.problem_type = "single_label_classification"
        model.save_pretrained(tmp_path)
        for again in (load([tmp_path]), AutoModelForTokenClassification.from_pretrained(tmp_path)):
            assert torch.equal(again(**batch()).logits, expected)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert not {"max_length", "label_names", "my_own_key"} & set(saved)
        assert AutoConfig.from_pretrained(tmp_path).tasks["people"]["labels"] == LABELS

    def test_a_misspelt_option_is_refused(self):
        with pytest.raises(ConfigError, match="Unknown configuration key 'delta_stpe'"):
            UniHyperLoraConfig(delta_stpe=0.1)

    def test_a_configuration_of_the_first_format_says_how_to_get_on(self, folders, tmp_path):
        """Such a file has old keys; the error must name the format, not an unknown key."""
        content = json.loads((folders[0] / "config.json").read_text())
        old = {"stream_dim": 32, "stream_width": 160, "stream_hidden": 128, "projector": "anchored", "router": "token"}
        del content["space"]
        content |= old | {"format_version": 1}
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / WEIGHTS_NAME).write_bytes((folders[0] / WEIGHTS_NAME).read_bytes())
        for cls in (UniHyperLoraForTokenClassification, AutoModelForTokenClassification):
            with pytest.raises(ConfigError, match="Train the adapter again, or install 'unihyperlora<0.2'"):
                cls.from_pretrained(tmp_path)
        host = bert()
        with pytest.raises(ConfigError, match="format_version 1, but this package reads 2"):
            load([tmp_path], host=host, tokenizer=TOKENIZER)
        assert all(parameter.requires_grad for parameter in host.parameters())

    def test_weights_of_the_first_format_say_the_same(self, folders, tmp_path):
        tensors = load_file(folders[0] / WEIGHTS_NAME)
        metadata = signed_metadata(tensors) | {"unihyperlora_format": "1"}
        (tmp_path / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
        save_file(tensors, tmp_path / WEIGHTS_NAME, metadata)
        with pytest.raises(AdapterFileError, match="train the adapter again, or install 'unihyperlora<0.2'"):
            load([tmp_path])

    def test_a_newer_format_asks_for_an_update(self, folders, tmp_path):
        content = json.loads((folders[0] / "config.json").read_text()) | {"format_version": 3}
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / WEIGHTS_NAME).write_bytes((folders[0] / WEIGHTS_NAME).read_bytes())
        with pytest.raises(ConfigError, match="Update the package"):
            load([tmp_path])

    def test_a_model_of_another_kind_is_refused(self, folders):
        for cls in (UniHyperLoraForSequenceClassification, AutoModelForSequenceClassification):
            with pytest.raises(ConfigError, match="'people' is token_classification"):
                cls.from_pretrained(folders[0])
