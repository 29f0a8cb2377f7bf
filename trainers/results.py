"""The folder of a run: checked before the run starts, and its ``all_results.json`` at the end."""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from modeling_unihyperlora.errors import ConfigError
from modeling_unihyperlora.storage import write_json

RESULT_KEYS = (
    "zero_shot_f1",
    "eval_f1",
    "eval_accuracy",
    "adapter_bytes",
    "head_bytes",
    "delta_bytes",
    "reader_bytes",
    "extra_ram_mb",
    "flops_overhead_pct",
    "active_atoms_per_token",
    "trainable_parameters",
    "train_runtime",
    "cpu_seconds",
    "host_cpu_seconds",
    "peak_memory_mb",
    "budget_ok",
    "space",
)


def require_writable(folder: str | Path) -> None:
    """Raise ``ConfigError`` if ``folder`` cannot be written or made; nothing is made yet."""
    if not str(folder):
        raise ConfigError("The output folder has no name. Give --output_dir FOLDER.")
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"The output folder {folder} cannot be made: {existing} is a file. Choose another.")
    try:
        os.rmdir(tempfile.mkdtemp(dir=existing))
    except OSError as error:  # no permission, a full disk, a file system that is only read
        raise ConfigError(
            f"The output folder {folder} cannot be written ({error.strerror} at {existing}). Choose another."
        ) from error


def require_unused(folder: str | Path, resumed: str | Path | None = None, but_checkpoints: bool = False) -> None:
    """Raise ``ConfigError`` if a folder holds what another training left, which a new one would overwrite.

    Args:
        resumed: the checkpoint that the run goes on from; one in this folder makes it the same training.
        but_checkpoints: let checkpoints be, none of which is complete where a run was to be resumed and is not.
    """
    left = [path for path in trainings_in(folder) if path.is_file() or not but_checkpoints]
    if left and (resumed is None or Path(folder).resolve() not in Path(resumed).resolve().parents):
        raise ConfigError(
            f"The output folder {folder} holds another training ({', '.join(path.name for path in left[:3])}). Choose "
            "another --output_dir, go on with --resume_from_checkpoint true, or give --overwrite_output_dir."
        )


def trainings_in(folder: str | Path) -> list[Path]:
    """The weights and the checkpoints that trainings have left in a folder, whatever the method."""
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and any(path.iterdir())]
    weights = [Path(folder) / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return [path for path in weights if path.exists()] + sorted(checkpoints)


def delete_checkpoints(folder: str | Path, keep: Sequence[str | Path | None]) -> None:
    """Delete the checkpoints of another training, but those that this one starts from."""
    kept = [Path(path).resolve() for path in keep if path is not None]
    for path in trainings_in(folder):
        if path.is_dir() and (path / TRAINER_STATE_NAME).is_file() and path.resolve() not in kept:
            shutil.rmtree(path)


def process_costs() -> dict[str, float | None]:
    """What this process has taken so far; None where the system does not say (Windows).

    Returns:
        ``peak_memory_mb``: most memory that was resident. Pages of files that are read through a memory map count as
        long as the system keeps them. ``cpu_seconds``: of all threads, from the start of the process.
    """
    try:
        import resource
    except ImportError:
        return {"peak_memory_mb": None, "cpu_seconds": None}
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return {
        "peak_memory_mb": round(used.ru_maxrss * unit / 1e6, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }


def write_results(folder: str | Path, metrics: Mapping[str, object]) -> dict[str, object]:
    """Write ``all_results.json``: ``metrics``, and None for each of ``RESULT_KEYS`` that is not among them.

    A figure that is not finite becomes None too, since JSON has no word for it.
    """
    results = dict.fromkeys(RESULT_KEYS) | {name: _finite(value) for name, value in metrics.items()}
    write_json(Path(folder) / "all_results.json", results)
    return results


def write_arguments(
    folder: str | Path, arguments: Mapping[str, object], name: str, splits: Mapping[str, Sequence[object]]
) -> None:
    """Write ``run_arguments.json``: every argument but secrets, and which sentences the run read.

    Args:
        arguments: flat, argument → value.
        name: of the data set.
        splits: split → its sentences (dataclasses); kept as their number and a SHA-256 over all but their origin.
    """
    kept = {key: value for key, value in arguments.items() if not key.endswith("token")}
    data = {split: {"sentences": len(rows), "sha256": _digest(rows)} for split, rows in splits.items()}
    write_json(Path(folder) / "run_arguments.json", kept | {"data": {"name": name, "splits": data}})


def _digest(sentences: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        content = [getattr(sentence, field.name) for field in fields(sentence) if field.name != "origin"]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
