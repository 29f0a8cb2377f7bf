"""Readers, δθ and heads of a stream's tasks, each against torch's own layers or the formula in float64."""

import copy
import json

import pytest
import torch
from torch import nn

from modeling_unihyperlora import AdapterFileError, ConfigError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.reader import (
    READERS,
    TOGETHER,
    Reader,
    StreamTask,
    Words,
    knot_features,
    sentences_by_task,
    unpack,
)
from modeling_unihyperlora.space import KNOTS, CanonicalSpace
from modeling_unihyperlora.storage import WEIGHTS_NAME, StoredTensor, adapter_tensors, load_latents, save_latents
from tests.modeling_unihyperlora.small_streams import (
    LABELS,
    TOKENIZER,
    D,
    batch,
    bert,
    small_stream,
    stirred,
)

K = len(KNOTS)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm() / expected.norm()).detach())


def lstm_of(reader: Reader, width: int) -> nn.LSTM:
    """Torch's layer with the reader's values, in float64."""
    plain = nn.LSTM(width, reader.hidden, batch_first=True, bidirectional=True).double()
    for direction, suffix in zip(reader.directions, ("", "_reverse"), strict=True):
        getattr(plain, f"weight_ih_l0{suffix}").data.copy_(direction["from_input"]())
        getattr(plain, f"weight_hh_l0{suffix}").data.copy_(direction["from_state"]())
        getattr(plain, f"bias_ih_l0{suffix}").data.copy_(direction["bias"]())
        getattr(plain, f"bias_hh_l0{suffix}").data.zero_()
    return plain


class TestReader:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("shape", [(5, 4), *READERS.values()])
    @pytest.mark.parametrize("even", [False, True], ids=["different lengths", "one length"])
    def test_values_and_gradients_are_those_of_torchs_layer(self, even, shape, bits):
        """More sentences than one group, compared with each sentence alone in float64."""
        torch.manual_seed(0)
        reader = Reader(6, *shape, bits=bits, dropout=0.0)
        lengths = torch.full((2 * TOGETHER + 3,), 4) if even else torch.randperm(2 * TOGETHER + 3) + 1
        z = torch.randn(int(lengths.sum()), 6)
        z[:, 0] *= 3
        mine = z.clone().requires_grad_(True)
        found = reader(mine, Words(lengths, is_full=even))
        plain, theirs = lstm_of(reader, shape[0]), z.double().requires_grad_(True)
        inward, bias = reader.inward().detach().double(), reader.inward_bias().detach().double()
        x = nn.functional.gelu(theirs @ inward.T + bias)
        expected = torch.cat([plain(sentence[None])[0][0] for sentence in x.split(lengths.tolist())])
        assert found.shape == (len(z), 2 * shape[1]) and relative(found, expected) < 1e-5
        way = torch.randn_like(expected)
        (expected * way).sum().backward()
        (found * way.float()).sum().backward()
        assert relative(mine.grad, theirs.grad) < 1e-5
        for direction, suffix in zip(reader.directions, ("", "_reverse"), strict=True):
            for name, theirs_ in (("from_input", "ih"), ("from_state", "hh")):
                gradient = getattr(plain, f"weight_{theirs_}_l0{suffix}").grad
                assert relative(direction[name].latent.grad, gradient) < 1e-5

    def test_rows_beyond_a_sentence_are_not_looked_at(self):
        reader = Reader(6, 5, 4, dropout=0.0)
        z = torch.randn(3, 7, 6)
        lengths = torch.tensor([7, 3, 1])
        found = reader(z.flatten(0, 1), Words(lengths, 7)).view(3, 7, -1)
        changed = z.clone()
        changed[1, 3:], changed[2, 1:] = 100, -100
        again = reader(changed.flatten(0, 1), Words(lengths, 7)).view(3, 7, -1)
        for row, length in enumerate(lengths):
            alone = reader(z[row, :length], Words(lengths[row : row + 1]))
            torch.testing.assert_close(found[row, :length], alone, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(again[row, :length], alone, rtol=1e-5, atol=1e-6)

    def test_a_word_knows_those_before_and_after_it_in_its_sentence_alone(self):
        reader = Reader(6, 5, 4, dropout=0.0)
        lengths = torch.tensor([4, 4])
        words, z = Words(lengths), torch.randn(8, 6)
        before = reader(z, words)
        z[2] += 1
        changed = (reader(z, words) - before).abs().amax(dim=1) > 1e-6
        assert changed.tolist() == [True] * 4 + [False] * 4

    def test_dropout_is_of_training_alone(self):
        reader, words = Reader(6, 5, 4, dropout=0.5), Words(torch.tensor([9]))
        z = torch.randn(9, 6)
        assert not torch.equal(reader(z, words), reader(z, words))
        reader.eval()
        assert torch.equal(reader(z, words), reader(z, words))

    def test_words_one_after_the_other_and_in_rows(self):
        lengths = torch.tensor([3, 1, 2])
        words = Words(lengths)
        assert words.starts().tolist() == [0, 3, 4]
        sentence, place = words.of_rows(6)
        assert sentence.tolist() == [0, 0, 0, 1, 2, 2] and place.tolist() == [0, 1, 2, 0, 0, 1]
        rows = Words(lengths, 4)
        assert rows.starts().tolist() == [0, 4, 8]
        sentence, place = rows.of_rows(12)
        assert sentence.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and place.tolist() == [0, 1, 2, 3] * 3

    def test_unpacking_puts_words_into_their_cells(self):
        values = torch.randn(3, 2)
        padded = unpack(values, torch.tensor([0, 1, 4]), (2, 3))
        assert torch.equal(padded[0, :2], values[:2]) and torch.equal(padded[1, 1], values[2])
        assert not padded[0, 2].any() and not padded[1, 0].any() and not padded[1, 2].any()


class TestDelta:
    @staticmethod
    def task() -> tuple[StreamTask, CanonicalSpace]:
        torch.manual_seed(0)
        space = CanonicalSpace("s", 1, 300, 10, D, 16)
        space.atoms_in.latent.data.normal_()
        space.atoms_out.latent.data.normal_()
        return StreamTask(K * D, 3, 16, {"width": 10, "hidden": 6, "bits": 8}, 1 / 32, 0.0).eval(), space

    def test_amends_the_map_of_every_knot(self):
        """z_k + Σ_j δθ(k)_j · u_j (v_jᵀ z_k), atom by atom in float64."""
        task, space = self.task()
        task.delta.latent.data.uniform_(-0.25, 0.2)
        words, z = Words(torch.tensor([4, 3])), torch.randn(7, K, D)
        seen = {}
        task.reader.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        task(z, words, task.values(space, LABELS))
        delta, into, out = (x().detach().double() for x in (task.delta, space.atoms_in, space.atoms_out))
        for k, knot in enumerate(KNOTS):
            place = torch.tensor([1.0, knot, *(float(k == i) for i in range(6))], dtype=torch.float64)
            expected = z[:, k].double()
            for j, share in enumerate(place @ delta):
                expected = expected + share * (z[:, k].double() @ into[j])[:, None] * out[j]
            assert relative(seen["z"].view(7, K, D)[:, k], expected) < 1e-5
            assert (expected - z[:, k]).norm() > 0.1 * z[:, k].norm()

    def test_a_delta_of_zero_does_nothing(self):
        task, space = self.task()
        words, z = Words(torch.tensor([4, 3])), torch.randn(7, K, D)
        seen = {}
        task.reader.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        with torch.no_grad():
            assert task.amended(space) is None, "nothing is computed for it either"
            task(z, words, task.values(space, LABELS))
            assert torch.equal(seen["z"], z.flatten(1))
        assert task.amended(space) is not None, "it may get a gradient"
        task(z, words, task.values(space, LABELS))
        assert torch.equal(seen["z"], z.flatten(1))
        task.delta.requires_grad_(False)
        assert task.amended(space) is None, "the reader is trained alone"

    def test_its_gradient_is_that_of_the_formula(self):
        task, space = self.task()
        words, z = Words(torch.tensor([4])), torch.randn(4, K, D)
        way = torch.randn(4, K * D)
        seen = {}
        task.reader.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
        task(z, words, task.values(space, LABELS))
        (seen["z"] * way).sum().backward()
        into, out, expected = space.atoms_in().double(), space.atoms_out().double(), torch.zeros(8, 16).double()
        for k, knot in enumerate(KNOTS):
            place = torch.tensor([1.0, knot, *(float(k == i) for i in range(6))], dtype=torch.float64)
            shares = (z[:, k].double() @ into.T) * (way.view(4, K, D)[:, k].double() @ out.T)
            expected += place[:, None] * shares.sum(dim=0)
        assert relative(task.delta.latent.grad, expected) < 1e-5

    def test_the_rows_of_a_knot(self):
        rows = knot_features(torch.tensor(KNOTS))
        assert rows.shape == (K, 8)
        assert rows[:, 0].eq(1).all() and rows[:, 1].tolist() == list(KNOTS)
        assert torch.equal(rows[:, 2:7], torch.eye(5)) and not rows[:, 7].any()

    def test_it_changes_what_a_model_computes_on_its_task_alone(self):
        model = small_stream()
        model.add_task("later", LABELS, reader={"width": 8, "hidden": 4})
        stirred(model, "later")
        before = {name: model(**batch(), task=name).logits for name in ("people", "later")}
        model.adapter.tasks["people"].delta.latent.data.zero_()
        assert (model(**batch(), task="people").logits - before["people"]).abs().max() > 1e-4
        assert torch.equal(model(**batch(), task="later").logits, before["later"])


class TestSizes:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("reader", READERS)
    def test_a_saved_reader_computes_what_it_did(self, reader, bits, tmp_path):
        model = small_stream()
        model.add_task("later", LABELS, reader=reader, bits=bits)
        stirred(model, "later").eval()
        model.save_pretrained(tmp_path)
        again = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=bert(), tokenizer=TOKENIZER)
        width, hidden = READERS[reader]
        assert again.config.tasks["later"]["reader"] == {"width": width, "hidden": hidden, "bits": bits}
        for name in ("people", "later"):
            expected = model(**batch(), task=name).logits
            assert torch.equal(again(**batch(), task=name).logits, expected) and expected.std() > 0.01
        own = adapter_tensors(again.adapter)
        packed = own["tasks.later.reader.directions.0.from_input"]
        assert packed.numel() == 4 * hidden * width * bits // 8

    @pytest.mark.parametrize(("reader", "kilobytes"), [("small", 36), ("medium", 100), ("large", 330)])
    def test_bytes_in_a_space_of_the_packages_size(self, reader, kilobytes):
        width, hidden = READERS[reader]
        shape = {"width": width, "hidden": hidden, "bits": 8}
        sizes = [
            sum(
                x.numel() * x.element_size()
                for part in Reader(K * 64, **shape | {"bits": bits}).modules()
                if isinstance(part, StoredTensor)
                for x in part.encode().values()
            )
            for bits in (8, 4)
        ]
        assert sizes[0] == pytest.approx(1000 * kilobytes, rel=0.35)
        assert 0.45 < sizes[1] / sizes[0] < 0.65

    def test_other_readers_are_refused(self):
        model = small_stream()
        for given, message in (
            ({"reader": "huge"}, "choose one of small, medium, large"),
            ({"reader": {"width": 8}}, "needs 'width', 'hidden' and 'bits'"),
            ({"reader": {"width": 8, "hidden": 4, "layers": 2}}, "needs 'width', 'hidden' and 'bits'"),
            ({"reader": {"width": 0, "hidden": 4}}, "from 1 to"),
            ({"reader": {"width": 8, "hidden": 5000}}, "from 1 to 4096"),
            ({"reader": {"width": 8, "hidden": True}}, "from 1 to"),
            ({"bits": 2}, "bits=2"),
            ({"bits": "8"}, "bits='8'"),
        ):
            with pytest.raises(ConfigError, match=message):
                model.add_task("later", LABELS, **given)
        assert list(model.config.tasks) == list(model.adapter.tasks) == ["people"]
        assert model.config.active_task == "people"

    def test_a_file_whose_reader_is_of_another_size_is_refused(self, tmp_path):
        small_stream().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["tasks"]["people"]["reader"]["hidden"] = 7
        (tmp_path / "config.json").write_text(json.dumps(config))
        host = bert()
        with pytest.raises(AdapterFileError, match="tasks.people"):
            UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=host, tokenizer=TOKENIZER)
        assert all(parameter.requires_grad for parameter in host.parameters())

    def test_ten_small_tasks_in_a_file_under_a_megabyte_with_the_packages_space(self, tmp_path):
        """Each task has a small reader and CoNLL-2003's nine labels; all anchors are unknown words to the host."""
        labels = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for prefix in "BI")]
        names = [f"ner{number}" for number in range(10)]
        model = small_stream(labels=labels, task=names[0], space=None, reader="small")
        assert model.adapter.space.digest == CanonicalSpace.default().digest
        for name in names[1:]:
            model.add_task(name, labels, reader="small")
            stirred(model, name, seed=int(name[3:]) + 1)
        model.save_pretrained(tmp_path)
        assert (tmp_path / WEIGHTS_NAME).stat().st_size < 1_000_000
        again = UniHyperLoraForTokenClassification.from_pretrained(tmp_path, host=bert(), tokenizer=TOKENIZER)
        found, expected = (one(**batch(), tasks=names).logits for one in (again, model))
        for name in names:
            assert torch.equal(found[name], expected[name])
        assert not torch.equal(found["ner1"], found["ner2"])


class TestTasksOfABatch:
    def test_by_name_or_number(self):
        names, rows = sentences_by_task(["b", "a", "b"], ["a", "b", "c"], 3, torch.device("cpu"))
        assert names == ["b", "a"] and rows.tolist() == [0, 1, 0]
        names, rows = sentences_by_task(torch.tensor([2, 0, 2]), ["a", "b", "c"], 3, torch.device("cpu"))
        assert names == ["c", "a"] and rows.tolist() == [0, 1, 0]

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (["a", "b"], "one task for each of the 3 sentences; given: 2"),
            (torch.tensor(1), "given: one number"),
            (["a", "b", "x"], "'x', which is not a task"),
            (torch.tensor([0, 1, 3]), "has 3; the adapter has 3 tasks"),
            (torch.tensor([0, 1, -1]), "has -1"),
            ([True, "a", "b"], "True, which is not a task"),
        ],
    )
    def test_others_are_refused(self, ids, message):
        with pytest.raises(ConfigError, match=message):
            sentences_by_task(ids, ["a", "b", "c"], 3, torch.device("cpu"))


class TestKept:
    def test_what_is_kept_never_serves_other_values(self, tmp_path):
        model = small_stream()
        model.add_task("later", LABELS, reader={"width": 8, "hidden": 4})
        stirred(model, "later")
        with torch.no_grad():
            for task in ("people", "later"):
                last = model(**batch(), task=task).logits
                assert torch.equal(model(**batch(), task=task).logits, last)
                for name, module in model.adapter.named_modules():
                    shared = name in ("space.atoms_in", "space.atoms_out")
                    if isinstance(module, StoredTensor) and (shared or name.startswith(f"tasks.{task}.")):
                        module.latent.mul_(-1)
                        now = model(**batch(), task=task).logits
                        assert not torch.equal(now, last), name
                        last = now

    def test_a_part_that_was_replaced_is_noticed(self):
        """A parameter's data, a parameter, a module, a task, all tasks."""
        model, other = stirred(small_stream(), "people").eval(), stirred(small_stream(), "people", seed=9).eval()
        own, theirs = model.adapter, other.adapter
        with torch.no_grad():
            last = model(**batch()).logits

            def changed() -> bool:
                nonlocal last
                before, last = last, model(**batch()).logits
                return not torch.equal(before, last)

            assert not changed()
            own.tasks["people"].head_bias.latent.data = theirs.tasks["people"].head_bias.latent.data + 1
            assert changed()
            own.tasks["people"].head_bias.latent = torch.nn.Parameter(theirs.tasks["people"].head_bias.latent - 1)
            assert changed()
            own.tasks["people"].reader = theirs.tasks["people"].reader
            assert changed()
            own.tasks["people"] = theirs.tasks["people"]
            assert changed()
            own.tasks = stirred(small_stream(), "people", seed=7).adapter.tasks
            assert changed() and not changed()

    def test_other_tasks_are_not_computed_again(self):
        model = small_stream()
        model.add_task("later", LABELS, reader={"width": 8, "hidden": 4})
        stirred(model, "later")
        with torch.no_grad():
            kept = model.adapter.values("people")
            model.adapter.tasks["later"].head_bias.latent.add_(1)
            model.adapter.values("later")
            assert model.adapter.values("people") is kept
        assert model.adapter.values("people") is not kept, "a gradient may be needed"

    def test_latents_are_saved_bit_for_bit(self, tmp_path):
        one, other = small_stream(), stirred(small_stream(), "people", seed=9)
        save_latents(one.adapter, tmp_path / "latents")
        assert not torch.equal(one(**batch()).logits, other(**batch()).logits)
        load_latents(other.adapter, tmp_path / "latents")
        for name, value in one.adapter.state_dict().items():
            assert torch.equal(other.adapter.state_dict()[name], value), name


class TestPacked:
    """Weights that are rearranged once for oneDNN change nothing."""

    @pytest.mark.parametrize("shape", [(5, 4), *READERS.values()])
    @pytest.mark.parametrize("lengths", [[1], [7], [4] * (TOGETHER + 3), [3, 1, 9, 2], [*range(1, TOGETHER + 4)]])
    def test_features_equal_those_of_torchs_layer(self, lengths, shape):
        torch.manual_seed(0)
        reader, lengths = Reader(6, *shape, bits=8).eval(), torch.tensor(lengths)
        z, even = torch.randn(int(lengths.sum()), 6), len({*lengths.tolist()}) == 1
        words = Words(lengths, is_full=even)
        expected = reader(z, words).detach()
        with torch.no_grad():
            values = reader.values()
            assert values.packed is not None and values.packed[0][0].is_mkldnn
            for _ in range(2):
                torch.testing.assert_close(reader(z, words, values), expected, rtol=1e-6, atol=1e-6)
        assert expected.std() > 0.01 and reader.values().packed is None, "a gradient may be needed"

    def test_without_it_torchs_layer_is_used(self, monkeypatch):
        torch.manual_seed(0)
        reader, z, words = Reader(6, 5, 4).eval(), torch.randn(7, 6), Words(torch.tensor([4, 3]))
        with torch.no_grad():
            expected = reader(z, words)
            with torch.backends.mkldnn.flags(enabled=False):
                assert reader.values().packed is None
                torch.testing.assert_close(reader(z, words), expected, rtol=1e-6, atol=1e-6)
            with torch.autocast("cpu", torch.bfloat16):
                coarse = reader(z, words)
            assert coarse.dtype == torch.bfloat16 and relative(coarse, expected.double()) < 0.05

    def test_a_model_that_has_computed_can_be_copied(self):
        model = stirred(small_stream(), "people").eval()
        with torch.no_grad():
            expected = model(**batch()).logits
            again = copy.deepcopy(model)
            assert torch.equal(again(**batch()).logits, expected)
            again.adapter.tasks["people"].head_bias.latent.add_(1)
            assert not torch.equal(again(**batch()).logits, expected) and torch.equal(
                model(**batch()).logits, expected
            )
