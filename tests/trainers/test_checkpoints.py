"""Checkpoints of the trainer: their contents, and resuming from them."""

import math

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_unihyperlora import AdapterFileError
from modeling_unihyperlora.publish.hub import files_of
from modeling_unihyperlora.storage import LATENTS_NAME, adapter_tensors
from tests.trainers.test_trainer import StopAt, changed, losses, make_data, make_model, make_trainer, snapshot


class TestCheckpoints:
    def test_holds_the_adapter_and_the_state_of_the_run(self, tmp_path, tokenizer):
        trainer = make_trainer(
            tmp_path,
            max_steps=2,
            save_strategy="steps",
            save_steps=2,
            optim="adamw_torch",
            trainer={"processing_class": tokenizer},
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        folder = tmp_path / "checkpoint-2"
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "model.safetensors",
            LATENTS_NAME,
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
        }
        assert {path.name for path in (tmp_path / "final").iterdir()} == set(files_of("inject"))
        adapter = trainer.model.adapter
        assert load_file(folder / "model.safetensors").keys() == adapter_tensors(adapter).keys()
        assert load_file(folder / LATENTS_NAME).keys() == adapter.state_dict().keys()
        floats = sum(p.numel() for p in adapter.parameters())
        assert (folder / "optimizer.pt").stat().st_size < 2 * 4 * floats + 16_000
        host = sum(p.numel() for p in trainer.model.host.parameters())
        assert (
            sum(path.stat().st_size for path in folder.iterdir()) < 4 * 4 * floats + 50_000 < 4 * (4 * floats + host)
        )

    @pytest.mark.parametrize("scope", ["task", "delta"])
    def test_resumed_run_ends_as_the_uninterrupted_one(self, scope, tmp_path):
        """Weights are equal bit for bit, from a model that starts with other values, on a host with dropout."""
        settings = {
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "lr_scheduler_type": "linear",
            "train_scope": scope,
            "learning_rate": 0.02,
        }
        whole = make_trainer(tmp_path / "whole", make_model(dropout=0.3), **settings)
        whole.train()
        cut = make_trainer(tmp_path / "cut", make_model(dropout=0.3), **settings)
        cut.add_callback(StopAt(4))
        cut.train()
        assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint-2", "checkpoint-4"]
        resumed = make_trainer(tmp_path / "cut", make_model(seed=5, dropout=0.3), **settings)
        host = snapshot(resumed.model.host)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert not changed(resumed.model.adapter, snapshot(whole.model.adapter))
        assert changed(cut.model.adapter, snapshot(whole.model.adapter))
        assert not changed(resumed.model.host, host)
        assert losses(resumed)[-1]["loss"] == losses(whole)[-1]["loss"]

    def test_best_model_is_loaded_at_the_end(self, tmp_path):
        scores = iter([0.1, 0.9, 0.2])
        trainer = make_trainer(
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="f1",
            trainer={"eval_dataset": make_data(5, seed=1), "compute_metrics": lambda _: {"f1": next(scores)}},
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        best, last = (load_file(tmp_path / f"checkpoint-{step}" / LATENTS_NAME) for step in (2, 3))
        assert not changed(trainer.model.adapter, best)
        assert changed(trainer.model.adapter, last)

    def tuned_delta(self, folder, scores, model=None, resume: bool = False, **arguments):
        """Train δθ for up to three steps beyond its grid, with these scores; returns the trainer and the changes."""
        scores = iter(scores)
        trainer = make_trainer(
            folder,
            model,
            train_scope="delta",
            learning_rate=1e4,
            load_best_model_at_end=True,
            metric_for_best_model="f1",
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            trainer={"eval_dataset": make_data(5, seed=1), "compute_metrics": lambda _: {"f1": next(scores)}},
            **arguments,
        )
        before = snapshot(trainer.model.adapter)
        trainer.train(resume_from_checkpoint=resume)
        assert next(scores, None) is None
        return trainer, changed(trainer.model.adapter, before)

    @pytest.mark.parametrize("limit", [None, 1])
    def test_delta_that_only_harms_ends_where_it_started(self, limit, tmp_path):
        trainer, moved = self.tuned_delta(tmp_path, [0.5, 0.4, 0.5, 0.3], save_total_limit=limit)
        assert not moved
        assert trainer.state.best_metric == 0.5
        if limit is None:
            assert changed(trainer.model.adapter, load_file(tmp_path / "checkpoint-3" / LATENTS_NAME))

    def test_delta_that_helps_is_kept(self, tmp_path):
        trainer, moved = self.tuned_delta(tmp_path, [0.5, 0.4, 0.6, 0.3])
        assert "tasks.ner.delta.latent" in moved
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")

    def test_a_resumed_delta_remembers_its_start(self, tmp_path):
        start = snapshot(make_model().adapter)
        self.tuned_delta(tmp_path, [0.5, 0.4], max_steps=1)
        resumed, _ = self.tuned_delta(tmp_path, [0.3, 0.2], make_model(seed=5), resume=True)
        assert resumed.state.global_step == 3
        assert not changed(resumed.model.adapter, start)

    @pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
    def test_damaged_one_is_refused(self, damage, tmp_path):
        make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
        path = tmp_path / "checkpoint-1" / LATENTS_NAME
        raw = bytearray(path.read_bytes())
        raw[-20] ^= 1
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(raw if damage == "flip" else raw[:-20])
        trainer = make_trainer(tmp_path, make_model(seed=3))
        before = snapshot(trainer.model)
        with pytest.raises(AdapterFileError):
            trainer.train(resume_from_checkpoint=True)
        assert not changed(trainer.model, before)

    def test_one_of_another_adapter_is_refused(self, tmp_path):
        make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
        trainer = make_trainer(tmp_path, make_model(atoms=8))
        before = snapshot(trainer.model)
        with pytest.raises(AdapterFileError, match="belongs to another adapter"):
            trainer.train(resume_from_checkpoint=True)
        assert not changed(trainer.model, before)

    @pytest.mark.parametrize("how", ["value", "rate"])
    def test_diverged_training_writes_nothing(self, how, tmp_path):
        class Diverge(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                if how == "value" and state.global_step == 2:
                    model.adapter.atoms_in.latent.data[0, 0] = math.nan

        rate = {"learning_rate": 1e38, "head_learning_rate": 1e38} if how == "rate" else {}
        trainer = make_trainer(
            tmp_path, save_strategy="steps", save_steps=2, trainer={"callbacks": [Diverge()]}, **rate
        )
        with pytest.raises(AdapterFileError, match="training diverged"):
            trainer.train()
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not (tmp_path / "checkpoint-2").exists(), "resume_from_checkpoint=True would take it"
