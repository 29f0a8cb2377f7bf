"""Train and score a classifier of texts or pairs of texts: a UniHyperLoRA adapter, or a baseline, on any host.

    python scripts/run_classification.py --model_name_or_path distilbert-base-uncased --dataset_name stanfordnlp/sst2 \
        --do_train --do_eval --output_dir runs/sst2
    python scripts/run_classification.py --train_file train.csv --validation_file dev.csv --text_column_name review \
        --label_column_name stars …                                     # or JSON lines
    python scripts/run_classification.py --adapter runs/sst2 --model_name_or_path ANOTHER_HOST \
        --validation_file dev.csv --do_eval --output_dir runs/elsewhere  # zero-shot on another host
    python scripts/run_classification.py --adapter runs/conll2003 --task_name sst2 --train_scope delta …   # a new task
    python scripts/run_classification.py --method lora …                 # or full, or probe: to compare with

Columns that are not named are guessed (sentence, text, question and passage …; label, answer). Every flag of
transformers' TrainingArguments works as well. Writes into --output_dir: the adapter, all_results.json (eval_f1 is the
macro F1) and, with --do_predict, predictions.txt: one label a line. A test set may be without labels.
"""

import sys

from transformers import DataCollatorWithPadding

from modeling_unihyperlora import UniHyperLoraError, UniHyperLoraForSequenceClassification
from trainers import classification_data
from trainers.arguments import ClassificationArguments
from trainers.classification_inputs import EncodedTexts, best_class, classification_scores
from trainers.running import Task, run

TASK = Task(
    script="run_classification",
    default_name="classification",
    arguments=ClassificationArguments,
    model_class=UniHyperLoraForSequenceClassification,
    read_file=classification_data.read_file,
    read_hub_dataset=classification_data.read_hub_dataset,
    collect_labels=classification_data.collect_labels,
    check_splits=classification_data.check_splits,
    scheme=lambda *_: None,
    dataset=lambda examples, tokenizer, labels, length, *_: EncodedTexts(examples, tokenizer, labels, length),
    collator=DataCollatorWithPadding,
    logits=best_class,
    scores=lambda texts, args: classification_scores,
    words=lambda example: f"{example.text} {example.pair or ''}".split(),
)


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Run what the command line asks for; see ``trainers.running.run``."""
    return run(TASK, command_line)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"run_classification: {error}")
