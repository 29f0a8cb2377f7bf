"""Runs that are done only once: each run has its own folder, and a finished run is not repeated."""

import hashlib
import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from modeling_unihyperlora import DataError, UniHyperLoraError
from modeling_unihyperlora.storage import write_json
from trainers.running import run
from trainers.tasks import TASKS

logger = logging.getLogger("scripts.research.runner")

SCRIPTS = {task.script: task for task in TASKS.values()}  # name of the entry point → its kind of task
LIMITS = ("max_flops_overhead_pct", "max_adapter_bytes", "logging_steps")  # flags that do not change a run's result


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: name of its folder.
        flags: its command line without --output_dir and --adapter.
        source: the run whose adapter this run loads.
        control: (source folder, new folder) → folder of a changed adapter to load instead of the source's.
        keep_weights: whether to keep the weights after scoring.
        script: key of SCRIPTS; by default that of the Runner.
    """

    name: str
    flags: tuple[str, ...]
    source: "Cell | None" = None
    control: Callable[[Path, Path], Path] | None = None
    keep_weights: bool = True
    script: str | None = None


def call(script: str, flags: list[str]) -> None:
    """Run a script in this process."""
    run(SCRIPTS[script], flags)


@dataclass(frozen=True)
class Runner:
    """Does the runs of a matrix, each only once.

    Attributes:
        folder: folder for the runs' own folders.
        script: key of SCRIPTS.
        digests: file or host, as written on the command line → digest of its content.
        launch: starts a run, given a script and a command line.
    """

    folder: Path
    script: str
    digests: dict[str, str]
    launch: Callable[[str, list[str]], None] = call

    def run(self, cell: Cell) -> None:
        """Do a run, and before it its source, unless they are finished.

        If several processes ask for the same run, one does it and the others wait. So several processes can share a
        matrix.

        Raises:
            UniHyperLoraError: the run failed; the message starts with its name.
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
            flags = [*cell.flags, "--output_dir", str(folder), *self._adapter(cell)]
            logger.info("run %s: %s", cell.name, shlex.join(flags))
            self.launch(cell.script or self.script, flags)
        except UniHyperLoraError as error:
            raise type(error)(f"run {cell.name}: {error}") from error
        for weights in () if cell.keep_weights else folder.glob("*.safetensors"):
            weights.unlink()
        write_json(folder / "cell.json", self._mark(cell))

    def results(self, cell: Cell) -> dict[str, object] | None:
        """``all_results.json`` of a finished run with the same flags, data and hosts; None if there is none."""
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
    """A mark without the flags in ``LIMITS``."""
    if mark is None:
        return None
    flags = without(mark["flags"], lambda flag: flag in LIMITS)
    return mark | {"flags": flags, "source": _without_limits(mark["source"])}


def show_progress() -> None:
    """Log the names of the runs to stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("scripts.research").setLevel(logging.INFO)


def name_of(host: str) -> str:
    """Name of a host in the matrix: the last part of its folder or Hub id."""
    return Path(host).name


def without(flags: list[str], unwanted: Callable[[str], bool]) -> list[str]:
    """Remove flags and their values from a command line; ``unwanted`` receives a flag's name without dashes."""
    kept, keep = [], True
    for part in flags:
        if part.startswith("--"):
            keep = not unwanted(flag_name(part))
        if keep:
            kept.append(part)
    return kept


def flag_name(part: str) -> str:
    """Name of a flag: "--name=value" or "--name" → "name"."""
    return part.removeprefix("--").split("=")[0]


def digest_of(path: str) -> str:
    """SHA-256 of a data file; raises ``DataError`` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}). Check the path.") from error
