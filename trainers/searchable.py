"""``trainer.hyperparameter_search`` of an adapter: the paper's space, a total of trials, no unread name."""

from modeling_unihyperlora.errors import BudgetError, ConfigError

from .interruption import SafeTrainer
from .search_space import ADAPTER_FLAGS, PAPER_SPACE, TRAINING_FLAGS, Knob, knobs_of, seed_of_draw
from .training_args import UniHyperLoraTrainingArguments

PAPER_ARGUMENTS = {  # training argument → its name in the paper's space; router_top_k is a knob of the adapter
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "lambda_f": "lambda_F",
    "lambda_q": "lambda_Q",
}


class SearchableTrainer(SafeTrainer):
    """A ``Trainer`` whose ``hyperparameter_search`` keeps to what an adapter's trainer reads."""

    def hyperparameter_search(
        self,
        hp_space=None,
        compute_objective=None,
        n_trials: int = 25,
        direction: str | list[str] | None = None,
        backend: str = "optuna",
        **kwargs,
    ):
        """As ``Trainer.hyperparameter_search``, on Optuna.

        It varies training arguments. An adapter knob (atoms, router_top_k …) is varied by a ``model_init(trial)`` that
        asks the trial for it. A stream with ``sources`` is not searched here; ``--do_search`` does it.

        Args:
            hp_space: trial → values of training arguments; the paper's ranges if None.
            compute_objective: metrics → score. If None ``eval_f1``, or ``eval_loss`` of a Trainer without
                ``compute_metrics``.
            n_trials: in all; with ``storage`` and ``study_name``, those of earlier calls are among them.
            direction: "maximize" or "minimize"; if None the loss is minimised and anything else maximised.
            backend: Optuna.
            **kwargs: those of ``optuna.create_study`` and ``Study.optimize``. A trial that fails for want of memory
                is recorded and survived unless ``catch`` says otherwise.

        Raises:
            ConfigError: Optuna is not installed, a name is no training argument that a run reads, or there is
                nothing to score trials by.
        """
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("A search needs Optuna, not installed: pip install 'unihyperlora[search]'.") from error
        if backend != "optuna":
            raise ConfigError(f"backend={backend!r} is not there; a search runs on 'optuna'.")
        if self.eval_dataset is None:
            raise ConfigError("A search scores its trials on eval_dataset; give the Trainer one.")
        by_loss = compute_objective is None and self.compute_metrics is None
        if by_loss and direction == "maximize":
            raise ConfigError(
                "Without compute_metrics trials are scored by their loss, which is not to be maximised. Give the "
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
        """A fresh model; one over budget makes the trial infeasible."""
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
        model.config.tasks[model.config.active_task]["trained"] = True  # as it will be before it is saved
        return model

    def make_ready(self, model) -> None:
        """Check and set up a model that is to be trained."""

    def _hp_search_setup(self, trial) -> None:
        if self.hp_search_backend is not None and trial is not None:
            fields = UniHyperLoraTrainingArguments.__dataclass_fields__
            flags = [name for name in (*TRAINING_FLAGS, *ADAPTER_FLAGS) if name in fields]
            unread = [name for name in self.hp_space(trial) if name not in flags]
            if unread:
                raise ConfigError(
                    f"hp_space gives {unread[0]}, which no trainer reads. It may give: {', '.join(flags)}. A knob of "
                    "the adapter is for model_init(trial)."
                )
        super()._hp_search_setup(trial)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["eval_loss"]


def _f1(metrics: dict[str, float]) -> float:
    if "eval_f1" not in metrics:
        known = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
        raise ConfigError(
            f"Trials are scored by eval_f1, which compute_metrics does not give; there are {known}. Give "
            "compute_objective, such as lambda metrics: metrics['eval_accuracy']."
        )
    return metrics["eval_f1"]


def _paper_space(trial) -> dict[str, object]:
    space = {argument: PAPER_SPACE[name] for argument, name in PAPER_ARGUMENTS.items()}
    knobs: list[Knob] = knobs_of(space, {}, "unihyperlora", "hyperparameter_search")
    return {knob.name: knob.suggest(trial) for knob in knobs}
