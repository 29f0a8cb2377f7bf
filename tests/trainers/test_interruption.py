"""However a run is interrupted, the resumed run ends with the same weights, bit for bit."""

import errno
import os
import resource
import shutil
import signal

import pytest
import torch
from transformers import BertConfig, BertModel, TrainerCallback

from modeling_unihyperlora import AdapterFileError, ConfigError, UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.publish.hub import files_of
from trainers import UniHyperLoraTrainer, UniHyperLoraTrainingArguments
from trainers.interruption import EXIT_STATUS, is_complete, last_complete_checkpoint

SETTINGS = {
    **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.02},
    **{"lr_scheduler_type": "linear"},
}


def make_model(seed: int = 0):
    """An adapter on a random host with dropout, the same host at every call."""
    torch.manual_seed(99)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    host = BertModel(BertConfig(vocab_size=40, hidden_dropout_prob=0.3, **shape), add_pooling_layer=False)
    torch.manual_seed(seed)
    config = UniHyperLoraConfig(pathway="inject", atoms=16, anchor_dim=8, mixer_hidden=4)
    return UniHyperLoraForTokenClassification.from_host(host, labels=["O", "B-A"], task="ner", config=config)


def make_trainer(folder, model, **more) -> UniHyperLoraTrainer:
    generator = torch.Generator().manual_seed(0)
    draw = lambda most: torch.randint(0, most, (6,), generator=generator)  # noqa: E731
    data = [{"input_ids": draw(40), "attention_mask": torch.ones(6).long(), "labels": draw(2)} for _ in range(24)]
    arguments = UniHyperLoraTrainingArguments(
        **SETTINGS | more,
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        per_device_train_batch_size=8,
        max_flops_overhead_pct=1e6,
        max_adapter_bytes=10**6,
    )
    return UniHyperLoraTrainer(model=model, args=arguments, train_dataset=data)


def snapshot(adapter) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def changed(adapter, before) -> list[str]:
    return [name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, before[name])]


class AtStep(TrainerCallback):
    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


@pytest.fixture
def whole(tmp_path):
    trainer = make_trainer(tmp_path / "whole", make_model())
    trainer.train()
    return snapshot(trainer.model.adapter)


def resumed(folder, **more):
    trainer = make_trainer(folder, make_model(seed=5), **more)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_sigterm_saves_before_it_leaves(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path / "cut", make_model())
    trainer.add_callback(AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == EXIT_STATUS == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert last_complete_checkpoint(tmp_path / "cut").name == "checkpoint-3"  # in between two regular ones
    assert not changed(resumed(tmp_path / "cut").model.adapter, whole)


def test_a_full_disk_leaves_the_checkpoint_before(whole, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "cut", make_model())

    def full(folder):
        if folder.endswith("checkpoint-4"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    assert (tmp_path / "cut" / "checkpoint-4" / "optimizer.pt").is_file()
    shutil.copy(tmp_path / "whole" / "checkpoint-2" / "rng_state.pth", tmp_path / "cut" / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path / "cut").name == "checkpoint-2"
    assert not changed(resumed(tmp_path / "cut").model.adapter, whole)


@pytest.mark.parametrize("most", [1_000, 6_000, 10_000])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(whole, tmp_path, most):
    """From step 3 on, files have a size limit, so that each time another file of checkpoint-4 is truncated."""
    trainer = make_trainer(tmp_path / "cut", make_model())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.add_callback(AtStep(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))))
    try:
        with pytest.raises((OSError, RuntimeError, AdapterFileError)):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last_complete_checkpoint(tmp_path / "cut").name == "checkpoint-2"
    assert not changed(resumed(tmp_path / "cut").model.adapter, whole)


def test_no_step_is_taken_after_the_last_one(whole, tmp_path):
    """The run is stopped after its last step, before the last save; step 5 is inside an epoch of 3 steps."""
    trainer = make_trainer(tmp_path / "cut", make_model(), max_steps=5)
    trainer.train()
    before = snapshot(trainer.model.adapter)
    again = resumed(tmp_path / "cut", max_steps=5)
    assert last_complete_checkpoint(tmp_path / "cut").name == "checkpoint-5" and again.state.global_step == 5
    assert not changed(again.model.adapter, before)
    assert changed(again.model.adapter, whole)  # of one step more


def test_without_a_checkpoint_it_starts_from_the_beginning(whole, tmp_path):
    (tmp_path / "cut" / "checkpoint-2").mkdir(parents=True)
    trainer = make_trainer(tmp_path / "cut", make_model())
    trainer.train(resume_from_checkpoint=True)
    assert not changed(trainer.model.adapter, whole)


@pytest.mark.parametrize("content", [None, "", '{"global_step": 4', '{"global_step": "4"}', "[]", "{}"])
def test_half_written(tmp_path, content):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    if content is not None:
        (folder / "trainer_state.json").write_text(content)
    assert not is_complete(folder)
    assert last_complete_checkpoint(tmp_path) is None
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    assert last_complete_checkpoint(tmp_path) == folder


def test_the_name_of_a_folder_means_nothing(whole, tmp_path):
    """A copied and renamed checkpoint stays valid; the last checkpoint is the one with the most steps."""
    source, folder = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(source / "checkpoint-4", folder / "the one that I like")
    shutil.copytree(source / "checkpoint-2", folder / "checkpoint-9")
    (folder / "another run").mkdir()
    (folder / "another run" / "trainer_state.json").write_text('{"global_step": 99}')  # as at the end of a run
    assert last_complete_checkpoint(folder).name == "the one that I like"
    trainer = make_trainer(tmp_path / "new", make_model(seed=5))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert not changed(trainer.model.adapter, whole)


def test_an_output_folder_with_the_name_of_a_checkpoint_gets_a_whole_adapter(tmp_path):
    trainer = make_trainer(tmp_path / "checkpoint-final", make_model(), max_steps=2)
    trainer.train()
    trainer.save_model()
    assert {path.name for path in (tmp_path / "checkpoint-final").iterdir() if path.is_file()} == set(
        files_of("inject")
    )
    assert not (tmp_path / "checkpoint-final" / "checkpoint-2" / "README.md").exists()


def test_a_checkpoint_without_the_optimisers_state_is_not_resumed_from(tmp_path):
    make_trainer(tmp_path, make_model(), save_only_model=True).train()
    with pytest.raises(ConfigError, match="no optimizer.pt and no scheduler.pt, as with save_only_model"):
        resumed(tmp_path)


def test_a_checkpoint_written_over_is_not_complete_meanwhile(tmp_path, monkeypatch):
    make_trainer(tmp_path, make_model()).train()
    again = make_trainer(tmp_path, make_model())
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", lambda folder: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        again.train()
    assert not is_complete(tmp_path / "checkpoint-2") and is_complete(tmp_path / "checkpoint-4")
