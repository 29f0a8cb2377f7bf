"""The two kinds of task: tags of words (NER), and classes of texts or pairs of texts."""

from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from modeling_unihyperlora import UniHyperLoraForSequenceClassification, UniHyperLoraForTokenClassification

from . import classification_data, ner_data, stored_data
from .arguments import ClassificationArguments, NerArguments
from .classification_inputs import EncodedTexts, best_class
from .metrics import classification_scores, entity_scores
from .ner_windows import SentenceWindows, token_scores
from .raw_text import words_of_raw_text
from .running import Task

NER = Task(
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
    read_states=stored_data.read_sentences,
    stored_dataset=stored_data.StoredSentences,
    collator=DataCollatorForTokenClassification,
    logits=token_scores,
    scores=lambda windows, args: entity_scores(windows, args.return_entity_level_metrics),
    words=lambda sentence: sentence.tokens,
    further=words_of_raw_text,
    line=lambda row: " ".join(row["ner_tags"]),
)

CLASSIFICATION = Task(
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
    read_states=stored_data.read_examples,
    stored_dataset=lambda examples, labels, scheme: stored_data.StoredTexts(examples, labels),
    collator=DataCollatorWithPadding,
    logits=best_class,
    scores=lambda texts, args: classification_scores,
    words=lambda example: f"{example.text} {example.pair or ''}".split(),
    further=lambda *_: [],
    line=lambda row: row["label"],
)

TASKS = {"ner": NER, "classification": CLASSIFICATION}
