"""Several tasks of one stream: in one pass, mixed in a batch, and moved from one file to another."""

import json

import pytest
import torch
import torch.nn.functional as F

from modeling_unihyperlora import (
    AdapterFileError,
    CanonicalSpace,
    ConfigError,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
    UniHyperLoraModel,
)
from modeling_unihyperlora.storage import WEIGHTS_NAME
from tests.modeling_unihyperlora.small_streams import (
    LABELS,
    MOODS,
    READER,
    TOKENIZER,
    D,
    batch,
    bert,
    small_space,
    small_stream,
    stirred,
)

PLACES = ["O", "B-LOC", "I-LOC", "B-SEA", "I-SEA"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters of one space and one of another space, each with its own task."""
    made = {
        "people": small_stream(),
        "places": stirred(small_stream(labels=PLACES, task="places", reader={"width": 7, "hidden": 5}), "places", 2),
        "mood": small_stream(labels=MOODS, task="mood", cls=UniHyperLoraForSequenceClassification),
        "elsewhere": small_stream(task="elsewhere", space=small_space(seed=6)),
    }
    root = tmp_path_factory.mktemp("adapters")
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in made}


def load(folder, cls=UniHyperLoraForTokenClassification, host=None, **given):
    return cls.from_pretrained(folder, host=bert() if host is None else host, tokenizer=TOKENIZER, **given)


@pytest.fixture
def model(folders):
    """All three tasks in one adapter."""
    made = load(folders["people"])
    made.load_task(folders["places"])
    made.load_task(folders["mood"])
    return made


def counted(host) -> list:
    calls = []
    host.register_forward_hook(lambda *_: calls.append(1))
    return calls


def state_of(model) -> tuple:
    tensors = {name: value.clone() for name, value in model.adapter.state_dict().items()}
    return json.dumps(model.config.to_dict(), default=str), tensors


def assert_untouched(model, before: tuple) -> None:
    now = state_of(model)
    assert now[0] == before[0] and now[1].keys() == before[1].keys()
    assert all(torch.equal(value, now[1][name]) for name, value in before[1].items())


class TestOnePass:
    def test_every_task_scores_as_on_its_own(self, model, folders):
        calls = counted(model.host)
        out = model(**batch(), tasks=["mood", "people", "places"])
        assert len(calls) == 1, "the host reads a batch once"
        assert list(out.logits) == ["mood", "people", "places"] and out.loss is None
        for name in ("people", "places"):
            assert torch.equal(out.logits[name], load(folders[name])(**batch()).logits)
        mood = load(folders["mood"], UniHyperLoraForSequenceClassification)
        assert torch.equal(out.logits["mood"], mood(**batch()).logits)
        assert [tuple(out.logits[name].shape) for name in out.logits] == [(2, 2), (2, 6, 3), (2, 6, 5)]

    @pytest.mark.parametrize("cls", [UniHyperLoraForSequenceClassification, UniHyperLoraForTokenClassification])
    def test_the_kind_of_the_model_does_not_matter(self, cls, model, tmp_path):
        model.save_pretrained(tmp_path)
        task = "mood" if cls is UniHyperLoraForSequenceClassification else "places"
        other = load(tmp_path, cls, task=task)
        found, expected = (one(**batch(), tasks=["people", "mood"]).logits for one in (other, model))
        assert all(torch.equal(found[name], expected[name]) for name in ("people", "mood"))

    def test_from_canonical_states(self, model):
        inputs = batch()
        run = model.stream.read(inputs["attention_mask"], {"input_ids": inputs["input_ids"]})
        mask = torch.arange(run.z.shape[1]) < run.lengths[:, None]
        calls = counted(model.host)
        found = model(canonical_states=run.z, attention_mask=mask, tasks=["mood", "people"]).logits
        assert not calls
        torch.testing.assert_close(found["mood"], model(**inputs, tasks=["mood"]).logits["mood"])
        assert found["people"].shape == (2, 3, 3)

    def test_as_a_tuple(self, model):
        [logits] = model(**batch(), tasks=["mood", "people"], return_dict=False)
        assert set(logits) == {"mood", "people"}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"tasks": ["people", "none"]}, "No task 'none'"),
            ({"tasks": ["people"], "task": "people"}, "Give only one of"),
            ({"tasks": ["people"], "task_ids": ["people"] * 2}, "Give only one of"),
            ({"task": "people", "task_ids": ["people"] * 2}, "Give only one of"),
            ({"tasks": ["people"], "labels": torch.zeros(2, 6, dtype=torch.long)}, "Leave labels out"),
        ],
    )
    def test_what_is_refused(self, model, given, message):
        with pytest.raises(ConfigError, match=message):
            model(**batch(), **given)

    def test_the_active_task_stays(self, model):
        model.set_task("people")
        model(**batch(), tasks=["places"])
        assert model.config.active_task == "people" and model(**batch()).logits.shape[-1] == 3

    def test_gradients_reach_every_task(self, model):
        logits = model(**batch(), tasks=["people", "places"]).logits
        (logits["people"].square().sum() + logits["places"].square().sum()).backward()
        for name in ("people", "places"):
            assert model.adapter.tasks[name].reader.inward.latent.grad.norm() > 0
        assert model.adapter.tasks["mood"].reader.inward.latent.grad is None


class TestMixedBatch:
    SENTENCES = ("word1 unknown word3", "word7 word2", "word4", "word5 word6 word7 word8")

    def test_each_sentence_is_of_its_own_task(self, model):
        inputs, ids = batch(self.SENTENCES), ["places", "people", "people", "places"]
        calls = counted(model.host)
        found = model(**inputs, task_ids=ids).logits
        assert len(calls) == 1 and found.shape[-1] == 5
        for row, name in enumerate(ids):
            own = model(**inputs, task=name).logits[row]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(found[row, real, : own.shape[-1]], own[real], rtol=1e-5, atol=1e-5)
            assert found[row, :, own.shape[-1] :].eq(-torch.inf).all()

    def test_by_number_and_with_a_loss(self, model):
        inputs, names = batch(self.SENTENCES), list(model.config.tasks)
        ids = torch.tensor([names.index(name) for name in ("places", "people", "people", "places")])
        labels = torch.where(inputs["attention_mask"].bool(), 1, -100)
        out = model(**inputs, task_ids=ids, labels=labels)
        assert torch.equal(out.logits, model(**inputs, task_ids=["places", "people", "people", "places"]).logits)
        losses = [
            F.cross_entropy(
                model(**inputs, task=names[task]).logits[row], labels[row], ignore_index=-100, reduction="sum"
            )
            for row, task in enumerate(ids.tolist())
        ]
        torch.testing.assert_close(out.loss, torch.stack(losses).sum() / inputs["attention_mask"].sum())

    def test_sentences_of_two_classifications(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        classifier = load(tmp_path, UniHyperLoraForSequenceClassification, task="mood")
        classifier.add_task("topic", ["a", "b", "c"], reader=READER)
        stirred(classifier, "topic").eval()
        inputs = batch(self.SENTENCES)
        found = classifier(**inputs, task_ids=["topic", "mood", "mood", "topic"]).logits
        torch.testing.assert_close(found[[0, 3]], classifier(**inputs, task="topic").logits[[0, 3]])
        torch.testing.assert_close(found[[1, 2], :2], classifier(**inputs, task="mood").logits[[1, 2]])
        assert found[[1, 2], 2].eq(-torch.inf).all()

    def test_a_task_of_another_kind_is_refused(self, model):
        with pytest.raises(ConfigError, match="'mood' is sequence_classification"):
            model(**batch(), task_ids=["people", "mood"])
        with pytest.raises(ConfigError, match="one task for each of the 2 sentences"):
            model(**batch(), task_ids=["people"])


class TestLoading:
    def test_a_task_is_added_as_it_is(self, folders, tmp_path):
        model = load(folders["people"])
        before = model(**batch()).logits
        model.load_task(folders["places"], name="geography")
        assert list(model.config.tasks) == ["people", "geography"] and model.config.active_task == "people"
        assert model.config.tasks["geography"] == UniHyperLoraConfig.from_pretrained(folders["places"]).tasks["places"]
        expected = load(folders["places"])(**batch()).logits
        assert torch.equal(model(**batch(), task="geography").logits, expected)
        assert torch.equal(model(**batch()).logits, before)
        model.save_pretrained(tmp_path)
        again = load(tmp_path, task="geography", host=bert(24, 7, seed=2))
        there = load(folders["places"], host=bert(24, 7, seed=2))
        assert torch.equal(again(**batch()).logits, there(**batch()).logits)

    def test_its_active_task_or_the_named_one(self, model, folders, tmp_path):
        model.set_task("places")
        model.save_pretrained(tmp_path)
        other = load(folders["people"])
        other.load_task(tmp_path)
        other.load_task(tmp_path, "mood")
        assert list(other.config.tasks) == ["people", "places", "mood"]

    def test_it_does_not_share_its_configuration(self, folders):
        model = load(folders["people"])
        model.load_task(folders["people"], name="twin")
        model.config.tasks["twin"]["labels"][0] = "nothing"
        assert model.config.tasks["people"]["labels"] == LABELS

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (("elsewhere",), ConfigError, "their coordinates mean different things"),
            (("places", "none"), ConfigError, "No task 'none'"),
            (("people",), ConfigError, "exists already"),
            (("places", None, "people"), ConfigError, "exists already"),
            (("places", None, "no name"), ConfigError, "not allowed"),
            (("places", None, "keys"), ConfigError, "PyTorch reserves"),
            (("damaged",), AdapterFileError, "damaged"),
            (("half",), AdapterFileError, "has no model.safetensors"),
            (("nowhere",), AdapterFileError, "No adapter"),
        ],
    )
    def test_on_an_error_the_model_is_untouched(self, folders, tmp_path, given, error, message):
        folders = folders | {name: tmp_path / name for name in ("damaged", "half", "nowhere")}
        for name in ("damaged", "half"):
            folders[name].mkdir()
            for file in ("config.json", WEIGHTS_NAME):
                (folders[name] / file).write_bytes((folders["places"] / file).read_bytes())
        content = bytearray((folders["damaged"] / WEIGHTS_NAME).read_bytes())
        content[-40] ^= 1
        (folders["damaged"] / WEIGHTS_NAME).write_bytes(bytes(content))
        (folders["half"] / WEIGHTS_NAME).unlink()
        model = load(folders["people"])
        before = state_of(model)
        with pytest.raises(error, match=message):
            model.load_task(folders[given[0]], *given[1:])
        assert_untouched(model, before)
        assert torch.isfinite(model(**batch()).logits).all()

    def test_a_space_of_the_same_shape_is_another_space(self, folders, tmp_path):
        space = CanonicalSpace(**small_space().shape())
        space.set(small_space().sentences(), -small_space().canonical())
        small_stream(space=space).save_pretrained(tmp_path)
        assert UniHyperLoraConfig.from_pretrained(tmp_path).space == small_space().shape()
        with pytest.raises(ConfigError, match=space.digest):
            load(folders["people"]).load_task(tmp_path, name="other")

    def test_a_delta_in_other_steps_is_refused_where_it_says_something(self, folders, tmp_path):
        model = load(folders["people"])
        model.config.delta_step = 1 / 16
        before = state_of(model)
        with pytest.raises(ConfigError, match="has the step 0.03125, but this adapter has 0.0625"):
            model.load_task(folders["places"])
        assert_untouched(model, before)
        places = load(folders["places"])
        places.adapter.tasks["places"].delta.latent.data.zero_()
        places.save_pretrained(tmp_path)
        model.load_task(tmp_path)
        assert torch.equal(model(**batch(), task="places").logits, places(**batch()).logits)

    def test_an_injected_update_has_no_part_in_it(self, folders, tmp_path):
        config = UniHyperLoraConfig(pathway="inject", atoms=8, anchor_dim=8, mixer_hidden=3)
        injected = UniHyperLoraForTokenClassification.from_host(bert(), labels=LABELS, task="own", config=config)
        with pytest.raises(ConfigError, match="Only tasks of streams"):
            injected.load_task(folders["places"])
        injected.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="Only tasks of streams"):
            load(folders["people"]).load_task(tmp_path)
        with pytest.raises(ConfigError, match="Only a stream can score several"):
            injected(**batch(), tasks=["own"])

    def test_into_a_model_without_a_head(self, folders):
        plain = load(folders["people"], UniHyperLoraModel)
        plain.load_task(folders["mood"])
        assert list(plain.config.tasks) == ["people", "mood"]

    def test_in_training_what_is_trained_stays_so(self, folders):
        model = load(folders["people"])
        model.set_train_scope("task")
        model.train()
        model.load_task(folders["places"])
        assert model.adapter.tasks["places"].training


class TestDeleting:
    def test_the_next_task_of_its_kind_becomes_active(self, model):
        expected = model(**batch(), task="places").logits
        model.set_task("people")
        model.delete_task("people")
        assert list(model.config.tasks) == list(model.adapter.tasks) == ["places", "mood"]
        assert model.config.active_task == "places" and model.config.id2label == dict(enumerate(PLACES))
        assert torch.equal(model(**batch()).logits, expected)

    def test_the_active_one_stays_active(self, model):
        model.set_task("people")
        model.delete_task("places")
        assert model.config.active_task == "people" and model.labels == LABELS

    def test_a_file_without_it_is_smaller_and_as_one_that_never_had_it(self, model, folders, tmp_path):
        model.save_pretrained(tmp_path / "all")
        model.delete_task("places")
        model.delete_task("mood")
        model.save_pretrained(tmp_path / "one")
        sizes = [(tmp_path / name / WEIGHTS_NAME).stat().st_size for name in ("all", "one")]
        assert sizes[1] < sizes[0]
        again = load(tmp_path / "one")
        assert torch.equal(again(**batch()).logits, load(folders["people"])(**batch()).logits)

    def test_the_last_one_leaves_a_space_to_which_tasks_can_be_added(self, model, folders, tmp_path):
        for name in ("people", "places", "mood"):
            model.delete_task(name)
        assert model.config.active_task is None
        with pytest.raises(ConfigError, match="no task yet"):
            model(**batch())
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        again.load_task(folders["places"])
        again.set_task("places")
        assert torch.equal(again(**batch()).logits, load(folders["places"])(**batch()).logits)

    def test_one_that_is_not_there(self, model):
        before = state_of(model)
        with pytest.raises(ConfigError, match="No task 'none'"):
            model.delete_task("none")
        assert_untouched(model, before)


class TestSaving:
    def test_tasks_keep_their_order_by_which_they_are_numbered(self, model, tmp_path):
        for name in ("zoo", "animals"):
            model.add_task(name, LABELS, reader=READER)
            stirred(model, name)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert list(again.config.tasks) == ["people", "places", "mood", "zoo", "animals"]
        numbers = torch.tensor([4, 3])
        assert torch.equal(again(**batch(), task_ids=numbers).logits, model(**batch(), task_ids=numbers).logits)
        again.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()

    def test_some_tasks_alone(self, model, tmp_path):
        before = state_of(model)
        model.save_pretrained(tmp_path, tasks=["places", "mood"])
        assert_untouched(model, before)
        again = load(tmp_path)
        assert list(again.config.tasks) == list(again.adapter.tasks) == ["places", "mood"]
        assert again.config.active_task == "places"
        found, expected = (one(**batch(), tasks=["places", "mood"]).logits for one in (again, model))
        assert all(torch.equal(found[name], expected[name]) for name in found)
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "places" in card and "`people`" not in card and "B-PER" not in card

    def test_the_active_task_is_kept_where_it_is_among_them(self, model, tmp_path):
        model.set_task("places")
        model.save_pretrained(tmp_path, tasks=["people", "places"])
        assert UniHyperLoraConfig.from_pretrained(tmp_path).active_task == "places"
        assert model.config.active_task == "places"

    @pytest.mark.parametrize(("tasks", "told"), [(["people", "none"], "No task 'none'"), ([], r"tasks=\[\] names no")])
    def test_others_are_refused_and_nothing_is_written(self, model, tasks, told, tmp_path):
        before = state_of(model)
        with pytest.raises(ConfigError, match=told):
            model.save_pretrained(tmp_path / "new", tasks=tasks)
        assert_untouched(model, before)
        assert not (tmp_path / "new").exists()

    def test_a_save_that_fails_leaves_the_model_as_it_was(self, model, tmp_path):
        before = state_of(model)
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(AdapterFileError, match="cannot be written"):
            model.save_pretrained(tmp_path / "file" / "folder", tasks=["places"])
        assert_untouched(model, before)

    def test_the_file_of_all_is_the_space_once_and_its_tasks(self, model, folders, tmp_path):
        model.save_pretrained(tmp_path)
        whole = (tmp_path / WEIGHTS_NAME).stat().st_size
        alone = sum((folders[name] / WEIGHTS_NAME).stat().st_size for name in ("people", "places", "mood"))
        space = len(small_space().text) + 5 * 480 * D // 4
        assert whole < alone - 2 * space + 1000
