"""The scripts' command line: its flags, the run config that they override, and checks that need nothing loaded."""

import argparse
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import HfArgumentParser

from modeling_unihyperlora.configuration_unihyperlora import TAG_SCHEMES, reader_shape
from modeling_unihyperlora.errors import ConfigError, DataError, UniHyperLoraError

from .baselines import BASELINES, require_peft
from .results import require_writable
from .run_config import read_run_config
from .training_args import UniHyperLoraTrainingArguments
from .unusable import check_reports

METHODS = ("unihyperlora", "sat_lora", *BASELINES)
SAT_LORA_FLAGS = ("lora_alpha", "share_across_layers", "target_modules")  # for no other method
SPACE_FLAGS = ("space", "anchor_file")  # for a new adapter
STREAM_FLAGS = (*SPACE_FLAGS, "reader", "reader_bits")
INJECTED_FLAGS = ("projector", "router", "router_top_k", "atoms", "anchor_dim")  # for an injected update
UNIVERSAL_FLAGS = ("pathway", *(flag for flag in INJECTED_FLAGS if flag != "router_top_k"))  # not for SAT-LoRA
TARGETS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention_output"}  # PEFT's name → ours
METHOD_LEARNING_RATES = {"lora": 1e-3, "full": 5e-5}  # defaults; the other methods use the adapter's default
HOST_FLAGS = (  # need a host; a run on stored states has none
    *("model_name_or_path", "model_revision", "tokenizer_name", "source_hosts", "anchor_file", "refine_host"),
    *("refine_file", "hidden_size", "num_layers"),
)
SPLITS = ("train", "validation", "test")

# Flags of transformers' run_ner.py, run_classification.py and run_glue.py that the scripts refuse, and the reason.
FOREIGN_FLAGS = {
    "config_name": "a host is frozen and uses the config.json that was saved with it. To use another config, save the "
    "host with it and give that folder as --model_name_or_path",
    "preprocessing_num_workers": "the tokenizer uses all cores in one process; the environment variable "
    "RAYON_NUM_THREADS sets how many",
    "overwrite_cache": "every run encodes its texts anew, so there is no cache to overwrite",
    "ignore_mismatched_sizes": "a host is always loaded whole, and each task gets its own head (--task_name)",
    "use_fast_tokenizer": "only fast tokenizers can tell which word a sub-token belongs to",
    "use_auth_token": "its name is --token now",
    "do_regression": "labels are classes here, not numbers",
    "text_column_names": "--text_column_name names the column and, for pairs, --text_pair_column_name the second one",
    "text_column_delimiter": "pairs of texts stay pairs: give --text_column_name and --text_pair_column_name",
    "train_split_name": "its name is --train_split here",
    "validation_split_name": "its name is --validation_split here",
    "test_split_name": "its name is --test_split here",
    "remove_splits": "the scripts read only the splits that you name",
    "remove_columns": "the scripts read only the columns that you name",
    "shuffle_train_dataset": "training shuffles in every epoch; --max_train_samples takes the first sentences",
    "shuffle_seed": "--data_seed sets the order of training, or else --seed",
    "metric_name": "the metrics are always accuracy and macro F1",
    # of earlier versions of transformers
    "group_by_length": "its name is --train_sampling_strategy group_by_length now",
    "evaluation_strategy": "its name is --eval_strategy now",
    "warmup_ratio": "--warmup_steps below 1 is a share of all steps",
    "no_cuda": "its name is --use_cpu now",
    "use_slow_tokenizer": "only fast tokenizers can tell which word a sub-token belongs to",
    "per_gpu_train_batch_size": "its name is --per_device_train_batch_size now",
    "per_gpu_eval_batch_size": "its name is --per_device_eval_batch_size now",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR names that folder now",
    "save_safetensors": "every file of weights is safetensors",
}


COMMON_FLAGS = {  # what --help shows; %(reads)s is what a file may be
    "--model_name_or_path HOST": "the host: Hub id or folder",
    "--adapter ADAPTER": "start from this adapter: folder, Hub id, or a ready one",
    "--train_file FILE": "%(reads)s",
    "--validation_file FILE": "the same, for --do_eval; --test_file for --do_predict",
    "--dataset_name NAME": "in place of files: a data set of the Hub, or its folder",
    "--do_train --do_eval --do_predict": "what to do",
    "--output_dir DIR": "for the adapter, all_results.json and the predictions",
    "--overwrite_output_dir": "train into a folder that holds another training",
    "--task_name NAME": "what the adapter calls the task; a new name adds a task",
    "--reader small|medium|large": "size of a new task's reader: 24, 60 or 180 kB",
    "--train_scope task|delta": "reader and head (default), or δθ of this host alone",
    "--max_steps N": "or --num_train_epochs N",
    "--per_device_train_batch_size N": "8 by default",
    "--learning_rate X": "0.005 by default, and less for some parts",
    "--max_seq_length N": "sub-tokens that the host reads at once; 128 by default",
    "--seed N": "42 by default",
    "--run_config FILE": "a whole run in YAML; flags that are typed win",
    "--method METHOD": "unihyperlora, or to compare: sat_lora, lora, full, probe",
}


@dataclass
class ModelArguments:
    """Flags for the host, the adapter and the method."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Host: Hub id or folder. With --adapter, the adapter's own host by default."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Start from this adapter: folder or Hub id."})
    method: str = field(default="unihyperlora", metadata={"help": f"One of: {', '.join(METHODS)}."})
    lora_r: int = field(
        default=8,
        metadata={
            "help": "Rank of --method lora (alpha is twice the rank). With --method sat_lora, the number of atoms for "
            "each shape of linear layer (and for each block, if blocks do not share them)."
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "For --method sat_lora: the scale of the update is lora_alpha / lora_r; default: 2."},
    )
    share_across_layers: bool | None = field(
        default=None,
        metadata={
            "help": "For --method sat_lora: blocks share their atoms (true, the default) or each block has its own."
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "For --method sat_lora: linear layers to update, some of q_proj k_proj v_proj o_proj ffn_up "
            "ffn_down; default: all."
        },
    )
    pathway: str | None = field(
        default=None,
        metadata={
            "help": "stream (default): the adapter works on unseen hosts; inject: the adapter updates the layers of "
            "the host that it is trained on, and does not transfer to other hosts."
        },
    )
    projector: str | None = field(default=None, metadata={"help": "For --pathway inject: kind of projector."})
    router: str | None = field(default=None, metadata={"help": "For --pathway inject: token or static."})
    router_top_k: int | None = field(
        default=None, metadata={"help": "For --pathway inject: maximum number of atoms per token, 1 to 3."}
    )
    atoms: int | None = field(default=None, metadata={"help": "For --pathway inject: number of atoms, M."})
    anchor_dim: int | None = field(
        default=None, metadata={"help": "For --pathway inject: width of the canonical space, d0."}
    )
    reader: str | None = field(
        default=None, metadata={"help": "Size of a new task's reader: small, medium or large (default)."}
    )
    reader_bits: int | None = field(
        default=None, metadata={"help": "Bits of the matrices of a new task's reader: 4 (default) or 8."}
    )
    space: str | None = field(
        default=None, metadata={"help": "File with the canonical space of a new stream; default: the package's space."}
    )
    source_hosts: list[str] | None = field(
        default=None,
        metadata={"help": "Further hosts, beside --model_name_or_path, to train a task of a stream on."},
    )
    anchor_file: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --space: text with one sentence per line, from which this host makes a new space."
        },
    )
    refine_file: str | None = field(
        default=None,
        metadata={
            "help": "Text for --refine_host, one sentence per line, words separated by blanks. Use text similar to "
            "the text that the adapter will read. Default: the training split without its labels."
        },
    )
    refine_host: str | None = field(
        default=None,
        metadata={
            "help": "A host that --adapter was trained on. It reads unlabelled text, and the host of "
            "--model_name_or_path is aligned with its states on that text too."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Refuse a host with another hidden size."})
    num_layers: int | None = field(default=None, metadata={"help": "Refuse a host with another number of blocks."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the host."})
    adapter_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the adapter."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer; default: the host's own."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code from the tokenizer's repository; never allowed for a host."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads from the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub; default: that of the Hub login."})
    run_config: str | None = field(
        default=None, metadata={"help": "YAML file with the settings of a run; command-line flags override them."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Allow an --output_dir with the result or checkpoints of another training run; deletes those "
            "checkpoints."
        },
    )
    do_search: bool = field(
        default=False,
        metadata={
            "help": "Search hyperparameters in the run config's optuna space or a default one, then train with the "
            "best values into --output_dir. The same command resumes a stopped search, or shares the trials of a "
            "running one."
        },
    )
    n_trials: int | None = field(
        default=None,
        metadata={"help": "Total number of trials, including those of earlier calls; default: 25."},
    )

    def shape(self) -> dict[str, object]:
        """Settings of the adapter's shape that were given."""
        names = ("pathway", "projector", "router", "router_top_k", "atoms", "anchor_dim")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | self.sat_lora_shape() if self.method == "sat_lora" else given

    def new_reader(self, named: bool = True) -> dict[str, object]:
        """Given settings of a new task's reader: arguments of ``add_task``, or of ``from_host`` if not ``named``."""
        bits = {} if self.reader_bits is None else {"bits": self.reader_bits}
        if named or not bits:
            return bits | ({} if self.reader is None else {"reader": self.reader})
        return {"reader": reader_shape(self.reader or "large", self.reader_bits)}

    def sat_lora_shape(self) -> dict[str, object]:
        """Settings of SAT-LoRA's shape, as arguments of ``UniHyperLoraConfig``."""
        targets = self.target_modules and [TARGETS.get(name, name) for name in self.target_modules]
        return {
            "pathway": "inject",
            "projector": "host",
            "atoms": self.lora_r,
            "router_top_k": min(self.router_top_k or 2, self.lora_r),
            "atom_scale": (2 * self.lora_r if self.lora_alpha is None else self.lora_alpha) / self.lora_r,
            "share_across_layers": self.share_across_layers in (None, True),
            "target_modules": targets or None,
        }

    @property
    def makes_stream(self) -> bool:
        """Whether the run makes a new stream."""
        return self.adapter is None and self.method == "unihyperlora" and self.pathway in (None, "stream")

    def hub(self) -> dict[str, str]:
        """Arguments for loading from the Hub."""
        return {name: getattr(self, name) for name in ("cache_dir", "token") if getattr(self, name) is not None}

    def __post_init__(self):
        if self.lora_r < 1:
            raise ConfigError(f"--lora_r {self.lora_r} is not a rank; give 1 or more.")


@dataclass
class DataArguments:
    """Flags for the data, from files or from the Hub; each script has its own subclass."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of the task in the adapter; a new name adds a task. Default: the active task of --adapter, "
            "else 'ner' or 'classification'."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set: Hub id or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "File to train on; the README lists the formats."})
    validation_file: str | None = field(default=None, metadata={"help": "File for --do_eval."})
    test_file: str | None = field(default=None, metadata={"help": "File for --do_predict."})
    train_states: list[str] | None = field(
        default=None,
        metadata={"help": "Folders written by `unihyperlora read`, instead of a file; no host is loaded."},
    )
    validation_states: list[str] | None = field(default=None, metadata={"help": "Folders for --do_eval."})
    test_states: list[str] | None = field(default=None, metadata={"help": "Folders for --do_predict."})
    train_split: str = field(
        default="train", metadata={"help": "Split of --dataset_name to train on, such as 'train[:90%%]'."}
    )
    validation_split: str = field(default="validation", metadata={"help": "Split of --dataset_name for --do_eval."})
    test_split: str = field(default="test", metadata={"help": "Split of --dataset_name for --do_predict."})
    max_seq_length: int = field(
        default=128, metadata={"help": "Maximum number of sub-tokens that the host reads at once."}
    )
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every batch to --max_seq_length."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N sentences only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate the first N sentences only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first N sentences only."})
    cache_eval_states: bool = field(
        default=False,
        metadata={
            "help": "Cache the host's states of the validation data on disk (in $UNIHYPERLORA_CACHE), as training "
            "does with the training data. Use this if a stream is scored more than once."
        },
    )

    COMMAND: ClassVar[str]  # of ``unihyperlora``
    READS: ClassVar[str]  # what a file may be
    NAMES_FLAG: ClassVar[str]  # the flag that names the ids 0, 1, …
    METRICS: ClassVar[tuple[str, ...]]  # metrics that an evaluation reports, without "eval_"

    def id_names(self) -> list[str] | None:
        """Given names of the ids 0, 1, …, or None."""
        return getattr(self, self.NAMES_FLAG.removeprefix("--"))

    def reading(self, split: str) -> dict[str, object]:
        """Arguments for the reader of this kind of data; ``split`` is "train", "validation" or "test"."""
        raise NotImplementedError

    def reports(self, metric: str) -> bool:
        """Whether an evaluation on this data reports a metric."""
        return metric in self.METRICS

    def name(self) -> str:
        """Name of the data in results: the id of the data set, or the folder of the files or of the states."""
        files = (self.train_file, self.validation_file, self.test_file)
        if self.reads_states:
            return next(Path(folders[0]).absolute().name for folders in map(self.states_of, SPLITS) if folders)
        return self.dataset_name or next((Path(file).absolute().parent.name for file in files if file), "")

    def file_of(self, split: str) -> str | None:
        """The file given for "train", "validation" or "test"."""
        return getattr(self, f"{split}_file")

    def states_of(self, split: str) -> list[str] | None:
        """The folders of stored states given for "train", "validation" or "test"."""
        return getattr(self, f"{split}_states")

    @property
    def reads_states(self) -> bool:
        """Whether the run reads stored states instead of text."""
        return any(map(self.states_of, SPLITS))

    def split_of(self, split: str) -> str:
        """Name that the data set has for "train", "validation" or "test"."""
        return getattr(self, f"{split}_split")

    def limit_of(self, split: str) -> int | None:
        """Largest number of sentences to use of "train", "validation" or "test"; None for all."""
        return {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_predict_samples,
        }[split]

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} leaves no sentences; give 1 or more.")


@dataclass
class NerArguments(DataArguments):
    """Flags for tagged text: JSON lines, or columns of words and tags. Long sentences are read in several windows."""

    text_column_name: str = field(default="tokens", metadata={"help": "Column with the list of words."})
    label_column_name: str = field(default="ner_tags", metadata={"help": "Column with the list of tags."})
    tag_names: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the ids 0, 1, …; needed if files hold ids and there is no --adapter."},
    )
    tag_scheme: str | None = field(
        default=None,
        metadata={
            "help": f"Scheme of the tags, one of {', '.join(TAG_SCHEMES)}. Default: the scheme of --adapter, else "
            "inferred from the training tags."
        },
    )
    label_all_tokens: bool = field(
        default=False,
        metadata={
            "help": "Train on every sub-token of a word; after the first, B- becomes I-. For --pathway inject and the "
            "baselines. Words are still scored at their first sub-token."
        },
    )
    return_entity_level_metrics: bool = field(default=False, metadata={"help": "Also score every entity type."})

    COMMAND = "ner"
    READS = "JSON lines (tokens, ner_tags) or columns (word and tag)"
    NAMES_FLAG = "--tag_names"
    METRICS = ("precision", "recall", "f1", "accuracy")

    def reports(self, metric: str) -> bool:
        of_a_type = self.return_entity_level_metrics and metric.rpartition("_")[2] in ("precision", "recall", "f1")
        return of_a_type or super().reports(metric)

    def reading(self, split: str) -> dict[str, object]:
        return {
            "text_column": self.text_column_name,
            "label_column": self.label_column_name,
            "needs_tags": split != "test",
        }

    def __post_init__(self):
        super().__post_init__()
        if self.tag_scheme not in (None, *TAG_SCHEMES):
            raise ConfigError(f"--tag_scheme {self.tag_scheme} is unknown. Choose one of {', '.join(TAG_SCHEMES)}.")


@dataclass
class ClassificationArguments(DataArguments):
    """Flags for texts or pairs of texts with one label each: JSON lines or CSV. Long texts are cut at the end."""

    text_column_name: str | None = field(
        default=None, metadata={"help": "Column with the text; default: a known name, such as sentence or text."}
    )
    text_pair_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the second text of a pair. Default: known pairs of names (sentence1 and sentence2, "
            "question and passage, premise and hypothesis …), unless --text_column_name is given."
        },
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the label; default: label, labels or answer."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the ids 0, 1, …; default: the names in --adapter, else the numbers."}
    )

    COMMAND = "classification"
    READS = "JSON lines or CSV with a text, or a pair, and a label"
    NAMES_FLAG = "--class_names"
    METRICS = ("accuracy", "f1")

    def reading(self, split: str) -> dict[str, object]:
        return {
            "text_column": self.text_column_name,
            "pair_column": self.text_pair_column_name,
            "label_column": self.label_column_name,
            "needs_label": split != "test",
        }


def parse(
    command_line: list[str], data_class: type[DataArguments]
) -> tuple[ModelArguments, DataArguments, UniHyperLoraTrainingArguments]:
    """Parse a command line. The arguments of --run_config come first, so the command line overrides them.

    Args:
        command_line: arguments of the command line.
        data_class: flags of this kind of data.

    Raises:
        ConfigError: a flag is unknown, or a value is not usable.
    """
    parser = HfArgumentParser(
        (ModelArguments, data_class, UniHyperLoraTrainingArguments), allow_abbrev=False, add_help=False
    )
    own = {"default": argparse.SUPPRESS}
    short = short_help(data_class)
    parser.add_argument("-h", "--help", action=_ShortHelp, nargs=0, const=short, help="the common flags", **own)
    parser.add_argument("--help-all", action="help", help="every flag", **own)
    typed, _ = parser.parse_known_args(command_line)
    if typed.run_config is not None:
        run = read_run_config(typed.run_config)
        if typed.train_file or typed.validation_file or typed.test_file:
            run.arguments.pop("dataset_name", None)  # files on the command line replace the run config's data set
        if typed.train_states or typed.validation_states or typed.test_states:
            for name in ("dataset_name", "train_file", "validation_file", "test_file", "model_name_or_path"):
                run.arguments.pop(name, None)  # stored states replace the run config's data, and need no host
        command_line = run.to_command_line() + command_line
        typed, _ = parser.parse_known_args(command_line)
    if typed.method in METHOD_LEARNING_RATES:
        parser.set_defaults(learning_rate=METHOD_LEARNING_RATES[typed.method])
    if typed.method in BASELINES:
        parser.set_defaults(max_adapter_bytes=None, max_flops_overhead_pct=None)  # the default budget is for adapters
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            command_line, return_remaining_strings=True, look_for_args_file=False
        )
    except UniHyperLoraError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, NotImplementedError) as error:
        raise ConfigError(f"The arguments cannot be used: {' '.join(str(error).split())}") from error
    if unknown:
        foreign = unknown[0].split("=")[0].removeprefix("--")
        if foreign in FOREIGN_FLAGS:
            raise ConfigError(f"--{foreign} is not supported: {FOREIGN_FLAGS[foreign]}. Leave it out.")
        flags = [flag for action in parser._actions for flag in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0)[0]
        raise ConfigError(f"Unknown argument {unknown[0]}. The nearest flag is {nearest}; --help-all lists all.")
    return tuple(parsed)


class _ShortHelp(argparse.Action):
    """Prints its ``const`` as it is, and leaves."""

    def __call__(self, parser, *_) -> None:
        print(self.const)
        parser.exit()


def short_help(data_class: type[DataArguments]) -> str:
    """What --help prints: the common flags, on one screen."""
    rows = [f"  {flag:<34}{said % {'reads': data_class.READS}}" for flag, said in COMMON_FLAGS.items()]
    return "\n".join(
        [
            f"usage: unihyperlora {data_class.COMMAND} --model_name_or_path HOST --output_dir DIR …",
            "",
            *rows,
            "",
            "--help-all lists every flag, those of transformers' TrainingArguments among them.",
        ]
    )


def check_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: UniHyperLoraTrainingArguments
) -> None:
    """Check arguments before anything is loaded.

    Raises:
        ConfigError, DataError: an argument is not allowed, or two arguments contradict each other.
    """
    if model_args.method not in METHODS:
        raise ConfigError(f"--method {model_args.method} is unknown. Choose: {', '.join(METHODS)}.")
    if model_args.n_trials is not None and not model_args.do_search:
        raise ConfigError("--n_trials is for a search; give --do_search with it, or leave it out.")
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ConfigError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    if training_args.do_train and training_args.max_steps < 0 and training_args.num_train_epochs <= 0:
        raise ConfigError(
            f"--num_train_epochs {training_args.num_train_epochs} trains nothing; give more than 0, or --max_steps."
        )
    if training_args.do_train and training_args.max_steps == 0:
        raise ConfigError("--max_steps 0 trains nothing; give 1 or more, or leave it out.")
    if model_args.method in BASELINES and model_args.adapter is not None:
        raise ConfigError(f"--method {model_args.method} has no adapter to start from; leave --adapter out.")
    if model_args.method in METHOD_LEARNING_RATES and (parts := training_args.learning_rates_given()):
        raise ConfigError(
            f"--method {model_args.method} trains everything at --learning_rate; leave --{parts[0]} out. It is for a "
            "part of an adapter."
        )
    if model_args.method == "lora":
        require_peft()
    foreign = {
        "unihyperlora": SAT_LORA_FLAGS,
        "sat_lora": (*UNIVERSAL_FLAGS, *STREAM_FLAGS),
        **dict.fromkeys(BASELINES, (*SAT_LORA_FLAGS, *UNIVERSAL_FLAGS, "router_top_k", *STREAM_FLAGS)),
    }[model_args.method]
    if given := [name for name in foreign if getattr(model_args, name) is not None]:
        raise ConfigError(f"--method {model_args.method} does not use --{given[0]}; leave it out.")
    if model_args.method != "unihyperlora" and training_args.train_scope == "delta":
        raise ConfigError(
            f"--method {model_args.method} has no δθ: all of it is trained on each host. Leave --train_scope out."
        )
    unread = STREAM_FLAGS if model_args.pathway == "inject" else SPACE_FLAGS if model_args.adapter else ()
    if given := [name for name in unread if getattr(model_args, name) is not None]:
        raise ConfigError(f"--{given[0]} is for a new stream, but this run does not make one; leave it out.")
    if model_args.makes_stream and (given := [n for n in INJECTED_FLAGS if getattr(model_args, n) is not None]):
        raise ConfigError(f"--{given[0]} is for an injected update: add --pathway inject, or leave it out.")
    reader_shape(**{"reader": "large"} | model_args.new_reader())
    if data_args.reads_states:
        check_stored(model_args, data_args)
    elif model_args.model_name_or_path is None and model_args.adapter is None:
        raise ConfigError("No host: give --model_name_or_path, or an --adapter, which names its host.")
    if model_args.method == "unihyperlora" and training_args.train_scope == "delta" and model_args.adapter is None:
        raise ConfigError(
            "--train_scope delta tunes an existing adapter: give --adapter FOLDER_OR_HUB_ID, or first train one with "
            "--train_scope task."
        )
    is_stream = model_args.pathway in (None, "stream") and model_args.method == "unihyperlora"
    if model_args.source_hosts and (not is_stream or training_args.train_scope == "delta"):
        raise ConfigError(
            "--source_hosts names further hosts to train a task of a stream on. Use it with --train_scope task, or "
            "leave it out: an injected update, δθ and the baselines are trained on one host."
        )
    if model_args.space is not None and model_args.anchor_file is not None:
        raise ConfigError("Give --space, or --anchor_file to make a new space; not both.")
    if model_args.refine_host is None and model_args.refine_file is not None:
        raise ConfigError("--refine_file needs --refine_host: give a host that the adapter was trained on.")
    if model_args.refine_host is not None and model_args.refine_file is None and not training_args.do_train:
        raise ConfigError(
            "--refine_host needs text without labels: add --refine_file TEXT, or --do_train to use the training text."
        )
    trained_anew = training_args.do_train and training_args.train_scope != "delta"
    if model_args.refine_host is not None and (model_args.adapter is None or trained_anew):
        raise ConfigError(
            "--refine_host aligns one more host with a trained stream: add --adapter FOLDER_OR_HUB_ID, and train with "
            "--train_scope delta or not at all."
        )
    scored = training_args.do_eval or training_args.do_predict or training_args.eval_strategy != "no"
    if scored and training_args.train_sampling_strategy == "group_by_length":
        raise ConfigError(
            "--train_sampling_strategy group_by_length also reorders the evaluation data, so predictions would go to "
            "the wrong sentences. Leave it out, or train and evaluate in two runs."
        )
    check_evaluation(model_args, data_args, training_args)
    check_reports(training_args)
    files = [data_args.train_file, data_args.validation_file, data_args.test_file]
    if data_args.dataset_name is not None and any(files):
        raise DataError("Give --dataset_name or files (--train_file …), not both.")
    require_writable(training_args.output_dir)


def check_stored(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Check the arguments of a run on stored states, which has no host in memory and reads no text.

    Raises:
        ConfigError: an argument needs a host or sub-tokens.
        DataError: text is given too.
    """
    given = next(f"--{split}_states" for split in SPLITS if data_args.states_of(split))
    if data_args.dataset_name is not None or any(map(data_args.file_of, SPLITS)):
        raise DataError(f"{given} replaces text. Give stored states or text (--train_file …), not both.")
    if named := [name for name in HOST_FLAGS if getattr(model_args, name) is not None]:
        raise ConfigError(f"{given}: the states are stored, so no host is loaded. Leave --{named[0]} out.")
    if model_args.method != "unihyperlora" or model_args.pathway == "inject":
        other = "--pathway inject" if model_args.method == "unihyperlora" else f"--method {model_args.method}"
        raise ConfigError(f"{other} computes inside a host, but {given} loads no host. Leave one of the two out.")
    if data_args.cache_eval_states:
        raise ConfigError(
            f"--cache_eval_states is for text, but the states of {given} are stored already. Leave it out."
        )
    if getattr(data_args, "label_all_tokens", False) or data_args.pad_to_max_length:
        raise ConfigError(
            f"{given} has words, but no sub-tokens. Leave --label_all_tokens and --pad_to_max_length out."
        )


def check_evaluation(
    model_args: ModelArguments, data_args: DataArguments, training_args: UniHyperLoraTrainingArguments
) -> None:
    """Check the arguments of the evaluation; without this check a misspelt metric would fail only after training.

    Raises:
        ConfigError: the evaluation does not support an argument, or does not report the metric.
    """
    if training_args.batch_eval_metrics:
        raise ConfigError("--batch_eval_metrics: F1 is computed on a whole split, not on a batch. Leave it out.")
    if not training_args.eval_do_concat_batches:
        raise ConfigError("--eval_do_concat_batches false: F1 is computed on a whole split. Leave it out.")
    if training_args.include_for_metrics:
        raise ConfigError("--include_for_metrics: no metric of this script reads it. Leave it out.")
    if training_args.prediction_loss_only and training_args.do_predict:
        raise ConfigError("--prediction_loss_only leaves nothing for --do_predict to write. Leave out one of the two.")
    metric = training_args.metric_for_best_model
    if metric is None:
        return
    metric, others = metric.removeprefix("eval_"), ["loss"]
    if model_args.method not in BASELINES:
        others.append("active_atoms_per_token")
    scored = data_args.reports(metric) and not training_args.prediction_loss_only
    if metric not in others and not scored:
        known = others if training_args.prediction_loss_only else [*data_args.METRICS, *others]
        raise ConfigError(
            f"The evaluation does not report --metric_for_best_model {training_args.metric_for_best_model}. Choose "
            f"one of: {', '.join(known)}."
        )
