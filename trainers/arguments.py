"""The command line of the scripts: its flags, the run config in front of them, and what can be refused at once."""

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
SAT_LORA_FLAGS = ("lora_alpha", "share_across_layers", "target_modules")  # of no other method
SPACE_FLAGS = ("space", "anchor_file")  # of a new adapter
STREAM_FLAGS = (*SPACE_FLAGS, "reader", "reader_bits")
INJECTED_FLAGS = ("projector", "router", "router_top_k", "atoms", "anchor_dim")  # of an injected update
UNIVERSAL_FLAGS = ("pathway", *(flag for flag in INJECTED_FLAGS if flag != "router_top_k"))  # which SAT-LoRA has not
TARGETS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention_output"}  # as PEFT says it
METHOD_LEARNING_RATES = {
    "lora": 1e-3,
    "full": 5e-5,
}  # where --learning_rate is not given; the others have the adapter's

FOREIGN_FLAGS = {  # of transformers' run_ner.py, run_classification.py and run_glue.py: why each has no place here
    "config_name": "a host is frozen, and is read by the config.json that was saved with it. For another one save the "
    "host with it, and give that folder as --model_name_or_path",
    "preprocessing_num_workers": "the tokenizer itself works on all cores, in one process; RAYON_NUM_THREADS in the "
    "environment sets on how many",
    "overwrite_cache": "texts are encoded anew in every run; nothing is kept that could be overwritten",
    "ignore_mismatched_sizes": "a host is loaded whole or not at all, and a task gets a head of its own (--task_name)",
    "use_fast_tokenizer": "only fast tokenizers can say to which word a sub-token belongs",
    "use_auth_token": "its name is --token now",
    "do_regression": "labels are classes here, not numbers",
    "text_column_names": "the columns are named by --text_column_name and, for pairs, --text_pair_column_name",
    "text_column_delimiter": "a pair of texts is read as a pair: --text_column_name and --text_pair_column_name",
    "train_split_name": "its name is --train_split here",
    "validation_split_name": "its name is --validation_split here",
    "test_split_name": "its name is --test_split here",
    "remove_splits": "only the splits that are named are read",
    "remove_columns": "only the columns that are named are read",
    "shuffle_train_dataset": "training shuffles in every epoch; --max_train_samples takes the first ones",
    "shuffle_seed": "training shuffles by --data_seed, or else by --seed",
    "metric_name": "the figures are accuracy and macro F1",
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
    "--reader small|medium|large": "size of a new task's reader: 36, 100 or 330 kB",
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
    """The host, the adapter on it, and the method."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Host: Hub id or folder. With --adapter, the adapter's own host by default."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Start from this adapter: folder or Hub id."})
    method: str = field(default="unihyperlora", metadata={"help": f"One of: {', '.join(METHODS)}."})
    lora_r: int = field(
        default=8,
        metadata={
            "help": "Rank of --method lora, whose alpha is twice the rank; of sat_lora the atoms for each shape of "
            "linear layer (and block, unless shared)."
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Of --method sat_lora: its update is scaled by lora_alpha / lora_r; 2 if none."},
    )
    share_across_layers: bool | None = field(
        default=None,
        metadata={"help": "Of --method sat_lora: all blocks use the same atoms (default) or each its own."},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Of --method sat_lora: some of q_proj k_proj v_proj o_proj ffn_up ffn_down; all if none."},
    )
    pathway: str | None = field(
        default=None,
        metadata={
            "help": "stream (default): works on hosts that it has not seen; inject: an update inside the host that it "
            "is trained on, which does not carry over."
        },
    )
    projector: str | None = field(default=None, metadata={"help": "Of --pathway inject: kind of projector."})
    router: str | None = field(default=None, metadata={"help": "Of --pathway inject: token or static."})
    router_top_k: int | None = field(
        default=None, metadata={"help": "Of --pathway inject: atoms a token may use, 1 to 3."}
    )
    atoms: int | None = field(default=None, metadata={"help": "Of --pathway inject: number of atoms, M."})
    anchor_dim: int | None = field(
        default=None, metadata={"help": "Of --pathway inject: width of its canonical space, d0."}
    )
    reader: str | None = field(
        default=None, metadata={"help": "Size of a new task's reader: small, medium or large (default)."}
    )
    reader_bits: int | None = field(default=None, metadata={"help": "Bits of its matrices: 8 (default) or 4."})
    space: str | None = field(
        default=None, metadata={"help": "File of the canonical space of a new stream; the package's own if none."}
    )
    source_hosts: list[str] | None = field(
        default=None,
        metadata={"help": "More hosts, beside --model_name_or_path, to train a task of a stream on."},
    )
    anchor_file: str | None = field(
        default=None,
        metadata={"help": "In place of --space: text, one sentence a line, from which a space is made on this host."},
    )
    refine_file: str | None = field(
        default=None,
        metadata={
            "help": "The text for --refine_host, one sentence a line, words between blanks; that of the training "
            "split, without its labels, if none. Of the kind that is to be read."
        },
    )
    refine_host: str | None = field(
        default=None,
        metadata={
            "help": "A host that --adapter was trained on: as it reads unlabelled text, the host of "
            "--model_name_or_path is lined up on that text as well."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Refuse a host that is not this wide."})
    num_layers: int | None = field(default=None, metadata={"help": "Refuse a host with another number of blocks."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the host."})
    adapter_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the adapter."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the host's."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let the tokenizer's repository run its own code; a host never may."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub, if not the one logged in with."})
    run_config: str | None = field(
        default=None, metadata={"help": "YAML file with a whole run; flags given on the command line win."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Train into an --output_dir that holds the result or the checkpoints of another training; those "
            "checkpoints are deleted."
        },
    )
    do_search: bool = field(
        default=False,
        metadata={
            "help": "Search the run config's optuna space, or a default one, then train the best trial into "
            "--output_dir. The same command again goes on where it stopped; started twice, both share the work."
        },
    )
    n_trials: int | None = field(
        default=None,
        metadata={"help": "Trials of the search in all, those of earlier calls included; 25 if nothing says."},
    )

    def shape(self) -> dict[str, object]:
        """The adapter's choices that were given."""
        names = ("pathway", "projector", "router", "router_top_k", "atoms", "anchor_dim")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | self.sat_lora_shape() if self.method == "sat_lora" else given

    def new_reader(self, named: bool = True) -> dict[str, object]:
        """The reader of a new task as ``add_task`` takes it, or with ``named`` false ``from_host``; what was given."""
        bits = {} if self.reader_bits is None else {"bits": self.reader_bits}
        if named or not bits:
            return bits | ({} if self.reader is None else {"reader": self.reader})
        return {"reader": reader_shape(self.reader or "large", self.reader_bits)}

    def sat_lora_shape(self) -> dict[str, object]:
        """The same for SAT-LoRA, in the words of ``UniHyperLoraConfig``."""
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
        """Whether the run is to make a new stream."""
        return self.adapter is None and self.method == "unihyperlora" and self.pathway in (None, "stream")

    def hub(self) -> dict[str, str]:
        """Arguments for whatever is loaded from the Hub."""
        return {name: getattr(self, name) for name in ("cache_dir", "token") if getattr(self, name) is not None}

    def __post_init__(self):
        if self.lora_r < 1:
            raise ConfigError(f"--lora_r {self.lora_r} is no rank; give 1 or more.")


@dataclass
class DataArguments:
    """The data, from files or from the Hub; each script has its own sub-class."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "Name under which the adapter keeps this task's head and δθ. By default the active task of "
            "--adapter, else 'ner' or 'classification'. A name that the adapter does not have is added to it."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set: Hub id or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "File to train on; the README has the formats."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for --do_eval."})
    test_file: str | None = field(default=None, metadata={"help": "The same, for --do_predict."})
    train_split: str = field(default="train", metadata={"help": "Split of --dataset_name, such as 'train[:90%%]'."})
    validation_split: str = field(default="validation", metadata={"help": "Split of --dataset_name."})
    test_split: str = field(default="test", metadata={"help": "Split of --dataset_name."})
    max_seq_length: int = field(default=128, metadata={"help": "Most sub-tokens that the host reads at once."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every batch to --max_seq_length."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first sentences only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first sentences only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use the first sentences only."})
    cache_eval_states: bool = field(
        default=False,
        metadata={
            "help": "Score a stream on the host's states of --validation_file kept on disk (in $UNIHYPERLORA_CACHE), "
            "as training does with the training data; worth it when it is scored more than once."
        },
    )

    COMMAND: ClassVar[str]  # of ``unihyperlora``
    READS: ClassVar[str]  # what a file may be
    NAMES_FLAG: ClassVar[str]  # the flag that names the ids 0, 1, …
    METRICS: ClassVar[tuple[str, ...]]  # what an evaluation reports, less "eval_"

    def id_names(self) -> list[str] | None:
        """Names of the ids 0, 1, …, if they were given."""
        return getattr(self, self.NAMES_FLAG.removeprefix("--"))

    def reading(self, split: str) -> dict[str, object]:
        """How "train", "validation" or "test" is to be read: arguments of the reader of this kind of data."""
        raise NotImplementedError

    def reports(self, metric: str) -> bool:
        """Whether an evaluation on this data reports a metric."""
        return metric in self.METRICS

    def name(self) -> str:
        """What results call this data: the data set's id, or the folder of the files."""
        files = (self.train_file, self.validation_file, self.test_file)
        return self.dataset_name or next((Path(file).absolute().parent.name for file in files if file), "")

    def file_of(self, split: str) -> str | None:
        """The file given for "train", "validation" or "test"."""
        return getattr(self, f"{split}_file")

    def split_of(self, split: str) -> str:
        """What that part is called in the data set."""
        return getattr(self, f"{split}_split")

    def limit_of(self, split: str) -> int | None:
        """How many of its sentences are used; None for all."""
        return {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_predict_samples,
        }[split]

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} leaves no sentence; give 1 or more.")


@dataclass
class NerArguments(DataArguments):
    """Tagged text: JSON lines, or word and tag in columns. A sentence that is too long is read in several windows."""

    text_column_name: str = field(default="tokens", metadata={"help": "Column with the list of words."})
    label_column_name: str = field(default="ner_tags", metadata={"help": "Column with the list of tags."})
    tag_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the ids 0, 1, …; needed where files hold ids and no --adapter."}
    )
    tag_scheme: str | None = field(
        default=None,
        metadata={
            "help": f"Scheme of the tags, one of {', '.join(TAG_SCHEMES)}; by default that of --adapter, else "
            "what the training tags keep to."
        },
    )
    label_all_tokens: bool = field(
        default=False,
        metadata={
            "help": "Train on every sub-token of a word, with B- as I- on the further ones; for --pathway inject and "
            "the baselines. Words are scored at their first one all the same."
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
    """Texts or pairs of texts with one label each: JSON lines or CSV. What is too long is cut at the end."""

    text_column_name: str | None = field(
        default=None, metadata={"help": "Column with the text; by default a known one, such as sentence or text."}
    )
    text_pair_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the second text of a pair. By default known pairs are found (sentence1 and "
            "sentence2, question and passage, premise and hypothesis …), unless --text_column_name is given."
        },
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the label; by default label, labels or answer."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the ids 0, 1, …; by default those of --adapter, else the numbers."}
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
    """Flags, with those of --run_config in front so that the ones typed win.

    Args:
        command_line: what was typed.
        data_class: the flags of the kind of data.

    Raises:
        ConfigError: an unknown flag or a value that is not usable.
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
            run.arguments.pop("dataset_name", None)  # files that were typed take the place of the file's data set
        command_line = run.to_command_line() + command_line
        typed, _ = parser.parse_known_args(command_line)
    if typed.method in METHOD_LEARNING_RATES:
        parser.set_defaults(learning_rate=METHOD_LEARNING_RATES[typed.method])
    if typed.method in BASELINES:
        parser.set_defaults(max_adapter_bytes=None, max_flops_overhead_pct=None)  # the package's are for its adapter
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
            raise ConfigError(f"--{foreign} has no place here: {FOREIGN_FLAGS[foreign]}. Leave it out.")
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
    """What can be refused before anything is loaded.

    Raises:
        ConfigError, DataError
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
            f"--method {model_args.method} trains everything at --learning_rate; leave --{parts[0]} out, which is for "
            "a part of the adapter."
        )
    if model_args.method == "lora":
        require_peft()
    foreign = {
        "unihyperlora": SAT_LORA_FLAGS,
        "sat_lora": (*UNIVERSAL_FLAGS, *STREAM_FLAGS),
        **dict.fromkeys(BASELINES, (*SAT_LORA_FLAGS, *UNIVERSAL_FLAGS, "router_top_k", *STREAM_FLAGS)),
    }[model_args.method]
    if given := [name for name in foreign if getattr(model_args, name) is not None]:
        raise ConfigError(f"--{given[0]} means nothing to --method {model_args.method}; leave it out.")
    if model_args.method != "unihyperlora" and training_args.train_scope == "delta":
        raise ConfigError(
            f"--method {model_args.method} has no δθ: it is trained whole for each host. Leave --train_scope out."
        )
    unread = STREAM_FLAGS if model_args.pathway == "inject" else SPACE_FLAGS if model_args.adapter else ()
    if given := [name for name in unread if getattr(model_args, name) is not None]:
        raise ConfigError(f"--{given[0]} is for a new stream, which this run does not make; leave it out.")
    if model_args.makes_stream and (given := [n for n in INJECTED_FLAGS if getattr(model_args, n) is not None]):
        raise ConfigError(f"--{given[0]} is of an injected update: give --pathway inject with it, or leave it out.")
    reader_shape(**{"reader": "large"} | model_args.new_reader())
    if model_args.model_name_or_path is None and model_args.adapter is None:
        raise ConfigError("No host: give --model_name_or_path, or --adapter, which names its own.")
    if model_args.method == "unihyperlora" and training_args.train_scope == "delta" and model_args.adapter is None:
        raise ConfigError(
            "--train_scope delta tunes an adapter that exists: give --adapter FOLDER_OR_HUB_ID, or train one first "
            "with --train_scope task."
        )
    is_stream = model_args.pathway in (None, "stream") and model_args.method == "unihyperlora"
    if model_args.source_hosts and (not is_stream or training_args.train_scope == "delta"):
        raise ConfigError(
            "--source_hosts names further hosts to train a task of a stream on. Give it with --train_scope task, or "
            "leave it out: an injected update, δθ and the baselines are trained on one host."
        )
    if model_args.space is not None and model_args.anchor_file is not None:
        raise ConfigError("Give --space or --anchor_file, from which a space is made; not both.")
    if model_args.refine_host is None and model_args.refine_file is not None:
        raise ConfigError("--refine_file is read by --refine_host: give a host that the adapter was trained on.")
    if model_args.refine_host is not None and model_args.refine_file is None and not training_args.do_train:
        raise ConfigError(
            "--refine_host reads unlabelled text: give it with --refine_file TEXT, or with --do_train, whose text it "
            "then reads."
        )
    trained_anew = training_args.do_train and training_args.train_scope != "delta"
    if model_args.refine_host is not None and (model_args.adapter is None or trained_anew):
        raise ConfigError(
            "--refine_host lines one more host up with a trained stream: give --adapter FOLDER_OR_HUB_ID with it, and "
            "no training but that of --train_scope delta."
        )
    scored = training_args.do_eval or training_args.do_predict or training_args.eval_strategy != "no"
    if scored and training_args.train_sampling_strategy == "group_by_length":
        raise ConfigError(
            "--train_sampling_strategy group_by_length also reorders what is evaluated, so that labels would go to "
            "the wrong sentences. Leave it out, or train and evaluate in two runs."
        )
    check_evaluation(model_args, data_args, training_args)
    check_reports(training_args)
    files = [data_args.train_file, data_args.validation_file, data_args.test_file]
    if data_args.dataset_name is not None and any(files):
        raise DataError("Give --dataset_name or files (--train_file …), not both.")
    require_writable(training_args.output_dir)


def check_evaluation(
    model_args: ModelArguments, data_args: DataArguments, training_args: UniHyperLoraTrainingArguments
) -> None:
    """What the evaluation of a script cannot do; a mistyped metric would be found at the first one only.

    Raises:
        ConfigError
    """
    if training_args.batch_eval_metrics:
        raise ConfigError("--batch_eval_metrics: F1 is of a whole split, not of a batch. Leave it out.")
    if not training_args.eval_do_concat_batches:
        raise ConfigError("--eval_do_concat_batches false: F1 is of a whole split. Leave it out.")
    if training_args.include_for_metrics:
        raise ConfigError("--include_for_metrics is read by no metric of this script. Leave it out.")
    if training_args.prediction_loss_only and training_args.do_predict:
        raise ConfigError("--prediction_loss_only leaves nothing for --do_predict to write. Leave one of the two out.")
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
            f"--metric_for_best_model {training_args.metric_for_best_model} is not what an evaluation reports. Give "
            f"one of: {', '.join(known)}."
        )
