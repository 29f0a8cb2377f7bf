"""The records in results/: one JSON file per measurement, one JSON line per run of the paper's comparison."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

from filelock import FileLock

from modeling_unihyperlora import ConfigError
from modeling_unihyperlora.storage import replacing, write_json

SETTINGS = (
    "method lora_r lora_alpha share_across_layers target_modules router train_scope max_steps "
    "per_device_train_batch_size learning_rate num_train_epochs lr_scheduler_type warmup_steps fidelity copy_fidelity "
    "copy_share consistency reader reader_bits delta_learning_rate head_learning_rate weight_decay lambda_f lambda_q "
    "seed bf16 max_seq_length label_smoothing_factor"
).split()
VERSIONS = ("torch", "transformers", "accelerate", "seqeval")
WITH_PICTURE = ("transfer_matrix", "pruned_hosts")  # files of transfer.py and pruned_hosts.py, without suffixes
ABLATION = "ablation.json"  # file of ablation.py
SEARCH = "search.json"  # file of --do_search
PAPER = "paper.jsonl"  # runs of the paper's comparison, one line each, sorted by name


def keep(folder: Path, name: str, results: Path) -> None:
    """Write results/NAME.json from the folder of a run, a search, transfer.py, pruned_hosts.py or ablation.py.

    Raises:
        ConfigError: the folder holds nothing finished.
    """
    drawn = [stem for stem in WITH_PICTURE if (folder / f"{stem}.json").is_file()]
    if drawn:
        keep_with_picture(folder / drawn[0], name, results)
        return
    makers = {ABLATION: ablation_of, SEARCH: search_of}
    make = next((make for file, make in makers.items() if (folder / file).is_file()), record_of)
    write_json(results / f"{name}.json", make(folder))


def keep_paper_run(folder: Path, kind: str, results: Path) -> None:
    """Write a run's line into results/paper.jsonl; replaces an earlier line of the same name.

    Several processes may call this at the same time.

    Args:
        folder: folder of the run; its name is the name of the run.
        kind: "paper", or "paper_rate" for a trial of another learning rate.
        results: folder of the records.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    record = record_of(folder) | {"kind": kind, "name": folder.name}
    results.mkdir(parents=True, exist_ok=True)
    path = results / PAPER
    with FileLock(results / f".{PAPER}.lock"):
        records = read_paper_runs(path) | {folder.name: record}
        lines = [json.dumps(records[name], sort_keys=True, ensure_ascii=False) for name in sorted(records)]
        with replacing(path) as temporary:
            Path(temporary).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_paper_runs(path: Path) -> dict[str, dict]:
    """Name → record, for each line of the file; empty if there is no file."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8") as lines:
        return {record["name"]: record for record in map(json.loads, lines)}


def read_records(folder: Path) -> dict[str, dict]:
    """Name → record, for all records in a folder."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    single = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return single | read_paper_runs(folder / PAPER)


def of_kind(records: dict[str, dict], kind: str | None) -> dict[str, dict]:
    """Records of one kind; None selects the records of single runs."""
    return {name: record for name, record in records.items() if record.get("kind") == kind}


def record_of(folder: Path) -> dict[str, object]:
    """The record of a finished run; it contains no local paths.

    If the run loaded an adapter from a folder, ``adapter`` has the data and the settings of the run that trained it.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    try:
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        run = json.loads((folder / "run_arguments.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no finished run ({error}). Give the --output_dir of a run.") from error
    loaded = Path(run.get("adapter") or folder)
    adapter, before = (_read_if_there(loaded / name) for name in ("config.json", "run_arguments.json"))
    hosts = [{**host, "name": Path(host["name"] or "").name} for host in adapter.get("source_hosts") or []]
    return {
        "run_config": run.get("run_config") and Path(run["run_config"]).stem,
        "settings": _settings_of(run),
        "adapter": {"data": before["data"], "settings": _settings_of(before)} if before and loaded != folder else None,
        "pathway": adapter.get("pathway"),
        "projector": adapter.get("projector"),
        "host": Path(run.get("model_name_or_path") or "").name,
        "source_hosts": hosts,
        "data": run["data"],
        "results": results,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def _read_if_there(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _settings_of(run: dict) -> dict[str, object]:
    return {name: None if run.get(name) == "None" else run.get(name) for name in SETTINGS}


def keep_with_picture(written: Path, name: str, results: Path) -> None:
    """Copy a table and its picture to results/NAME.json and results/NAME.png.

    Args:
        written: path of the two files without their suffixes.
        name: new name of the files.
        results: folder of the records.

    Raises:
        ConfigError: one of the files cannot be read.
    """
    try:
        matrix = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
        picture = written.with_suffix(".png").read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{written.parent} holds no complete table and picture ({error}). Give the --output_dir of transfer.py or "
            "pruned_hosts.py."
        ) from error
    with replacing(results / f"{name}.png") as temporary:
        Path(temporary).write_bytes(picture)
    write_json(results / f"{name}.json", matrix)


def ablation_of(folder: Path) -> dict[str, object]:
    """The record of ablation.py's folder, with the settings of its first run.

    Raises:
        ConfigError: the table cannot be read, or the first run is not finished.
    """
    try:
        table = json.loads((folder / ABLATION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / ABLATION} cannot be read ({error}). Give the folder of ablation.py.") from error
    first = record_of(folder / "00")
    kept = {name: first[name] for name in ("settings", "host", "data", "versions", "hardware")}
    kept["space"] = first["results"].get("space")
    return kept | {"kind": "ablation", "rows": table["rows"], "space_hosts": table.get("space_hosts", [])}


def search_of(folder: Path) -> dict[str, object]:
    """The record of a search's folder: its trials, and the run with the best values."""
    best = record_of(folder)
    found = json.loads((folder / SEARCH).read_text(encoding="utf-8"))
    kept = {name: best[name] for name in ("settings", "pathway", "host", "data", "results", "versions", "hardware")}
    return {"kind": "search"} | kept | {"search": found}
