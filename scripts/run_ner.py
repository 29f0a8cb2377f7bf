"""Train and score a token classifier: a UniHyperLoRA adapter, or a baseline, on any host and any tagged text.

    python scripts/run_ner.py --model_name_or_path distilbert-base-uncased --dataset_name eriktks/conll2003 \
        --do_train --do_eval --do_predict --output_dir runs/conll2003

    accelerate launch --num_processes 2 scripts/run_ner.py …            # the same flags
    python scripts/run_ner.py --adapter runs/conll2003 --model_name_or_path ANOTHER_HOST --validation_file dev.jsonl \
        --do_eval --output_dir runs/elsewhere                            # zero-shot on another host
    python scripts/run_ner.py --method lora …                            # or full, or probe: to compare with

Every flag of transformers' TrainingArguments works as well. Writes into --output_dir: the adapter, all_results.json
and, with --do_predict, predictions.txt: one line a sentence, a tag for each word. A test set may be without tags.
"""

import sys

from transformers import DataCollatorForTokenClassification

from modeling_unihyperlora import UniHyperLoraError, UniHyperLoraForTokenClassification
from trainers import ner_data
from trainers.arguments import NerArguments
from trainers.decoding import token_scores
from trainers.ner_windows import SentenceWindows, entity_scores
from trainers.running import Task, run

TASK = Task(
    script="run_ner",
    default_name="ner",
    arguments=NerArguments,
    model_class=UniHyperLoraForTokenClassification,
    read_file=ner_data.read_file,
    read_hub_dataset=ner_data.read_hub_dataset,
    collect_labels=ner_data.collect_labels,
    check_splits=ner_data.check_splits,
    scheme=lambda splits, labels, known, args: ner_data.scheme_of_splits(splits, labels, known, args.tag_scheme),
    dataset=lambda sentences, tokenizer, labels, length, args, scheme: SentenceWindows(
        sentences, tokenizer, labels, length, scheme, args.label_all_tokens
    ),
    collator=DataCollatorForTokenClassification,
    logits=token_scores,
    scores=lambda windows, args: entity_scores(windows, args.return_entity_level_metrics),
    words=lambda sentence: sentence.tokens,
)


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Run what the command line asks for; see ``trainers.running.run``."""
    return run(TASK, command_line)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"run_ner: {error}")
