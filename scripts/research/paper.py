"""The runs of the paper's comparison: run configs × hosts × seeds, each in its own process, each done only once.

    python -m scripts.research.benchmark paper {probe,lora,unihyperlora}-iter1-{sst2,boolq} --seeds 0 1 2 \
        --output_dir runs/paper --source unihyperlora-source-iter1-{sst2,boolq} --hosts distilbert-base-uncased

A config that tunes δθ starts from the adapter of the --source with the same data and the same seed; all other configs
start anew. ``evaluation.metric`` selects the script: run_ner.py for seqeval, else run_classification.py. Unknown flags
are passed to all runs. A finished run is not repeated while its flags, config, local files and the package's space
stay the same, so the same command continues an interrupted benchmark. The file of --local gives the local paths of
hosts and data, so that run configs need no change:

    hosts:                       # name in a run config or in --hosts → folder
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
    what = "Run configs that train a task for all hosts; configs that tune δθ start from the one with the same data."
    parser.add_argument("--source", nargs="+", default=[], help=what)
    parser.add_argument("--hosts", nargs="+", help="Hosts to run every config on, instead of its own host.")
    parser.add_argument("--local", type=Path, help="YAML file with the local paths of hosts and data.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        help="Learning rates to try in separate runs, instead of the config's.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the runs' own folders.")


@dataclass(frozen=True)
class Local:
    """Local paths: host → folder, and data set → split → file."""

    hosts: dict[str, str]
    data: dict[str, dict[str, str]]

    def flags(self, config: RunConfig, host: str | None) -> list[str]:
        """Flags of a run for its host and data."""
        named = host or config.arguments.get("model_name_or_path")
        folder = self.hosts.get(named, host)
        flags = ["--model_name_or_path", folder] if folder else []
        if (source := config.arguments.get("refine_host")) in self.hosts:
            flags += ["--refine_host", self.hosts[source]]
        for split, file in self.data.get(config.arguments.get("task_name"), {}).items():
            flags += [f"--{split}_file", file]
        return flags


def run_all(args: argparse.Namespace, passed: list[str]) -> Iterator[tuple[Path, str]]:
    """Run the missing runs; yields the folder and the kind of every run, including finished ones.

    The kind is "paper_rate" for a run with one of --learning_rates, else "paper".

    Raises:
        UniHyperLoraError: the input is bad, or a run fails; finished runs are kept.
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
        if path not in args.source  # a source is trained on its own host, when a run needs it
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
    """One run of a config; a run that tunes δθ has the source with the same data and seed as its source."""
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
    """Name of a run config's data set."""
    return config.arguments.get("task_name")


def said_by(config: RunConfig) -> str:
    """Digest of a run config's content without comments, and of the package's space if the method uses it."""
    said = [config.arguments, digest_of(str(PACKAGE_SPACE)) if config.arguments["method"] == "unihyperlora" else None]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_local(path: Path | None) -> Local:
    """Read the file of --local; its relative paths are relative to the file.

    Raises:
        ConfigError: the file is unreadable, has another form, or names a path that does not exist.
    """
    if path is None:
        return Local({}, {})
    form = "Write hosts: {NAME: FOLDER} and data: {NAME: {train: FILE, validation: FILE}}."
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--local {path} cannot be read ({' '.join(str(error).split())}). {form}") from error
    if not isinstance(content, dict) or set(content) - {"hosts", "data"}:
        raise ConfigError(f"--local {path} must hold the blocks hosts and data, and nothing else. {form}")
    parts = [content.get(name) or {} for name in ("hosts", "data")]
    if not all(isinstance(part, dict) for part in [*parts, *parts[-1].values()]):
        raise ConfigError(f"--local {path}: hosts or data is not a block of names. {form}")
    hosts, data = parts
    for name, files in data.items():
        if set(files) - {"test"} != set(FILES):
            raise ConfigError(f"--local {path}: data '{name}' has {', '.join(map(str, files)) or 'nothing'}. {form}")

    def here(given: str) -> str:
        found = path.parent / str(given)
        if not found.exists():
            raise ConfigError(f"--local {path} names {given}, which does not exist. Correct the path.")
        return str(found)

    return Local(
        {name: here(folder) for name, folder in hosts.items()},
        {name: {split: here(file) for split, file in files.items()} for name, files in data.items()},
    )


def check(args: argparse.Namespace, configs: dict[str, RunConfig], passed: list[str]) -> None:
    """Check the arguments before the first run.

    Raises:
        ConfigError: an argument is not allowed, or two arguments contradict each other.
    """
    if passed and not passed[0].startswith("-"):
        raise ConfigError(f"{passed[0]} comes after a flag; give run configs before all flags.")
    for part in passed:
        if part.startswith("--") and flag_name(part) in SET_HERE:
            raise ConfigError(f"This command sets {part} for each run; leave it out.")
    sources: dict[str | None, str] = {}
    for path in args.source:
        if configs[path].arguments.get("train_scope") != "task":
            raise ConfigError(
                f"--source {path} does not train a universal adapter (method unihyperlora, train_bias_delta_only "
                "false), so no run can start from it. Give the config of the source training."
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
                f"{path} tunes δθ of an adapter whose reader was trained on the same data ({data_of(config)}); give "
                "the config of that source training as --source."
            )
    hosts = [name_of(host) for host in dict.fromkeys(args.hosts or [])]
    if same := next((name for name in hosts if hosts.count(name) > 1), None):
        raise ConfigError(f"--hosts has two hosts named {same}, whose runs would share a folder. Rename a folder.")
    require_writable(args.output_dir)
