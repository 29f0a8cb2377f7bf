"""The baselines: changed layers, trained weights, saved files and figures."""

import sys

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    ConvBertConfig,
    ConvBertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
)

from modeling_unihyperlora import BudgetError, ConfigError, HostError
from trainers.baselines import BASELINES, check_baseline_budget, head_modules, make_baseline, measure_baseline

LABELS = ["O", "B-A", "I-A"]
TASK_TYPES = ("token_classification", "sequence_classification")
SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
HOSTS = {
    "bert": lambda: BertModel(BertConfig(**SHAPE, intermediate_size=32)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
    ),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SHAPE, intermediate_size=32)),
    "convbert": lambda: ConvBertModel(ConvBertConfig(**SHAPE, intermediate_size=32, embedding_size=16)),
}
ATTENTION, FEED_FORWARD = 4 * (16 + 16), 2 * (16 + 32)  # sums of the widths on both sides of a block's linear layers
DENSE, CLASSIFIER = 16 * 16 + 16, 16 * 3 + 3
HEADS = {  # what transformers' task models put on an encoder
    ("bert", "token_classification"): {"classifier": CLASSIFIER},
    ("bert", "sequence_classification"): {"bert.pooler": DENSE, "classifier": CLASSIFIER},
    ("distilbert", "token_classification"): {"classifier": CLASSIFIER},
    ("distilbert", "sequence_classification"): {"pre_classifier": DENSE, "classifier": CLASSIFIER},
    ("mpnet", "token_classification"): {"classifier": CLASSIFIER},
    ("mpnet", "sequence_classification"): {"classifier": DENSE + CLASSIFIER},
}


@pytest.fixture(scope="module")
def host_of(tmp_path_factory):
    """host_of("bert") → folder of a random host of that family, 3 blocks x 16."""
    made = {}

    def save(family: str) -> str:
        if family not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made[family] = str(tmp_path_factory.mktemp(family))
                HOSTS[family]().save_pretrained(made[family])
        return made[family]

    return save


def trained(model) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "task_type"), HEADS)
def test_the_head_is_what_the_task_model_adds(host_of, family, task_type):
    probe = make_baseline("probe", task_type, host_of(family), LABELS)
    expected = HEADS[family, task_type]
    assert {name: sum(p.numel() for p in m.parameters()) for name, m in head_modules(probe).items()} == expected
    assert sum(trained(probe).values()) == sum(expected.values())
    assert all(name.startswith(tuple(expected)) for name in trained(probe))
    figures = measure_baseline(probe, "probe")
    head = sum(expected.values())
    assert figures == {"head_bytes": 4 * head, "trainable_parameters": head, "extra_ram_mb": round(4e-6 * head, 3)}


@pytest.mark.parametrize(("family", "task_type"), HEADS)
@pytest.mark.parametrize("rank", [1, 8])
def test_lora_sits_on_six_layers_a_block(host_of, family, task_type, rank):
    model = make_baseline("lora", task_type, host_of(family), LABELS, lora_r=rank)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 6 * 3
    assert {layer.scaling["default"] for layer in layers} == {2.0}
    names = trained(model)
    lora = {name: count for name, count in names.items() if ".lora_" in name}
    assert sum(lora.values()) == 3 * rank * (ATTENTION + FEED_FORWARD)
    heads = HEADS[family, task_type]
    assert sum(names.values()) - sum(lora.values()) == sum(heads.values())
    host = 3 * (4 * 16 * 16 + 2 * 16 * 32 + 2 * 128 * 16)  # linear layers, and attention over 128 tokens
    assert measure_baseline(model, "lora") == {
        "adapter_bytes": None,
        "head_bytes": 4 * sum(heads.values()),
        "trainable_parameters": sum(names.values()),
        "extra_ram_mb": round(4e-6 * sum(names.values()), 3),
        "flops_overhead_pct": round(100 * sum(lora.values()) / host, 4),
    }


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_full_trains_everything(host_of, task_type):
    model = make_baseline("full", task_type, host_of("bert"), LABELS)
    every = sum(p.numel() for p in model.parameters())
    figures = measure_baseline(model, "full")
    assert figures["trainable_parameters"] == sum(trained(model).values()) == every
    assert figures["head_bytes"] == 4 * sum(HEADS["bert", task_type].values())


def test_a_budget_that_was_asked_for(host_of):
    lora, full, probe = (
        make_baseline(method, "token_classification", host_of("bert"), LABELS) for method in ("lora", "full", "probe")
    )
    size = 4 * 3 * 8 * (ATTENTION + FEED_FORWARD)
    check_baseline_budget(lora, "lora", size, None)
    check_baseline_budget(probe, "probe", 0, 0.0)
    check_baseline_budget(full, "full", None, 0.0)
    with pytest.raises(BudgetError, match=rf"budget: {size:,} bytes without the head \({size - 1:,} allowed") as e:
        check_baseline_budget(lora, "lora", size - 1, None)
    assert e.value.excess == {"bytes": 1, "flops_overhead_pct": 0.0}
    with pytest.raises(BudgetError, match=r"extra multiply-adds \(1 % allowed"):
        check_baseline_budget(lora, "lora", None, 1.0)
    with pytest.raises(BudgetError, match="full is over budget"):
        check_baseline_budget(full, "full", 1_000, None)


def test_the_file_of_full_is_counted_without_its_head(host_of, tmp_path):
    model = make_baseline("full", "token_classification", host_of("bert"), LABELS)
    assert measure_baseline(model, "full", tmp_path)["adapter_bytes"] is None
    model.save_pretrained(tmp_path)
    figures = measure_baseline(model, "full", tmp_path)
    assert figures["adapter_bytes"] == (tmp_path / "model.safetensors").stat().st_size - figures["head_bytes"]
    assert figures["adapter_bytes"] > 4 * (figures["trainable_parameters"] - CLASSIFIER)


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_lora_begins_as_its_host_and_its_file_holds_all_of_it(host_of, task_type, tmp_path):
    auto = {
        "token_classification": AutoModelForTokenClassification,
        "sequence_classification": AutoModelForSequenceClassification,
    }[task_type]
    ids = torch.arange(2, 14).view(2, 6)
    torch.manual_seed(1)
    plain = make_baseline("full", task_type, host_of("bert"), LABELS).eval()
    torch.manual_seed(1)
    model = make_baseline("lora", task_type, host_of("bert"), LABELS).eval()
    before = plain(ids).logits
    torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    moved = model(ids).logits
    assert (moved - before).abs().max() > 0.1

    model.save_pretrained(tmp_path)
    base = auto.from_pretrained(host_of("bert"), num_labels=3)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, moved, atol=1e-6, rtol=1e-6)

    figures = measure_baseline(model, "lora", tmp_path)
    of_lora = 4 * 3 * 8 * (ATTENTION + FEED_FORWARD)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert figures["adapter_bytes"] == size - figures["head_bytes"]
    assert of_lora < figures["adapter_bytes"] < of_lora + 8000  # the rest is the file's table of names


@pytest.mark.parametrize("method", BASELINES)
def test_a_host_in_half_precision_is_trained_in_float32(method, host_of, tmp_path):
    BertModel.from_pretrained(host_of("bert")).half().save_pretrained(tmp_path)
    model = make_baseline(method, "token_classification", str(tmp_path), LABELS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", BASELINES)
def test_a_host_that_is_not_there(method, tmp_path):
    with pytest.raises(HostError, match=f"cannot be loaded for --method {method}"):
        make_baseline(method, "token_classification", str(tmp_path / "none"), LABELS)


def test_a_head_for_other_labels(host_of, tmp_path):
    make_baseline("full", "token_classification", host_of("bert"), LABELS).save_pretrained(tmp_path)
    with pytest.raises(HostError, match="no head for other labels"):
        make_baseline("full", "token_classification", str(tmp_path), ["O", "B-A"])


def test_lora_knows_the_families_of_the_injected_update_alone(host_of):
    with pytest.raises(HostError, match="lora does not know .* type convbert .*Give another host, or --method full"):
        make_baseline("lora", "token_classification", host_of("convbert"), LABELS)
    make_baseline("full", "token_classification", host_of("convbert"), LABELS)


def test_without_peft(host_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'unihyperlora\[baselines\]'"):
        make_baseline("lora", "token_classification", host_of("bert"), LABELS)
