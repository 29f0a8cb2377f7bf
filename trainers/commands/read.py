"""Read a corpus into canonical states, once for all tasks and hosts.

    unihyperlora read --host HOST --input corpus.jsonl --output states
    unihyperlora ner --train_states states --do_train --output_dir runs/task

To resume an interrupted reading, give the same command again. Runs under accelerate launch.
"""

import argparse
import json
import logging
import time
from dataclasses import fields
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from ..reading_job import CorpusReader, ReadingJob, own_shards
from ..stored_states import BITS
from . import new_parser

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    own = new_parser("read", "--host HOST --input INPUT --output FOLDER", __doc__)
    add = own.add_argument
    add("--host", required=True, help="Folder or Hub id of the host that reads.")
    add("--input", required=True, help="A .jsonl, .json, .csv or .parquet file, or a data set of the Hub.")
    add("--output", required=True, metavar="FOLDER", help="Where to write the states.")
    add("--split", default="train", metavar="NAME", help="Split of the input; 'train[:1000]' takes the first rows.")
    add("--config_name", metavar="NAME", help="Configuration of a data set.")
    add("--column", metavar="NAME", help="Text or words; by default tokens, words, text or sentence.")
    add(
        "--bits",
        type=int,
        default=16,
        choices=sorted(BITS),
        metavar="N",
        help="Bits per number: 2, 3, 4, 8, or 16 (float16).",
    )
    add("--rows_a_shard", type=int, default=2048, metavar="N", help="Rows in one file.")
    add("--max_seq_length", type=int, default=128, metavar="N", help="Sub-tokens that the host reads at once.")
    add("--batch_size", type=int, default=32, metavar="N", help="Windows that it reads together.")
    add("--causal", action="store_true", help="Read an encoder as a decoder reads, for tasks on decoders.")
    add("--space", metavar="FILE", help="Canonical space, if not the package's own.")
    add("--ray_workers", type=int, metavar="N", help="Read on a Ray cluster, with N hosts.")
    return own


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Run the command; returns counts and times of the reading."""
    arguments = vars(parser().parse_args(command_line))
    workers = arguments.pop("ray_workers")
    job = ReadingJob(**{field.name: arguments[field.name] for field in fields(ReadingJob)})
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logger.setLevel(logging.INFO)
    if workers is not None:
        from ..ray_reading import read_on_ray  # only this needs Ray

        found = read_on_ray(job, workers)
    else:
        found = read_own_shards(job)
    print(json.dumps(found))
    return found


def read_own_shards(job: ReadingJob) -> dict[str, object]:
    """Read this process's missing shards; returns the number of all shards and of those read, words and seconds."""
    reader = CorpusReader(job)
    left = reader.to_do(own_shards(reader.manifest.shards))
    logger.info(
        "%s: %d rows in %d shards, %d for this process to read.",
        job.output,
        reader.manifest.rows,
        reader.manifest.shards,
        len(left),
    )
    start, start_cpu, words = time.perf_counter(), time.process_time(), 0
    with ShownProgress(sum(len(reader.manifest.rows_of(shard)) for shard in left)) as progress:
        for number, shard in enumerate(left, start=1):
            rows = len(reader.manifest.rows_of(shard))
            words += reader.read_shard(shard, lambda n, share, rows=rows: progress.add(n, share * rows))
            progress.finish(f"shard {number} of {len(left)}")
    return {
        "output": job.output,
        "shards": reader.manifest.shards,
        "shards_read": len(left),
        "words_read": words,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - start_cpu, 2),
    }


class ShownProgress:
    """Shows progress, words per second and remaining time: as a bar in a terminal, else as a line per shard.

    Args:
        rows: number of rows to read.
    """

    def __init__(self, rows: int):
        console = Console(stderr=True)
        columns = ("[progress.description]{task.description}", "{task.completed:.0f} of {task.total:.0f} rows")
        rate = TextColumn("{task.fields[rate]:,.0f} words a second")
        shown = (TextColumn(columns[0]), BarColumn(), TextColumn(columns[1]), rate, TimeRemainingColumn())
        self.bar = Progress(*shown, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("Reading", total=rows, rate=0)
        self.rows, self.done, self.words, self.start = rows, 0.0, 0, time.perf_counter()

    def add(self, words: int, rows: float) -> None:
        self.words, self.done = self.words + words, self.done + rows
        self.bar.update(self.task, completed=self.done, rate=self.rate)

    @property
    def rate(self) -> float:
        """Words per second."""
        return self.words / (time.perf_counter() - self.start)

    def finish(self, shard: str) -> None:
        """Log progress after a shard was written, if there is no bar."""
        if self.bar.disable:
            passed = time.perf_counter() - self.start
            left = timedelta(seconds=round(passed * max(0.0, self.rows / max(self.done, 1e-9) - 1)))
            logger.info("%s, %d words, %.0f words a second, %s left", shard, self.words, self.rate, left)

    def __enter__(self) -> "ShownProgress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()
