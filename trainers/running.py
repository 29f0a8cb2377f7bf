"""A run, from its command line to ``all_results.json``, for any kind of task.

A ``Task`` describes the kind of task, see ``tasks.py``. A run has this order: arguments, data and labels, model,
Trainer, work (train, evaluate, predict), costs, results.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from modeling_unihyperlora import ConfigError, DataError, UniHyperLoraConfig, UniHyperLoraModel
from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.hosts import NoHost, window_of
from modeling_unihyperlora.measure.accounting import check_budget, measure
from modeling_unihyperlora.modeling_unihyperlora import UniHyperLoraPreTrainedModel
from modeling_unihyperlora.storage import WEIGHTS_NAME, adapter_file, replacing
from modeling_unihyperlora.words import check_vocabulary, load_tokenizer

from .arguments import DataArguments, ModelArguments, check_arguments, parse
from .baselines import BASELINES, check_baseline_budget, make_baseline, measure_baseline
from .interruption import SafeTrainer, is_complete, resumable
from .launching import whole
from .reading import check_label_names, numbered_lines
from .results import delete_checkpoints, process_costs, require_unused, write_arguments, write_results
from .sources import SourceStates, sources_of
from .state_cache import CanonicalStates, StreamCollator, WordStates, scores_of_words
from .stored_data import host_of
from .trainer import UniHyperLoraTrainer
from .training_args import UniHyperLoraTrainingArguments
from .unusable import check_pathway

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A kind of task: how its data are read, turned into model inputs and scored.

    A row is one labelled sentence, a dataclass with its ``origin``. A data set has ``rows_of(predictions)``: the lines
    of predictions.jsonl.
    """

    script: str  # name of the script, the prefix of error messages
    default_name: str  # name of the task in a new adapter
    arguments: type[DataArguments]
    model_class: type[UniHyperLoraPreTrainedModel]
    read_file: Callable  # (path, label_names, **arguments.reading(split)) → rows
    read_hub_dataset: Callable  # (name, split, config_name, label_names, **…) → rows and declared label names or None
    collect_labels: Callable  # (rows) → label names in order
    check_splits: Callable  # ({split: rows}, labels, whose labels) → None, or DataError
    scheme: Callable  # ({split: rows}, labels, scheme of the task if known, data arguments) → tag scheme or None
    dataset: Callable[..., Dataset]  # (rows, tokenizer, labels, max_seq_length, data arguments, tag scheme)
    read_states: Callable  # (folders, limit, label_column, label_names, needs labels) → rows of stored states
    stored_dataset: Callable[..., Dataset]  # (those rows, labels, tag scheme)
    collator: Callable  # (tokenizer, padding, max_length, pad_to_multiple_of)
    logits: Callable  # preprocess_logits_for_metrics
    scores: Callable  # (data set, arguments) → compute_metrics
    words: Callable  # (row) → its words
    further: Callable  # (rows, labels, tag scheme) → rows whose words differ in raw text, with the words of raw text
    line: Callable  # (line of predictions.jsonl) → that of predictions.txt


def run(task: Task, command_line: list[str], callbacks: Sequence[TrainerCallback] = ()) -> dict[str, object]:
    """Parse the command line and run it; see ``run_parsed``."""
    return run_parsed(task, *parse(command_line, task.arguments), callbacks)


def run_parsed(
    task: Task,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: UniHyperLoraTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, object]:
    """Train, evaluate and predict, as the arguments ask.

    Args:
        task: kind of task.
        callbacks: further callbacks of the Trainer.

    Returns:
        The content of ``all_results.json``.

    Raises:
        UniHyperLoraError: bad input; the message says what was given, what is allowed and what to do.
    """
    check_arguments(model_args, data_args, training_args)
    wants_resume, overwrites = asks_to_resume(training_args), model_args.overwrite_output_dir
    training_args.resume_from_checkpoint = checkpoint = checkpoint_to_resume(training_args)
    if training_args.do_train and not overwrites:
        require_unused(training_args.output_dir, checkpoint, but_checkpoints=wants_resume)
    set_up_logging(training_args, task.script)
    set_seed(training_args.seed)

    host = NoHost() if data_args.reads_states else None  # a host read the text before
    adapter = load_adapter(task.model_class, model_args, data_args.task_name, host) if model_args.adapter else None
    name = data_args.task_name or (adapter and adapter.config.active_task) or task.default_name
    if adapter is not None and model_args.new_reader():
        check_new_reader(adapter.config, name, model_args.adapter)
    known = adapter.config.tasks.get(name, {}) if adapter else {}
    task_labels = known.get("labels")
    splits, labels = read_data(task, data_args, training_args, name, task_labels)
    scheme = task.scheme(splits, labels, known.get("scheme"), data_args)

    if host is not None:
        host.config.name_or_path = host_of(splits)
    if adapter is None:
        model = make_model(task.model_class, model_args, name, labels, host)
    else:
        model = adapter
        if task_labels is None:
            logger.info("Adding task '%s' to the adapter (it has %s).", name, ", ".join(model.config.tasks) or "none")
            model.add_task(name, labels, **model_args.new_reader())
        else:
            model.set_task(name)
    if scheme is not None and isinstance(model, UniHyperLoraPreTrainedModel):
        model.config.tasks[name]["scheme"] = scheme
    if model_args.refine_host is not None:
        refine(task, model, model_args, splits)
    make = make_trainer if host is None else make_stored_trainer
    trainer, datasets = make(task, model, splits, labels, scheme, model_args, data_args, training_args)
    for callback in callbacks:
        trainer.add_callback(callback)
    if training_args.do_train and overwrites and not wants_resume and trainer.is_world_process_zero():
        delete_checkpoints(training_args.output_dir, [model_args.adapter])
    metrics = work(task, trainer, datasets, splits, data_args, zero_shot=task_labels is not None)

    trainer.accelerator.wait_for_everyone()  # the main process saves the trained weights first
    with whole(model.adapter) if isinstance(model, UniHyperLoraPreTrainedModel) else contextlib.nullcontext():
        metrics |= costs(model, model_args, training_args) | process_costs()
        metrics["host_cpu_seconds"] = host_cpu_seconds(model, trainer)
    if trainer.is_world_process_zero():
        arguments = vars(model_args) | vars(data_args) | training_args.to_sanitized_dict()
        write_arguments(training_args.output_dir, arguments, data_args.name(), splits)
        metrics = write_results(training_args.output_dir, metrics)
        if training_args.do_train and isinstance(trainer, UniHyperLoraTrainer):
            trainer.create_model_card()  # again, now with the results
            logger.info("%s", next_steps(data_args.COMMAND, training_args.output_dir, model.stream is not None))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def next_steps(command: str, folder: str, moves: bool) -> str:
    """Where a trained adapter is, and commands to go on with; ``moves`` says whether it works on other hosts."""
    use = {"ner": "tag", "classification": "classify"}[command]
    host = " --host ANOTHER_HOST" if moves else ""
    lines = [
        f"The adapter is the folder {folder}; {WEIGHTS_NAME} there has all that was trained. What to type next:",
        f'  unihyperlora {use} {folder}{host} "a text of yours"',
        f"  unihyperlora inspect {folder}{host}",
    ]
    if moves:
        score = "--validation_file FILE --do_eval --output_dir ANOTHER_FOLDER"
        lines.append(f"  unihyperlora {command} --adapter {folder} --model_name_or_path ANOTHER_HOST {score}")
    return "\n".join(lines)


# ---- before the work: data, model, trainer ----


def load_adapter(
    model_class: type[UniHyperLoraPreTrainedModel],
    args: ModelArguments,
    task_name: str | None,
    host: NoHost | None = None,
) -> UniHyperLoraPreTrainedModel:
    """Load --adapter on its own host, on --model_name_or_path, or on ``host``.

    The active task becomes ``task_name`` if the adapter has this task. Otherwise the saved active task stays, or, if
    it is of another kind, no task is active: an adapter for tags may get a task for sentences.

    Raises:
        ConfigError: a flag contradicts the adapter's shape, or ``task_name`` is of another kind.
        AdapterFileError, HostError: the adapter or the host cannot be loaded.
    """
    config = read_config(adapter_file(args.adapter, CONFIG_NAME, args.adapter_revision, args.hub()))
    if task_name in config.tasks:
        config.activate(task_name)
    elif config.active_task is not None and config.tasks[config.active_task]["type"] != model_class.task_type:
        config.active_task = None
    check_kind(config, args)
    if host is not None and config.pathway == "inject":
        raise ConfigError(
            f"The adapter '{args.adapter}' is an injected update, which computes inside its host, so it cannot read "
            "stored states. Give text files, or the adapter of a stream."
        )
    tokenizer = None if args.tokenizer_name is None else named_tokenizer(args)
    routing = {name: value for name, value in args.shape().items() if name in ("router", "router_top_k")}
    return model_class.from_pretrained(
        args.adapter,
        config=config,
        host=host,
        base_model_name_or_path=args.model_name_or_path,
        base_model_revision=args.model_revision,
        revision=args.adapter_revision,
        tokenizer=tokenizer,
        **routing,
        **args.hub(),
    )


def check_kind(config: UniHyperLoraConfig, args: ModelArguments) -> None:
    """Raise ``ConfigError`` if a flag contradicts the method or shape of --adapter.

    The router of an injected update may differ from the one that it was trained with.
    """
    kind = "sat_lora" if config.projector == "host" else "unihyperlora"
    if kind != args.method:
        raise ConfigError(
            f"The adapter '{args.adapter}' is of --method {kind}, not {args.method}. Give --method {kind}, or train a "
            "new adapter."
        )
    free = ("router", "router_top_k") if config.pathway == "inject" else ()
    for name, value in ({} if args.method == "sat_lora" else args.shape()).items():
        if name not in free and getattr(config, name) != value:
            raise ConfigError(
                f"--{name} {value} contradicts the adapter '{args.adapter}', which has {name} "
                f"{getattr(config, name)}. Leave the flag out, or train a new adapter."
            )


def check_new_reader(config: UniHyperLoraConfig, task: str, adapter: str) -> None:
    """Raise ``ConfigError`` if the run makes no reader; called if --reader or --reader_bits was given."""
    if config.pathway == "inject":
        raise ConfigError(
            f"--reader is for a stream, but the adapter '{adapter}' is an injected update. Leave --reader out."
        )
    if task in config.tasks:
        raise ConfigError(
            f"--reader is for a new task, but the adapter '{adapter}' already has the task '{task}'. Leave --reader "
            "out, or give another --task_name."
        )


def refine(task: Task, model: UniHyperLoraPreTrainedModel, args: ModelArguments, splits: dict[str, list]) -> None:
    """Align a model's host with --refine_host on the text of --refine_file, or of the training split.

    Raises:
        ConfigError, DataError, HostError: the text or --refine_host cannot be used.
    """
    if args.refine_file is not None:
        sentences = [line.split() for _, line in numbered_lines(Path(args.refine_file))]
    else:
        sentences = [task.words(row) for row in splits["train"]]
    load = {"revision": args.adapter_revision, **args.hub()}
    source = UniHyperLoraModel.from_pretrained(args.adapter, base_model_name_or_path=args.refine_host, **load)
    model.refine(sentences, source)
    logger.info("Aligned on %s too: %s", args.refine_file or "the training text", model.describe())


def make_model(
    model_class: type[UniHyperLoraPreTrainedModel],
    args: ModelArguments,
    task_name: str,
    labels: list[str],
    host: NoHost | None = None,
) -> nn.Module:
    """Make a new adapter on --model_name_or_path or on ``host``, or the baseline of --method."""
    if args.method in BASELINES:
        where = {"revision": args.model_revision or "main", **args.hub()}
        return make_baseline(args.method, model_class.task_type, args.model_name_or_path, labels, args.lora_r, **where)
    config, more = UniHyperLoraConfig(**args.shape()), {}
    if config.pathway == "stream":
        more = {"space": args.space, "anchor_file": args.anchor_file, **args.new_reader(named=False)}
    return model_class.from_host(
        args.model_name_or_path if host is None else host,
        labels=labels,
        task=task_name,
        config=config,
        revision=args.model_revision,
        tokenizer=None if args.tokenizer_name is None else named_tokenizer(args),
        **more,
        **args.hub(),
    )


def named_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of --tokenizer_name, else of --model_name_or_path."""
    name, revision = args.tokenizer_name, None
    if name is None:
        name, revision = args.model_name_or_path, args.model_revision
    return load_tokenizer(name, args.trust_remote_code, revision=revision or "main", **args.hub())


def read_data(
    task: Task,
    data_args: DataArguments,
    training_args: UniHyperLoraTrainingArguments,
    task_name: str,
    task_labels: list[str] | None,
) -> tuple[dict[str, list], list[str]]:
    """Read every split that the run needs; returns split → rows, and the labels.

    The labels come from the first of these that exists: the adapter's task, the flags, the data set's declaration, the
    training split.

    Raises:
        DataError: the data cannot be read, or a label is not one of the task's labels.
    """
    needed = {
        "train": training_args.do_train,
        "validation": training_args.do_eval or training_args.eval_strategy != "no",
        "test": training_args.do_predict,
    }
    given_names = data_args.id_names()
    read = {split: read_split(task, data_args, split, given_names or task_labels) for split in needed if needed[split]}
    splits = {split: rows for split, (rows, _) in read.items()}
    declared = [names for _, names in read.values() if names]

    labels = task_labels or given_names or next(iter(declared), None) or task.collect_labels(splits.get("train", []))
    too_few = (
        f"At least two labels are needed; found: {', '.join(labels) or 'none'}. Give --adapter, or --do_train with "
        f"data that has more labels, or name the labels with {task.arguments.NAMES_FLAG}."
    )
    if not labels:
        raise DataError(too_few)
    whose = f"task '{task_name}' of the adapter" if task_labels else "this run"
    check_label_names([*itertools.chain(*declared), *(given_names or [])], labels, whose)
    task.check_splits(splits, labels, whose)  # names rows without a label, which leave too few labels
    if len(labels) < 2:
        raise DataError(too_few)
    return splits, labels


def read_split(
    task: Task, args: DataArguments, split: str, id_names: list[str] | None
) -> tuple[list, list[str] | None]:
    """Read "train", "validation" or "test"; returns the rows, and the labels that the data set declares or None."""
    file, declared, limit = args.file_of(split), None, args.limit_of(split)
    if args.reads_states:
        if not args.states_of(split):
            raise DataError(f"No {split} data: give --{split}_states, because the other data are stored states.")
        how = args.reading(split)
        needed = how.get("needs_tags", how.get("needs_label"))
        rows = task.read_states(args.states_of(split), limit, how["label_column"], id_names, needed)
    elif file is not None:
        rows = task.read_file(file, label_names=id_names, **args.reading(split))
    elif args.dataset_name is not None:
        where = (args.dataset_name, args.split_of(split), args.dataset_config_name)
        rows, declared = task.read_hub_dataset(*where, label_names=id_names, **args.reading(split))
    else:
        raise DataError(f"No {split} data: give --{split}_file or --dataset_name.")
    logger.info("%s: %d sentences", split, len(rows))
    return rows[:limit], declared


def make_trainer(
    task: Task,
    model: nn.Module,
    splits: dict[str, list],
    labels: list[str],
    scheme: str | None,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: UniHyperLoraTrainingArguments,
) -> tuple[Trainer, dict[str, Dataset]]:
    """Make the Trainer of the method; returns it, and the model inputs of every split."""
    is_adapter = isinstance(model, UniHyperLoraPreTrainedModel)
    if is_adapter:
        if getattr(data_args, "label_all_tokens", False) and model.config.pathway != "inject":
            raise ConfigError(
                f"--label_all_tokens cannot be used with --pathway {model.config.pathway}, which reads one state per "
                "word. Leave it out, or train with --pathway inject."
            )
        host_config, trainer_class = model.host.config, UniHyperLoraTrainer
        name, revision = model.config.base_model_name_or_path, model.config.base_model_revision
        logger.info(model.describe())
    else:
        host_config, trainer_class = model.config, SafeTrainer
        if "train" in splits:
            limits = (training_args.max_adapter_bytes, training_args.max_flops_overhead_pct)
            check_baseline_budget(model, model_args.method, *limits)
        name, revision = model_args.model_name_or_path, model_args.model_revision
        if model_args.method == "probe":
            training_args.learning_rate = training_args.learning_rate_of("head")
    check_host_size(host_config, name, model_args)
    if is_adapter and model.stream is not None:
        tokenizer = model.stream.words.tokenizer  # the tokenizer that the host was aligned with
    else:
        host_named = dataclasses.replace(model_args, model_name_or_path=name, model_revision=revision)
        tokenizer = named_tokenizer(host_named)
        check_vocabulary(model.host if is_adapter else model, tokenizer)
    window = window_of(model.host if is_adapter else model, tokenizer)
    length = min(data_args.max_seq_length, window or data_args.max_seq_length)
    if length < data_args.max_seq_length:
        logger.warning("--max_seq_length %d exceeds the host's maximum; using %d.", data_args.max_seq_length, length)
    own = (data_args, scheme)
    read = dict(splits)
    if is_adapter and model.injection is None and training_args.train_scope == "task" and "train" in read:
        read["train"] = [*read["train"], *task.further(read["train"], labels, scheme)]
    datasets = {split: task.dataset(rows, tokenizer, labels, length, *own) for split, rows in read.items()}
    validation, train = datasets.get("validation"), datasets.get("train")
    collator = task.collator(
        tokenizer,
        padding="max_length" if data_args.pad_to_max_length else True,
        max_length=length if data_args.pad_to_max_length else None,
        pad_to_multiple_of=8 if training_args.fp16 else None,  # for tensor cores
    )
    scores, more = validation and task.scores(validation, data_args), {}
    if is_adapter and model.injection is not None and data_args.cache_eval_states:
        logger.info("--cache_eval_states is ignored: an injected update changes the host's states.")
    if is_adapter and model.injection is None:  # the host's states never change
        collator = StreamCollator(collator)
        if train is not None:
            check_pathway(training_args, model)  # before the host reads all the text
            check_budget(model, training_args.max_adapter_bytes, training_args.max_flops_overhead_pct)
            sources = sources_of(
                model,
                train,
                model_args.source_hosts or [],
                lambda other: task.dataset(read["train"], other, labels, length, *own),
                training_args.bf16,
                causal=training_args.train_scope == "task" and training_args.copy_share > 0,
                **model_args.hub(),
            )
            train, more = SourceStates(sources), {"sources": sources}
        if validation is not None and data_args.cache_eval_states:
            words = WordStates(model.host, model.stream.words, validation, bf16=training_args.bf16)
            validation, scores = CanonicalStates(words, lambda: [model.stream.fit]), scores_of_words(words, scores)
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=scores,
        preprocess_logits_for_metrics=task.logits,
        **more,
    )
    return trainer, datasets


def make_stored_trainer(
    task: Task,
    model: UniHyperLoraPreTrainedModel,
    splits: dict[str, list],
    labels: list[str],
    scheme: str | None,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: UniHyperLoraTrainingArguments,
) -> tuple[UniHyperLoraTrainer, dict[str, Dataset]]:
    """Make the Trainer of a model without a host, and the data set of each split from stored states."""
    logger.info(model.describe())
    datasets = {split: task.stored_dataset(rows, labels, scheme) for split, rows in splits.items()}
    for data in datasets.values():
        data.check_space(model.adapter.space)
    validation = datasets.get("validation")
    trainer = UniHyperLoraTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets.get("train"),
        eval_dataset=validation,
        data_collator=StreamCollator(),
        compute_metrics=validation and task.scores(validation, data_args),
        preprocess_logits_for_metrics=task.logits,
    )
    return trainer, datasets


def check_host_size(host_config, host: str, args: ModelArguments) -> None:
    """Raise ``ConfigError`` if the host's size differs from the run config or the flags."""
    for name, actual in (("hidden_size", host_config.hidden_size), ("num_layers", host_config.num_hidden_layers)):
        stated = getattr(args, name)
        if stated not in (None, actual):
            raise ConfigError(
                f"The run config or the command line states {name} {stated}, but the host '{host}' has {actual}. "
                f"Choose another host, or give --{name} {actual}."
            )


def checkpoint_to_resume(args: UniHyperLoraTrainingArguments) -> str | None:
    """The checkpoint of --resume_from_checkpoint: a folder, or "true" for the last complete one in the output folder.

    None means that training starts from the beginning, as for a run that was stopped before its first checkpoint.

    Raises:
        ConfigError: the folder is not a complete checkpoint.
    """
    if not asks_to_resume(args):
        return None
    asked = str(args.resume_from_checkpoint)
    if asked.lower() == "true":
        return resumable(args.output_dir)
    if not is_complete(Path(asked)):
        raise ConfigError(
            f"--resume_from_checkpoint {asked}: no such checkpoint, or it is incomplete. Give the folder of a "
            "complete checkpoint, or true for the last one in --output_dir."
        )
    return asked


def asks_to_resume(args: UniHyperLoraTrainingArguments) -> bool:
    """Whether --resume_from_checkpoint was given with a value other than "false"."""
    return str(args.resume_from_checkpoint or "false").lower() != "false"


def set_up_logging(args: UniHyperLoraTrainingArguments, script: str) -> None:
    """Log progress to stderr at the level of --log_level; the other processes of a launch log only warnings."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = logging.INFO if args.log_level == "passive" and args.should_log else args.get_process_log_level()
    for name in ("trainers", "modeling_unihyperlora"):
        logging.getLogger(name).setLevel(level)
    transformers_logging.set_verbosity(args.get_process_log_level())
    transformers_logging.disable_progress_bar()  # of loading weights, in which a host takes a moment
    logger.info("%s: process %d of %d on %s", script, args.process_index + 1, args.world_size, args.device)


# ---- the work and its costs ----


def work(
    task: Task,
    trainer: Trainer,
    datasets: dict[str, Dataset],
    splits: dict[str, list],
    data_args: DataArguments,
    zero_shot: bool,
) -> dict[str, object]:
    """Train, evaluate and predict, as the arguments ask; returns all figures.

    Args:
        zero_shot: the model has learnt the task before, so it is also scored before training.
    """
    args = trainer.args
    metrics: dict[str, object] = {}

    def report(part: str, figures: dict[str, float], split: str) -> None:
        figures = figures | {f"{part}_samples": len(splits[split])}
        trainer.log_metrics(part, figures)
        trainer.save_metrics(part, figures, combined=False)
        metrics.update(figures)

    if args.do_train:
        if zero_shot and "validation" in datasets:
            report("zero_shot", trainer.evaluate(metric_key_prefix="zero_shot"), "validation")
        trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        report("train", trained.metrics, "train")
    if args.do_eval:
        report("eval", trainer.evaluate(), "validation")
        if zero_shot and not args.do_train:
            metrics |= {f"zero_shot_{name}": metrics.get(f"eval_{name}") for name in ("f1", "accuracy")}
        metrics["active_atoms_per_token"] = metrics.get("eval_active_atoms_per_token")
    if args.do_predict:
        trainer.compute_metrics = task.scores(datasets["test"], data_args)
        predicted = trainer.predict(datasets["test"], metric_key_prefix="predict")
        report("predict", predicted.metrics, "test")
        if trainer.is_world_process_zero():
            write_predictions(args.output_dir, datasets["test"].rows_of(predicted.predictions), task.line)
    return metrics


def costs(model: nn.Module, model_args: ModelArguments, args: UniHyperLoraTrainingArguments) -> dict[str, object]:
    """Bytes, multiply-adds, memory and parameters of the trained model, or of the loaded adapter without training."""
    folder: str | Path | None = args.output_dir if args.do_train else None
    if model_args.method in BASELINES:
        return measure_baseline(model, model_args.method, folder)
    if folder is None and model_args.adapter is not None:
        where = (model_args.adapter_revision, model_args.hub())
        folder = adapter_file(model_args.adapter, WEIGHTS_NAME, *where).parent
    figures = measure(model, folder=folder)
    if model.stream is not None:
        fit = model.stream.fit.r2
        figures |= {"calibration_seconds": model.stream.seconds, "calibration_r2": fit}
    parts = figures.pop("parts")
    return figures | {f"bytes_of_{part}": size for part, size in parts.items()}


def host_cpu_seconds(model: nn.Module, trainer: Trainer) -> float | None:
    """CPU seconds that this process spent on aligning hosts and computing their states; None without a stream.

    The figure is near zero if everything was in the cache, and zero if stored states were read.
    """
    if isinstance(getattr(model, "host", None), NoHost):
        return 0.0
    if getattr(model, "stream", None) is None:
        return None
    cached = [*trainer.sources, *([trainer.eval_dataset.words] if hasattr(trainer.eval_dataset, "words") else [])]
    return round(model.stream.cpu_seconds + sum(part.cpu_seconds for part in cached), 1)


def write_predictions(folder: str, rows: list[dict], line: Callable[[dict], str]) -> None:
    """One line a sentence, in the order of the test split: ``predictions.txt`` has what was predicted, as the scripts
    of transformers write it, and ``predictions.jsonl`` also the sentence.
    """
    for name, write in (("predictions.txt", line), ("predictions.jsonl", partial(json.dumps, ensure_ascii=False))):
        with replacing(Path(folder) / name) as temporary:
            Path(temporary).write_text("".join(write(row) + "\n" for row in rows), encoding="utf-8")
