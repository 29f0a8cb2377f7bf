"""Ablation of the stream: train it with one part changed or missing, score it on the source and on other hosts.

    python -m scripts.research.ablation --model_name_or_path SOURCE --target_hosts A B --space_hosts SOURCE C D \
        --train_file train.jsonl --validation_file dev.jsonl --output_dir runs/ablation \
        --max_train_samples 3500 --max_steps 1000

Further flags are passed to run_ner.py. Each row is one training run and a zero-shot score on each target; finished
rows are not repeated. Rows with another space make it from --space_hosts, by default from the source alone.
ablation.json is written after every row.
"""

import argparse
import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch

from modeling_unihyperlora import CanonicalSpace, UniHyperLoraError, space
from modeling_unihyperlora.reader import Reader, Words
from modeling_unihyperlora.space import KNOTS, HostFit, join_anchors, read_anchors
from modeling_unihyperlora.space_making.make import PACKAGE_ANCHORS
from modeling_unihyperlora.storage import Grid, write_json
from scripts.research.runner import without
from trainers.arguments import STREAM_FLAGS
from trainers.running import run
from trainers.tasks import NER
from trainers.training_args import NOISE_FLAGS

logger = logging.getLogger("ablation")

Change = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Row:
    """One variation of the stream's design.

    Attributes:
        name: name of the row in the table.
        flags: further flags of the training run.
        change: context that patches code during the row's runs.
        space: arguments of ``CanonicalSpace.make`` for the row's own space; empty for the package's space.
    """

    name: str
    flags: tuple[str, ...] = ()
    change: Change = contextlib.nullcontext
    space: dict[str, object] = field(default_factory=dict)


def words_alone() -> mock._patch:
    """The reader sees one word at a time."""
    forward = Reader.forward

    def alone(self, z: torch.Tensor, words: Words, *weights) -> torch.Tensor:
        return forward(self, z, Words(words.lengths.new_ones(len(z))), *weights)  # sentences of one word

    return mock.patch.object(Reader, "forward", alone)


def no_dropout() -> mock._patch:
    """The reader has no dropout in training."""
    make = Reader.__init__

    def without(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs | {"dropout": 0.0})

    return mock.patch.object(Reader, "__init__", without)


def given_words_alone() -> mock._patch:
    """Words are those of the data alone, and not those of raw text as well."""
    return mock.patch.object(sys.modules[__name__], "NER", replace(NER, further=lambda *_: []))


def _line_up_otherwise(name: str, new: object) -> contextlib.AbstractContextManager:
    """Replace a part of the alignment; the resulting maps have other names in the cache."""
    return mock.patch.multiple(space, **{name: new, "METHOD": f"{space.METHOD} without {name}"})


def no_stretch() -> contextlib.AbstractContextManager:
    """The predictions keep the small variance that the regression gives them, on every host."""
    return _line_up_otherwise("_stretch", lambda predicted, y, held_out: torch.eye(y.shape[1]))


def variances_alone() -> contextlib.AbstractContextManager:
    """Each coordinate is stretched separately."""
    return _line_up_otherwise("_transport", lambda given, wanted: torch.eye(wanted.shape[1]))


def no_landmarks() -> contextlib.AbstractContextManager:
    """The map is linear in the host's states."""
    return _line_up_otherwise("WORTH", math.inf)


def four_bits() -> mock._patch:
    """The space stores coordinates in 16 steps from -3 to 2.625."""
    return mock.patch.object(space, "TwoBit", lambda step: Grid(0.375))


def only_knots(*kept: int) -> Change:
    """All other knots are zero."""
    call = HostFit.__call__
    mask = torch.tensor([float(knot in kept) for knot in range(len(KNOTS))])[:, None]

    def masked(*args) -> torch.Tensor:
        z = call(*args)
        return (z.unflatten(1, (len(mask), -1)) * mask.to(z.device)).flatten(1)

    return lambda: mock.patch.object(HostFit, "__call__", masked)


def rows(folder: Path, source: str, space_hosts: list[str]) -> list[Row]:
    """The shipped design and all its variations.

    Args:
        folder: folder for the texts with fewer anchors.
        source: host to train on.
        space_hosts: hosts of a space that is made from several hosts.
    """
    text = read_anchors(PACKAGE_ANCHORS)
    shares = {"half": folder / "half_of_the_anchors.txt", "a quarter": folder / "quarter_of_the_anchors.txt"}
    for step, path in zip((2, 4), shares.values(), strict=True):
        path.write_bytes(join_anchors(text[::step]))
    more_bytes = ("--max_adapter_bytes", "2000000")
    several = {"hosts": space_hosts}
    return [
        Row("as shipped"),
        Row("without noise", ("--fidelity", "1", "--copy_fidelity", "1")),
        Row("without noise on copies", ("--copy_fidelity", "1")),
        Row("without copies of the source", ("--copy_share", "0")),
        Row("without noise and copies", ("--fidelity", "1", "--copy_share", "0")),
        Row("without the consistency term", ("--consistency", "0")),
        Row("without dropout", change=no_dropout),
        Row("without the words of raw text", change=given_words_alone),
        Row("each word alone", change=words_alone),
        Row("a medium reader", ("--reader", "medium")),
        Row("a small reader", ("--reader", "small")),
        Row("a large reader of 4 bits", ("--reader_bits", "4")),
        Row("a medium reader of 4 bits", ("--reader", "medium", "--reader_bits", "4")),
        Row("a small reader of 4 bits", ("--reader", "small", "--reader_bits", "4")),
        Row("a space of the source alone", space={"hosts": [source]}),
        Row("a space of the space hosts", space=several),
        Row("… its coordinates of 4 bits", more_bytes, four_bits, several),
        *(Row(f"… with {dim} coordinates a knot", more_bytes, space=several | {"dim": dim}) for dim in (16, 32, 96)),
        *(Row(f"… with {share} of the anchors", space=several | {"anchor_file": shares[share]}) for share in shares),
        Row("variances matched in place of covariances", change=variances_alone),
        Row("without matching either", change=no_stretch),
        Row("without landmarks: a linear map", change=no_landmarks),
        Row("3 knots: 0, 1/2, 1", change=only_knots(0, 2, 4)),
        Row("1 knot: 1/2", change=only_knots(2)),
    ]


def main(command_line: list[str] | None = None) -> list[dict[str, object]]:
    """Run the missing rows; returns the content of ``ablation.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="Host to train on.")
    parser.add_argument("--target_hosts", nargs="+", default=[])
    parser.add_argument("--space_hosts", nargs="+", help="Hosts for the rows with another space; default: the source.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", help="Run only rows whose names start with one of these.")
    args, passed = parser.parse_known_args(command_line)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    source, table = args.model_name_or_path, []
    for number, row in enumerate(rows(args.output_dir, source, args.space_hosts or [source])):
        if args.rows and not any(row.name.startswith(name) for name in args.rows):
            continue
        folder = args.output_dir / f"{number:02d}"
        with row.change():
            flags = ["--model_name_or_path", source, "--pathway", "stream", "--do_train"]
            flags.append("--overwrite_output_dir")  # replaces an interrupted run
            flags += ["--space", str(own_space(row, folder))] if row.space else []
            scores = {"source": _run([*passed, *flags, *row.flags], folder)}
            for host in args.target_hosts:
                loading = without(passed, lambda flag: flag in (*STREAM_FLAGS, *NOISE_FLAGS))
                moved = [*loading, "--adapter", str(folder), "--model_name_or_path", host]
                scores[Path(host).name] = _run(moved, folder / Path(host).name)
        table.append({"row": row.name, "f1": scores})
        write_json(args.output_dir / "ablation.json", {"rows": table, "space_hosts": _names(args.space_hosts)})
    return table


def own_space(row: Row, folder: Path) -> Path:
    """File of the row's own space; makes the space if the file does not exist."""
    path = folder.with_suffix(".space.safetensors")
    if not path.is_file():
        CanonicalSpace.make(**row.space).save(path)
    return path


def _names(hosts: list[str] | None) -> list[str]:
    return [Path(host).name for host in hosts or []]


def _run(flags: list[str], folder: Path) -> float:
    done = folder / "all_results.json"
    if not done.is_file():
        logger.warning("run %s", folder)
        run(NER, [*flags, "--do_eval", "--cache_eval_states", "--save_strategy", "no", "--output_dir", str(folder)])
    return json.loads(done.read_text(encoding="utf-8"))["eval_f1"]


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"ablation: {error}")
