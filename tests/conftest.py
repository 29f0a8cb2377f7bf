"""Fixtures for all tests: no network, and a tiny temporary host with its tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a stray download would cost a minute

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from modeling_unihyperlora.space import HostFit

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "anna ben carla david paris rome oslo lima lives works in at near the a and from to flew .".split()
PIECES = ["super", "##cali", "##fragi", "##listic", "##s", "##ed"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece over WORDS and PIECES; "supercalifragilistic" is four pieces, other words are unknown."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *WORDS, *PIECES])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],  # as BERT's
    )


def piece_tokenizer(pieces: list[str], length: int) -> PreTrainedTokenizerFast:
    """WordPiece with these pieces, including special tokens, in this order; blanks separate words."""
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Cache maps and states in a folder of the tests, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIHYPERLORA_CACHE", str(tmp_path_factory.mktemp("unihyperlora")))
        yield


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_host(tmp_path_factory) -> Path:
    """Folder of a random BERT of 2 blocks x 64 with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_host")
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl("train.jsonl", [(words, tags), …]) → path; other column names by keyword."""

    def write(name: str, rows: list[tuple[list, list]], text: str = "tokens", label: str = "ner_tags") -> Path:
        path = tmp_path / name
        lines = (json.dumps({text: words, label: tags}) + "\n" for words, tags in rows)
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


def mapped(fit: HostFit, states: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Canonical coordinates of words, (N, layers, d) states of the named layers → (N, K, D)."""
    return fit(dict(zip(layers, states.unbind(1), strict=True))).unflatten(1, (len(fit.knots), -1))
