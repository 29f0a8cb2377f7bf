"""States on disk, several sources and their copies, and noise, on hosts of a few thousand weights."""

import pickle

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, DataCollatorForTokenClassification, EvalPrediction, T5Config, T5Model

from modeling_unihyperlora import CanonicalSpace, ConfigError, DataError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.space import KNOTS, LANDMARKS, fit_host, knot_layers, line_up
from modeling_unihyperlora.words import WordReader
from tests.conftest import WORDS, mapped
from tests.modeling_unihyperlora.families import tiny_host
from tests.tokenizer_kinds import KINDS, make_tokenizer
from trainers import UniHyperLoraTrainer, UniHyperLoraTrainingArguments
from trainers.ner_data import Sentence
from trainers.ner_windows import IGNORED, SentenceWindows
from trainers.raw_text import words_of_raw_text
from trainers.sources import COPIES, Source, SourceStates, causal_copy_of, disturb, sources_of
from trainers.state_cache import StreamCollator, WordStates, scores_of_words

LABELS = ["O", "B-PER", "I-PER"]


def bert(tokenizer, width: int = 64, blocks: int = 2, seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": width}
    return BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sentences():
    generator = np.random.default_rng(0)
    rows = []
    for number in range(40):
        words = [*generator.choice(WORDS, 2 + number % 5).tolist(), "supercalifragilistic"]
        tags = ["B-PER" if word in ("anna", "ben", "carla", "david") else "O" for word in words]
        rows.append(Sentence(words, tags, f"row {number}"))
    return rows


@pytest.fixture
def windows(sentences, tokenizer):
    return SentenceWindows(sentences, tokenizer, LABELS, 32)


def words_of(host, tokenizer, windows, batch_size: int = 8, **kwargs) -> WordStates:
    return WordStates(host, WordReader(host, tokenizer), windows, batch_size=batch_size, **kwargs)


def all_of(words: WordStates) -> np.ndarray:
    return words.states(0, words.offsets[-1])


class TestWordStates:
    def test_are_the_hosts_own(self, tokenizer, windows):
        host = bert(tokenizer)
        words = words_of(host, tokenizer, windows)
        for index in (0, 7, 39):
            item = windows[index]
            with torch.no_grad():
                hidden = host(torch.tensor([item["input_ids"]]), output_hidden_states=True).hidden_states
            starts = windows.windows[index].starts
            kept = words.states(words.offsets[index], words.offsets[index + 1])
            for layer in range(3):
                np.testing.assert_allclose(kept[:, layer], hidden[layer][0, starts].numpy(), atol=2e-3)
            assert words.labels[index].tolist() == [item["labels"][at] for at in starts]

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_text_with_other_words_is_read_once(self, kind):
        """A sentence in the words of its data set, and in those of raw text: often the same ids, and other words."""
        tokenizer = make_tokenizer(kind)
        host, labels = bert(tokenizer), ["O", "B-LOC", "I-LOC"]
        own = [Sentence(["the", "U.S.", "win"], ["O", "B-LOC", "O"], "1"), Sentence(["the", "win"], ["O", "O"], "2")]
        windows = SentenceWindows(own + words_of_raw_text(own, labels, None) + own[1:], tokenizer, labels, 32)
        reader, read = WordReader(host, tokenizer), []
        watch = host.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(len(out)))
        words = WordStates(host, reader, windows)
        watch.remove()
        different = {tuple(windows[index]["input_ids"]) for index in range(4)}
        assert read == [len(different)] and len(different) < 4
        assert [len(starts) for starts in words.starts] == [3, 2, 6, 2]
        for index in range(4):
            item = windows[index]
            with torch.no_grad():
                hidden = host(torch.tensor([item["input_ids"]]), output_hidden_states=True).hidden_states
            kept, starts = words.states(*words.offsets[index : index + 2]), windows.windows[index].starts
            for layer in range(3):
                np.testing.assert_allclose(kept[:, layer], hidden[layer][0, starts].numpy(), atol=2e-3)

    def test_are_read_in_bfloat16_if_asked_for_and_kept_apart(self, tokenizer, windows, cache):
        host = bert(tokenizer)
        exact, half = (all_of(words_of(host, tokenizer, windows, bf16=bf16)) for bf16 in (False, True))
        error = np.linalg.norm(half - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.02
        assert len(list(cache.glob("states-*.f16"))) == 2
        np.testing.assert_array_equal(all_of(words_of(host, tokenizer, windows)), exact)

    def test_are_computed_once_for_a_host_and_a_text(self, tokenizer, windows, cache, monkeypatch):
        words_of(bert(tokenizer), tokenizer, windows)
        monkeypatch.setattr("trainers.state_cache.read_words", None)  # it would have to run the host
        words_of(bert(tokenizer), tokenizer, windows)
        with pytest.raises(TypeError):
            words_of(bert(tokenizer, seed=1), tokenizer, windows)
        assert not list(cache.glob("*.json")) or len(list(cache.glob("*.f16"))) == 1

    def test_a_killed_run_is_continued(self, tokenizer, windows, monkeypatch):
        import trainers.state_cache as module

        whole = all_of(words_of(bert(tokenizer), tokenizer, windows))
        for path in module.cache_folder().glob("*.f16"):
            path.unlink()
        read, calls = module.read_words, []

        def read_some(*args):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return read(*args)

        monkeypatch.setattr(module, "SAVE_EVERY", 2)
        monkeypatch.setattr(module, "read_words", read_some)
        with pytest.raises(KeyboardInterrupt):
            words_of(bert(tokenizer), tokenizer, windows)
        assert not list(module.cache_folder().glob("*.f16"))
        again = words_of(bert(tokenizer), tokenizer, windows)
        assert len(calls) == 4 + 3, "two of five batches were on disk already"
        np.testing.assert_array_equal(all_of(again), whole)

    def test_a_file_that_was_removed_meanwhile_is_said(self, tokenizer, windows, cache):
        words = words_of(bert(tokenizer), tokenizer, windows)
        [path] = cache.glob("states-*.f16")
        path.write_bytes(path.read_bytes()[:-2])
        assert len(words.states(0, 3)) == 3
        with pytest.raises(DataError, match="cannot be read.*Start the run again"):
            all_of(words)
        path.unlink()
        with pytest.raises(DataError, match="cannot be read.*Start the run again"):
            words.states(0, 3)

    def test_no_room_is_said_before_the_host_runs(self, tokenizer, windows, monkeypatch):
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr("trainers.state_cache.shutil.disk_usage", lambda path: usage)
        with pytest.raises(DataError, match="has only 0.0 GB left. Free some, set UNIHYPERLORA_CACHE"):
            words_of(bert(tokenizer), tokenizer, windows)

    def test_a_folder_that_cannot_be_written_is_said(self, tokenizer, windows, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(DataError, match="cannot be cached"):
            words_of(bert(tokenizer), tokenizer, windows)

    def test_scores_of_words_are_those_of_their_sub_tokens(self, tokenizer, windows):
        words = words_of(bert(tokenizer), tokenizer, windows)
        longest = max(map(len, words.labels))
        labels = np.full((len(words.labels), longest), IGNORED)
        for row, own in enumerate(words.labels):
            labels[row, : len(own)] = own
        seen = {}
        scores_of_words(words, lambda p: seen.update(predicted=p.predictions, true=p.label_ids) or {})(
            EvalPrediction(np.stack([labels, labels - 0.5], axis=-1), labels)  # as logits, (windows, W, C)
        )
        for index in range(len(windows)):
            item = windows[index]["labels"]
            row = seen["true"][index]
            assert row[row != IGNORED].tolist() == [label for label in item if label != IGNORED]
            assert [at for at in range(len(row)) if row[at] != IGNORED] == windows.windows[index].starts
        at_words = seen["true"] != IGNORED
        assert (seen["predicted"][..., 0] == seen["true"])[at_words].all()
        assert (seen["predicted"][..., 1] == seen["true"] - 0.5)[at_words].all()


@pytest.fixture
def space(tokenizer, tmp_path) -> CanonicalSpace:
    """Six coordinates of 480 words, made on ``bert(tokenizer)``."""
    generator = np.random.default_rng(5)
    path = tmp_path / "anchors.txt"
    path.write_text("\n".join(" ".join(generator.choice(WORDS, 8)) for _ in range(60)) + "\n", encoding="utf-8")
    return CanonicalSpace.make([bert(tokenizer)], path, dim=6, atoms=16, tokenizers=[tokenizer])


def source_of(host, tokenizer, space, windows) -> Source:
    words = WordReader(host, tokenizer)
    return Source(host, words, space, windows, line_up(space, host, words))


@pytest.fixture
def made(tokenizer, windows, space, tmp_path):
    """A trainer on two sources with different shapes."""
    host = bert(tokenizer)
    model = UniHyperLoraForTokenClassification.from_host(
        host, labels=LABELS, task="people", tokenizer=tokenizer, space=space, reader={"width": 10, "hidden": 8}
    )
    collate = DataCollatorForTokenClassification(tokenizer)
    other = bert(tokenizer, width=32, blocks=5, seed=4)
    sources = [source_of(each, tokenizer, space, windows) for each in (host, other)]
    args = UniHyperLoraTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=20,
        per_device_train_batch_size=8,
        max_flops_overhead_pct=1e9,
        use_cpu=True,
        report_to="none",
        save_steps=10,
        logging_steps=5,
        disable_tqdm=True,
    )
    return UniHyperLoraTrainer(
        model=model,
        args=args,
        sources=sources,
        train_dataset=SourceStates(sources),
        data_collator=StreamCollator(collate),
    )


def test_workers_that_are_not_forked_read_the_same(made):
    """As on macOS and Windows, where a DataLoader sends its data set to the workers."""
    data = made.train_dataset
    for source in data.sources:
        source.line_up_copies()
    data.sampler(seed=3).set_epoch(2)
    data.fidelity = 0.5
    there = pickle.loads(pickle.dumps(data))
    for source in there.sources:  # without the host, and without a copy of the file
        assert source._to_read is None and "anchor_states" not in vars(source)
        assert len(pickle.dumps(source.words)) < all_of(source.words).nbytes, "the states are not sent"
    for key in (0, 41, len(data) + 3):
        here, other = data[key], there[key]
        assert torch.equal(here["canonical_states"], other["canonical_states"])
        assert torch.equal(here["labels"], other["labels"])


class TestCopies:
    def test_read_only_their_own_blocks_and_dimensions(self, tokenizer, windows, space):
        source = source_of(bert(tokenizer, blocks=5), tokenizer, space, windows)
        before = source.cpu_seconds
        source.line_up_copies()
        own, *copies = source.fits
        assert len(copies) == len(COPIES) and source.cpu_seconds > before
        for fit, (blocks, width) in zip(copies, COPIES, strict=True):
            assert max(fit.layers) == fit.knots[-1].layer == round(blocks * 5)
            for part in fit.parts:
                read = (part.matrix.unflatten(1, (-1, 64)) != 0).any(dim=0).any(dim=0)
                assert int(read.sum()) == round(width * 64)
        assert all(len(knot.matrix[0]) == 64 for knot in own.knots)
        assert own.landmarks is None or len(own.landmarks.matrix[0]) == 64 * len(own.layers)
        source.line_up_copies()  # for another task of the same run
        assert source.fits == [own, *copies]

    def test_are_lined_up_by_their_own_states(self, tokenizer, windows, space):
        """Equal to fitting a host that has only those states."""
        source = source_of(bert(tokenizer, blocks=4), tokenizer, space, windows)
        source.line_up_copies()
        blocks, width = 3, 43  # 2/3 of 4 blocks and of 64 dimensions
        kept = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:width]
        states = source.anchor_states[: blocks + 1, :, kept]
        alone = fit_host(states, knot_layers(blocks), space.canonical(), count=LANDMARKS // 2)
        states = torch.randn(7, 5, 64)
        mine = mapped(source.fits[2], states, [0, 1, 2, 3, 4])
        torch.testing.assert_close(mine, mapped(alone, states[:, : blocks + 1, kept], [0, 1, 2, 3]))

    def test_a_view_is_what_its_copy_makes_of_a_window(self, tokenizer, windows, space, monkeypatch):
        sources = [source_of(bert(tokenizer, seed=s), tokenizer, space, windows) for s in (0, 1)]
        for source in sources:
            source.line_up_copies()
        for kept_bytes in (2e9, 0):  # with and without room to keep what was made
            monkeypatch.setattr("trainers.state_cache.KEPT_BYTES", kept_bytes)
            data = SourceStates(sources)
            assert len(data) == 80
            for view, index in ((0, 3), (2, 3), (1, 75), (1, 75)):
                source, own = sources[index // 40], index % 40
                start, end = source.words.offsets[own : own + 2]
                states = torch.tensor(np.array(source.words.states(start, end), np.float32))
                expected = mapped(source.fits[view], states, source.words.layers)
                item = data[view * 80 + index]
                torch.testing.assert_close(item["canonical_states"], expected, rtol=1e-3, atol=1e-3)
                assert item["labels"].tolist() == source.words.labels[own].tolist()


class TestTheCausalCopy:
    def test_has_the_states_of_the_weights_as_a_decoder(self, tokenizer, windows):
        """Those of BERT's own decoder, at the last token of each word."""
        host = bert(tokenizer)
        decoder = BertModel(BertConfig(**host.config.to_dict() | {"is_decoder": True})).eval()
        decoder.load_state_dict(host.state_dict())
        copied, read_causally = causal_copy_of(host, WordReader(host, tokenizer))
        words = WordStates(copied, read_causally, windows, batch_size=8)
        for index in (0, 7, 39):
            item, places = windows[index], windows.windows[index]
            with torch.no_grad():
                hidden = decoder(torch.tensor([item["input_ids"]]), output_hidden_states=True).hidden_states
            at = [start + size - 1 for start, size in zip(places.starts, places.sizes, strict=True)]
            kept = words.states(words.offsets[index], words.offsets[index + 1])
            for layer in range(3):
                np.testing.assert_allclose(kept[:, layer], hidden[layer][0, at].numpy(), atol=2e-3)
            assert words.labels[index].tolist() == [item["labels"][start] for start in places.starts]

    @pytest.mark.parametrize("family", ["albert", "bert", "distilbert", "modernbert", "mpnet", "roberta", "t5"])
    def test_is_found_for_an_encoder(self, family):
        host = tiny_host(family, vocab_size=300)
        copied, read_causally = causal_copy_of(host, WordReader(host, make_tokenizer("wordpiece-uncased")))
        assert read_causally.causal
        ids = torch.tensor([[5, 9, 13, 17], [5, 9, 21, 17], [5, 9, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
        states = copied(ids, mask, output_hidden_states=True, return_dict=True).hidden_states[-1]
        torch.testing.assert_close(states[0, :2], states[1, :2])
        torch.testing.assert_close(states[0, :2], states[2, :2])
        assert not torch.allclose(states[0, 3], states[1, 3])

    @pytest.mark.parametrize("family", ["deberta-v2", "fnet", "llama"])
    def test_is_left_out_where_a_host_takes_no_such_mask_or_is_a_decoder(self, family):
        host = tiny_host(family, vocab_size=300)
        assert causal_copy_of(host, WordReader(host, make_tokenizer("wordpiece-uncased"))) is None

    def test_is_trained_on(self, made, tokenizer, space, windows, sentences):
        """Views after those of the narrow copies are the causal copy's; its CPU time counts."""

        def make(own):
            return SentenceWindows(sentences, own, LABELS, 32)

        plain = sources_of(made.model, windows, [], make, causal=False)
        both = sources_of(made.model, windows, [], make)
        assert plain[0].causal is None
        for source in both:
            source.line_up_copies()
            assert source.cpu_seconds > source.causal.cpu_seconds > 0
        data, count = SourceStates(both), len(COPIES) + 1
        causal = both[0].causal
        for view in (0, 2):
            start, end = causal.words.offsets[3:5]
            states = torch.tensor(np.array(causal.words.states(start, end), np.float32))
            expected = mapped(causal.fits[view], states, causal.words.layers)
            item = data[(count + view) * len(data) + 3]
            torch.testing.assert_close(item["canonical_states"], expected, rtol=1e-3, atol=1e-3)
        views = {key // len(data) for number in range(400) for key in set_epoch(data.sampler(0), number)}
        assert views == {*range(2 * count)}
        assert not any(module.training for module in made.model.host.modules())

    def test_a_source_without_one_gives_its_own_states(self, made):
        data = made.train_dataset
        for source in data.sources:
            source.line_up_copies()
        count = len(COPIES) + 1
        first, second = (data[view * len(data) + 3]["canonical_states"] for view in (2, 2 + count))
        assert torch.equal(first, second)


def set_epoch(sampler, number):
    sampler.set_epoch(number)
    return sampler


class TestTraining:
    def test_changes_the_task_and_leaves_the_space(self, made, tokenizer, tmp_path):
        model = made.model
        before = {name: value.clone() for name, value in model.adapter.state_dict().items()}
        made.train()
        logged = [entry for entry in made.state.log_history if "loss" in entry]
        assert logged[-1]["loss"] < logged[0]["loss"] and "lambda_f_loss" not in logged[0]
        terms = [logged[0][name] for name in ("task_loss", "lambda_q_loss", "consistency_loss")]
        assert logged[0]["loss"] == pytest.approx(sum(terms), abs=2e-3) and terms[2] > 0
        moved = {name for name, x in model.adapter.state_dict().items() if not torch.equal(x, before[name])}
        own = {f"tasks.people.{name}" for name in model.adapter.tasks["people"].state_dict()}
        assert moved == own - {"tasks.people.delta.latent"}
        model.save_pretrained(tmp_path / "saved")
        again = UniHyperLoraForTokenClassification.from_pretrained(
            tmp_path / "saved", host=bert(tokenizer), tokenizer=tokenizer
        )
        inputs = tokenizer("anna flew to supercalifragilistic .", return_tensors="pt")
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("items", [None, 50])
    @pytest.mark.parametrize("consistency", [1.0, 0.3])
    def test_consistency_is_that_of_two_passes_with_their_own_dropout(self, made, consistency, items):
        """The loss of R-Drop in float64, from the logits; ``items`` are the labels of several micro-batches."""
        made.args.consistency, made.args.lambda_q, seen = consistency, 0.0, []
        model = made.model.train()
        torch.nn.init.normal_(model.adapter.tasks["people"].head_weight.latent)
        model.register_forward_hook(lambda module, args, output: seen.append(output["logits"].detach().double()))
        batch = next(iter(made.get_train_dataloader()))
        sentences = len(batch["labels"])
        loss = made.compute_loss(model, dict(batch), num_items_in_batch=items and torch.tensor(items))
        logits, number = seen[0], items or int((batch["labels"] != IGNORED).sum())
        assert len(logits) == 2 * sentences and not torch.equal(*logits.chunk(2))
        expected = 0.0
        for b, w in (batch["labels"] != IGNORED).nonzero().tolist():
            p, q = (logits[row, w].softmax(dim=-1) for row in (b, b + sentences))
            expected -= float(p[batch["labels"][b, w]].log() + q[batch["labels"][b, w]].log()) / 2
            expected += consistency * float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
        assert float(loss.detach()) == pytest.approx(expected / number, rel=1e-4)

    def test_without_consistency_a_sentence_is_read_once(self, made):
        made.args.consistency, seen = 0.0, []
        batch = next(iter(made.get_train_dataloader()))
        made.model.register_forward_hook(lambda module, args, output: seen.append(len(output["logits"])))
        made.compute_loss(made.model.train(), dict(batch))
        made.args.consistency = 1.0
        made.compute_loss(made.model.eval(), dict(batch))
        assert seen == [len(batch["labels"])] * 2

    def test_goes_on_where_it_stopped(self, made):
        made.train()
        whole = {name: value.clone() for name, value in made.model.adapter.state_dict().items()}
        with torch.no_grad():
            for parameter in made.model.adapter.tasks.parameters():
                parameter.zero_()
        made.train(resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-10")
        for name, value in made.model.adapter.state_dict().items():
            torch.testing.assert_close(value, whole[name], rtol=0, atol=0, msg=name)

    @pytest.mark.parametrize("copy_share", [0.0, 1.0])
    def test_the_share_of_copies_is_that_of_the_arguments(self, made, copy_share):
        made.args.copy_share = copy_share
        keys = [key for batch in made.get_train_dataloader().batch_sampler for key in batch]
        copies = [key >= len(made.train_dataset) for key in keys]
        assert len(keys) == len(made.train_dataset) and all(is_copy == bool(copy_share) for is_copy in copies)
        assert all(len(source.fits) == (7 if copy_share else 1) for source in made.sources)

    def test_delta_reads_its_host_as_it_is(self, made):
        """Without copies and noise: two passes over the same sentences have the same loss."""
        made.model.config.tasks["people"]["trained"] = True
        made.args.train_scope, made.args.max_steps, made.args.logging_steps = "delta", 10, 10
        made.args.learning_rate = 0.0
        made.make_ready(made.model)
        made.model.adapter.config.dropout = 0.0
        for task in made.model.adapter.tasks.values():
            task.reader.dropout.p = 0.0
        losses = []
        for _ in range(2):
            made.train()
            losses.append(made.state.log_history[0]["loss"])
        assert losses[0] == losses[1]
        assert all(len(source.fits) == 1 for source in made.sources)


class TestDisturb:
    """Noise that simulates unseen hosts."""

    def test_is_that_of_an_item_in_an_epoch(self, tokenizer, windows, space):
        source = source_of(bert(tokenizer), tokenizer, space, windows)
        data = SourceStates([source], fidelity=0.8)
        sampler = data.sampler(seed=3)
        clean = source.data[7]["canonical_states"]
        first, other = data[7]["canonical_states"], data[8]["canonical_states"]
        torch.rand(5)  # whatever else is drawn, and in whatever order items are read
        assert torch.equal(data[8]["canonical_states"], other) and torch.equal(data[7]["canonical_states"], first)
        assert 0 < (first - clean).abs().mean() < 1
        sampler.set_epoch(1)
        assert not torch.equal(data[7]["canonical_states"], first)
        data.fidelity = 1.0
        assert torch.equal(data[7]["canonical_states"], clean)

    def test_one_leaves_the_coordinates_alone(self):
        z = torch.randn(4, 3, 5, 6)
        torch.testing.assert_close(disturb(z, 1.0), z, rtol=0, atol=0)

    def test_a_sentence_keeps_the_correlation_that_it_drew(self):
        torch.manual_seed(0)
        z = torch.randn(200, 50, 5, 16)
        noisy = disturb(z, 0.6)
        assert noisy.double().var() == pytest.approx(1, abs=0.01)
        flat = [x.flatten(1).double().numpy() for x in (z, noisy)]
        found = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(*flat, strict=True)])
        assert 0.58 < found.min() < 0.65 and found.max() > 0.97
        assert found.mean() == pytest.approx(0.8, abs=0.02)  # uniform from 0.6 to 1


class TestSourcesOf:
    @pytest.fixture
    def model(self, tiny_host, tokenizer, space):
        return UniHyperLoraForTokenClassification.from_host(
            str(tiny_host), labels=LABELS, task="people", space=space, reader="small"
        )

    @pytest.fixture
    def other(self, tokenizer, tmp_path):
        bert(tokenizer, width=32, blocks=5, seed=4).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        return str(tmp_path / "other")

    def test_others_are_noted_once_whatever_the_task(self, model, other, windows, sentences):
        make = lambda own: SentenceWindows(sentences, own, LABELS, 32)  # noqa: E731
        for task in ("people", "another"):
            if task not in model.config.tasks:
                model.add_task(task, LABELS)
            sources = sources_of(model, windows, [other], make)
            assert [source.num_layers for source in sources] == [2, 5]
            assert sources[0].fits == [model.stream.fit] and sources[1].cpu_seconds > 0
            assert [host["num_layers"] for host in model.config.source_hosts] == [2, 5]

    def test_of_an_encoder_decoder_its_encoder_is_read(self, model, tokenizer, windows, sentences, tmp_path):
        shape = {"d_model": 32, "d_kv": 8, "num_layers": 3, "num_heads": 4, "d_ff": 64, "vocab_size": len(tokenizer)}
        T5Model(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path / "whole")
        tokenizer.save_pretrained(tmp_path / "whole")
        make = lambda own: SentenceWindows(sentences, own, LABELS, 32)  # noqa: E731
        sources = sources_of(model, windows, [str(tmp_path / "whole")], make)
        assert [source.num_layers for source in sources] == [2, 3]
        assert all(len(fit.knots) == len(KNOTS) for fit in sources[1].fits)

    def test_each_is_named_once(self, model, other, tiny_host, windows, sentences):
        for others in ([str(tiny_host)], [other, other]):
            with pytest.raises(ConfigError, match="is among the sources already; name each host once"):
                sources_of(model, windows, others, lambda own: SentenceWindows(sentences, own, LABELS, 32))
