"""``trainer.hyperparameter_search`` of an adapter: searches the paper's space and refuses names that no run reads."""

from modeling_unihyperlora.errors import BudgetError, ConfigError

from .interruption import SafeTrainer
from .search_space import ADAPTER_FLAGS, PAPER_SPACE, TRAINING_FLAGS, Knob, knobs_of, seed_of_draw
from .training_args import UniHyperLoraTrainingArguments

PAPER_ARGUMENTS = {  # training argument → its name in the paper's space
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "lambda_f": "lambda_F",
    "lambda_q": "lambda_Q",
}


class SearchableTrainer(SafeTrainer):
    """A ``Trainer`` whose ``hyperparameter_search`` varies only arguments that an adapter's trainer reads."""

    def hyperparameter_search(
        self,
        hp_space=None,
        compute_objective=None,
        n_trials: int = 25,
        direction: str | list[str] | None = None,
        backend: str = "optuna",
        **kwargs,
    ):
        """Search training arguments with Optuna; otherwise as ``Trainer.hyperparameter_search``.

        To vary a hyperparameter of the adapter (atoms, router_top_k …), ask the trial for it in ``model_init(trial)``.
        A stream with ``sources`` cannot be searched here; use ``--do_search``.

        Args:
            hp_space: trial → values of training arguments; by default the paper's ranges.
            compute_objective: metrics → score; by default ``eval_f1``, or ``eval_loss`` if the Trainer has no
                ``compute_metrics``.
            n_trials: total number of trials; with ``storage`` and ``study_name`` it includes those of earlier calls.
            direction: "maximize" or "minimize"; by default the loss is minimised and any other score maximised.
            backend: "optuna".
            **kwargs: passed to ``optuna.create_study`` and ``Study.optimize``. By default a trial that runs out of
                memory is recorded as failed and the search continues; ``catch`` changes this.

        Raises:
            ConfigError: Optuna is not installed, a name is not a training argument that a run reads, or nothing
                scores the trials.
        """
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("A search needs Optuna, not installed: pip install 'unihyperlora[search]'.") from error
        if backend != "optuna":
            raise ConfigError(f"backend={backend!r} is not supported; use 'optuna'.")
        if self.eval_dataset is None:
            raise ConfigError("A search scores its trials on eval_dataset; give the Trainer one.")
        by_loss = compute_objective is None and self.compute_metrics is None
        if by_loss and direction == "maximize":
            raise ConfigError(
                "Without compute_metrics the loss scores the trials, and a loss must not be maximised. Give the "
                "Trainer compute_metrics, or leave direction out."
            )
        if direction is None:
            direction = "minimize" if by_loss else "maximize"
        before = 0
        if kwargs.get("storage") is not None and kwargs.get("study_name") is not None:
            kwargs = {"load_if_exists": True} | kwargs
            known = optuna.get_all_study_names(kwargs["storage"])
            if kwargs["study_name"] in known:
                before = len(optuna.load_study(study_name=kwargs["study_name"], storage=kwargs["storage"]).trials)
        if "sampler" not in kwargs:
            kwargs["sampler"] = optuna.samplers.TPESampler(seed=seed_of_draw(self.args.seed, before))
        return super().hyperparameter_search(
            hp_space=hp_space or _paper_space,
            compute_objective=compute_objective or (_loss if by_loss else _f1),
            n_trials=max(0, n_trials - before),
            direction=direction,
            backend=backend,
            **({"catch": (RuntimeError, MemoryError)} | kwargs),
        )

    def call_model_init(self, trial=None):
        """Make a new model; if it is over budget, mark the trial as infeasible."""
        model = super().call_model_init(trial)
        try:
            self.make_ready(model)
        except BudgetError as error:
            if trial is None:
                raise
            import optuna

            for name, excess in error.excess.items():
                trial.set_constraint(name, excess)
            raise optuna.TrialPruned(str(error)) from error
        model.config.tasks[model.config.active_task]["trained"] = True  # as in the saved adapter
        return model

    def make_ready(self, model) -> None:
        """Check a model and prepare it for training."""

    def _hp_search_setup(self, trial) -> None:
        if self.hp_search_backend is not None and trial is not None:
            fields = UniHyperLoraTrainingArguments.__dataclass_fields__
            flags = [name for name in (*TRAINING_FLAGS, *ADAPTER_FLAGS) if name in fields]
            unread = [name for name in self.hp_space(trial) if name not in flags]
            if unread:
                raise ConfigError(
                    f"hp_space gives {unread[0]}, which no trainer reads. It may give: {', '.join(flags)}. Vary a "
                    "hyperparameter of the adapter in model_init(trial)."
                )
        super()._hp_search_setup(trial)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["eval_loss"]


def _f1(metrics: dict[str, float]) -> float:
    if "eval_f1" not in metrics:
        known = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
        raise ConfigError(
            f"eval_f1 scores the trials, but compute_metrics returns only {known}. Give compute_objective, such as "
            "lambda metrics: metrics['eval_accuracy']."
        )
    return metrics["eval_f1"]


def _paper_space(trial) -> dict[str, object]:
    space = {argument: PAPER_SPACE[name] for argument, name in PAPER_ARGUMENTS.items()}
    knobs: list[Knob] = knobs_of(space, {}, "unihyperlora", "hyperparameter_search")
    return {knob.name: knob.suggest(trial) for knob in knobs}
