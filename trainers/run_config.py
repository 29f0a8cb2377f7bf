"""Reads run configurations in the paper's schema and turns them into command-line arguments.

A run configuration is a YAML file, or a name METHOD-iter1-DATASET. The name stands for ``common.yaml``,
``dataset/DATASET.yaml`` and ``method/METHOD.yaml`` of one folder; later files override earlier ones. A method may
begin with the content of another one, which it names under ``defaults``, as in Hydra.

Every key is read or refused. A key with a flag below becomes that argument of ``scripts/run_ner.py`` or
``scripts/run_classification.py``. It is placed before the user's own arguments, so that the command line wins.
"""

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from modeling_unihyperlora.configuration_unihyperlora import READER_BITS
from modeling_unihyperlora.errors import ConfigError
from modeling_unihyperlora.reader import READERS

from .launching import processes
from .search_space import knobs_of

logger = logging.getLogger(__name__)

BYTES_A_MEGABYTE = 1_000_000
RUNS = Path(__file__).parents[1] / "hub_configs" / "runs"  # default folder of names, in a checkout
SEPARATOR = "-iter1-"  # separates method and data set in the name of a run
SELF = "_self_"  # Hydra's name for a file's own content
DELTA_GROUP = "adapter.bias_delta"  # the paper's name for the parameter group of δθ


@dataclass(frozen=True)
class RunConfig:
    """Content of a run configuration.

    Attributes:
        run_id: name of the run.
        arguments: argument of the script → value.
        metric: metric of the ``evaluation`` block; "seqeval" by default.
        search: the ``optuna`` block, checked and otherwise unchanged; None if there is none.
    """

    run_id: str
    arguments: dict[str, Any]
    metric: str
    search: dict[str, Any] | None

    def to_command_line(self) -> list[str]:
        """The arguments as a command line."""
        typed: list[str] = []
        for name, value in self.arguments.items():
            values = value if isinstance(value, list) else [value]
            typed += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
        return typed


@dataclass(frozen=True)
class Key:
    """An allowed key: type of its value, argument that it becomes, allowed values, conversion to the argument."""

    kind: type
    flag: str | None = None
    allowed: tuple = ()
    convert: Callable[[Any], Any] | None = None


_NAME = {"name": Key(str, "hub_model_id")}

ADAPTER_KEYS = {
    "unihyperlora": {
        **_NAME,
        "pathway": Key(str, "pathway"),
        "projector": Key(str, "projector"),
        "router": Key(str, "router"),
        "atoms": Key(int, "atoms"),
        "anchor_dim": Key(int, "anchor_dim"),
        "router_top_k": Key(int, "router_top_k"),
        "refine_host": Key(str, "refine_host"),
        "space": Key(str, "space"),
        "reader": Key(str, "reader", allowed=tuple(READERS)),
        "reader_bits": Key(int, "reader_bits", allowed=READER_BITS),
        "quant_bits": Key(int, allowed=(4,)),  # bits of the mixer; the file format has no other
        "bias_bits": Key(int, allowed=(4,)),  # bits of δθ; the file format has no other
        "freeze_base_adapter": Key(bool),  # this key and the next become train_scope, see _train_scope
        "train_bias_delta_only": Key(bool),
        "lambda_F": Key(float, "lambda_f"),
        "lambda_Q": Key(float, "lambda_q"),
    },
    "sat_lora": {
        **_NAME,
        "lora_rank": Key(int, "lora_r"),
        "lora_alpha": Key(float, "lora_alpha"),
        "target_modules": Key(list, "target_modules"),
        "share_across_layers": Key(bool, "share_across_layers"),
        "precision": Key(str, allowed=("int8",)),
    },
    "lora": {**_NAME, "lora_rank": Key(int, "lora_r")},
    "full": _NAME,
    "probe": _NAME,
}

SECTIONS: dict[str, Any] = {
    "run_id": Key(str, "output_dir", convert=lambda name: f"runs/{name}"),
    "method": Key(str, "method", allowed=tuple(ADAPTER_KEYS)),
    "model": {
        "host_model_name": Key(str, "model_name_or_path"),
        "revision": Key(str, "model_revision"),
        "hidden_size": Key(int, "hidden_size"),
        "num_layers": Key(int, "num_layers"),
    },
    "dataset": {
        "name": Key(str, "task_name"),
        "hf_id": Key(str, "dataset_name"),
        "config": Key(str, "dataset_config_name"),
        "splits": {
            "train": Key(str, "train_split"),
            "validation": Key(str, "validation_split"),
            "test": Key(str, "test_split"),
        },
        "max_length": Key(int, "max_seq_length"),
    },
    "training": {
        "optimizer": Key(str, "optim", allowed=("adamw",), convert=lambda _: "adamw_torch"),
        "learning_rate": Key(float, "learning_rate"),
        "delta_learning_rate": Key(float, "delta_learning_rate"),
        "head_learning_rate": Key(float, "head_learning_rate"),
        "reader_learning_rate": Key(float, "reader_learning_rate"),
        "fidelity": Key(float, "fidelity"),
        "copy_fidelity": Key(float, "copy_fidelity"),
        "copy_share": Key(float, "copy_share"),
        "consistency": Key(float, "consistency"),
        "weight_decay": Key(float, "weight_decay"),
        "batch_size": Key(int, "per_device_train_batch_size", convert=lambda size: _per_process(size)),
        "max_steps": Key(int, "max_steps"),
        "num_train_epochs": Key(float, "num_train_epochs"),
        "lr_scheduler": Key(str, "lr_scheduler_type"),
        "warmup_steps": Key(int, "warmup_steps"),
        "seed": Key(int, "seed"),
        "update_param_groups": Key(list),
    },
    "evaluation": {"eval_steps": Key(int, "eval_steps"), "metric": Key(str, allowed=("seqeval", "accuracy", "f1"))},
    "budget_constraints": {
        "max_extra_params_mb": Key(float, "max_adapter_bytes", convert=lambda mb: round(mb * BYTES_A_MEGABYTE)),
        "max_flop_overhead_pct": Key(float, "max_flops_overhead_pct"),
    },
    "optuna": {
        "n_trials": Key(int),
        "metric": Key(str),
        "direction": Key(str, allowed=("maximize", "minimize")),
        "objectives": Key(list, allowed=(["score"], ["score", "bytes"])),
        "search_space": Key(dict),
    },
    "hardware": {
        "accelerator": Key(str, allowed=("auto", "cpu", "gpu")),
        "precision": Key(str, allowed=("bf16", "fp16", "fp32")),
        "devices": Key(int),
    },
}


def read_run_config(path: str | Path) -> RunConfig:
    """Read and check a run configuration.

    Args:
        path: a YAML file, or a name FOLDER/METHOD-iter1-DATASET, which is composed from the fragments in FOLDER
            (``hub_configs/runs`` by default).

    Raises:
        ConfigError: a file is missing or unreadable, a key is unknown, a value has the wrong type or contradicts
            another.
    """
    content = _content(Path(path))
    where = str(path)
    for required in ("run_id", "method"):
        if required not in content:
            raise ConfigError(f"{where}: the key '{required}' is missing. Every run needs it.")
    method = content["method"]
    _check_value(method, SECTIONS["method"], f"{where}: 'method'")  # the method decides which adapter keys are allowed
    adapter_keys = ADAPTER_KEYS[method]
    arguments: dict[str, Any] = {}
    _read_section(content, SECTIONS | {"adapter": adapter_keys}, where, "", arguments)

    adapter = content.get("adapter", {})
    if method == "unihyperlora":
        arguments["train_scope"] = _train_scope(adapter, content.get("training", {}), where)
    if "eval_steps" in arguments:
        arguments["eval_strategy"] = "steps"
    arguments |= _hardware(content.get("hardware", {}), where)
    if "optuna" in content:
        knobs_of(content["optuna"].get("search_space", {}), searchable_keys(method), method, where)
    return RunConfig(
        run_id=content["run_id"],
        arguments=arguments,
        metric=content.get("evaluation", {}).get("metric", "seqeval"),
        search=content.get("optuna"),
    )


def searchable_keys(method: str) -> dict[str, Key]:
    """Keys that a search may vary: those of the training block and of the method's adapter block."""
    return SECTIONS["training"] | ADAPTER_KEYS[method]


def _read_section(content: Mapping, keys: Mapping, where: str, path: str, arguments: dict[str, Any]) -> None:
    """Check ``content`` against ``keys``, block by block; collect the resulting arguments in ``arguments``."""
    for name, value in content.items():
        full = f"{path}.{name}" if path else str(name)
        if name not in keys:
            nearest = difflib.get_close_matches(str(name), list(keys), n=1, cutoff=0)
            hint = f" The nearest key is '{nearest[0]}'; allowed here: {', '.join(keys)}." if nearest else ""
            raise ConfigError(f"{where}: unknown key '{full}'.{hint}")
        key = keys[name]
        if isinstance(key, Mapping):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: '{full}' must be a block of keys ({', '.join(key)}), not {value!r}.")
            _read_section(value, key, where, full, arguments)
            continue
        _check_value(value, key, f"{where}: '{full}'")
        if key.flag is not None:
            arguments[key.flag] = key.convert(value) if key.convert else value


def _check_value(value: Any, key: Key, what: str) -> None:
    fits = isinstance(value, int | float) if key.kind is float else isinstance(value, key.kind)
    if not fits or (isinstance(value, bool) and key.kind is not bool):
        raise ConfigError(f"{what} must be of type {key.kind.__name__}, not {value!r}.")
    if key.allowed and value not in key.allowed:
        raise ConfigError(f"{what} is {value!r}; allowed: {', '.join(map(str, key.allowed))}.")


def _train_scope(adapter: Mapping, training: Mapping, where: str) -> str:
    """Train scope of the run. The paper's schema has three keys for it; all three must agree."""
    frozen = adapter.get("freeze_base_adapter", False)
    delta_only = adapter.get("train_bias_delta_only", False)
    groups = training.get("update_param_groups")
    if frozen != delta_only:
        raise ConfigError(
            f"{where}: adapter.freeze_base_adapter is {frozen} and adapter.train_bias_delta_only is {delta_only}. "
            "Both are true (only δθ is trained) or both are false (the adapter is trained)."
        )
    if groups is not None and groups != ([DELTA_GROUP] if delta_only else ["adapter"]):
        raise ConfigError(
            f"{where}: training.update_param_groups is {groups}, but train_bias_delta_only is {delta_only}. It must "
            f"be [{DELTA_GROUP}] where only δθ is trained and [adapter] otherwise."
        )
    return "delta" if delta_only else "task"


def _hardware(hardware: Mapping, where: str) -> dict[str, Any]:
    accelerator = hardware.get("accelerator", "auto")
    if accelerator == "gpu" and not torch.accelerator.is_available():
        raise ConfigError(f"{where}: hardware.accelerator is gpu and there is no GPU here. Set it to auto or cpu.")
    if "devices" in hardware and hardware["devices"] != processes():
        logger.warning(
            "%s is written for %d device(s), but this launch has %d. Set the number with accelerate launch "
            "--num_processes.",
            where,
            hardware["devices"],
            processes(),
        )
    on_cpu = accelerator == "cpu" or not torch.accelerator.is_available()
    arguments: dict[str, Any] = {"use_cpu": True} if on_cpu else {}
    if hardware.get("precision") in ("bf16", "fp16"):
        arguments[hardware["precision"]] = True
    return arguments


def _per_process(batch_size: int) -> int:
    """Batch size of each process: the configuration gives that of a whole step, split evenly over the processes."""
    if batch_size % processes():
        raise ConfigError(
            f"training.batch_size={batch_size} cannot be split evenly over {processes()} processes. Give a multiple "
            f"of {processes()}."
        )
    return batch_size // processes()


def _content(path: Path) -> dict[str, Any]:
    """Keys and values of a configuration file, or of the fragments that a name stands for."""
    if path.is_file():
        return _load(path)
    folder = path.parent if len(path.parts) > 1 else RUNS
    name = path.name.removesuffix(".yaml")
    if (folder / f"{name}.yaml").is_file():
        return _load(folder / f"{name}.yaml")
    method, _, dataset = name.partition(SEPARATOR)
    if not dataset or not (folder / "common.yaml").is_file():
        return _load(path)  # raises the error for a missing file
    for kind, chosen in (("dataset", dataset), ("method", method)):
        if not (folder / kind / f"{chosen}.yaml").is_file():
            known = ", ".join(sorted(file.stem for file in (folder / kind).glob("*.yaml")))
            raise ConfigError(f"{path}: there is no {kind} '{chosen}' in {folder / kind}. Choose one of: {known}.")
    content = _load(folder / "common.yaml")
    for fragment in (folder / "dataset" / f"{dataset}.yaml", folder / "method" / f"{method}.yaml"):
        content = _merged(content, _fragment(fragment, {"${dataset.name}": dataset}))
    return content


def _fragment(path: Path, names: Mapping[str, str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Content of a fragment, over that of the fragments beside it that it names under ``defaults``.

    ``above`` are the fragments that lead to this one.
    """
    if path in above:
        raise ConfigError(f"{path}: its 'defaults' lead back to itself. Name another file.")
    own = _load(path, names)
    begins_with = own.pop("defaults", [SELF])
    if not isinstance(begins_with, list) or begins_with[-1:] != [SELF]:
        raise ConfigError(f"{path}: 'defaults' must be a list of files of this folder with {SELF} at its end.")
    content: dict[str, Any] = {}
    for name in begins_with[:-1]:
        content = _merged(content, _fragment(path.with_name(f"{name}.yaml"), names, (*above, path)))
    return _merged(content, own)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested blocks of keys; values of ``above`` win."""
    both = {name: _merged(below[name], above[name]) for name in above if _are_blocks(below.get(name), above[name])}
    return below | above | both


def _are_blocks(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _load(path: Path, names: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Load a YAML file, after replacing each of ``names`` in its text by the name's value."""
    try:
        text = path.read_text(encoding="utf-8")
        for name, value in names.items():
            text = text.replace(name, value)
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a block of keys ({', '.join(SECTIONS)}, adapter), not {content!r}.")
    return content


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.1 as PyYAML does, but reads 1e-5 as a number and refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{name}' is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)
