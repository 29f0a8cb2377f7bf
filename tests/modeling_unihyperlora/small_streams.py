"""Small streams: random BERTs with forty words, a canonical space of twelve coordinates, readers with six units."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from modeling_unihyperlora import CanonicalSpace, UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.storage import StoredTensor
from tests.conftest import piece_tokenizer

WORDS = [f"word{i}" for i in range(40)]
TOKENIZER = piece_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "un", "##known"], 64)
LABELS = ["O", "B-PER", "I-PER"]
MOODS = ["no", "yes"]
D = 12
READER = {"width": 10, "hidden": 6}


def bert(width: int = 32, blocks: int = 4, seed: int = 0) -> BertModel:
    shape = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(vocab_size=50, max_position_embeddings=64, intermediate_size=2 * width, **shape)
        return BertModel(config).eval()


def distilbert() -> DistilBertModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        shape = {"dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 48}
        return DistilBertModel(DistilBertConfig(vocab_size=50, max_position_embeddings=64, **shape)).eval()


def text(seed: int, sentences: int = 60) -> list[list[str]]:
    """Sentences of eight words."""
    return np.random.default_rng(seed).choice(WORDS, (sentences, 8)).tolist()


@functools.cache
def small_space(seed: int = 5, dim: int = D) -> CanonicalSpace:
    """A space of 480 anchors, made on ``bert()``. Shared by tests, so do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        anchors = Path(folder) / "anchors.txt"
        anchors.write_text("\n".join(map(" ".join, text(seed))), encoding="utf-8")
        return CanonicalSpace.make([bert()], anchors, dim=dim, atoms=16, tokenizers=[TOKENIZER])


def small_stream(host=None, labels=LABELS, task: str = "people", cls=UniHyperLoraForTokenClassification, **given):
    """A stream on a host, by default the host of the space; all values of the task are random."""
    given = {"reader": READER, "tokenizer": TOKENIZER, "space": small_space()} | given
    host = bert() if host is None else host
    model = cls.from_host(host, labels=labels, task=task, config=UniHyperLoraConfig(), **given).eval()
    return stirred(model, task)


def stirred(model, task: str, seed: int = 1):
    """Set all tensors of a task to random values, so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.adapter.tasks[task].named_modules():
            if isinstance(module, StoredTensor):
                noise = torch.randn(module.latent.shape, generator=generator)
                module.latent += (0.1 if name == "delta" else 0.5) * noise
    return model


def batch(sentences: tuple[str, ...] = ("word1 unknown word3", "word7 word2"), tokenizer=TOKENIZER):
    return tokenizer(list(sentences), padding=True, return_tensors="pt")


def tensors_of(fit) -> list[torch.Tensor]:
    """All tensors of a host's map."""
    return [x for part in fit.parts for x in part if isinstance(x, torch.Tensor)]
