"""Hyperparameter search (--do_search): each trial runs the same command with values that Optuna chooses.

The search writes everything to --output_dir: ``search.db`` (Optuna's SQLite storage), ``search.json`` and
``search.html`` (the trials and Optuna's plots), and at the end the run with the best values.

Giving the same command again resumes a search that was stopped. Giving it in a second process shares the trials. A
trial holds a file lock while it runs, and the operating system releases the lock when the process dies. So a killed
trial is detected at once and marked as failed, and another trial tries its values again.
"""

import argparse
import importlib.util
import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from modeling_unihyperlora import AdapterFileError, BudgetError, ConfigError, UniHyperLoraConfig, UniHyperLoraError

from .arguments import check_arguments, parse
from .baselines import BASELINES
from .results import require_unused
from .run_config import read_run_config, searchable_keys
from .running import Task, run, set_up_logging
from .search_space import (
    DELTA_SPACE,
    INJECTED_FLAGS,
    PAPER_SPACE,
    READER_FLAGS,
    SHAPE_FLAGS,
    STREAM_FLAGS,
    TASK_SPACE,
    Knob,
    knobs_of,
    seed_of_draw,
)

if missing := [name for name in ("optuna", "plotly") if importlib.util.find_spec(name) is None]:
    raise ConfigError(f"--do_search needs {' and '.join(missing)}, not installed: pip install 'unihyperlora[search]'.")
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from .search_report import write_report

logger = logging.getLogger(__name__)

STORAGE_NAME = "search.db"
N_TRIALS = 25
RANDOM_TRIALS = 8  # after these the sampler and the pruner use the scores of earlier trials
BUDGETS = (("adapter_bytes", "max_adapter_bytes"), ("flops_overhead_pct", "max_flops_overhead_pct"))
CHANGEABLE = {  # arguments that may change when a search is resumed
    *("do_search", "n_trials", "output_dir", "logging_dir", "run_name", "disable_tqdm", "log_level", "token"),
    *("hub_token", "push_to_hub", "do_predict", "overwrite_output_dir", "dataloader_num_workers"),
}
# These errors end a trial but not the search. Torch raises RuntimeError when memory runs out.
TRIAL_ERRORS = (RuntimeError, MemoryError, FloatingPointError, ConfigError, AdapterFileError)


class TrialFailed(RuntimeError):
    """A trial produced no score."""


class UnknownMetric(UniHyperLoraError):
    """No run reports the metric of the search, so further trials would be useless."""


@dataclass(frozen=True)
class Search:
    """The settings of a search.

    Attributes:
        task: kind of task.
        typed: command-line arguments of every trial, without the hyperparameters.
        folder: --output_dir.
        knobs: hyperparameters that are varied.
        metric: name of the score in all_results.json.
        directions: direction of the score and, if bytes are an objective, of the bytes.
        n_trials: total number of trials.
        seed: random seed of the sampler.
        budget: figure of all_results.json → largest allowed value.
        facts: settings that must not change when the search is resumed.
    """

    task: Task
    typed: list[str]
    folder: Path
    knobs: list[Knob]
    metric: str
    directions: list[str]
    n_trials: int
    seed: int
    budget: dict[str, float]
    facts: dict[str, object]

    def command_line(self, values: dict[str, object]) -> list[str]:
        """Command line of a run with these values of the hyperparameters."""
        return self.typed + [part for knob in self.knobs for part in knob.typed(values[knob.name])]

    def lock(self, name: str) -> FileLock:
        """A lock that one process holds at a time; the operating system releases it when the process dies."""
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "locks" / name)

    def folder_of(self, trial: Trial | FrozenTrial) -> Path:
        """Output folder of a trial; it is deleted when the trial ends."""
        return self.folder / "trials" / f"{trial.number:04d}"


def search(task: Task, typed: list[str]) -> dict[str, object]:
    """Run all trials, then train with the best values into the output folder.

    Returns:
        The content of the final run's ``all_results.json``.

    Raises:
        ConfigError: no run reads a hyperparameter, a range is unusable, the folder holds another search, or no trial
            has a score within the budget.
    """
    plan = plan_of(task, typed)
    study = _open(plan)
    while (started := _next_trial(plan, study)) is not None:
        trial, values, lock = started
        try:
            _run_trial(plan, study, trial, values)
        finally:
            lock.release()
    with plan.lock("best"):  # one process trains the best values, the others wait
        best = _best(plan, study)
        write_report(plan.folder, study, best, plan.metric)
        results_file = plan.folder / "all_results.json"
        if study.user_attrs.get("trained") == best.number and results_file.is_file():
            return json.loads(results_file.read_text(encoding="utf-8"))
        logger.info("Best: trial %d, %s %s, %s", best.number, plan.metric, best.values[0], best.params)
        values = {knob.name: best.params[knob.name] for knob in plan.knobs}
        results = run(task, [*plan.command_line(values), "--overwrite_output_dir", "true"])  # replaces an earlier best
        study.set_user_attr("trained", best.number)
    return results


# ---- the settings ----


def plan_of(task: Task, typed: list[str]) -> Search:
    """Settings of the search that the command line and its run config ask for; writes nothing.

    Raises:
        ConfigError
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--do_search", "--do-search", nargs="?")
    own.add_argument("--n_trials", "--n-trials")
    _, rest = own.parse_known_args(typed)
    n_trials = parse(typed, task.arguments)[0].n_trials
    rest += ["--do_train", "true", "--do_eval", "true"]
    model_args, data_args, training_args = parse(rest, task.arguments)
    check_arguments(model_args, data_args, training_args)
    if not model_args.overwrite_output_dir and not (Path(training_args.output_dir) / STORAGE_NAME).exists():
        require_unused(training_args.output_dir)
    if training_args.world_size > 1:
        raise ConfigError(
            "A search cannot be launched on several processes. Start the same command several times instead, with the "
            "same --output_dir: the processes share the trials."
        )
    if training_args.resume_from_checkpoint is not None:
        raise ConfigError("A search resumes by itself where it stopped; leave --resume_from_checkpoint out.")
    set_up_logging(training_args, task.script)

    block = (read_run_config(model_args.run_config).search if model_args.run_config else None) or {}
    n_trials = block.get("n_trials", N_TRIALS) if n_trials is None else n_trials
    if n_trials < 1:
        raise ConfigError(f"n_trials={n_trials} is not allowed; give 1 or more.")
    knobs = _knobs(block.get("search_space"), rest, model_args, data_args, training_args)
    for knob in knobs:
        for value in knob.some_values():  # checks that each value is usable
            chosen = parse(rest + knob.typed(value), task.arguments)
            check_arguments(*chosen)
            if chosen[0].method == "unihyperlora" and chosen[0].adapter is None:
                UniHyperLoraConfig(**chosen[0].shape())
    directions = [block.get("direction", "maximize")]
    if "bytes" in block.get("objectives", []):
        if model_args.method in ("full", "probe"):
            raise ConfigError(
                f"--method {model_args.method} has no adapter, so its bytes cannot be an objective. Leave 'bytes' out."
            )
        directions.append("minimize")
    facts = vars(model_args) | vars(data_args) | training_args.to_sanitized_dict()
    facts = {name: value for name, value in facts.items() if name not in CHANGEABLE}
    metric = block.get("metric", "eval_f1")
    facts |= {"search_space": {knob.name: knob.space for knob in knobs}, "metric": metric, "directions": directions}
    return Search(
        task=task,
        typed=rest,
        folder=Path(training_args.output_dir),
        knobs=knobs,
        metric=metric,
        directions=directions,
        n_trials=n_trials,
        seed=training_args.seed,
        budget={figure: limit for figure, most in BUDGETS if (limit := getattr(training_args, most)) is not None},
        facts=json.loads(json.dumps(facts, default=str)),
    )


def _default_space(model_args, training_args) -> dict:
    """The search space to use when the run config gives none."""
    if model_args.method in BASELINES:
        return {name: PAPER_SPACE[name] for name in ("learning_rate", "batch_size")}
    if training_args.train_scope == "delta":
        return DELTA_SPACE
    if model_args.makes_stream:
        return TASK_SPACE
    return PAPER_SPACE


def _knobs(space: dict | None, typed: list[str], model_args, data_args, training_args) -> list[Knob]:
    """Hyperparameters to search: from the run config or the method's defaults, without those on the command line."""
    where, method = model_args.run_config or "--do_search", model_args.method
    if space is None:
        space = _default_space(model_args, training_args)
    knobs = knobs_of(space, searchable_keys(method), method, where)
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in typed if word.startswith("--")}
    fixed = [knob.name for knob in knobs if knob.flag in given]
    if fixed:
        logger.info("Not searched, because the command line sets it: %s", ", ".join(fixed))
    knobs = [knob for knob in knobs if knob.name not in fixed]
    if not knobs:
        raise ConfigError(
            f"{where}: nothing is left to search. Leave out the flags of the hyperparameters that are to be searched."
        )
    for knob in knobs:
        if why := _unread(knob.flag, model_args, data_args, training_args):
            raise ConfigError(f"{where}: this run ignores 'optuna.search_space.{knob.name}': {why}. Leave it out.")
    return knobs


def _unread(flag: str, model_args, data_args, training_args) -> str | None:
    """Why this run would ignore a flag of the adapter; None if no reason is known before the run."""
    adapter = model_args.adapter is not None
    if adapter and flag in SHAPE_FLAGS:
        return "--adapter fixes it"
    if flag in READER_FLAGS and adapter and data_args.task_name is None:
        return "--adapter fixes it, unless --task_name names a new task"
    if flag in ("fidelity", "reader_learning_rate", *READER_FLAGS) and training_args.train_scope == "delta":
        return "it is for --train_scope task"
    if flag in STREAM_FLAGS and not adapter and not model_args.makes_stream:
        return "it is for --pathway stream"
    if flag in INJECTED_FLAGS and model_args.makes_stream:
        return "it is for --pathway inject"
    return None


def _open(plan: Search) -> optuna.Study:
    """Open the study in the output folder, or create it.

    Raises:
        ConfigError: the folder holds a search with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with plan.lock("next"):
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{plan.folder / STORAGE_NAME}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        # Optuna cannot prune with two objectives.
        pruner = optuna.pruners.MedianPruner(RANDOM_TRIALS) if len(plan.directions) == 1 else None
        try:
            study = optuna.load_study(study_name="search", storage=storage, pruner=pruner)
        except KeyError:
            study = optuna.create_study(
                study_name="search", storage=storage, directions=plan.directions, pruner=pruner
            )
        known = study.user_attrs.get("search")
        if known is None:
            study.set_user_attr("search", plan.facts)
        elif known != plan.facts:
            differ = sorted(n for n in {*known, *plan.facts} if known.get(n) != plan.facts.get(n))
            raise ConfigError(
                f"{plan.folder} holds another search; it differs in {', '.join(differ)}. Give the same command to "
                "resume that search, or another --output_dir."
            )
    return study


# ---- trials ----


def _next_trial(plan: Search, study: optuna.Study) -> tuple[Trial, dict[str, object], FileLock] | None:
    """Start a trial: returns the trial, its values and the lock it holds; None when all trials have ended."""
    while True:
        with plan.lock("next"):
            _fail_killed_trials(plan, study)
            trials = study.get_trials(deepcopy=False)
            running = sum(trial.state == TrialState.RUNNING for trial in trials)
            ended = sum(map(_has_ended, trials))
            if ended >= plan.n_trials:
                return None
            if ended + running < plan.n_trials:
                seed = seed_of_draw(plan.seed, len(trials))
                study.sampler = optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=RANDOM_TRIALS, constant_liar=True
                )
                trial = study.ask()
                lock = plan.lock(f"trial-{trial.number}")
                lock.acquire()
                return trial, {knob.name: knob.suggest(trial) for knob in plan.knobs}, lock
        time.sleep(1)  # the last trials run in other processes


def _has_ended(trial: FrozenTrial) -> bool:
    """Whether a trial counts as done; a killed trial does not, since another trial repeats it."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "error" in trial.user_attrs


def _fail_killed_trials(plan: Search, study: optuna.Study) -> None:
    """Mark trials whose process died as failed. Retry each only once: its own values may have killed the process."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            with plan.lock(f"trial-{trial.number}").acquire(blocking=False):
                pass
        except Timeout:
            continue
        logger.warning("Trial %d was killed before it ended", trial.number)
        shutil.rmtree(plan.folder_of(trial), ignore_errors=True)
        if "again" in trial.user_attrs:
            study._storage.set_trial_user_attr(trial._trial_id, "error", "its process was killed, twice")
        elif len(trial.params) == len(plan.knobs):
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
        study.tell(trial.number, state=TrialState.FAIL)


def _run_trial(plan: Search, study: optuna.Study, trial: Trial, values: dict[str, object]) -> None:
    """Run a trial and tell the study how it ended."""
    logger.info("Trial %d: %s", trial.number, values)
    folder = plan.folder_of(trial)
    typed = plan.command_line(values) + [
        "--output_dir",
        str(folder),
        "--do_predict",
        "false",
        "--push_to_hub",
        "false",
    ]
    if not parse(typed, plan.task.arguments)[2].load_best_model_at_end:
        typed += ["--save_strategy", "no"]
    try:
        results = run(plan.task, typed, callbacks=[Watch(trial, plan.metric, prunes=len(plan.directions) == 1)])
        score = _score(plan, results)
    except BudgetError as error:  # infeasible; the sampler treats this differently from a bad score
        for name, excess in error.excess.items():
            trial.set_constraint(name, excess)
        trial.set_user_attr("over_budget", str(error))
        study.tell(trial, state=TrialState.PRUNED)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except TRIAL_ERRORS as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        logger.warning("Trial %d failed. %s", trial.number, reason)
        trial.set_user_attr("error", reason)
        study.tell(trial, state=TrialState.FAIL)
    else:
        for figure, most in plan.budget.items():
            if results.get(figure) is not None:
                trial.set_constraint(figure, results[figure] - most)
        trial.set_user_attr(
            "results", {name: results.get(name) for name in (plan.metric, "adapter_bytes", "train_runtime")}
        )
        study.tell(trial, [score] if len(plan.directions) == 1 else [score, results["adapter_bytes"]])
        logger.info("Trial %d: %s %s", trial.number, plan.metric, score)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _score(plan: Search, results: dict[str, object]) -> float:
    if plan.metric not in results:
        known = ", ".join(sorted(name for name in results if name.startswith("eval_")))
        raise UnknownMetric(f"optuna.metric is {plan.metric}, which no run reports; it reports {known}. Choose one.")
    if results[plan.metric] is None or results["eval_loss"] is None:
        raise TrialFailed(f"{plan.metric} {results[plan.metric]}, eval_loss {results['eval_loss']}: not a number")
    return float(results[plan.metric])


class Watch(TrainerCallback):
    """Reports each evaluation's score to the trial; stops a trial that is below the median or whose loss is NaN."""

    def __init__(self, trial: Trial, metric: str, prunes: bool):
        self.trial, self.metric, self.prunes = trial, metric, prunes
        self.reported = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm", "eval_loss"):
            if math.isnan((logs or {}).get(name, 0.0)):
                raise TrialFailed(f"{name} is not a number at step {state.global_step}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        score = (metrics or {}).get(self.metric)
        if (
            not self.prunes
            or score is None
            or state.global_step <= self.reported
            or state.global_step >= state.max_steps
        ):
            return
        self.reported = state.global_step
        self.trial.report(float(score), state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned()


def _best(plan: Search, study: optuna.Study) -> FrozenTrial:
    """The trial with the best score within the budget; with two objectives, the best score on the Pareto front."""
    trials = study.get_trials(deepcopy=False)
    found = study.best_trials
    if not found:
        reasons = [trial.user_attrs.get("error") or trial.user_attrs.get("over_budget") for trial in trials]
        last = next((reason for reason in reversed(reasons) if reason), "")
        raise ConfigError(
            f"None of the {len(trials)} trials has a score within the budget. Raise the budget or change the search "
            f"space. The last trial: {last}"
        )
    sign = 1 if plan.directions[0] == "maximize" else -1
    return max(found, key=lambda trial: (sign * trial.values[0], -trial.number))
