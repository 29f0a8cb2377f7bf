"""Train and score a classifier of texts or pairs of texts: a UniHyperLoRA adapter, or a baseline, on any host.

    python scripts/run_classification.py --model_name_or_path distilbert-base-uncased --dataset_name stanfordnlp/sst2 \
        --do_train --do_eval --output_dir runs/sst2
    python scripts/run_classification.py --train_file train.csv --validation_file dev.csv --text_column_name review \
        --label_column_name stars …                                     # or JSON lines
    python scripts/run_classification.py --adapter runs/sst2 --model_name_or_path ANOTHER_HOST \
        --validation_file dev.csv --do_eval --output_dir runs/elsewhere  # zero-shot on another host
    python scripts/run_classification.py --adapter runs/conll2003 --task_name sst2 --reader small …   # a second task
    python scripts/run_classification.py --method lora …                 # or full, or probe: to compare with

If columns are not named, known names are tried (sentence, text, question and passage …; label, answer). All flags of
transformers' TrainingArguments work too. --output_dir receives the adapter, all_results.json (eval_f1 is the macro F1)
and, with --do_predict, predictions.txt (one label per line) and predictions.jsonl (text and label). A test set may
have no labels.
"""

import sys

from modeling_unihyperlora import UniHyperLoraError
from trainers import entry
from trainers.tasks import CLASSIFICATION


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Start the run that the command line asks for; returns the content of ``all_results.json``."""
    return entry.main(CLASSIFICATION, command_line)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"run_classification: {error}")
