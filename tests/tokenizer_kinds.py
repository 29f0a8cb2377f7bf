"""Small tokenizers of all kinds, trained on a few lines, for tests that must hold for all of them."""

import functools
import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "Angela Merkel met Tim Cook at Apple, in Cupertino.",
    "He (Ben) lives near Hong Kong, and works in Paris; she flew to Oslo.",
    "The price is 5 or 17 dollars, they said: do not pay it!",
    "Send a word to John Smith at the example company, please.",
    "Anna and Ben live in Rome, and Carla works at the sea.",
] * 4

# As the Llama-3 and Qwen families cut, in short.
_CUT_FIRST = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

KINDS = (
    "wordpiece-uncased",
    "wordpiece-cased",
    "unigram",
    "unigram-nfkc",
    "byte-level",
    "byte-level-digits",
    "byte-level-cut-first",
    "sentencepiece-bpe",
    "sentencepiece-bpe-legacy",
)


@functools.cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer as ``AutoTokenizer`` loads it, with at most 300 entries. Shared by tests, so do not change it."""
    backend, trainer = _backend(kind)
    backend.train_from_iterator(LINES, trainer)
    if kind.endswith("legacy"):  # as the first Llama: no pre-tokenizer, blanks are written by the normaliser
        state = json.loads(backend.to_str()) | {"pre_tokenizer": None}
        backend = Tokenizer.from_str(json.dumps(state))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder = kind.startswith(("wordpiece", "unigram"))
    if encoder:
        ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    if encoder:
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **names)


def _backend(kind: str):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    own = {"vocab_size": 300, "special_tokens": special, "show_progress": False}
    if kind.startswith("wordpiece"):
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=kind.endswith("uncased"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return backend, trainers.WordPieceTrainer(**own)
    if kind.startswith("unigram"):
        backend = Tokenizer(models.Unigram())
        if kind.endswith("nfkc"):
            backend.normalizer = normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁"), normalizers.Strip(left=False)]
            )
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace()
        return backend, trainers.UnigramTrainer(**own, unk_token="[UNK]")
    if kind.startswith("byte-level"):
        backend = Tokenizer(models.BPE())
        cut_first = kind.endswith("cut-first")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut_first)
        before = {
            "byte-level-digits": [pre_tokenizers.Digits(individual_digits=True)],
            "byte-level-cut-first": [pre_tokenizers.Split(Regex(_CUT_FIRST), "isolated")],
        }.get(kind, [])
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.decoder = decoders.ByteLevel()
        own["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        return backend, trainers.BpeTrainer(**own | {"vocab_size": 400})
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend, trainers.BpeTrainer(**own)
