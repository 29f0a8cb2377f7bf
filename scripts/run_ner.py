"""Train and score a token classifier: a UniHyperLoRA adapter, or a baseline, on any host and any tagged text.

    python scripts/run_ner.py --model_name_or_path distilbert-base-uncased --dataset_name eriktks/conll2003 \
        --do_train --do_eval --do_predict --output_dir runs/conll2003

    accelerate launch --num_processes 2 scripts/run_ner.py …            # the same flags
    python scripts/run_ner.py --adapter runs/conll2003 --model_name_or_path ANOTHER_HOST --validation_file dev.jsonl \
        --do_eval --output_dir runs/elsewhere                            # zero-shot on another host

Every flag of transformers' TrainingArguments works as well. Writes into --output_dir: the adapter, all_results.json
and, with --do_predict, predictions.txt.
"""

import logging
import sys
from pathlib import Path

from transformers import DataCollatorForTokenClassification, PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from modeling_unihyperlora import (
    ConfigError,
    DataError,
    UniHyperLoraConfig,
    UniHyperLoraError,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.accounting import measure
from modeling_unihyperlora.storage import WEIGHTS_NAME, replacing
from trainers import UniHyperLoraTrainer, UniHyperLoraTrainingArguments
from trainers.arguments import DataArguments, ModelArguments, check_arguments, parse
from trainers.baselines import BASELINES, make_baseline, measure_baseline
from trainers.decoding import best_labels
from trainers.ner_data import (
    Sentence,
    check_label_names,
    check_labels,
    collect_labels,
    read_file,
    read_hub_dataset,
)
from trainers.ner_windows import SentenceWindows, entity_scores, load_tokenizer
from trainers.results import write_arguments, write_results
from trainers.state_cache import CanonicalStates, StreamCollator

logger = logging.getLogger("run_ner")


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Run what the command line asks for.

    Returns:
        The content of ``all_results.json``.

    Raises:
        UniHyperLoraError: bad input, with what was given, what is allowed and what to do.
    """
    model_args, data_args, training_args = parse(sys.argv[1:] if command_line is None else command_line)
    check_arguments(model_args, data_args, training_args)
    training_args.resume_from_checkpoint = checkpoint_to_resume(training_args)
    set_up_logging(training_args)
    set_seed(training_args.seed)

    adapter = load_adapter(model_args) if model_args.adapter is not None else None
    task = data_args.task_name or (adapter.config.active_task if adapter else None) or "ner"
    task_labels = adapter.config.tasks[task]["labels"] if adapter and task in adapter.config.tasks else None
    splits, labels = read_data(data_args, training_args, task, task_labels)

    if adapter is None:
        model = make_model(model_args, task, labels)
    else:
        model = adapter
        if task_labels is None:
            logger.info("Task '%s' is new to the adapter (it has %s).", task, ", ".join(model.config.tasks) or "none")
            model.add_task(task, labels)
        else:
            model.set_task(task)
    trainer, windows = make_trainer(model, splits, labels, model_args, data_args, training_args)
    metrics = work(trainer, windows, data_args.return_entity_level_metrics, zero_shot=task_labels is not None)

    if isinstance(model, UniHyperLoraForTokenClassification):
        metrics |= costs(model, model_args, training_args)
    else:
        saved = training_args.output_dir if training_args.do_train else None
        metrics |= measure_baseline(model, model_args.method, saved)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        arguments = vars(model_args) | vars(data_args) | training_args.to_sanitized_dict()
        write_arguments(training_args.output_dir, arguments, data_args.name(), splits)
        metrics = write_results(training_args.output_dir, metrics)
    return metrics


def load_adapter(args: ModelArguments) -> UniHyperLoraForTokenClassification:
    """The adapter of --adapter, on its own host or on --model_name_or_path.

    Raises:
        ConfigError: a flag asks for another shape than the adapter has.
        AdapterFileError, HostError
    """
    routing = {name: value for name, value in args.shape().items() if name in ("router", "router_top_k")}
    model = UniHyperLoraForTokenClassification.from_pretrained(
        args.adapter,
        base_model_name_or_path=args.model_name_or_path,
        base_model_revision=args.model_revision,
        revision=args.adapter_revision,
        **routing,
        **args.hub(),
    )
    for name, value in args.shape().items():
        if getattr(model.config, name) != value:
            raise ConfigError(
                f"--{name} {value} does not fit the adapter '{args.adapter}', which has {name} "
                f"{getattr(model.config, name)}. Leave the flag out, or train a new adapter."
            )
    return model


def make_model(args: ModelArguments, task: str, labels: list[str]) -> PreTrainedModel:
    """A fresh adapter on the host, or the baseline of --method."""
    if args.method in BASELINES:
        task_type = UniHyperLoraForTokenClassification.task_type
        where = {"revision": args.model_revision or "main", **args.hub()}
        return make_baseline(args.method, task_type, args.model_name_or_path, labels, args.lora_r, **where)
    return UniHyperLoraForTokenClassification.from_host(
        args.model_name_or_path,
        labels=labels,
        task=task,
        config=UniHyperLoraConfig(**args.shape()),
        revision=args.model_revision,
        anchor_file=args.anchor_file,
        **args.hub(),
    )


def read_data(
    data_args: DataArguments,
    training_args: UniHyperLoraTrainingArguments,
    task: str,
    task_labels: list[str] | None,
) -> tuple[dict[str, list[Sentence]], list[str]]:
    """The sentences of every split that the run needs, and the labels.

    The labels are those of the adapter's task where it has one; else those of --tag_names, those that the data set
    declares, or those that occur in the training split, whichever is there first.

    Raises:
        DataError: unreadable data, or a label that is not among those of the task.
    """
    needed = {
        "train": training_args.do_train,
        "validation": training_args.do_eval or training_args.eval_strategy != "no",
        "test": training_args.do_predict,
    }
    id_names = data_args.tag_names or task_labels
    read = {split: read_split(data_args, split, id_names) for split in needed if needed[split]}
    splits = {split: sentences for split, (sentences, _) in read.items()}
    declared = next((names for _, names in read.values() if names), None)

    labels = task_labels or data_args.tag_names or declared or collect_labels(splits.get("train", []))
    if len(labels) < 2:
        raise DataError(
            f"At least two labels are needed; found: {', '.join(labels) or 'none'}. Give --tag_names, --adapter, or "
            "--do_train with data that has entities."
        )
    whose = f"task '{task}' of the adapter" if task_labels else "this run"
    check_label_names([*(declared or []), *(data_args.tag_names or [])], labels, whose)
    for sentences in splits.values():
        check_labels(sentences, labels, whose)
    return splits, labels


def read_split(
    data_args: DataArguments, split: str, id_names: list[str] | None
) -> tuple[list[Sentence], list[str] | None]:
    """The sentences of "train", "validation" or "test", and the labels that the data set itself declares."""
    columns = {"text_column": data_args.text_column_name, "label_column": data_args.label_column_name}
    file, declared = data_args.file_of(split), None
    if file is not None:
        sentences = read_file(file, **columns, label_names=id_names)
    elif data_args.dataset_name is not None:
        sentences, declared = read_hub_dataset(
            data_args.dataset_name,
            data_args.split_of(split),
            data_args.dataset_config_name,
            **columns,
            label_names=id_names,
        )
    else:
        raise DataError(f"No {split} data: give --{split}_file or --dataset_name.")
    logger.info("%s: %d sentences", split, len(sentences))
    return sentences[: data_args.limit_of(split)], declared


def make_trainer(
    model: PreTrainedModel,
    splits: dict[str, list[Sentence]],
    labels: list[str],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: UniHyperLoraTrainingArguments,
) -> tuple[Trainer, dict[str, SentenceWindows]]:
    """The Trainer of the method, and every split cut into windows for its host."""
    is_adapter = isinstance(model, UniHyperLoraForTokenClassification)
    if is_adapter:
        host_config, trainer_class = model.host.config, UniHyperLoraTrainer
        name, revision = model.config.base_model_name_or_path, model.config.base_model_revision
        logger.info(model.describe())
    else:
        host_config, trainer_class = model.config, Trainer
        name, revision = model_args.model_name_or_path, model_args.model_revision
        if model_args.method == "probe":
            training_args.learning_rate = training_args.learning_rate_of("head")
    check_host_size(host_config, name, model_args)
    if model_args.tokenizer_name is not None:
        name, revision = model_args.tokenizer_name, None
    tokenizer = load_tokenizer(
        name, revision=revision or "main", trust_remote_code=model_args.trust_remote_code, **model_args.hub()
    )
    if len(tokenizer) > host_config.vocab_size:
        raise ConfigError(
            f"The tokenizer '{name}' knows {len(tokenizer)} sub-tokens, the host {host_config.vocab_size}: "
            "it is not the host's. Give the right one with --tokenizer_name."
        )
    length = min(data_args.max_seq_length, tokenizer.model_max_length, host_config.max_position_embeddings)
    if length < data_args.max_seq_length:
        logger.warning("--max_seq_length %d is more than the host reads; using %d.", data_args.max_seq_length, length)
    windows = {split: SentenceWindows(sentences, tokenizer, labels, length) for split, sentences in splits.items()}
    validation, train = windows.get("validation"), windows.get("train")
    collator = DataCollatorForTokenClassification(
        tokenizer,
        padding="max_length" if data_args.pad_to_max_length else True,
        max_length=length if data_args.pad_to_max_length else None,
        pad_to_multiple_of=8 if training_args.fp16 else None,  # what tensor cores want
    )
    if train is not None and is_adapter and model.config.pathway == "stream":
        train, collator = CanonicalStates(model, train, collator), StreamCollator(collator)
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=validation and entity_scores(validation, data_args.return_entity_level_metrics),
        preprocess_logits_for_metrics=best_labels(labels),
    )
    return trainer, windows


def check_host_size(host_config, host: str, args: ModelArguments) -> None:
    """Raise ``ConfigError`` if the host is not of the size that the run config or the flags state."""
    for name, actual in (("hidden_size", host_config.hidden_size), ("num_layers", host_config.num_hidden_layers)):
        stated = getattr(args, name)
        if stated not in (None, actual):
            raise ConfigError(
                f"The run config or the command line states {name} {stated}, but the host '{host}' has {actual}. "
                f"Choose the host that was meant, or give --{name} {actual}."
            )


def work(trainer: Trainer, windows: dict[str, SentenceWindows], by_type: bool, zero_shot: bool) -> dict[str, object]:
    """Train, evaluate and predict as far as asked for; returns every figure found on the way.

    Args:
        by_type: score every entity type as well.
        zero_shot: the model knows the task from elsewhere, so that its score before any training means something.
    """
    args = trainer.args
    metrics: dict[str, object] = {}

    def report(part: str, figures: dict[str, float], split: str) -> None:
        figures = figures | {f"{part}_samples": len(windows[split].sentences)}
        trainer.log_metrics(part, figures)
        trainer.save_metrics(part, figures, combined=False)
        metrics.update(figures)

    if args.do_train:
        if zero_shot and "validation" in windows:
            report("zero_shot", trainer.evaluate(metric_key_prefix="zero_shot"), "validation")
        trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        report("train", trained.metrics, "train")
    if args.do_eval:
        report("eval", trainer.evaluate(), "validation")
        if zero_shot and not args.do_train:
            metrics["zero_shot_f1"] = metrics["eval_f1"]
        metrics["active_atoms_per_token"] = metrics.get("eval_active_atoms_per_token")
    if args.do_predict:
        trainer.compute_metrics = entity_scores(windows["test"], by_type)
        predicted = trainer.predict(windows["test"], metric_key_prefix="predict")
        report("predict", predicted.metrics, "test")
        if trainer.is_world_process_zero():
            write_predictions(args.output_dir, windows["test"].tags_of(predicted.predictions))
    return metrics


def checkpoint_to_resume(args: UniHyperLoraTrainingArguments) -> str | None:
    """The checkpoint of --resume_from_checkpoint: a folder, or "true" for the last one in the output folder.

    Raises:
        ConfigError: there is none.
    """
    asked = str(args.resume_from_checkpoint or "false")
    if asked.lower() == "false":
        return None
    found: str | None = asked
    if asked.lower() == "true":
        found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if found is None or not Path(found).is_dir():
        raise ConfigError(
            f"--resume_from_checkpoint {asked}: no such checkpoint (output folder {args.output_dir}). Give a "
            "checkpoint-<step> folder, or leave the flag out to start from the beginning."
        )
    return found


def costs(model, model_args: ModelArguments, training_args: UniHyperLoraTrainingArguments) -> dict[str, object]:
    """Bytes, multiply-adds, memory and parameters of the adapter that was trained here, or else of the one loaded."""
    folder: str | Path | None = None
    if training_args.do_train:
        folder = training_args.output_dir
    elif model_args.adapter is not None:
        hub = {"revision": model_args.adapter_revision, **model_args.hub()}
        folder = Path(cached_file(model_args.adapter, WEIGHTS_NAME, **hub)).parent
    figures = measure(model, folder=folder)
    parts = figures.pop("parts")
    return figures | {f"bytes_of_{part}": size for part, size in parts.items()}


def write_predictions(folder: str, tags: list[list[str]]) -> None:
    """One line a sentence, its tags separated by spaces; an empty sentence is an empty line."""
    with replacing(Path(folder) / "predictions.txt") as temporary:
        Path(temporary).write_text("".join(" ".join(line) + "\n" for line in tags), encoding="utf-8")


def set_up_logging(args: UniHyperLoraTrainingArguments) -> None:
    """Progress to stderr, at the level of --log_level; the other processes of a launch stay quiet."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = logging.INFO if args.log_level == "passive" and args.should_log else args.get_process_log_level()
    for name in ("run_ner", "trainers", "modeling_unihyperlora"):
        logging.getLogger(name).setLevel(level)
    transformers_logging.set_verbosity(args.get_process_log_level())
    logger.info("process %d of %d on %s", args.process_index + 1, args.world_size, args.device)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"run_ner: {error}")
