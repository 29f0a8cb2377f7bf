"""Tags and classifies texts with a loaded model on any host.

Predictions are computed as in a scored run: overlapping windows, tags decoded with the rules of the task's scheme, and
entities as in seqeval's default mode.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from modeling_unihyperlora.errors import DataError
from modeling_unihyperlora.hosts import window_of
from modeling_unihyperlora.modeling_unihyperlora import UniHyperLoraPreTrainedModel
from modeling_unihyperlora.words import CUT, load_tokenizer

from .classification_data import Example
from .classification_inputs import EncodedTexts
from .findings import ClassifiedText, TaggedText, Tagger, WordCutter, classified, in_batches
from .ner_data import Sentence
from .ner_windows import SentenceWindows

words_of = WordCutter(CUT)


def tag(
    model: UniHyperLoraPreTrainedModel,
    texts: Sequence[str | list[str]],
    *,
    max_seq_length: int = 128,
    batch_size: int = 32,
) -> list[TaggedText]:
    """Tag texts with the model's active task; a text without words has no entities.

    Args:
        model: a model for token classification.
        texts: raw text, or lists of words; given words are not split, and offsets refer to the words joined by blanks.
        max_seq_length: maximum number of sub-tokens in a window, including special tokens; longer texts are read in
            overlapping windows.
        batch_size: number of windows that the host reads at once.

    Raises:
        ConfigError: the model has no task of tags, or no word fits into ``max_seq_length``.
    """
    joined = [text if isinstance(text, str) else " ".join(text) for text in texts]
    places = [words_of(text) if isinstance(text, str) else _places(text) for text in texts]
    words = [[text[start:end] for start, end in at] for text, at in zip(joined, places, strict=True)]
    labels, scheme = model.labels, model.config.tasks[model.config.active_task].get("scheme")
    sentences = [Sentence(row, None, f"text {number + 1}") for number, row in enumerate(words)]
    if not any(words):
        return [TaggedText(text, [], [], []) for text in joined]
    tokenizer = _tokenizer_of(model)
    length = min(max_seq_length, window_of(model.host, tokenizer) or max_seq_length)
    windows = SentenceWindows(sentences, tokenizer, labels, length, scheme)
    logits = _scores(model, windows, DataCollatorForTokenClassification(tokenizer), batch_size)
    found = Tagger(labels, scheme)
    return [found(*row) for row in zip(joined, places, windows.word_logits(logits), strict=True)]


def classify(
    model: UniHyperLoraPreTrainedModel,
    texts: Sequence[str | tuple[str, str]],
    *,
    max_seq_length: int = 128,
    batch_size: int = 32,
) -> list[ClassifiedText]:
    """Classify texts, or pairs of texts, with the model's active task.

    Args:
        model: a model for sequence classification.
        texts: all texts, or all pairs.
        max_seq_length: maximum number of sub-tokens of a text, including special tokens; the end of a longer text is
            left out.
        batch_size: number of texts that the host reads at once.

    Raises:
        ConfigError: the model has no task of classes, or ``max_seq_length`` leaves no room.
        DataError: a text is empty, or texts and pairs are mixed.
    """
    examples = []
    for number, text in enumerate(texts):
        first, second = (text, None) if isinstance(text, str) else text
        if not first.strip() or (second is not None and not second.strip()):
            raise DataError(f"Text {number + 1} of {len(texts)} is empty. Leave empty texts out.")
        examples.append(Example(first, second, None, f"text {number + 1}"))
    if len({example.pair is None for example in examples}) > 1:
        raise DataError("Some texts are pairs and some are not. Give only one kind at a time.")
    if not examples:
        return []
    labels, tokenizer = model.labels, _tokenizer_of(model)
    length = min(max_seq_length, window_of(model.host, tokenizer) or max_seq_length)
    inputs = EncodedTexts(examples, tokenizer, labels, length)
    rows = _scores(model, inputs, DataCollatorWithPadding(tokenizer), batch_size)
    return [classified(example.text, labels, logits) for example, logits in zip(examples, rows, strict=True)]


def _tokenizer_of(model: UniHyperLoraPreTrainedModel):
    if model.stream is not None:
        return model.stream.words.tokenizer
    return load_tokenizer(model.config.base_model_name_or_path, revision=model.config.base_model_revision or "main")


@torch.inference_mode()
def _scores(model, inputs, collate: Callable, batch_size: int) -> list[np.ndarray]:
    """Logits of each input, (T, C) or (C,), in order; inputs of similar length share a batch."""
    items = [inputs[number] for number in range(len(inputs))]

    def score(numbers: list[int]) -> np.ndarray:
        batch = collate([items[number] for number in numbers]).to(model.device)
        return model(**batch).logits.float().cpu().numpy()

    return in_batches([len(item["input_ids"]) for item in items], batch_size, score)


def _places(words: list[str]) -> list[tuple[int, int]]:
    """Positions (start, end) of words in the text of the words joined by blanks."""
    places, at = [], 0
    for word in words:
        places.append((at, at + len(word)))
        at += len(word) + 1
    return places
