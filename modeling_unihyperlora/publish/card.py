"""Generates an adapter's model card from the files in its folder: size, results, transfer to other hosts.

All numbers come from ``all_results.json`` and ``run_arguments.json`` of the run that wrote the folder, and from a
given record of ``scripts/transfer.py``. The card leaves out what is not recorded.
"""

import importlib.metadata
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_unihyperlora import UniHyperLoraConfig, read_config
from ..errors import ConfigError
from ..storage import WEIGHTS_NAME, read_json_object, replacing
from .code_files import code_files

CARD_NAME = "README.md"
LICENCE_NAME = "LICENSE"
MARK = "<!-- This card writes itself. Delete this line to keep what you write here. -->"
PIPELINES = {"token_classification": "token-classification", "sequence_classification": "text-classification"}
AUTO_CLASSES = {
    "token_classification": "AutoModelForTokenClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
}
SCORES = {
    "token_classification": "F1 is micro F1 of whole entities (seqeval, IOB2)",
    "sequence_classification": "F1 is macro F1 over the classes",
}


def write_licence(folder: Path) -> None:
    """Copy the licence of the code into an adapter's folder."""
    with replacing(Path(folder) / LICENCE_NAME) as temporary:
        shutil.copyfile(_licence_file(), temporary)


def _licence_file() -> Path:
    """Licence file of the installed package, else of the checkout."""
    try:
        files = importlib.metadata.files("unihyperlora") or []
        found = [Path(file.locate()) for file in files if file.name == LICENCE_NAME]
    except importlib.metadata.PackageNotFoundError:
        found = []
    return next((path for path in found if path.is_file()), Path(__file__).parents[2] / LICENCE_NAME)


def write_card(folder: Path, repo_id: str | None = None, look_up: bool = False, **facts) -> None:
    """Write ``README.md``, unless the folder has one that a user has edited (and that has no ``MARK``).

    Args:
        folder: folder of the adapter.
        repo_id: future repository; without it the card shows how to load the folder.
        look_up: ask the Hub for unknown licences.
        **facts: ``transfer`` (path of a record), ``host_license`` and ``data_license``, if known.
    """
    path = Path(folder) / CARD_NAME
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return
    text = card_text(folder, repo_id, look_up, **facts)
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def card_text(
    folder: Path,
    repo_id: str | None = None,
    look_up: bool = False,
    transfer: str | Path | None = None,
    host_license: str | None = None,
    data_license: str | None = None,
) -> str:
    """Text of the card with its metadata; the same folder gives the same text.

    Raises:
        ConfigError: the transfer record belongs to another adapter.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    results, run = _read(folder / "all_results.json"), _read(folder / "run_arguments.json")
    record = transfer_record(transfer, config) if transfer else {}
    task = config.active_task or next(iter(config.tasks), None)
    kind = config.tasks[task]["type"] if task else None
    dataset = run.get("dataset_name")
    dataset = dataset if is_hub_id(dataset) else None
    hosts = [host["name"] for host in config.source_hosts if is_hub_id(host["name"])]
    if host_license is None:
        licences = {str(host["name"]): _licence_of(host["name"], "model", look_up) for host in config.source_hosts}
        host_license = ", ".join(sorted({licence for licence in licences.values() if licence})) or None
    if data_license is None and dataset is not None and look_up:
        data_license = _licence_of(dataset, "dataset", look_up)
    title = repo_id.split("/")[-1] if repo_id else f"UniHyperLoRA adapter {task or ''}".strip()
    data = _metadata(title, config, kind, dataset, hosts, results, run)
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n# {title}\n",
        _what_it_is(config, task),
        _snippet(config, kind, repo_id),
        _scores(kind, results, run),
        _transfer_table(record),
        _size(folder, results),
        _origins(config, host_license, run, dataset, data_license),
        _use_and_limits(config),
        _about_the_code(config),
    ]
    return "\n".join(section for section in sections if section)


def transfer_record(path: str | Path, config: UniHyperLoraConfig) -> dict:
    """Read a record of ``scripts/transfer.py``.

    Raises:
        ConfigError: the file is not such a record, or its adapter was trained on other hosts.
    """
    record = read_json_object(Path(path))
    if record.get("kind") != "transfer":
        raise ConfigError(f"{path} is not a record of scripts/transfer.py; give its transfer.json.")
    recorded, own = (
        {host["fingerprint"] for host in hosts} for hosts in (record["source_hosts"], config.source_hosts)
    )
    if recorded != own:
        raise ConfigError(
            f"{path} belongs to an adapter that was trained on other hosts ({', '.join(sorted(recorded))}) than this "
            f"adapter ({', '.join(sorted(own))}). Give the record of this adapter."
        )
    return record


def is_hub_id(name: object) -> bool:
    """Whether a name can be a repository on the Hub and is not a local path."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
        and not os.path.exists(name)
    )


def public_name(name: str | None) -> str | None:
    """Name of a host for publication: the name of its repository, or the last part of a local folder's path."""
    return name if name is None or is_hub_id(name) else Path(name).name


# ---- sections ----


def _metadata(title, config, kind, dataset, hosts, results, run) -> ModelCardData:
    scores = {name: results.get(f"eval_{name}") for name in ("f1", "accuracy", "precision", "recall")}
    scores = {name: value for name, value in scores.items() if value is not None}
    data_name = (run.get("data") or {}).get("name") or "not named"
    evaluations = [
        EvalResult(
            task_type=PIPELINES[kind],
            dataset_type=dataset or data_name,
            dataset_name=data_name,
            dataset_split="validation",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in scores.items()
    ]
    more = {
        "base_model": hosts or None,
        "base_model_relation": "adapter" if hosts else None,
        "datasets": [dataset] if dataset else None,
        "metrics": list(scores) or None,
        "pipeline_tag": PIPELINES.get(kind),
        "eval_results": evaluations or None,
        "model_name": title if evaluations else None,
    }
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        tags=["unihyperlora", "adapter", "custom_code", config.pathway],
        **{name: value for name, value in more.items() if value is not None},
    )


def _what_it_is(config: UniHyperLoraConfig, task: str | None) -> str:
    stream = (
        "It reads the hidden states of a frozen encoder and maps them into a small canonical space with a closed-form "
        "regression that needs no labels. It predicts from there. So the same file works on encoders of other width "
        "and depth that it has not seen in training."
    )
    how = {
        "stream": stream,
        "inject": "It adds a small update to the linear layers of a frozen encoder. The file loads on encoders of "
        "other width and depth, but its scores do not transfer: use it on the host that it was trained on.",
    }[config.pathway]
    tasks = "\n".join(
        f"- `{name}` ({PIPELINES[t['type']]}): {', '.join(f'`{label}`' for label in t['labels'])}"
        for name, t in config.tasks.items()
    )
    active = f" The active task is `{task}`." if len(config.tasks) > 1 else ""
    what = "One small adapter file for text encoders; it contains no tensor of the encoder."
    return f"{what} {how}\n\nTasks:{active}\n\n{tasks}\n"


def _snippet(config: UniHyperLoraConfig, kind: str | None, repo_id: str | None) -> str:
    if kind is None:
        return ""
    host, revision = config.base_model_name_or_path, config.base_model_revision
    note = "the host that it was trained on; any other encoder works too" if config.pathway == "stream" else "its host"
    if host is None:
        host, note = "NAME-OF-AN-ENCODER", "its own host is not on the Hub: name another host here"
    given = f'{{"base_model_name_or_path": "{host}"' + (
        f', "base_model_revision": "{revision}"}}' if revision else "}"
    )
    package = AUTO_CLASSES[kind].replace("AutoModel", "UniHyperLora")
    here = repo_id or "."
    return f"""## Use

```python
from transformers import pipeline

tagger = pipeline(
    "{PIPELINES[kind]}",
    model="{here}",
    trust_remote_code=True,  # runs the code of this repository; pin it with revision="a commit"
    model_kwargs={given},  # {note}
)
print(tagger("Ada Lovelace flew to Lisbon ."))
```

To run no code from this repository, install the package (`pip install unihyperlora`):

```python
from modeling_unihyperlora import {package}

model = {package}.from_pretrained("{here}", base_model_name_or_path="{host}")
print(model.describe())
```
"""


def _scores(kind: str | None, results: dict, run: dict) -> str:
    if kind is None or results.get("eval_f1") is None:
        return ""
    names = ("eval_f1", "eval_precision", "eval_recall", "eval_accuracy", "predict_f1", "zero_shot_f1")
    rows = "\n".join(f"| {name} | {results[name]:.4f} |" for name in names if results.get(name) is not None)
    data = run.get("data") or {}
    splits = "; ".join(
        f"{split}: {of['sentences']:,} sentences, SHA-256 {of['sha256'][:16]}…"
        for split, of in (data.get("splits") or {}).items()
    )
    settings = ("seed", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size")
    protocol = ", ".join(f"{name} {run[name]}" for name in (*settings, "train_scope") if name in run)
    return f"""## Scores

| figure | value |
|---|---|
{rows}

{SCORES[kind]}. Data {data.get("name", "not named")}; {splits or "splits not recorded"}.
Protocol: {protocol or "not recorded"}. One run, one seed.
"""


def _transfer_table(record: dict) -> str:
    if not record:
        return ""
    columns = record["columns"]
    head = "| host | blocks × width | " + " | ".join(column["label"] for column in columns) + " |"
    rows = []
    for name, target in record["targets"].items():
        cells = [_score(target.get(f"{column['key']}_f1")) for column in columns]
        rows.append(f"| {name} | {target['num_layers']} × {target['hidden_size']} | " + " | ".join(cells) + " |")
    lines = "\n".join([head, "|" + "---|" * (len(columns) + 2), *rows])
    sources = ", ".join(public_name(host["name"]) for host in record["source_hosts"])
    return f"""## Transfer

F1 of adapters that were trained like this one, on {sources}, over seeds {", ".join(map(str, record["seeds"]))} (mean ±
s.d. of several seeds). "zero-shot" used no labels on that host. Recorded by `scripts/transfer.py`, data
{record["data"]["name"]}.

{lines}
"""


def _score(value: dict | None) -> str:
    if not value or value.get("mean") is None:
        return "–"
    return f"{value['mean']:.3f}" + (f" ± {value['sd']:.3f}" if value.get("sd") is not None else "")


def _size(folder: Path, results: dict) -> str:
    weights = folder / WEIGHTS_NAME
    parts = {key.removeprefix("bytes_of_"): size for key, size in results.items() if key.startswith("bytes_of_")}
    table = ", ".join(f"{part} {size:,}" for part, size in sorted(parts.items(), key=lambda item: -item[1]) if size)
    overhead = results.get("flops_overhead_pct")
    cost = f" It adds {overhead:.1f} % multiply-adds to those of its source host." if overhead is not None else ""
    parts_text = f": {table}" if table else ""
    return f"## Size\n\n`{WEIGHTS_NAME}` has {weights.stat().st_size:,} bytes{parts_text}.{cost}\n"


def _origins(config, host_license, run, dataset, data_license) -> str:
    hosts = "\n".join(
        f"- host {public_name(host['name']) or 'not named'} ({host['family']}, {host['num_layers']} blocks × "
        f"{host['hidden_size']}, fingerprint {host['fingerprint']})"
        for host in config.source_hosts
    )
    data = dataset or (run.get("data") or {}).get("name") or "not recorded"
    return f"""## Origins and licences

{hosts}
- licence of the host: {host_license or "not stated at its source; see its own page"}
- data: {data}; licence of the data: {data_license or "not stated at its source; see its own page"}
- this adapter and its code: Apache-2.0, see `{LICENCE_NAME}`. The file contains no weights of the host.
"""


def _use_and_limits(config: UniHyperLoraConfig) -> str:
    stream = (
        "- On a new host, check the R² of each knot that loading reports: near or below 0.1, scores will be low. "
        "Hosts that are much smaller than the source, or of another language, fit worse.\n"
        "- A stream does not update weights, so it cannot be merged into a host.\n"
    )
    inject = "- The adapter loads on hosts other than its own, but its scores there are near chance.\n"
    limits = {"stream": stream, "inject": inject}[config.pathway]
    return f"""## Intended use and limits

Use it to label text of the kind that it was trained on. It has the errors and biases of its host and of its training
data. The scores above hold only for the data that they were measured on. Do not base decisions about people on it
alone.

{limits}"""


def _about_the_code(config: UniHyperLoraConfig) -> str:
    files = code_files(config.pathway)
    lines = sum((Path(__file__).parents[1] / name).read_text(encoding="utf-8").count("\n") for name in files)
    return f"""## The code in this repository

{len(files)} Python files, {lines:,} lines, copied from the package `unihyperlora`. The code reads only safetensors and
JSON, and never runs code from a host's repository.
"""


# ---- recorded facts ----


def _read(path: Path) -> dict:
    return read_json_object(path) if path.is_file() else {}


def _licence_of(name: str | None, kind: str, look_up: bool) -> str | None:
    """Licence in the card of a host or a data set; None if it is unknown."""
    if not name or not (os.path.isdir(name) or (look_up and is_hub_id(name))):
        return None
    where = os.path.join(name, CARD_NAME) if os.path.isdir(name) else name
    try:
        return ModelCard.load(where, repo_type=kind).data.get("license")
    except Exception:  # no card, network or metadata: the licence stays unknown
        return None
