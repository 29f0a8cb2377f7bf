"""No argument of a Trainer is ignored: it is honoured, or refused before anything is written."""

import pytest
import torch
from datasets import Dataset

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.measure.accounting import part_of
from tests.trainers.test_trainer import make_data, make_trainer, snapshot
from trainers.training_args import LEARNING_RATE_FACTORS, NOISE_FLAGS, UniHyperLoraTrainingArguments
from trainers.unusable import check_adapter_trainer, check_noise


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha would change nothing"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"bf16_full_eval": True}, "bf16_full_eval would round the adapter's own"),
        ({"label_names": ["tags"]}, "label_names=.*tags"),
        ({"optim": "adamw_bnb_8bit"}, "optim .*bnb.* cannot be used here"),
        ({"optim": "galore_adamw", "optim_target_modules": ["attn"]}, "optim"),
        ({"optim_target_modules": ["attn"]}, "optim_target_modules is not read"),
        ({"lr_scheduler_kwargs": {"min_lr": 1}}, "constant ignores warmup_steps and lr_scheduler_kwargs"),
        ({"warmup_steps": 3}, "constant ignores warmup_steps"),
        ({"optim": "adamw_torch", "optim_args": "betas=1"}, "optim adamw_torch does not read optim_args betas=1"),
        ({"optim": "rmsprop", "optim_args": "x"}, "optim rmsprop cannot be used here"),
        ({"fsdp": True}, "The Trainer cannot be set up: .*fsdp"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 is not allowed; it must be 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps=0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1"),
        ({"seed": -1}, "seed=-1 is not allowed; it must be from 0 to 4294967295"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"label_smoothing_factor": 2.0}, "label_smoothing_factor=2.0"),
        ({"save_steps": 0}, "save_steps=0"),
        ({"report_to": "clearml"}, "report_to clearml needs its package"),
        ({"report_to": "paper"}, "report_to paper is unknown"),
        ({"enable_jit_checkpoint": True}, "saves a checkpoint at SIGTERM by itself"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 25}, "24 items and one batch takes 25"),
        ({"eval_steps": 5}, "eval_steps=5 is not read: it needs eval_strategy steps"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_steps=5 is not read: it needs eval_strategy steps"),
        ({"eval_delay": 1}, "eval_delay=1 is not read: it needs eval_strategy steps or epoch"),
        ({"save_steps": 7, "save_strategy": "epoch"}, "save_steps=7 is not read: it needs save_strategy steps"),
        ({"logging_steps": 7, "logging_strategy": "epoch"}, "logging_steps=7 is not read"),
        ({"greater_is_better": False}, "greater_is_better=False is not read: it needs metric_for_best_model"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "it needs gradient_checkpointing"),
        ({"activation_checkpointing_kwargs": {"every_n_layers": 2}}, "it needs gradient_checkpointing"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True .* dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "spawn"}, "it needs dataloader_num_workers of 1 or more"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config=.* needs use_liger_kernel"),
        ({"fsdp_config": {"min_num_params": 1}}, "fsdp_config=.* is not read: it needs fsdp"),
        ({"length_column_name": "n"}, "length_column_name='n' is not read: it needs train_sampling_strategy"),
        (
            {"length_column_name": "n", "train_sampling_strategy": "group_by_length"},
            "length_column_name='n' is not read: the training data have no such column",
        ),
        ({"adam_beta1": 0.5}, "adam_beta1=0.5 is not read by optim sgd"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06 is not read by optim adafactor"),
        ({"use_cache": True}, "use_cache is not read"),
        ({"torch_compile_mode": "fastest"}, "torch_compile_mode fastest cannot be used .*default"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is not allowed; it must be 0 or more, and finite"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs=inf"),
        ({"logging_steps": -1}, "logging_steps=-1"),
        ({"eval_steps": 0, "eval_strategy": "steps"}, "eval_steps=0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_written(arguments, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        make_trainer(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_the_order_of_a_streams_batches(tmp_path):
    args = make_trainer(tmp_path, train_sampling_strategy="sequential").args
    with pytest.raises(ConfigError, match="train_sampling_strategy='sequential' is not read"):
        check_adapter_trainer(args, trains=True, has_sources=True)


def test_workers_that_stay_would_repeat_a_streams_noise(tmp_path):
    args = make_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True).args
    with pytest.raises(ConfigError, match="the noise of the first epoch"):
        check_adapter_trainer(args, trains=True, has_sources=True)


def test_what_is_read_is_let_through(tmp_path):
    make_trainer(tmp_path, optim="adamw_torch", adam_beta1=0.5, adam_epsilon=1e-6)
    lengths = Dataset.from_list([row | {"n": 6} for row in make_data(24)])
    arguments = {"train_sampling_strategy": "group_by_length", "length_column_name": "n"}
    trainer = make_trainer(tmp_path, data=lengths, **arguments)
    assert trainer._get_train_sampler(trainer.train_dataset).lengths == [6] * 24


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"optim_args": "momentum=fast"}, "optim sgd cannot be used here .*optim_args"),
        ({"optim": "adamw_torch", "adam_beta1": 2.0}, "AdamW does not accept its settings .*Invalid beta"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "min_lr does not accept its settings .*lr_scheduler_kwargs",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"warm": 1}}, "cosine does not accept its settings"),
    ],
)
def test_settings_that_the_optimiser_or_the_schedule_does_not_take(arguments, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        make_trainer(tmp_path, **arguments).train()


def test_the_optimiser_that_was_given_is_the_one_that_trains(tmp_path):
    given = (torch.optim.RMSprop, {"lr": 0.5, "alpha": 0.7})
    trainer = make_trainer(tmp_path, router_learning_rate=0.1, trainer={"optimizer_cls_and_kwargs": given})
    before = snapshot(trainer.model.adapter)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.RMSprop and optimizer.defaults["alpha"] == 0.7
    names = {id(p): name.removeprefix("adapter.") for name, p in trainer.model.named_parameters()}
    for group in optimizer.param_groups:
        part = part_of(names[id(group["params"][0])])
        assert group["lr"] == (0.1 if part == "router" else 0.5 * LEARNING_RATE_FACTORS[part]), part
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.adapter.state_dict().items())


def test_an_optimiser_with_groups_of_its_own_is_refused(tmp_path):
    given = (torch.optim.SGD, {"lr": 0.5, "params": []})
    with pytest.raises(ConfigError, match="SGD makes its own groups"):
        make_trainer(tmp_path, trainer={"optimizer_cls_and_kwargs": given}).create_optimizer()


def test_what_is_evaluated_is_evaluated_whole_where_training_drops_the_last_batch(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=7)
    assert len(trainer.get_train_dataloader()) == 24 // 7
    assert len(trainer.predict(make_data(13)).predictions) == 13
    assert trainer.args.dataloader_drop_last


def test_a_metric_that_no_evaluation_reports(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="f2",
        trainer={"eval_dataset": make_data(5), "compute_metrics": lambda _: {"f1": 0.5}},
    )
    with pytest.raises(ConfigError, match="does not report metric_for_best_model f2. Choose one of: .*f1"):
        trainer.train()


class TestNoise:
    """Arguments of a reader's training, which nothing else reads."""

    @staticmethod
    def arguments(tmp_path, **given) -> UniHyperLoraTrainingArguments:
        return UniHyperLoraTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **given)

    @pytest.mark.parametrize("name", NOISE_FLAGS)
    def test_is_read_by_a_reader_alone(self, name, tmp_path):
        args = self.arguments(tmp_path, **{name: 0.4})
        check_noise(args, has_sources=True, has_copies=True)
        with pytest.raises(ConfigError, match=f"{name}=0.4 is not read: only the reader of a stream"):
            check_noise(args, has_sources=False, has_copies=False)
        with pytest.raises(ConfigError, match=f"{name}=0.4 is not read: train_scope delta"):
            check_noise(self.arguments(tmp_path, train_scope="delta", **{name: 0.4}), True, True)

    @pytest.mark.parametrize("name", ["copy_fidelity", "copy_share"])
    def test_stored_states_have_no_copies(self, name, tmp_path):
        with pytest.raises(ConfigError, match=f"{name}=0.4 is not read: stored states"):
            check_noise(self.arguments(tmp_path, **{name: 0.4}), has_sources=True, has_copies=False)

    def test_noise_of_copies_needs_copies(self, tmp_path):
        with pytest.raises(ConfigError, match="copy_fidelity=0.6 is not read: copy_share 0"):
            check_noise(self.arguments(tmp_path, copy_fidelity=0.6, copy_share=0.0), True, True)

    def test_a_trainer_refuses_it(self, tmp_path):
        with pytest.raises(ConfigError, match="consistency=0.5 is not read"):
            make_trainer(tmp_path, consistency=0.5)
