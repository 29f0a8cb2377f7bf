"""trainer.hyperparameter_search: total trials over several calls, allowed names, and a new model for each trial."""

import optuna
import pytest
import torch
from transformers import BertConfig, BertModel

from modeling_unihyperlora import ConfigError, UniHyperLoraConfig, UniHyperLoraForTokenClassification
from trainers import UniHyperLoraTrainer, UniHyperLoraTrainingArguments


def make_model(trial=None):
    torch.manual_seed(99)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    host = BertModel(BertConfig(vocab_size=40, **shape), add_pooling_layer=False)
    atoms = 8 if trial is None else trial.suggest_categorical("atoms", [8, 4000])
    config = UniHyperLoraConfig(pathway="inject", atoms=atoms, anchor_dim=8, mixer_hidden=4)
    return UniHyperLoraForTokenClassification.from_host(host, labels=["O", "B-A"], task="ner", config=config)


def f1_of(prediction) -> dict[str, float]:
    return {"f1": float((prediction.predictions.argmax(-1) == 1).mean())}


@pytest.fixture
def trainer(tmp_path, request):
    generator = torch.Generator().manual_seed(0)
    row = lambda: {  # noqa: E731
        "input_ids": torch.randint(0, 40, (6,), generator=generator),
        "attention_mask": torch.ones(6).long(),
        "labels": torch.randint(0, 2, (6,), generator=generator),
    }
    arguments = UniHyperLoraTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        save_strategy="no",
        max_flops_overhead_pct=1e6,
        max_adapter_bytes=100_000,
    )
    data = [row() for _ in range(8)]
    settings = {"eval_dataset": data, "compute_metrics": f1_of} | getattr(request, "param", {})
    return UniHyperLoraTrainer(
        model_init=make_model,
        args=arguments,
        train_dataset=data,
        **settings,
    )


def test_it_goes_on_to_the_total(trainer, tmp_path):
    where = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "study_name": "s"}
    trainer.hyperparameter_search(n_trials=3, **where)
    best = trainer.hyperparameter_search(n_trials=6, **where)
    trials = optuna.load_study(**where).trials
    assert len(trials) == 6
    assert len({trial.params.get("learning_rate", trial.number) for trial in trials}) == 6
    over = [trial for trial in trials if trial.params["atoms"] == 4000]
    assert over and all(trial.state.name == "PRUNED" and trial.constraints["bytes"] > 0 for trial in over)
    fine = [trial for trial in trials if trial not in over]
    assert fine and {trial.state.name for trial in fine} == {"COMPLETE"}
    assert best.objective == max(trial.value for trial in fine)
    assert set(fine[0].params) == {"atoms", "learning_rate", "per_device_train_batch_size", "lambda_f", "lambda_q"}


def test_a_name_that_nothing_reads(trainer):
    with pytest.raises(ConfigError, match="hp_space gives learning_rat, which no trainer reads"):
        trainer.hyperparameter_search(hp_space=lambda trial: {"learning_rat": trial.suggest_float("x", 0, 1)})


def test_sources_need_a_run_of_their_own(trainer):
    with pytest.raises(ConfigError, match="--do_search"):
        UniHyperLoraTrainer(model_init=make_model, args=trainer.args, sources=[object()])


def rates(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1)}


@pytest.mark.parametrize("trainer", [{"compute_metrics": None}], indirect=True)
def test_without_metrics_the_loss_is_what_is_minimised(trainer, tmp_path):
    trainer.model_init = lambda trial=None: make_model()
    where = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "study_name": "s"}
    best = trainer.hyperparameter_search(hp_space=rates, n_trials=2, **where)
    study = optuna.load_study(**where)
    assert study.direction.name == "MINIMIZE"
    assert best.objective == min(trial.value for trial in study.trials) > 0
    with pytest.raises(ConfigError, match="must not be maximised"):
        trainer.hyperparameter_search(direction="maximize")


@pytest.mark.parametrize("trainer", [{"compute_metrics": lambda _: {"accuracy": 0.5}}], indirect=True)
def test_metrics_without_f1(trainer):
    trainer.model_init = lambda trial=None: make_model()
    with pytest.raises(ConfigError, match="eval_f1 scores the trials, but compute_metrics returns only eval_accuracy"):
        trainer.hyperparameter_search(hp_space=rates, n_trials=1)


@pytest.mark.parametrize("trainer", [{"eval_dataset": None}], indirect=True)
def test_nothing_to_score_trials_on(trainer):
    with pytest.raises(ConfigError, match="give the Trainer one"):
        trainer.hyperparameter_search(n_trials=1)
