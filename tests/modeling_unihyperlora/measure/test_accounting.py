"""Bytes against files on disk, and multiply-adds against a profiler."""

import functools
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, MPNetConfig, MPNetModel

from modeling_unihyperlora import BudgetError, UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.measure.accounting import (
    added_multiply_adds,
    check_budget,
    flops_overhead_pct,
    host_multiply_adds,
    measure,
)
from modeling_unihyperlora.storage import WEIGHTS_NAME, StoredTensor

TOKENS = 128
NINE = [f"L{i}" for i in range(9)]


class MultiplyAdds(TorchDispatchMode):
    """Counts multiplications and divisions: in matrix products, weighted bags of rows, and element-wise operations."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.total += out.numel() * args[0].shape[-1]
        elif name in ("addmm", "addmm_", "baddbmm"):
            self.total += out.numel() * args[1].shape[-1]
        elif name == "_embedding_bag_per_sample_weights_backward":
            self.total += out.numel() * args[0].shape[-1]
        elif name == "linalg_vector_norm":
            self.total += args[0].numel()
        elif name == "_embedding_bag" or name == "_embedding_bag_forward_only":
            rows, indices = args[0], args[1]
            self.total += indices.numel() * rows.shape[-1]
        elif name in ("mul", "mul_", "div", "pow", "square"):
            self.total += out.numel()
        return out


def products_a_token(forward, sentences: tuple[int, int]) -> float:
    """Multiply-adds of one more token; work that is done once per pass does not count."""
    totals = []
    for count in sentences:
        ids = torch.randint(5, 40, (count, TOKENS))
        with torch.no_grad():
            forward(input_ids=ids, attention_mask=torch.ones_like(ids))  # projects the atoms and keeps them
            with MultiplyAdds() as counter:
                forward(input_ids=ids, attention_mask=torch.ones_like(ids))
        totals.append(counter.total)
    return (totals[1] - totals[0]) / ((sentences[1] - sentences[0]) * TOKENS)


def realistic(family: str, width: int, layers: int):
    """Random hosts with the shapes of MiniLM, DistilBERT, MPNet; eager attention, so that its products are counted."""
    torch.manual_seed(0)
    if family == "distilbert":
        shape = {"dim": width, "n_layers": layers, "n_heads": 12, "hidden_dim": 4 * width}
        host = DistilBertModel(DistilBertConfig(vocab_size=50, attn_implementation="eager", **shape))
    else:
        shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
        config, model = (BertConfig, BertModel) if family == "bert" else (MPNetConfig, MPNetModel)
        host = model(config(vocab_size=50, num_attention_heads=12, attn_implementation="eager", **shape), False)
    return host.eval()


@functools.cache
def measured(family: str, width: int, layers: int) -> tuple[torch.nn.Module, float]:
    """A realistic host, and its multiply-adds per token."""
    host = realistic(family, width, layers)
    return host, products_a_token(host, (1, 2))


class TestMultiplyAdds:
    @pytest.mark.parametrize("router,top_k", [("token", 1), ("token", 2), ("token", 3), ("static", 2)])
    @pytest.mark.parametrize(
        "family,width,layers", [("bert", 384, 6), ("bert", 768, 4), ("mpnet", 384, 3), ("distilbert", 768, 2)]
    )
    def test_agrees_with_a_profiler_within_two_per_cent(self, family, width, layers, router, top_k, stir):
        host, alone = measured(family, width, layers)
        config = UniHyperLoraConfig(pathway="inject", router=router, router_top_k=top_k)
        model = stir(UniHyperLoraForTokenClassification.from_host(host, labels=NINE, config=config).eval())
        together = products_a_token(model, (1, 2))
        model.detach()
        added = together - alone
        assert host_multiply_adds(model, TOKENS) == pytest.approx(alone, rel=0.02)
        assert added_multiply_adds(model) == pytest.approx(added, rel=0.02)
        assert flops_overhead_pct(model, TOKENS) == pytest.approx(100 * added / alone, rel=0.02)

    def test_merged_adds_the_head_alone(self, stir):
        host = realistic("bert", 384, 2)
        alone = products_a_token(host, (1, 2))
        config = UniHyperLoraConfig(pathway="inject", router="static")
        model = stir(UniHyperLoraForTokenClassification.from_host(host, labels=NINE, config=config).eval())
        model.merge()
        added = products_a_token(model, (1, 2)) - alone
        assert added_multiply_adds(model) == pytest.approx(added, rel=0.02)
        assert added < 0.02 * alone

    def test_of_the_default_on_minilm_by_hand(self):
        model = UniHyperLoraForTokenClassification.from_host(
            realistic("bert", 384, 6), labels=NINE, config=UniHyperLoraConfig(pathway="inject")
        )
        d, used = 384, 2
        host = 6 * (4 * d * d + 2 * d * 4 * d + 2 * TOKENS * d)
        reads, writes = d + d + d + 4 * d, 4 * d + 4 * d + d  # q, k and v share their reading
        added = 6 * (128 * d + d + used * (reads + writes)) + 5 * ((9 + 1) * d + 9)
        assert host_multiply_adds(model, TOKENS) == host
        assert added_multiply_adds(model) == added
        assert flops_overhead_pct(model) == pytest.approx(100 * added / host)
        assert flops_overhead_pct(model) < 10


class TestBytes:
    def test_are_those_of_the_file(self, make_model, tmp_path):
        model = make_model()
        model.add_task("other", NINE)
        model.set_task("ner")
        model.save_pretrained(tmp_path)
        figures = measure(model, tmp_path)
        raw = (tmp_path / WEIGHTS_NAME).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        sizes = {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }

        def of(*names: str) -> int:
            return sum(size for name, size in sizes.items() if name.startswith(names))

        assert figures["adapter_bytes"] == len(raw)
        assert figures["head_bytes"] == of("tasks.ner.head_")
        assert figures["delta_bytes"] == of("tasks.ner.delta") == 8 * 16 // 2
        assert figures["parts"]["head"] == of("tasks.ner.head_", "tasks.other.head_")
        assert figures["parts"]["delta"] == of("tasks.ner.delta", "tasks.other.delta")
        assert figures["parts"]["dictionary"] == of("atoms_")
        assert figures["parts"]["mixer"] == of("mixer.")
        assert figures["parts"]["projector"] == of("projector.")
        assert sum(figures["parts"].values()) == sum(sizes.values())

    def test_without_a_file_there_is_no_size(self, make_model):
        assert measure(make_model())["adapter_bytes"] is None

    def test_figures_are_json_numbers(self, make_model):
        figures = measure(make_model())
        assert json.loads(json.dumps(figures)) == figures

    @pytest.mark.parametrize("scope", ["task", "delta"])
    def test_trainable_parameters(self, scope, make_model):
        model = make_model()
        model.config.tasks["ner"]["trained"] = True
        model.set_train_scope(scope)
        everything = sum(p.numel() for p in model.adapter.parameters())
        expected = 8 * 16 if scope == "delta" else everything - 8 * 16
        assert measure(model)["trainable_parameters"] == expected

    @pytest.mark.parametrize("width", [32, 64])
    def test_extra_memory_is_what_the_adapter_holds(self, width, make_host, make_model, make_batch):
        """Extra memory is float32 latents and buffers, and the atoms and router in the host's three widths."""
        model = make_model(host=make_host(width=width))
        floats = sum(p.numel() for p in [*model.adapter.parameters(), *model.adapter.buffers()])
        floats += 16 * (width + 2 * width) * 2 + 16 * width  # read and written at both widths; router at one
        floats += 3 * 6 * 16  # coefficients
        assert measure(model)["extra_ram_mb"] == pytest.approx(4 * floats / 1e6, abs=1e-3)


class TestBudget:
    def test_the_default_is_inside_it(self):
        model = UniHyperLoraForTokenClassification.from_host(
            realistic("bert", 384, 6), labels=NINE, config=UniHyperLoraConfig(pathway="inject")
        )
        check_budget(model)
        assert measure(model)["budget_ok"] is True

    def test_too_many_bytes(self, make_host):
        config = UniHyperLoraConfig(pathway="inject", atoms=1024, anchor_dim=512)
        model = UniHyperLoraForTokenClassification.from_host(make_host(), labels=NINE, config=config)
        with pytest.raises(BudgetError, match=r"Over budget: 1,\d{3},\d{3} bytes .1,000,000 allowed"):
            check_budget(model, max_flops_overhead_pct=math.inf)
        assert measure(model)["budget_ok"] is False

    def test_too_many_multiply_adds(self):
        host = realistic("bert", 384, 1)
        config = UniHyperLoraConfig(pathway="inject", router="static")
        model = UniHyperLoraForTokenClassification.from_host(host, labels=NINE, config=config)
        overhead = flops_overhead_pct(model)
        with pytest.raises(BudgetError, match=rf"{overhead:.2f} % extra multiply-adds \(10 % allowed\)"):
            check_budget(model)
        assert measure(model)["budget_ok"] is False

    def test_the_edge_of_multiply_adds_is_allowed(self, make_model):
        model = make_model()
        overhead = flops_overhead_pct(model)
        check_budget(model, max_flops_overhead_pct=overhead)
        with pytest.raises(BudgetError):
            check_budget(model, max_flops_overhead_pct=overhead * 0.9999)

    def test_the_edge_of_bytes_is_that_of_the_file(self, make_model, tmp_path):
        """An adapter within the budget before training is so when saved, even if many tasks lengthen the header."""
        model = make_model()
        for i in range(20):
            model.add_task(f"task-{i}-of-a-rather-long-name", NINE)
        model.save_pretrained(tmp_path)
        size = (tmp_path / WEIGHTS_NAME).stat().st_size
        check_budget(model, max_bytes=size, max_flops_overhead_pct=math.inf)
        with pytest.raises(BudgetError, match=f"Over budget: {size:,} bytes .{size - 1:,} allowed"):
            check_budget(model, max_bytes=size - 1, max_flops_overhead_pct=math.inf)

    def test_nothing_of_the_model_changes(self, make_model):
        model = make_model()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        check_budget(model, max_flops_overhead_pct=math.inf)
        measure(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert all(m.latent.grad is None for m in model.modules() if isinstance(m, StoredTensor))
