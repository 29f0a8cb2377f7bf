"""What each part of the stream is worth: train it with one part missing or changed, score it here and elsewhere.

    python -m scripts.research.ablation --model_name_or_path SOURCE --target_hosts A B --train_file train.jsonl \
        --validation_file dev.jsonl --output_dir runs/ablation --max_train_samples 3500 --max_steps 1000

Further flags go to run_ner.py. Every row is one training run and a zero-shot score on each target; a row whose folder
has its results is not done again. Writes ablation.json, row by row.
"""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from modeling_unihyperlora.anchors import join_anchors, read_anchors
from modeling_unihyperlora.quantization import Grid
from modeling_unihyperlora.token_mixer import TokenMixer, Words

from modeling_unihyperlora import UniHyperLoraError, adapter, anchors, calibration, stream
from modeling_unihyperlora.storage import write_json
from trainers import sources
from trainers.running import run
from trainers.tasks import NER

logger = logging.getLogger("ablation")

Change = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Row:
    """One way of leaving the stream's design: flags of the run, or code that is replaced while it runs."""

    name: str
    flags: tuple[str, ...] = ()
    change: Change = contextlib.nullcontext


def no_atoms() -> mock._patch:
    return mock.patch.object(stream, "write_atoms", lambda dots, rows, *_: dots.new_zeros(len(dots), rows.shape[1]))


def same_atoms_for_all_words() -> mock._patch:
    """The router's scores without the word: task and bias alone."""
    route = stream.route
    return mock.patch.object(stream, "route", lambda state, rows, *rest: route(state * 0, rows, *rest))


def no_mixer() -> mock._patch:
    """Every atom has the same weight at every depth."""
    return mock.patch.object(adapter.Mixer, "forward", lambda self, places: _ones(self, places))


def _ones(mixer: adapter.Mixer, places: torch.Tensor) -> torch.Tensor:
    return places.new_ones(*places.shape[:-1], len(mixer.output()))


def words_alone() -> mock._patch:
    """The token mixer sees one word at a time."""
    forward = TokenMixer.forward

    def alone(self, z: torch.Tensor, words: Words, *weights) -> torch.Tensor:
        return forward(self, z, Words.in_rows(torch.ones_like(words.place), 1), *weights)  # sentences of one word

    return mock.patch.object(TokenMixer, "forward", alone)


def no_stretch() -> mock._patch:
    """What the regression shrinks stays small, on every host."""
    return mock.patch.object(calibration, "_stretch", lambda predicted, y, held_out: torch.eye(y.shape[1]))


def variances_alone() -> mock._patch:
    """Each coordinate is stretched by itself."""
    return mock.patch.object(calibration, "_transport", lambda given, wanted: torch.eye(wanted.shape[1]))


def no_landmarks() -> mock._patch:
    """A linear map from the host's states alone."""
    return mock.patch.object(
        calibration, "nearness", lambda query, landmarks: query.new_zeros(len(query), len(landmarks))
    )


def four_bits() -> mock._patch:
    """Coordinates in 16 steps from -3 to 2.625."""
    return mock.patch.object(anchors, "TwoBit", lambda step: Grid(0.375))


def no_copies() -> mock._patch:
    return mock.patch.object(sources, "COPIES", ())


def only_knots(*kept: int) -> Change:
    """The other knots are always zero."""
    to_knots = calibration.HostToKnots.__call__
    mask = torch.tensor([float(knot in kept) for knot in range(len(adapter.KNOTS))])[:, None]

    def masked(*args) -> torch.Tensor:
        return (to_knots(*args).unflatten(1, (len(mask), -1)) * mask).flatten(1)

    return lambda: mock.patch.object(calibration.HostToKnots, "__call__", masked)


def rows(folder: Path) -> list[Row]:
    """The design as it is, and every way of leaving it."""
    half = folder / "half_of_the_anchors.txt"
    half.write_bytes(join_anchors(read_anchors()[::2]))
    quarter = folder / "quarter_of_the_anchors.txt"
    quarter.write_bytes(join_anchors(read_anchors()[::4]))
    return [
        Row("as shipped"),
        Row("without atoms", change=no_atoms),
        Row("without router: the same atoms for every word", change=same_atoms_for_all_words),
        Row("without mixer: one weight for all depths", change=no_mixer),
        Row("atoms for nothing: λ_F = 0", ("--lambda_f", "0")),
        Row("without token mixer: each word alone", change=words_alone),
        Row("without noise", ("--stream_fidelity", "1")),
        Row("without copies of the source", change=no_copies),
        Row("without learned coordinates: principal components", ("--coordinate_epochs", "0")),
        Row("variances matched in place of covariances", change=variances_alone),
        Row("without matching either", change=no_stretch),
        Row("without landmarks: a linear map", change=no_landmarks),
        Row("coordinates of 4 bits", ("--max_adapter_bytes", "2000000"), four_bits),
        Row("half of the anchors", ("--anchor_file", str(half))),
        Row("a quarter of the anchors", ("--anchor_file", str(quarter))),
        Row("3 knots: 0, 1/2, 1", change=only_knots(0, 2, 4)),
        Row("1 knot: 1/2", change=only_knots(2)),
        Row("16 coordinates a knot", ("--stream_dim", "16")),
        Row("a smaller file", ("--stream_width", "128", "--stream_hidden", "96")),
        Row("64 coordinates a knot", ("--stream_dim", "64", "--max_adapter_bytes", "2000000")),
    ]


def main(command_line: list[str] | None = None) -> list[dict[str, object]]:
    """Do the rows that are missing; returns the content of ``ablation.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", required=True, help="Host to train on.")
    parser.add_argument("--target_hosts", nargs="+", default=[])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", help="Only the rows whose name begins so.")
    args, passed = parser.parse_known_args(command_line)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = []
    for number, row in enumerate(rows(args.output_dir)):
        if args.rows and not any(row.name.startswith(name) for name in args.rows):
            continue
        folder = args.output_dir / f"{number:02d}"
        with row.change():
            source = ["--model_name_or_path", args.model_name_or_path, "--pathway", "stream", "--do_train"]
            source.append("--overwrite_output_dir")  # of a run that was interrupted
            scores = {"source": _run([*passed, *source, *row.flags], folder)}
            for host in args.target_hosts:
                moved = [*passed, "--adapter", str(folder), "--model_name_or_path", host]
                scores[Path(host).name] = _run(moved, folder / Path(host).name)
        table.append({"row": row.name, "f1": scores})
        write_json(args.output_dir / "ablation.json", {"rows": table})
    return table


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
