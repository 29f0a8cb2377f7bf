"""Every row of the ablation does what its name says, checked on small tensors."""

import contextlib
import json

import numpy as np
import pytest
import torch

from modeling_unihyperlora import CanonicalSpace, space
from modeling_unihyperlora.reader import Reader, Words
from modeling_unihyperlora.space import HostFit, KnotFit, Landmarks, fit_host
from modeling_unihyperlora.storage import RowInteger
from modeling_unihyperlora.words import WordReader, load_tokenizer
from scripts.research import ablation
from tests.conftest import mapped, tiny_tokenizer
from trainers.arguments import NerArguments, parse
from trainers.ner_data import Sentence

LINE_UP = (ablation.no_stretch, ablation.variances_alone, ablation.no_landmarks)


@pytest.fixture
def text(tmp_path):
    """An anchor file of words that the tiny tokenizer knows."""
    words = list(tiny_tokenizer().get_vocab())[5:24]
    rows = np.random.default_rng(0).choice(words, (60, 10)).tolist()
    (tmp_path / "anchors.txt").write_text("\n".join(map(" ".join, rows)))
    return tmp_path / "anchors.txt"


def test_rows_have_names_of_their_own_and_flags_that_are_flags(tmp_path):
    rows = ablation.rows(tmp_path, "source", ["source", "other"])
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and names[0] == "as shipped" and rows[0] == ablation.Row("as shipped")
    words = [len((tmp_path / f"{share}_of_the_anchors.txt").read_text().split()) for share in ("half", "quarter")]
    assert words[0] == pytest.approx(2 * words[1], rel=0.1)
    for row in rows:
        own = ["--space", "x"] if row.space else []
        parse(["--model_name_or_path", "h", "--output_dir", "o", *row.flags, *own], NerArguments)
    hosts = {row.name: row.space["hosts"] for row in rows if row.space}
    assert hosts.pop("a space of the source alone") == ["source"]
    assert hosts and all(given == ["source", "other"] for given in hosts.values())


def test_without_the_words_of_raw_text_each_sentence_is_read_once():
    asked = ([Sentence(["Al-Ain"], ["O"], "here")], ["O"], "IOB2")
    with ablation.given_words_alone():
        assert ablation.NER.further(*asked) == []
    assert [sentence.tokens for sentence in ablation.NER.further(*asked)] == [["Al", "-", "Ain"]]


def test_without_dropout_training_and_scoring_are_the_same():
    z, words = torch.randn(5, 6), Words(torch.tensor([3, 2]))

    def differs() -> bool:
        reader = Reader(6, 5, 4, dropout=0.2)
        torch.manual_seed(0)
        return not torch.equal(reader.train()(z, words), reader.eval()(z, words))

    assert differs()
    with ablation.no_dropout():
        assert not differs()


@pytest.mark.parametrize("change", LINE_UP, ids=lambda change: change.__name__)
def test_a_map_that_is_made_otherwise_is_not_taken_from_the_cache(change, tiny_host, text, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    from modeling_unihyperlora.hosts import load_host

    host = load_host(str(tiny_host))
    words = WordReader(host, load_tokenizer(str(tiny_host)))
    own = CanonicalSpace.make([host], text, dim=4, tokenizers=[words.tokenizer])
    first = space.line_up(own, host, words)
    with change():
        other = space.line_up(own, host, words)
    again = space.line_up(own, host, words)
    assert len(first.parts) != len(other.parts) or not torch.equal(first.knots[0].matrix, other.knots[0].matrix)
    assert torch.equal(first.knots[0].matrix, again.knots[0].matrix)


def test_words_alone_do_not_see_their_neighbours():
    reader = Reader(6, 5, 4, dropout=0.0).eval()
    z, lengths = torch.randn(2, 3, 6), torch.tensor([3, 2])
    other = z.clone()
    other[0, 0] += 1

    def mixed(sentences: torch.Tensor) -> torch.Tensor:
        return reader(sentences.flatten(0, 1), Words(lengths, 3)).view(2, 3, -1)

    assert not torch.equal(mixed(z)[0, 2], mixed(other)[0, 2])
    with ablation.words_alone():
        changed, same = mixed(other), mixed(z)
        assert torch.equal(changed[0, 1:], same[0, 1:]) and not torch.equal(changed[0, 0], same[0, 0])


def test_matching_stretches_predictions_by_itself_or_together_or_not_at_all():
    generator = np.random.default_rng(0)
    x, noise = (torch.tensor(generator.normal(size=(6000, n)), dtype=torch.float32) for n in (20, 3))
    y = (x[:, :3] * torch.tensor([1.0, 0.4, 0.4]) + noise) @ torch.linalg.qr(torch.randn(3, 3))[0]
    ways = {"none": ablation.no_stretch, "alone": ablation.variances_alone, "together": contextlib.nullcontext}
    found = {}
    for name, way in ways.items():
        with way():
            fit = space._fit_knot(x[:, :10], space._Features.of(x[:, 10:]), y, 0.3)
        z = x[:, :10] @ fit.matrix.T + x[:, 10:] @ fit.weights + fit.offset
        torch.testing.assert_close(z.mean(dim=0), y.mean(dim=0), rtol=1e-4, atol=1e-4)
        found[name] = z
    assert (found["none"].std(dim=0) < 0.9 * y.std(dim=0)).all()
    for name in ("alone", "together"):
        torch.testing.assert_close(found[name].std(dim=0), y.std(dim=0), rtol=0.1, atol=0.1)
    torch.testing.assert_close(found["together"].T.corrcoef(), y.T.corrcoef(), rtol=1e-3, atol=1e-3)
    assert (found["alone"].T.corrcoef() - y.T.corrcoef()).abs().max() > 0.02


def test_without_stretch_predictions_are_least_squares():
    generator = np.random.default_rng(0)
    x, y = (torch.tensor(generator.normal(size=(600, n)), dtype=torch.float32) for n in (20, 3))
    y = x[:, :3] * 0.4 + y
    with ablation.no_stretch():
        fit = space._fit_knot(x[:, :10], space._Features.of(x[:, 10:]), y, 0.3)
    z = x[:, :10] @ fit.matrix.T + x[:, 10:] @ fit.weights + fit.offset
    assert (z.std(dim=0) < 0.6 * y.std(dim=0)).all()
    error, slope = y - z, ((z - z.mean(0)) * (y - z)).mean(dim=0) / z.var(dim=0)
    assert slope.abs().max() < 5e-3  # what the smallest ridge shrinks
    assert error.mean(dim=0).abs().max() < 1e-4


def test_without_landmarks_the_map_is_linear():
    states = torch.randn(1, 3000, 6)
    target = states[:, :, :1] * states[:, :, 1:2]
    with ablation.no_landmarks():
        fit = fit_host(states, [0], target)
        z = mapped(fit, states.transpose(0, 1), [0])
        far = mapped(fit, 2 * states.transpose(0, 1), [0])
        origin = mapped(fit, torch.zeros(1, 1, 6), [0])
    torch.testing.assert_close(far - z, z - origin)
    assert fit.r2[0] < 0.1


def test_four_bits_are_sixteen_values():
    coordinates = torch.randn(5, 1000, 8)
    values = {}
    for name, change in (("2 bits", contextlib.nullcontext), ("4 bits", ablation.four_bits)):
        with change():
            made = CanonicalSpace("own", 1, 1000, 10, 8)
        made.set([["word"]], coordinates)
        values[name] = len(made.canonical().unique())
    assert values == {"2 bits": 4, "4 bits": 16}


def test_a_reader_of_four_bits_has_fifteen_codes():
    codes, _ = RowInteger(4).codes(torch.randn(4, 4000))
    assert codes.unique().tolist() == list(range(-7, 8))


def test_knots_that_are_left_out_are_zero():
    knot = KnotFit(0, torch.eye(2), torch.ones(2), 1.0)
    landmarks = Landmarks(torch.eye(2), torch.zeros(2), torch.zeros(1, 2), torch.ones(10, 1))
    fit = HostFit([knot] * 5, landmarks)
    with ablation.only_knots(0, 2, 4)():
        z = mapped(fit, torch.ones(3, 1, 2), [0])
    assert [bool(z[:, knot].any()) for knot in range(5)] == [True, False, True, False, True]
    assert mapped(fit, torch.ones(3, 1, 2), [0]).all()


def test_every_row_is_trained_and_scored_once(tmp_path, monkeypatch):
    """With simulated runs; a row's own space is made once, and loading gets no flags for new streams."""
    lines, spaces = [], []

    def pretended(task, line):
        folder = line[line.index("--output_dir") + 1]
        lines.append(line)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "all_results.json").write_text(json.dumps({"eval_f1": 0.5}))

    class Made:
        def save(self, path):
            path.write_text("space")

    monkeypatch.setattr(ablation, "run", pretended)
    monkeypatch.setattr(CanonicalSpace, "make", lambda hosts, **kwargs: spaces.append(hosts) or Made())
    names = ("as shipped", "a small reader", "a space of")
    command = ["--model_name_or_path", "h/source", "--target_hosts", "h/other", "--space_hosts", "h/source", "h/third"]
    command += ["--output_dir", str(tmp_path / "out"), "--reader_bits", "8", "--max_steps", "3", "--rows", *names]
    table = ablation.main(command)
    assert len(table) == 5
    assert all(row["f1"] == {"source": 0.5, "other": 0.5} for row in table)
    assert spaces == [["h/source"], ["h/source", "h/third"]]
    moved = [line for line in lines if "--adapter" in line]
    assert len(moved) == len(table) and all("--do_train" not in line for line in moved)
    assert not {"--reader_bits", "--reader", "--space"} & {part for line in moved for part in line}
    count = len(lines)
    assert ablation.main(command) == table and len(lines) == count and len(spaces) == 2
    kept = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert kept == {"rows": table, "space_hosts": ["source", "third"]}
