"""The runs of a transfer matrix: which they are, what each is called with, and that none is done twice."""

import argparse
import functools
import importlib
import json
import logging
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from modeling_unihyperlora import UniHyperLoraError
from modeling_unihyperlora.storage import write_json
from trainers.arguments import STREAM_FLAGS, UNIVERSAL_FLAGS
from trainers.controls import random_map, shuffle_anchors

logger = logging.getLogger("transfer")

# In the order of the runs.
COLUMNS = ("zero_shot", "refined", "own_stream", "probe", "delta", "delta_both", "shuffled", "random_map", "lora")
BASELINES = ("probe", "lora")
LORA_R = 8
FILES = ("train_file", "validation_file")
STREAM_TRAINING_FLAGS = ("coordinate_epochs", "anchor_file")  # mean something only where a stream begins
LIMITS = ("max_flops_overhead_pct", "max_adapter_bytes", "logging_steps")  # change no result
TEXT = "unlabelled.txt"  # the words of the training file, which "refined" reads
CHECK_EVERY = 100  # steps of δθ between two checkpoints, of which the best is kept


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: of its folder.
        flags: its command line but for --output_dir and --adapter.
        source: the run whose adapter is loaded.
        control: makes (source folder, new folder) of that adapter the one that is loaded instead.
        keep_weights: whether its weights are of use once it has its scores.
        script: name of the module whose ``main`` does it, where it is not that of the Runner.
    """

    name: str
    flags: tuple[str, ...]
    source: "Cell | None" = None
    control: Callable[[Path, Path], Path] | None = None
    keep_weights: bool = True
    script: str | None = None


def call(script: str, flags: list[str]) -> None:
    """A run in this process."""
    importlib.import_module(script).main(flags)


@dataclass(frozen=True)
class Runner:
    """Does the runs of a matrix, none of them twice.

    Attributes:
        folder: where each run gets a folder of its own.
        script: name of the module whose ``main`` does a run.
        digests: files and hosts as they stand on the command line → a digest of what they hold.
        launch: does a run, of a script with a command line.
    """

    folder: Path
    script: str
    digests: dict[str, str]
    launch: Callable[[str, list[str]], None] = call

    def run(self, cell: Cell) -> None:
        """Do a run, and before it the one that it starts from, unless they are finished.

        Of several processes one does it and the others wait, so that they may do columns of one matrix.

        Raises:
            UniHyperLoraError: the run fails, with its name in front.
        """
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / cell.name):
            if self.results(cell) is None:
                if cell.source is not None:
                    self.run(cell.source)
                self._do(cell)

    def _do(self, cell: Cell) -> None:
        folder = self.folder / cell.name
        (folder / "cell.json").unlink(missing_ok=True)
        try:
            flags = [*cell.flags, "--output_dir", str(folder), "--overwrite_output_dir", *self._adapter(cell)]
            logger.info("run %s: %s", cell.name, shlex.join(flags))
            self.launch(cell.script or self.script, flags)
        except UniHyperLoraError as error:
            raise type(error)(f"run {cell.name}: {error}") from error
        for weights in () if cell.keep_weights else folder.glob("*.safetensors"):
            weights.unlink()
        write_json(folder / "cell.json", self._mark(cell))

    def results(self, cell: Cell) -> dict[str, object] | None:
        """``all_results.json`` of a run that came to its end with the same flags, data and hosts; else None."""
        try:
            mark, results = (
                json.loads((self.folder / cell.name / file).read_text(encoding="utf-8"))
                for file in ("cell.json", "all_results.json")
            )
        except (OSError, ValueError):
            return None
        return results if _without_limits(mark) == _without_limits(self._mark(cell)) else None

    def _adapter(self, cell: Cell) -> list[str]:
        if cell.source is None:
            return []
        adapter = self.folder / cell.source.name
        if cell.control is not None:
            adapter = cell.control(adapter, self.folder / cell.name / "adapter")
        return ["--adapter", str(adapter)]

    def _mark(self, cell: Cell) -> dict[str, object]:
        source = None if cell.source is None else self._mark(cell.source)
        inputs = {given: digest for given, digest in self.digests.items() if given in cell.flags}
        script = cell.script or self.script
        return {"script": script, "name": cell.name, "flags": [*cell.flags], "inputs": inputs, "source": source}


def _without_limits(mark: dict | None) -> dict | None:
    """A mark without the flags that change no result."""
    if mark is None:
        return None
    flags = without(mark["flags"], lambda flag: flag in LIMITS)
    return mark | {"flags": flags, "source": _without_limits(mark["source"])}


class Plan:
    """Which runs make up the matrix.

    Args:
        args: the arguments of scripts/transfer.py.
        passed: further flags, for the runs.
    """

    def __init__(self, args: argparse.Namespace, passed: list[str]):
        self.args = args
        always = ["--save_strategy", "no", "--do_eval"]
        always += [part for name in FILES if getattr(args, name) for part in (f"--{name}", getattr(args, name))]
        loading = without(passed, lambda flag: flag in STREAM_TRAINING_FLAGS)
        self._begin = [*always, *passed, "--pathway", "stream", "--cache_eval_states", "--do_train"]
        self._load = [*always, *loading, "--cache_eval_states"]
        of_adapters = (*STREAM_FLAGS, *UNIVERSAL_FLAGS, "router_top_k")
        kept = without(loading, lambda flag: flag.endswith("learning_rate") or flag in of_adapters)
        self._baseline = [*always, *kept, *shlex.split(args.baseline_args), "--do_train"]
        self.targets: list[str] = args.source_hosts if args.leave_one_out else args.target_hosts

    def cells(self, column: str, target: str) -> dict[int, Cell]:
        """Seed → run of a column on a target; none where the column leaves the target out."""
        chosen = {"lora": self.args.lora_hosts or self.targets, "delta_both": self.args.delta_both_hosts}
        chosen["refined"] = self.targets if self.args.train_file else []
        if name_of(target) not in map(name_of, chosen.get(column, self.targets)):
            return {}
        seeds = self.args.baseline_seeds if column in BASELINES else self.args.seeds
        make = {"own_stream": self._own_stream, "probe": self._trained_baseline, "lora": self._trained_baseline}
        return {seed: make.get(column, self._loaded)(column, target, seed) for seed in seeds}

    def sources(self, target: str) -> list[str]:
        """The hosts that the adapter for a target is trained on."""
        return [host for host in self.args.source_hosts if host != target]

    def source(self, target: str, seed: int) -> Cell:
        """The run that trains the adapter for a target."""
        first, *others = self.sources(target)
        name = f"source-without-{name_of(target)}" if self.args.leave_one_out else "source"
        more = ["--source_hosts", *others] if others else []
        return Cell(f"{name}-s{seed}", self._flags([*self._begin, *more], first, seed))

    def _own_stream(self, column: str, target: str, seed: int) -> Cell:
        return Cell(f"{column}-{name_of(target)}-s{seed}", self._flags(self._begin, target, seed))

    def _trained_baseline(self, column: str, target: str, seed: int) -> Cell:
        rank = ["--lora_r", LORA_R] if column == "lora" else []
        flags = [*self._baseline, "--method", column, *rank, "--max_steps", self.args.baseline_steps]
        return Cell(f"{column}-{name_of(target)}-s{seed}", self._flags(flags, target, seed), keep_weights=False)

    def _loaded(self, column: str, target: str, seed: int) -> Cell:
        flags = self._load
        if column in ("delta", "delta_both"):
            every = min(CHECK_EVERY, self.args.delta_steps)
            more = (
                f"--do_train --train_scope delta --max_steps {self.args.delta_steps} "
                f"--eval_strategy steps --eval_steps {every} --save_strategy steps --save_steps {every} "
                "--save_total_limit 1 --load_best_model_at_end --metric_for_best_model f1"
            )
            flags = [*flags, *more.split(), *(["--pathway", "both"] if column == "delta_both" else [])]
        elif column == "refined":
            text = Path(self.args.output_dir) / TEXT
            flags = [*flags, "--refine_file", str(text), "--refine_host", self.sources(target)[0]]
        controls = {
            "shuffled": functools.partial(shuffle_anchors, seed=seed),
            "random_map": functools.partial(random_map, host=target, seed=seed),
        }
        name = f"{column}-{name_of(target)}-s{seed}"
        return Cell(name, self._flags(flags, target, seed), self.source(target, seed), controls.get(column))

    def _flags(self, flags: Iterable, host: str, seed: int) -> tuple[str, ...]:
        return tuple(map(str, [*flags, "--model_name_or_path", host, "--seed", seed]))


def name_of(host: str) -> str:
    """What the matrix calls a host: the last part of its folder or Hub id."""
    return Path(host).name


def without(flags: list[str], unwanted: Callable[[str], bool]) -> list[str]:
    """A command line without the flags of these names (no dashes) and their values."""
    kept, keep = [], True
    for part in flags:
        if part.startswith("--"):
            keep = not unwanted(flag_name(part))
        if keep:
            kept.append(part)
    return kept


def flag_name(part: str) -> str:
    """ "--name=value" or "--name" → "name"."""
    return part.removeprefix("--").split("=")[0]
