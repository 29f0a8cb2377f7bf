"""transformers' own Trainer on an adapter, for users without the package."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_unihyperlora import AdapterFileError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.storage import adapter_tensors, read_checked


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture
def make_trainer(saved, make_host, make_batch, tmp_path):
    """make_trainer(scores=…, stop=…) → a Trainer on the saved adapter, three steps, a checkpoint at each."""
    batch = make_batch()
    row = {name: tensor[0] for name, tensor in batch.items()}
    data = [row | {"labels": row["input_ids"] % 5}] * 8

    def make(scores: list[float] = (), stop: int | None = None, **more) -> Trainer:
        scores = iter(scores)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 3, "save_steps": 1},
            **{"save_strategy": "steps", "learning_rate": 0.05, "per_device_train_batch_size": 4},
            **more,
        )
        return Trainer(
            UniHyperLoraForTokenClassification.from_pretrained(saved[1], host=make_host()),
            arguments,
            train_dataset=data,
            eval_dataset=data[:2],
            data_collator=default_data_collator,
            compute_metrics=lambda _: {"f1": next(scores)},
            callbacks=[StopAt(stop)] if stop else None,
        )

    return make


def test_the_best_checkpoint_is_what_it_ends_with(make_trainer, tmp_path):
    each = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "f1"}
    trainer = make_trainer([0.1, 0.9, 0.2], **each)
    trainer.train()
    ends, best, last = (
        adapter_tensors(trainer.model.adapter),
        *(read_checked(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3)),
    )
    assert same(ends, best) and not same(ends, last)


def test_a_resumed_run_starts_from_its_checkpoint(make_trainer, tmp_path):
    make_trainer(stop=2).train()
    resumed = make_trainer()
    resumed._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
    assert same(
        adapter_tensors(resumed.model.adapter),
        read_checked(tmp_path / "run" / "checkpoint-2" / "model.safetensors"),
    )
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_state_of_another_adapter_or_of_none_is_refused_even_where_not_strict(make_model, make_host):
    model, other = make_model(), make_model(atoms=8)
    before = adapter_tensors(model.adapter)
    for state in (adapter_tensors(other.adapter), make_host().state_dict(), {"x": torch.zeros(1)}):
        with pytest.raises(AdapterFileError, match="The given state dict"):
            model.load_state_dict(state, strict=False)
    assert same(adapter_tensors(model.adapter), before)


def test_the_models_own_state_loads_as_of_any_module(make_model):
    model, other = make_model(), make_model(seed=3)
    model.load_state_dict(other.state_dict())
    assert same(adapter_tensors(model.adapter), adapter_tensors(other.adapter))
    assert model.load_state_dict({"adapter.router_bias.latent": torch.zeros(16)}, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"adapter.router_bias.latent": torch.zeros(16)})
