"""The host's tokenizer: words apart, and one clear error where there is none."""

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from modeling_unihyperlora.errors import DataError
from trainers.ner_data import Sentence
from trainers.ner_windows import IGNORED, SentenceWindows
from trainers.tokenization import load_tokenizer


def test_byte_level_tokenizers_keep_words_apart(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<unk>", *alphabet, "Ġa", "Ġb"])}
    backend = Tokenizer(BPE(vocabulary, [("Ġ", "a"), ("Ġ", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    (row,) = SentenceWindows([Sentence(["a", "b", "c"], ["O"] * 3, "here")], tokenizer, ["O", "B-A"], 16)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["Ġa", "Ġb", "Ġ", "c"]
    assert row["labels"] == [0, 0, 0, IGNORED]


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(DataError, match="--tokenizer_name"):
        load_tokenizer(str(tmp_path))
