"""Train and score a token classifier: a UniHyperLoRA adapter, or a baseline, on any host and any tagged text.

    python scripts/run_ner.py --model_name_or_path distilbert-base-uncased --dataset_name eriktks/conll2003 \
        --do_train --do_eval --do_predict --output_dir runs/conll2003

    accelerate launch --num_processes 2 scripts/run_ner.py …            # the same flags
    python scripts/run_ner.py --adapter runs/conll2003 --model_name_or_path ANOTHER_HOST --validation_file dev.jsonl \
        --do_eval --output_dir runs/elsewhere                            # zero-shot on another host
    python scripts/run_ner.py --adapter runs/conll2003 --task_name tweets --reader small …           # a second task
    python scripts/run_ner.py --adapter runs/conll2003 --model_name_or_path ANOTHER_HOST --train_scope delta …  # δθ
    python scripts/run_ner.py --method lora …                            # or full, or probe: to compare with

All flags of transformers' TrainingArguments work too. --output_dir receives the adapter, all_results.json and, with
--do_predict, predictions.txt (one line per sentence, one tag per word) and predictions.jsonl (words and tags). A test
set may have no tags.
"""

import sys

from modeling_unihyperlora import UniHyperLoraError
from trainers import entry
from trainers.tasks import NER


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Start the run that the command line asks for; returns the content of ``all_results.json``."""
    return entry.main(NER, command_line)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"run_ner: {error}")
