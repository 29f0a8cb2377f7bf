"""Examples as model inputs, and predictions as labels: token ids, one label per line."""

import logging

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_unihyperlora.errors import ConfigError

from .classification_data import Example

logger = logging.getLogger(__name__)


class EncodedTexts(Dataset):
    """Examples encoded by the host's tokenizer, ready for ``DataCollatorWithPadding``.

    A text that is too long is cut at the end. Of a pair, tokens are always removed from the longer text.

    Args:
        examples: all texts or all pairs, and all with labels or all without.
        tokenizer: a fast tokenizer.
        labels: names of the ids 0 … C-1; every label must be one of them.
        max_seq_length: maximum number of sub-tokens of an example, including special tokens.

    Raises:
        ConfigError: ``max_seq_length`` leaves no room for the text.
    """

    def __init__(
        self, examples: list[Example], tokenizer: PreTrainedTokenizerBase, labels: list[str], max_seq_length: int
    ):
        self.examples, self.labels = examples, labels
        pairs = None if examples[0].pair is None else [example.pair for example in examples]
        special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        if max_seq_length - special < (1 if pairs is None else 2):
            raise ConfigError(
                f"max_seq_length={max_seq_length} leaves no room for a text beside {special} special tokens. Choose a "
                "larger value, such as 128."
            )
        encoded = tokenizer(
            [example.text for example in examples], pairs, truncation="longest_first", max_length=max_seq_length
        )
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        if cut:
            logger.warning(
                "%d of %d texts are longer than %d sub-tokens and are cut at the end: the host does not read the "
                "rest. Give a larger --max_seq_length if the host can read more, or shorter texts.",
                cut,
                len(examples),
                max_seq_length,
            )
        self._inputs = dict(encoded)
        ids = {label: number for number, label in enumerate(labels)}
        if examples[0].label is not None:
            self._inputs["labels"] = [ids[example.label] for example in examples]

    def __len__(self) -> int:
        return len(self._inputs["input_ids"])

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        """``input_ids``, ``attention_mask`` and all else that the tokenizer returns, each (T,); known ``labels``."""
        return {name: values[index] for name, values in self._inputs.items()}

    def rows_of(self, label_ids: np.ndarray) -> list[dict[str, str]]:
        """Each text, or pair, and the class that was found, from predicted ids (N,) in the order of this data set."""
        rows = []
        for example, number in zip(self.examples, label_ids, strict=True):
            pair = {"sentence1": example.text, "sentence2": example.pair}
            row = {"text": example.text} if example.pair is None else pair
            rows.append(row | {"label": self.labels[number]})
        return rows


def best_class(logits: torch.Tensor | tuple, labels: torch.Tensor | None = None) -> torch.Tensor:
    """``preprocess_logits_for_metrics``: logits (B, C) → id of the highest logit (B,)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)
