"""Report of a search: ``search.json``, and ``search.html`` with Optuna's plots, which opens without a network."""

import html
import logging
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from modeling_unihyperlora.storage import replacing, write_json

logger = logging.getLogger(__name__)


def write_report(folder: Path, study: optuna.Study, best: FrozenTrial, metric: str) -> None:
    """Write ``search.json`` and ``search.html``.

    Args:
        folder: folder of the search.
        study: needs at least one trial with a score.
        best: the best trial.
        metric: name of the score, the first value of each trial.
    """
    trials = study.get_trials(deepcopy=False)
    content = {
        "metric": metric,
        "directions": [direction.name.lower() for direction in study.directions],
        "best": best.number,
        "best_params": best.params,
        "front": [trial.number for trial in study.best_trials],
        "importances": _importances(study),
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "values": trial.values if trial.state.name == "COMPLETE" else None,
                "params": trial.params,
                "seconds": trial.duration and trial.duration.total_seconds(),
                "over_budget": {name: over for name, over in trial.constraints.items() if over > 0},
                **{name: trial.user_attrs[name] for name in ("error", "again") if name in trial.user_attrs},
            }
            for trial in trials
        ],
    }
    write_json(folder / "search.json", content)
    figures = _figures(study, metric)
    parts = [figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)]
    title = f"{len(trials)} trials, best {metric} {best.values[0]:.4f} in trial {best.number}"
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in best.params.items())
    page = f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1><table>{rows}</table>"
    with replacing(folder / "search.html") as temporary:
        Path(temporary).write_text(page + "".join(parts), encoding="utf-8")


def _importances(study: optuna.Study) -> dict[str, float]:
    """Share of the score's variance that each hyperparameter explains (fANOVA); empty with too few scores."""
    several = len(study.directions) > 1
    try:
        return optuna.importance.get_param_importances(study, target=(lambda t: t.values[0]) if several else None)
    except (ValueError, RuntimeError) as error:
        logger.info("No importances: %s", error)
        return {}


def _figures(study: optuna.Study, metric: str) -> list:
    """Optuna's plots; a plot that needs more trials is left out."""
    plots = optuna.visualization
    several = len(study.directions) > 1
    score = {"target": lambda trial: trial.values[0], "target_name": metric} if several else {"target_name": metric}
    wanted = [
        lambda: plots.plot_optimization_history(study, **score),
        lambda: plots.plot_param_importances(study, **score),
        lambda: plots.plot_parallel_coordinate(study, **score),
        lambda: plots.plot_slice(study, **score),
        lambda: plots.plot_timeline(study),
    ]
    if several:
        wanted.insert(0, lambda: plots.plot_pareto_front(study, target_names=[metric, "bytes"]))
    else:
        wanted.insert(1, lambda: plots.plot_intermediate_values(study))
    figures = []
    for plot in wanted:
        try:
            figures.append(plot())
        except (ValueError, RuntimeError) as error:  # for example, importances need several trials
            logger.info("A plot is left out of search.html: %s", error)
    return figures
