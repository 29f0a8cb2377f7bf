"""Fast implementations against plain ones in float64 with loops; compiled models; gradients."""

import pytest
import torch
from torch import nn

from modeling_unihyperlora import CanonicalSpace, UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.modeling_unihyperlora import Stream
from modeling_unihyperlora.reader import TOGETHER
from modeling_unihyperlora.routing import Routing, make_bags, read_atoms, write_atoms
from modeling_unihyperlora.space import HostFit, KnotFit, Landmarks
from tests.conftest import WORDS, mapped, tiny_tokenizer
from tests.modeling_unihyperlora.small_streams import stirred

LABELS = ["O", "B-A", "I-A"]
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm() / expected.norm()).detach())


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of many lengths, from one word."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 1 + torch.randperm(count, generator=generator) % 23
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths.tolist()]


@pytest.fixture
def stream(make_host, tmp_path, monkeypatch):
    """A stream on a random BERT with the tiny tokenizer; all values of its task are random."""
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    lines = sentences(60, seed=9)
    (tmp_path / "anchors.txt").write_text("\n".join(lines), encoding="utf-8")
    host = make_host("bert")
    space = CanonicalSpace.make([host], tmp_path / "anchors.txt", dim=12, atoms=16, tokenizers=[tiny_tokenizer()])
    model = UniHyperLoraForTokenClassification.from_host(
        host,
        labels=LABELS,
        task="ner",
        config=UniHyperLoraConfig(dropout=0.0),
        reader={"width": 10, "hidden": 6},
        tokenizer=tiny_tokenizer(),
        space=space,
    )
    return stirred(model, "ner").eval()


@pytest.fixture(params=["stream", "token", "static"])
def either(request, make_model, stream):
    """A model of each pathway, and batches for it."""
    if request.param == "stream":
        encoded = tiny_tokenizer()(sentences(3), padding=True, return_tensors="pt")
        return stream, {name: encoded[name] for name in ("input_ids", "attention_mask")}
    ids = torch.randint(2, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 6, 2])[:, None]).long()
    return make_model(router=request.param), {"input_ids": ids, "attention_mask": mask}


class TestRoutedAtoms:
    @pytest.mark.parametrize("dtype,bound", PRECISIONS)
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    @pytest.mark.parametrize("width", [24, 384, 1536])
    def test_forward_and_gradients_against_float64(self, width, top_k, dtype, bound):
        generator = torch.Generator().manual_seed(width + top_k)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        values = [draw(width, 50).T, draw(16, width), draw(16, 2 * width), draw(50, top_k)]  # x is not contiguous
        atoms = torch.stack([torch.randperm(16, generator=generator)[:top_k] for _ in range(50)])
        leaves = [value.clone().requires_grad_(True) for value in values]
        exact = [value.double().requires_grad_(True) for value in values]
        routing = Routing(atoms, leaves[3], bags=make_bags(50, top_k, torch.device("cpu")))

        x, read, write, weights = leaves
        found = write_atoms(read_atoms(x, read, routing), write, routing, weights)
        x, read, write, weights = exact
        dots = (read[atoms] * x[:, None]).sum(dim=-1)
        expected = ((dots * weights)[..., None] * write[atoms]).sum(dim=1)
        assert expected.norm() > 0.01 and found.dtype == dtype
        assert relative(found, expected) < bound
        with torch.no_grad():
            again = write_atoms(read_atoms(leaves[0], leaves[1], routing), leaves[2], routing, leaves[3])
        assert torch.equal(again, found)
        way = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        (expected * way).sum().backward()
        (found * way.to(dtype)).sum().backward()
        for mine, theirs in zip(leaves, exact, strict=True):
            assert theirs.grad.norm() > 0 and relative(mine.grad, theirs.grad) < bound


class TestStream:
    @pytest.mark.parametrize("dtype,error", PRECISIONS)
    def test_a_hosts_map_by_layer_is_that_by_knot(self, dtype, error):
        torch.manual_seed(0)
        layers = [0, 1, 3, 3, 4]  # two knots read the same layer, and one layer is read by none
        knots = [KnotFit(layer, torch.randn(3, 8), torch.randn(3), 1.0) for layer in layers]
        values = (torch.randn(2, 32) / 9, torch.randn(2) / 9, torch.randn(7, 2) / 9, torch.randn(15, 7))
        fit = HostFit(knots, Landmarks(*values))
        hidden = [torch.randn(2, 6, 8).to(dtype) for _ in range(5)]
        cells = torch.tensor([0, 3, 2, 7, 11, 6])  # those of ``at`` below
        bound = object.__new__(Stream)
        bound.fit, bound._on_device = fit, None
        at = torch.tensor([[0, 3, 2], [1, 5, 0]])  # tokens of three words in each of two sentences
        found = bound.canonical_states(hidden, at)
        states = torch.stack([state.flatten(0, 1)[cells] for state in hidden], dim=1).double()

        def of(layers: list[int], part: KnotFit | Landmarks) -> torch.Tensor:
            return states[:, layers].flatten(1) @ part.matrix.double().T + part.offset.double()

        query, at, weights = (
            of(fit.layers, fit.landmarks),
            fit.landmarks.at.double(),
            fit.landmarks.weights.double(),
        )
        near_by = torch.exp(-(query[:, None] - at).square().sum(dim=-1)) @ weights.T
        expected = torch.stack([of([knot.layer], knot) for knot in knots], dim=1) + near_by.view(6, 5, 3)
        assert near_by.norm() > 0.1 * expected.norm()
        assert relative(found.view(6, 5, 3), expected) < error
        assert relative(mapped(fit, states.float(), list(range(5))), expected) < error

    def test_many_sentences_score_as_each_on_its_own(self, stream):
        tokenizer, text = tiny_tokenizer(), sentences(TOGETHER + 4)
        with torch.no_grad():
            encoded = tokenizer(text, padding=True, return_tensors="pt")
            together = stream(**encoded)
            assert together.logits.std() > 0.1
            for row, sentence in enumerate(text):
                alone = stream(**tokenizer(sentence, return_tensors="pt"))
                mine = together.logits[row, : alone.logits.shape[1]]
                torch.testing.assert_close(mine, alone.logits[0], rtol=1e-4, atol=1e-4)  # sums in another order

    def test_another_map_shows_at_once(self, stream):
        batch = tiny_tokenizer()(sentences(3), padding=True, return_tensors="pt")
        with torch.no_grad():
            before = stream(**batch).logits
            fit = stream.stream.fit
            stream.stream.fit = fit._replace(knots=[knot._replace(matrix=-knot.matrix) for knot in fit.knots])
            assert (stream(**batch).logits - before).abs().max() > 1e-2


class TestCompiled:
    """Compiles with ``fullgraph``: a graph break is an error."""

    @pytest.mark.parametrize("gradient", [False, True])
    def test_one_graph_with_the_same_numbers(self, either, gradient):
        model, batch = either
        real = batch["attention_mask"] > 0
        with torch.set_grad_enabled(gradient):
            expected = model(**batch).logits[real]
            compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
            found = compiled(**batch).logits[real]
        torch.compiler.reset()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.1
        if gradient:
            own = model.adapter.tasks["ner"].delta.latent
            gradients = [torch.autograd.grad((x * x).sum(), own, retain_graph=True)[0] for x in (found, expected)]
            assert gradients[1].norm() > 0 and relative(gradients[0], gradients[1].double()) < 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_one_graph_of_elementary_operations(self, either, backend):
        model, batch = either
        real = batch["attention_mask"] > 0
        with torch.no_grad():
            expected = model(**batch).logits[real]
            found = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**batch).logits[real]
        torch.compiler.reset()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestWhatIsTrained:
    @staticmethod
    def leaves_of(loss: torch.Tensor) -> set[int]:
        """Tensors that would receive a gradient in a backward pass."""
        seen, leaves, waiting = set(), set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            waiting += [following for following, _ in node.next_functions]
        return leaves

    @pytest.mark.parametrize("head_is_new", [False, True])
    def test_delta_scope_has_gradients_and_optimizer_state_for_nothing_else(self, either, head_is_new):
        model, batch = either
        model.config.tasks["ner"]["trained"] = not head_is_new
        model.set_train_scope("delta")
        model.train()
        own = model.adapter.tasks["ner"]
        wanted = {own.delta.latent} | ({own.head_weight.latent, own.head_bias.latent} if head_is_new else set())
        loss = model(**batch, labels=batch["input_ids"] % 3).loss
        assert self.leaves_of(loss) == {id(tensor) for tensor in wanted}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        loss.backward()
        optimizer.step()
        assert {p for p in model.parameters() if p.grad is not None} == wanted == set(optimizer.state)
        assert own.delta.latent.grad.norm() > 0

    def test_the_stream_never_goes_back_through_its_host(self, stream):
        stream.set_train_scope("task")
        stream.train()
        batch = tiny_tokenizer()(sentences(3), padding=True, return_tensors="pt")
        entered = []
        for module in (m for m in stream.host.modules() if isinstance(m, nn.Linear)):
            module.register_full_backward_hook(lambda *_: entered.append(1))
        run = stream.stream.read(batch["attention_mask"], {"input_ids": batch["input_ids"]})
        assert not any(state.requires_grad for state in run.hidden_states)
        run.logits("ner").sum().backward()
        assert not entered
        assert stream.adapter.tasks["ner"].reader.inward.latent.grad.norm() > 0
