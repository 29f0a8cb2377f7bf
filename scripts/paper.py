"""The runs of the paper's comparison: a set of run configs, each with several seeds, none done twice.

    python scripts/benchmark.py paper hub_configs/runs/*-iter1-sst2*.yaml --source hub_configs/runs/SOURCE.yaml \
        --seeds 0 1 2 --output_dir runs/paper

A config that tunes δθ starts from the adapter of --source, trained with the same seed; every other config starts
anew. What ``evaluation.metric`` says decides the script: seqeval is run_ner.py, any other run_classification.py. Flags
that are not of this command go to all runs. A finished run is not done again as long as its flags, its config and its
local files are the same, so the same command continues an interrupted benchmark.
"""

import argparse
import logging
from pathlib import Path

from modeling_unihyperlora import ConfigError
from trainers.results import require_writable
from trainers.run_config import RunConfig, read_run_config
from transfer import digest_of
from transfer_plan import Cell, Runner, flag_name

SCRIPTS = {True: "run_ner", False: "run_classification"}  # by whether the metric is seqeval
SET_HERE = ("run_config", "seed", "output_dir", "adapter", "do_train", "do_eval", "method", "train_scope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", help="Run configs: YAML files in the paper's schema.")
    parser.add_argument("--source", help="The run config whose adapter those that tune δθ start from.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Where each run gets a folder of its own.")


def run_all(args: argparse.Namespace, passed: list[str]) -> list[Path]:
    """Do the runs that are missing.

    Returns:
        The folder of every run, by config and seed.

    Raises:
        UniHyperLoraError: bad input before the first run, or a run that fails; finished runs are kept.
    """
    paths = dict.fromkeys(args.configs)
    configs = {path: read_run_config(path) for path in [*paths, *([args.source] if args.source else [])]}
    check(args, configs, passed)
    files = [part for part in passed if Path(part).is_file()]
    digests = {path: digest_of(path) for path in [*configs, *files]}
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("transfer").setLevel(logging.INFO)  # where the Runner says what it does
    folders = []
    for path in paths:
        for seed in dict.fromkeys(args.seeds):
            runner = Runner(args.output_dir, SCRIPTS[configs[path].metric == "seqeval"], digests)
            cell = cell_of(path, configs, args.source, seed, passed)
            runner.run(cell)
            folders.append(args.output_dir / cell.name)
    return folders


def cell_of(path: str, configs: dict[str, RunConfig], source: str | None, seed: int, passed: list[str]) -> Cell:
    """One run of a config; before a δθ run comes that of the source with the same seed."""
    config = configs[path]
    tunes = config.arguments.get("train_scope") == "delta"
    flags = ("--run_config", path, "--do_train", "--do_eval", "--seed", str(seed), "--save_strategy", "no", *passed)
    before = cell_of(source, configs, None, seed, passed) if tunes and source else None
    return Cell(f"{config.run_id}-s{seed}", flags, before, keep_weights=config.arguments["method"] != "full")


def check(args: argparse.Namespace, configs: dict[str, RunConfig], passed: list[str]) -> None:
    """What can be refused before a run.

    Raises:
        ConfigError
    """
    for part in passed:
        if part.startswith("--") and flag_name(part) in SET_HERE:
            raise ConfigError(f"{part} is chosen by this command for each run; leave it out.")
    if args.source and configs[args.source].arguments.get("train_scope") != "source":
        raise ConfigError(
            f"--source {args.source} trains no universal adapter (method unihyperlora, train_bias_delta_only false), "
            "so none can start from it. Give the config of the source training."
        )
    names: dict[str, str] = {}
    for path, config in configs.items():
        if path != names.setdefault(config.run_id, path):
            raise ConfigError(f"{names[config.run_id]} and {path} have the same run_id {config.run_id}; rename one.")
        if config.arguments.get("train_scope") == "delta":
            if args.source is None:
                raise ConfigError(f"{path} tunes δθ of an adapter that exists; give its source training as --source.")
            if configs[args.source].metric != config.metric:
                raise ConfigError(f"{path} and --source {args.source} are of different kinds of task; run them apart.")
    require_writable(args.output_dir)
