"""The runs of a transfer matrix, with their command lines."""

import argparse
import functools
import shlex
from collections.abc import Iterable
from pathlib import Path

from modeling_unihyperlora.space import PACKAGE_SPACE
from scripts.research.runner import Cell, flag_name, name_of, without
from trainers.arguments import SPACE_FLAGS, STREAM_FLAGS
from trainers.controls import random_map, shuffle_anchors
from trainers.training_args import NOISE_FLAGS

# In the order of the runs.
COLUMNS = ("zero_shot", "refined", "own_stream", "probe", "delta", "shuffled", "random_map", "lora")
BASELINES = ("probe", "lora")
LORA_R = 8
FILES = ("train_file", "validation_file")
TEXT = "unlabelled.txt"  # words of the training file, for the column "refined"
CHECK_EVERY = 100  # steps between two checkpoints of δθ; the best checkpoint is kept


class Plan:
    """The runs of a matrix.

    Args:
        args: arguments of scripts/research/transfer.py.
        passed: further flags for the runs.
    """

    def __init__(self, args: argparse.Namespace, passed: list[str]):
        self.args = args
        always = ["--save_strategy", "no", "--do_eval"]
        always += [part for name in FILES if getattr(args, name) for part in (f"--{name}", getattr(args, name))]
        loading = without(passed, lambda flag: flag in (*STREAM_FLAGS, *NOISE_FLAGS))  # no new reader is trained
        self._begin = [*always, *passed, *package_space(passed), "--pathway", "stream", "--cache_eval_states"]
        self._begin.append("--do_train")
        self._load = [*always, *loading, "--cache_eval_states"]
        kept = without(loading, lambda flag: flag.endswith("learning_rate"))
        self._baseline = [*always, *kept, *shlex.split(args.baseline_args), "--do_train"]
        self.targets: list[str] = args.source_hosts if args.leave_one_out else args.target_hosts

    def cells(self, column: str, target: str) -> dict[int, Cell]:
        """Seed → run of a column on a target; empty if the column leaves the target out."""
        chosen = {"lora": self.args.lora_hosts or self.targets}
        chosen["refined"] = self.targets if self.args.train_file else []
        if name_of(target) not in map(name_of, chosen.get(column, self.targets)):
            return {}
        seeds = self.args.baseline_seeds if column in BASELINES else self.args.seeds
        make = {"own_stream": self._own_stream, "probe": self._trained_baseline, "lora": self._trained_baseline}
        return {seed: make.get(column, self._loaded)(column, target, seed) for seed in seeds}

    def sources(self, target: str) -> list[str]:
        """Hosts to train the adapter for a target on."""
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
        if column == "delta":
            every = min(CHECK_EVERY, self.args.delta_steps)
            more = (
                f"--do_train --train_scope delta --max_steps {self.args.delta_steps} "
                f"--eval_strategy steps --eval_steps {every} --save_strategy steps --save_steps {every} "
                "--save_total_limit 1 --load_best_model_at_end --metric_for_best_model f1"
            )
            flags = [*flags, *more.split()]
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


def package_space(flags: list[str]) -> list[str]:
    """A --space flag for the package's space if the flags name no space, so that a new space makes runs outdated."""
    return [] if {*SPACE_FLAGS} & {*map(flag_name, flags)} else ["--space", str(PACKAGE_SPACE)]
