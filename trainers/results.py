"""Output folder of a run: checks before the run starts, and ``all_results.json`` at its end."""

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
    """Raise ``ConfigError`` if ``folder`` cannot be written or created; does not create it."""
    if not str(folder):
        raise ConfigError("The output folder has no name. Give --output_dir FOLDER.")
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"The output folder {folder} cannot be created: {existing} is a file. Choose another.")
    try:
        os.rmdir(tempfile.mkdtemp(dir=existing))
    except OSError as error:  # no permission, a full disk, or a read-only file system
        raise ConfigError(
            f"The output folder {folder} cannot be written ({error.strerror} at {existing}). Choose another."
        ) from error


def require_unused(folder: str | Path, resumed: str | Path | None = None, but_checkpoints: bool = False) -> None:
    """Raise ``ConfigError`` if a folder holds files of another training run, which a new run would overwrite.

    Args:
        resumed: the checkpoint to resume from; if it is in this folder, the folder belongs to the same training run.
        but_checkpoints: allow checkpoints: the run was asked to resume, but none of them is complete.
    """
    left = [path for path in trainings_in(folder) if path.is_file() or not but_checkpoints]
    if left and (resumed is None or Path(folder).resolve() not in Path(resumed).resolve().parents):
        raise ConfigError(
            f"The output folder {folder} holds another training run ({', '.join(path.name for path in left[:3])}). "
            "Choose another --output_dir, resume with --resume_from_checkpoint true, or give --overwrite_output_dir."
        )


def trainings_in(folder: str | Path) -> list[Path]:
    """Weights and checkpoints of earlier training runs in a folder, whatever the method."""
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and any(path.iterdir())]
    weights = [Path(folder) / name for name in ("model.safetensors", "adapter_model.safetensors")]
    return [path for path in weights if path.exists()] + sorted(checkpoints)


def delete_checkpoints(folder: str | Path, keep: Sequence[str | Path | None]) -> None:
    """Delete the checkpoints of another training run, except those in ``keep``, from which this run starts."""
    kept = [Path(path).resolve() for path in keep if path is not None]
    for path in trainings_in(folder):
        if path.is_dir() and (path / TRAINER_STATE_NAME).is_file() and path.resolve() not in kept:
            shutil.rmtree(path)


def process_costs() -> dict[str, float | None]:
    """Memory and CPU time that this process has used so far; None if the system does not report them (Windows).

    Returns:
        ``peak_memory_mb``: peak resident memory; pages of memory-mapped files count while the system keeps them.
        ``cpu_seconds``: CPU time of all threads since the process started.
    """
    try:
        import resource
    except ImportError:
        return {"peak_memory_mb": None, "cpu_seconds": None}
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return {
        "peak_memory_mb": round(used.ru_maxrss * unit / 1e6, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }


def write_results(folder: str | Path, metrics: Mapping[str, object]) -> dict[str, object]:
    """Write ``all_results.json``: ``metrics``, and None for each missing key of ``RESULT_KEYS``.

    A value that is not finite becomes None too, because JSON cannot write it.
    """
    results = dict.fromkeys(RESULT_KEYS) | {name: _finite(value) for name, value in metrics.items()}
    write_json(Path(folder) / "all_results.json", results)
    return results


def write_arguments(
    folder: str | Path, arguments: Mapping[str, object], name: str, splits: Mapping[str, Sequence[object]]
) -> None:
    """Write ``run_arguments.json``: all arguments except secrets, and a digest of the data that the run read.

    Args:
        arguments: argument → value.
        name: name of the data set.
        splits: split → its sentences (dataclasses). The file records their number, and a SHA-256 over all their
            fields except their origin and the location of their states.
    """
    kept = {key: value for key, value in arguments.items() if not key.endswith("token")}
    data = {split: {"sentences": len(rows), "sha256": _digest(rows)} for split, rows in splits.items()}
    write_json(Path(folder) / "run_arguments.json", kept | {"data": {"name": name, "splits": data}})


_WHERE = ("origin", "stored")  # fields of a sentence with its origin and the location of its states


def _digest(sentences: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        content = [getattr(sentence, field.name) for field in fields(sentence) if field.name not in _WHERE]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
