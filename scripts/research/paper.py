"""The runs of the paper's comparison: run configs × hosts × seeds, each in a process of its own, none done twice.

    python -m scripts.research.benchmark paper {probe,lora,unihyperlora}-iter1-{sst2,boolq} --seeds 0 1 2 \
        --output_dir runs/paper --source unihyperlora-source-iter1-{sst2,boolq} --hosts distilbert-base-uncased

A config that tunes δθ starts from the adapter of that --source which is trained on the same data with the same seed;
every other config starts anew. What ``evaluation.metric`` says decides the script: seqeval is run_ner.py, any other
run_classification.py. Flags that are not of this command go to all runs. A finished run is not done again as long as
its flags, its config, its local files and the package's space are the same, so the same command continues an
interrupted benchmark. Where hosts and data are on this machine is said in a file (--local), so that no run config has
to be changed:

    hosts:                       # the name in a run config, or of --hosts → a folder
      microsoft/mpnet-base: /data/hosts/mpnet
    data:                        # dataset.name of a run config → its files
      sst2: {train: /data/sst2/train.jsonl, validation: /data/sst2/validation.jsonl}
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.space import PACKAGE_SPACE
from scripts.research.own_process import run_in_own_process
from scripts.research.runner import Cell, Runner, digest_of, flag_name, name_of, show_progress
from trainers.results import require_writable
from trainers.run_config import RunConfig, read_run_config
from trainers.tasks import CLASSIFICATION, NER

SET_HERE = (
    *("run_config", "seed", "output_dir", "adapter", "do_train", "do_eval", "method", "train_scope"),
    *("model_name_or_path", "refine_host", "train_file", "validation_file", "dataset_name", "learning_rate"),
)
FILES = ("train", "validation")  # splits that a run reads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", help="Run configs: names METHOD-iter1-DATASET, or YAML files.")
    what = "Run configs that train a task for all hosts; those that tune δθ start from the one of their data."
    parser.add_argument("--source", nargs="+", default=[], help=what)
    parser.add_argument("--hosts", nargs="+", help="Do every config on each of these hosts, in place of its own.")
    parser.add_argument("--local", type=Path, help="YAML file: where hosts and data are on this machine.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", help="Try these in place of the config's; runs of their own."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Where each run gets a folder of its own.")


@dataclass(frozen=True)
class Local:
    """Where things are on this machine: host → folder, data set → split → file."""

    hosts: dict[str, str]
    data: dict[str, dict[str, str]]

    def flags(self, config: RunConfig, host: str | None) -> list[str]:
        """What the command line of a run has to say of its host and data."""
        named = host or config.arguments.get("model_name_or_path")
        folder = self.hosts.get(named, host)
        flags = ["--model_name_or_path", folder] if folder else []
        if (source := config.arguments.get("refine_host")) in self.hosts:
            flags += ["--refine_host", self.hosts[source]]
        for split, file in self.data.get(config.arguments.get("task_name"), {}).items():
            flags += [f"--{split}_file", file]
        return flags


def run_all(args: argparse.Namespace, passed: list[str]) -> Iterator[tuple[Path, str]]:
    """Do the runs that are missing; gives the folder and the kind of each, also of those that were finished.

    The kind is "paper_rate" for a run with one of --learning_rates, and "paper" for any other, the source's too.

    Raises:
        UniHyperLoraError: bad input before the first run, or a run that fails; finished runs are kept.
    """
    paths = dict.fromkeys(args.configs)
    configs = {path: read_run_config(path) for path in [*paths, *args.source]}
    local = read_local(args.local)
    check(args, configs, passed)
    sources = {data_of(configs[path]): path for path in args.source}
    cells = [
        cell_of(path, configs, sources, host, rate, seed, local, passed)
        for host in dict.fromkeys(args.hosts or [None])
        for path in paths
        if path not in args.source  # which is trained on its own host where a run needs it
        for rate in dict.fromkeys(args.learning_rates or [None])
        for seed in dict.fromkeys(args.seeds)
    ]
    flags = [part for cell in cells for one in (cell, cell.source) if one for part in one.flags]
    digests = {part: digest_of(part) for part in dict.fromkeys(flags) if Path(part).is_file() and part not in configs}
    digests |= {path: said_by(config) for path, config in configs.items()}
    show_progress()
    runner = Runner(args.output_dir, "", digests, run_in_own_process)
    seen: set[str] = set()
    for cell in cells:
        runner.run(cell)
        for one in (cell.source, cell):
            if one is not None and one.name not in seen:
                seen.add(one.name)
                yield args.output_dir / one.name, "paper_rate" if one is cell and args.learning_rates else "paper"


def cell_of(
    path: str,
    configs: dict[str, RunConfig],
    sources: dict[str | None, str],
    host: str | None,
    rate: float | None,
    seed: int,
    local: Local,
    passed: list[str],
) -> Cell:
    """One run of a config; before one of δθ comes the source of its data and seed, on the source's own host."""
    config = configs[path]
    tunes = config.arguments.get("train_scope") == "delta"
    parts = [config.run_id, host and name_of(host), rate and f"lr{rate:g}", f"s{seed}"]
    name = "-".join(part for part in parts if part)
    flags = ["--run_config", path, *local.flags(config, host), "--do_train", "--do_eval", "--seed", str(seed)]
    flags += ["--save_strategy", "no", *(["--learning_rate", f"{rate:g}"] if rate else []), *passed]
    source = sources[data_of(config)] if tunes else None
    before = cell_of(source, configs, {}, None, None, seed, local, passed) if tunes else None
    script = (NER if config.metric == "seqeval" else CLASSIFICATION).script
    return Cell(name, tuple(flags), before, keep_weights=config.arguments["method"] != "full", script=script)


def data_of(config: RunConfig) -> str | None:
    """What a run config calls its data set."""
    return config.arguments.get("task_name")


def said_by(config: RunConfig) -> str:
    """A digest of what a run config says, its comments left out, and of the package's space where that is read."""
    said = [config.arguments, digest_of(str(PACKAGE_SPACE)) if config.arguments["method"] == "unihyperlora" else None]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_local(path: Path | None) -> Local:
    """Read the file of --local; relative paths in it are relative to the file.

    Raises:
        ConfigError: it is unreadable, has another form, or names what is not there.
    """
    if path is None:
        return Local({}, {})
    form = "It has hosts: {NAME: FOLDER} and data: {NAME: {train: FILE, validation: FILE}}."
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--local {path} cannot be read ({' '.join(str(error).split())}). {form}") from error
    if not isinstance(content, dict) or set(content) - {"hosts", "data"}:
        raise ConfigError(f"--local {path} is no such file. {form}")
    parts = [content.get(name) or {} for name in ("hosts", "data")]
    if not all(isinstance(part, dict) for part in [*parts, *parts[-1].values()]):
        raise ConfigError(f"--local {path}: hosts or data is no block of names. {form}")
    hosts, data = parts
    for name, files in data.items():
        if set(files) - {"test"} != set(FILES):
            raise ConfigError(f"--local {path}: data '{name}' has {', '.join(map(str, files)) or 'nothing'}. {form}")

    def here(given: str) -> str:
        found = path.parent / str(given)
        if not found.exists():
            raise ConfigError(f"--local {path} names {given}, which is not there. Correct the path.")
        return str(found)

    return Local(
        {name: here(folder) for name, folder in hosts.items()},
        {name: {split: here(file) for split, file in files.items()} for name, files in data.items()},
    )


def check(args: argparse.Namespace, configs: dict[str, RunConfig], passed: list[str]) -> None:
    """What can be refused before a run.

    Raises:
        ConfigError
    """
    if passed and not passed[0].startswith("-"):
        raise ConfigError(f"{passed[0]} stands behind a flag; run configs come first, before every flag.")
    for part in passed:
        if part.startswith("--") and flag_name(part) in SET_HERE:
            raise ConfigError(f"{part} is chosen by this command for each run; leave it out.")
    sources: dict[str | None, str] = {}
    for path in args.source:
        if configs[path].arguments.get("train_scope") != "task":
            raise ConfigError(
                f"--source {path} trains no universal adapter (method unihyperlora, train_bias_delta_only false), so "
                "none can start from it. Give the config of the source training."
            )
        if path != sources.setdefault(data_of(configs[path]), path):
            raise ConfigError(
                f"--source {sources[data_of(configs[path])]} and {path} train on the same data; give one of them."
            )
    names: dict[str, str] = {}
    for path, config in configs.items():
        if path != names.setdefault(config.run_id, path):
            raise ConfigError(f"{names[config.run_id]} and {path} have the same run_id {config.run_id}; rename one.")
        if config.arguments.get("train_scope") == "delta" and data_of(config) not in sources:
            raise ConfigError(
                f"{path} tunes δθ of an adapter that exists, whose reader was trained on the same data "
                f"({data_of(config)}); give its source training as --source."
            )
    hosts = [name_of(host) for host in dict.fromkeys(args.hosts or [])]
    if same := next((name for name in hosts if hosts.count(name) > 1), None):
        raise ConfigError(f"--hosts has two of the name {same}, whose runs would have one folder. Rename a folder.")
    require_writable(args.output_dir)
