"""Words: a stream reads one state per word, and words are the same on every host, whatever its tokenizer.

Letters: B batch, T tokens, W words, V entries of a vocabulary.

A word begins at a blank, at a punctuation mark, at a symbol, at a Chinese character, and after one of these. BERT's
pre-tokeniser has this rule; here it holds for every tokenizer. Two parts of this module ensure it:

- ``prepare_tokenizer`` changes the normaliser of a host's tokenizer: it puts blanks around marks and before the text.
  A byte-level or SentencePiece tokenizer then encodes every word as a word after a blank, so raw text and its words
  give the same ids. If the caller gives words (``is_split_into_words=True``), the tokenizer also returns
  ``word_index``, and given words are never split or joined. A tokenizer that adds no special token gets one before the
  text, since decoders do not represent a text's first token, but use it as an attention sink (Xiao et al., 2024).
- ``begins_of`` finds the first tokens of words from token ids, with a small table of the vocabulary. The model uses it
  if there is no ``word_index``, also in ONNX and under torch.compile. It applies the same rule to ids from the host's
  own, unprepared tokenizer. For few tokens on the CPU, ``few_places`` does the same in plain Python, which is faster.
"""

import copy
import json
import re
import unicodedata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import HostError, first_line
from .hosts import call_host, check_states, transformers_folder

logger = logging.get_logger(__name__)

DOCUMENT_SEPARATOR = "<|endoftext|>"  # of GPT-2, GPT-NeoX, Falcon, Phi, Qwen, SmolLM and others
NO_WORD = -1  # value in ``word_index`` of tokens that belong to no word

# Blocks of Chinese characters, as in BERT's normaliser; each character is a word.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
_SKIN_TONES = (0x1F3FB, 0x1F3FF)  # symbols that belong to the emoji before them


def _class(*ranges: tuple[int, int]) -> str:
    return "".join(f"{chr(low)}-{chr(high)}" for low, high in ranges)


# The expressions mean the same to Oniguruma and to JavaScript: no class is intersected with another one, and each
# lookbehind has one length.
_SKIN = rf"[{_class(_SKIN_TONES)}]"
_MARK = rf"[\p{{P}}\p{{S}}{_class(*_IDEOGRAPHS)}]"  # it has to be no skin tone as well
_WITH = rf"[\p{{M}}\p{{Cf}}{_class(_SKIN_TONES)}]"  # accents and joiners, which belong to the mark before them
_AFTER = rf"(?=[^\s\p{{M}}\p{{Cf}}{_class(_SKIN_TONES)}])"
_BEHIND = [rf"(?<={_MARK}{rest})(?<!{_SKIN}{rest}){_AFTER}" for rest in ("", _WITH, _WITH * 2)]
CUT = "|".join([rf"(?<=\S)(?!{_SKIN})(?={_MARK})", *_BEHIND])  # the empty positions where a word begins

_CUT_TEXT = normalizers.Sequence([normalizers.Replace(Regex(CUT), " "), normalizers.Replace(Regex(r"\s+"), " ")])


def is_mark(character: str) -> bool:
    """Whether a character is a word by itself: punctuation, a symbol, or a Chinese character."""
    number = ord(character)
    if _SKIN_TONES[0] <= number <= _SKIN_TONES[1]:
        return False
    return unicodedata.category(character)[0] in "PS" or any(low <= number <= high for low, high in _IDEOGRAPHS)


def cut_words(text: str) -> list[str]:
    """Split a raw text into words; every host reads these words exactly like the text."""
    return _CUT_TEXT.normalize_str(text).split()


# ---- the tokenizer of a host ----


def load_tokenizer(name_or_path: str | None, trust_remote_code: bool = False, **kwargs) -> PreTrainedTokenizerBase:
    """Load and prepare the tokenizer of a host's folder or repository; see ``prepare_tokenizer``.

    Alignment, training, scoring, pipelines and exports all load tokenizers with this function.

    Args:
        name_or_path: a Hub id or a folder.
        trust_remote_code: allow code from the tokenizer's repository.
        **kwargs: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, and settings of the tokenizer such as
            ``model_max_length``.

    Raises:
        HostError: the tokenizer cannot be loaded or prepared.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            transformers_folder(name_or_path or ""), trust_remote_code=trust_remote_code, **kwargs
        )
    except (OSError, ValueError) as error:
        raise HostError(
            f"The tokenizer of the host '{name_or_path}' cannot be loaded ({first_line(error)}). Pass tokenizer=, or "
            "name another one with --tokenizer_name."
        ) from error
    if kwargs.get("padding_side", "right") != "right":
        raise HostError("padding_side='left' is not possible: words are counted from the left. Leave it out.")
    prepared = prepare_tokenizer(tokenizer)
    prepared.truncation_side = kwargs.get("truncation_side", prepared.truncation_side)
    return prepared


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Copy a fast tokenizer so that it splits words as this module describes; returns a prepared one unchanged.

    The copy pads on the right; without a pad token it pads with the end-of-text token. Offsets refer to the original
    text.

    Raises:
        HostError: it is no tokenizer of transformers, it is slow, or it has no token to pad with.
    """
    if isinstance(tokenizer, _WordTokenizer):
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise HostError(
            f"A tokenizer must be a loaded one; got {type(tokenizer).__name__}. Load it with "
            "AutoTokenizer.from_pretrained."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise HostError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell the word of a sub-token. Use a host "
            "with a tokenizer.json, or name a fast tokenizer with --tokenizer_name."
        )
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    state = _with_blanks(json.loads(backend.to_str()))
    start = start_token(tokenizer)
    if start is not None and backend.num_special_tokens_to_add(False) == 0:
        state["post_processor"] = _with_start(state["post_processor"], start, tokenizer.convert_tokens_to_ids(start))
    changed = type(backend).from_str(json.dumps(state))
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(changed, part) is not None:
            setattr(backend, part, getattr(changed, part))
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # words are counted from the left
    if tokenizer.pad_token is None:
        spare = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if spare is None:
            raise HostError(
                f"{type(tokenizer).__name__} has no pad token and no end-of-text token to pad with. Set one: "
                "tokenizer.pad_token = …."
            )
        tokenizer.pad_token = spare
    tokenizer.__class__ = _word_tokenizer(type(tokenizer))
    return tokenizer


def _with_blanks(state: dict) -> dict:
    """Change a tokenizer's JSON so that it splits at every mark and reads a blank before every word only."""
    own, after = (state[part] or {} for part in ("pre_tokenizer", "normalizer"))
    steps = [step.copy() for step in own.get("pretokenizers", [own] if own else [])]
    after = after.get("normalizers", [after] if after else [])
    kinds = [step["type"] for step in steps]
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if "ByteLevel" in kinds:
        for step in steps:
            step |= {"add_prefix_space": False} if step["type"] == "ByteLevel" else {}
        steps = [_as_json(step) for step in (pre_tokenizers.WhitespaceSplit(), _prefix(" "))] + steps
    elif "Metaspace" in kinds or blank in after:  # SentencePiece writes a blank as "▁"
        after = [step for step in after if step != blank and step["type"] != "Prepend"]
        others = [step for step in steps if step["type"] not in ("Metaspace", "WhitespaceSplit", "Split")]
        steps = [_as_json(step) for step in (pre_tokenizers.WhitespaceSplit(), _prefix("▁"))] + others
    changed = state | {
        "normalizer": {"type": "Sequence", "normalizers": [_as_json(_CUT_TEXT), *after]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps else None,
    }
    return json.loads(json.dumps(changed).replace('"trim_offsets": true', '"trim_offsets": false'))


def start_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Token that marks the start of a text: the separator of documents in pretraining, if its name is known."""
    known = (DOCUMENT_SEPARATOR, tokenizer.bos_token, tokenizer.eos_token)
    number_of = tokenizer.backend_tokenizer.token_to_id
    return next((token for token in known if token is not None and number_of(token) is not None), None)


def _with_start(own: dict | None, token: str, number: int) -> dict:
    """A tokenizer's post-processor, which then also puts a token before every text."""
    parts = {"single": f"{token} $A", "pair": f"{token} $A $B", "special_tokens": [(token, number)]}
    added = json.loads(processors.TemplateProcessing(**parts).__getstate__())
    return added if own is None else {"type": "Sequence", "processors": [own, added]}


def _prefix(blank: str) -> pre_tokenizers.PreTokenizer:
    """A step that puts a blank before every word; the blank is not part of the text, so offsets need no trimming."""
    return pre_tokenizers.Metaspace(replacement=blank, prepend_scheme="always", split=False)


def _as_json(step: normalizers.Normalizer | pre_tokenizers.PreTokenizer) -> dict:
    return json.loads(step.__getstate__())


class _WordTokenizer:
    """Mixin of prepared tokenizers: returns ``word_index`` for given words."""

    def _encode_plus(self, *args, is_split_into_words: bool = False, return_tensors=None, **kwargs) -> BatchEncoding:
        encoded = super()._encode_plus(*args, is_split_into_words=is_split_into_words, **kwargs)
        if not kwargs.get("return_overflowing_tokens") and any(text.overflowing for text in encoded.encodings or ()):
            logger.warning_once(
                f"A text has more than {kwargs.get('max_length') or self.model_max_length} tokens; its end is left "
                "out. Where words are tagged, stride=16 lets a pipeline read it in overlapping windows."
            )
        if is_split_into_words:
            rows = [
                [NO_WORD if word is None else word for word in encoding.word_ids] for encoding in encoded.encodings
            ]
            is_batch = len(encoded["input_ids"]) > 0 and isinstance(encoded["input_ids"][0], list)
            encoded["word_index"] = rows if is_batch or not rows else rows[0]
        if return_tensors is None:
            return encoded
        one = len(encoded["input_ids"]) == 0 or not isinstance(encoded["input_ids"][0], list)
        return encoded.convert_to_tensors(return_tensors, prepend_batch_axis=one)

    def _pad(self, encoded_inputs, *args, **kwargs):
        index = encoded_inputs.get("word_index")
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        if index is not None:
            missing = [NO_WORD] * (len(padded["input_ids"]) - len(index))
            padded["word_index"] = [*index, *missing]
        return padded

    def __reduce_ex__(self, protocol):
        """Pickle by the tokenizer's original class, since a class made at run time cannot be pickled by name."""
        return _restored, (type(self).__mro__[2], self.__dict__)


def _word_tokenizer(own: type) -> type:
    """Class of a prepared tokenizer; it keeps the name, which transformers writes into tokenizer_config.json."""
    return type(own.__name__, (_WordTokenizer, own), {"__module__": own.__module__})


def _restored(own: type, state: dict) -> PreTrainedTokenizerBase:
    tokenizer = own.__new__(own)
    tokenizer.__dict__.update(state)
    tokenizer.__class__ = _word_tokenizer(own)
    return tokenizer


def warn_of_scheme(task: str | None, tasks: dict) -> None:
    """Warn if the pipelines of transformers cannot join the tags of a task."""
    scheme = (tasks.get(task) or {}).get("scheme")
    if scheme in ("IOBES", "BILOU", "BMES"):
        logger.warning(
            f"The tags of task '{task}' are {scheme}. With an aggregation_strategy a pipeline of transformers splits "
            "such entities, as it joins words by B- and I- alone. `unihyperlora tag` decodes every scheme."
        )


class HostTokenizer:
    """Lets ``AutoTokenizer`` and ``pipeline`` load the prepared tokenizer of an adapter's host."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the adapter's host, or of another host.

        Args:
            pretrained_model_name_or_path: the adapter's folder or Hub id.
            base_model_name_or_path: another host, as for the model.
            base_model_revision: revision of that host.
            revision: revision of the adapter.
            **kwargs: ``cache_dir``, ``token``, ``local_files_only``, ``subfolder``, and settings of the tokenizer.

        Raises:
            HostError: no host is named, or its tokenizer cannot be loaded.
        """
        hub = {name: kwargs.pop(name) for name in ("cache_dir", "token", "local_files_only") if name in kwargs}
        subfolder = kwargs.pop("subfolder", None) or ""
        pipeline = kwargs.pop("_from_pipeline", None)
        for name in ("_from_auto", "_commit_hash", "trust_remote_code", "code_revision"):
            kwargs.pop(name, None)
        if base_model_name_or_path is None:
            where = {"revision": revision, "subfolder": subfolder}
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **where, **hub)
            base_model_name_or_path = config.get("base_model_name_or_path")
            base_model_revision = config.get("base_model_revision")
            if pipeline == "token-classification":
                warn_of_scheme(config.get("active_task"), config.get("tasks") or {})
        if not base_model_name_or_path:
            raise HostError(
                f"The adapter '{pretrained_model_name_or_path}' does not name a host, so it has no tokenizer. Pass "
                "tokenizer= and base_model_name_or_path='a Hub id or a folder'."
            )
        given = {name: value for name, value in kwargs.items() if value is not None}
        return load_tokenizer(base_model_name_or_path, revision=base_model_revision or "main", **hub, **given)


# ---- words from token ids ----

BLANK, MARK, ENDS, BARE, SPECIAL = 1, 2, 4, 8, 16  # flags of a vocabulary's entry, see ``vocabulary_flags``
LAST = 2**31  # beyond all positions of tokens, so that it is sorted behind them
OUTSIDE = -4  # own number of a token outside words, see ``word_rules``
FEW = 128  # tokens of a batch up to which ``few_places`` takes less time than twenty small operations of torch

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's form of one byte of an unknown character


def vocabulary_flags(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Flags of each entry of a vocabulary: (V + 1,) uint8; the last entry is for ids beyond the vocabulary.

    BLANK: the entry follows a blank (in WordPiece: continues no word), so it begins a word. MARK: its first character
    is a mark. ENDS: its last character is a mark. BARE: the entry is only a blank. SPECIAL: it is a special token.

    Raises:
        HostError: the vocabulary does not mark where words begin.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        flags = [BLANK if token is not None and not token.startswith(prefix) else 0 for token in tokens]
    elif any(token and token[0] in "▁Ġ" for token in tokens):
        read = _text_of_bytes if any(token and token[0] == "Ġ" for token in tokens) else _text_of_pieces
        flags = [_flags(read(token)) for token in tokens]
    else:
        raise HostError(
            f"The vocabulary of {type(tokenizer).__name__} does not mark where words begin ('##', '▁' or 'Ġ'), so its "
            "words cannot be aligned with those of other hosts. Use another host."
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and model.get("type") != "WordPiece":  # its name is not text
        flags[unknown] = 0
    for number in {*tokenizer.all_special_ids} - {unknown}:
        flags[number] = SPECIAL
    if (start := start_token(tokenizer)) is not None:  # also where it is the unknown token, as in SmolLM2-Instruct
        flags[tokenizer.convert_tokens_to_ids(start)] = SPECIAL
    return torch.tensor([*flags, BLANK], dtype=torch.uint8)


def word_rules(flags: torch.Tensor) -> torch.Tensor:
    """The rule for words as two small numbers per entry: flags (V + 1,) → (V + 2, 2) int8; the last row is padding.

    A token begins a word if its own number and the second number of the token before it add up to 2 or more. A token
    with a negative own number is outside words.

    - own: 2 after a blank, 1 for a mark, 0 for others, ``OUTSIDE`` for special tokens.
    - for the next token: 2 after a mark or a special token, 0 after a bare blank, which begins the word itself, and
      otherwise 1.
    """
    has = [flags & flag > 0 for flag in (BLANK, MARK, ENDS | SPECIAL, BARE, SPECIAL)]
    blank, mark, over, bare, special = (value.to(torch.int8) for value in has)
    own = torch.where(special > 0, OUTSIDE, torch.maximum(2 * blank, mark))
    rules = torch.stack([own, (1 + over) * (1 - bare)], dim=1)
    return torch.cat([rules, rules.new_tensor([[OUTSIDE, 2]])])


def rule_bytes(rules: torch.Tensor) -> tuple[bytes, bytes]:
    """The two columns of ``word_rules`` as bytes; ``OUTSIDE`` is subtracted from the first one, so that all fit."""
    own, for_next = rules.cpu().unbind(dim=1)
    return (own - OUTSIDE).numpy().tobytes(), for_next.numpy().tobytes()


def _flags(text: str) -> int:
    """Flags of an entry with this text; a leading blank is written as a blank."""
    inner = text.lstrip(" ")
    if not inner:
        return BLANK | BARE if text else 0
    return BLANK * (text[0] == " ") | MARK * is_mark(inner[0]) | ENDS * is_mark(inner[-1])


def _text_of_pieces(token: str | None) -> str:
    return "" if token is None or _BYTE.fullmatch(token) else token.replace("▁", " ")


def _text_of_bytes(token: str | None) -> str:
    """Text of a byte-level entry; part of a character becomes an accent, which is not a mark."""
    if token is None:
        return ""
    try:
        return bytes(_BYTE_OF[character] for character in token).decode("utf-8", errors="replace").replace("�", "́")
    except KeyError:  # an added token, which is plain text
        return token


def _byte_level() -> dict[str, int]:
    """Character → byte in a byte-level vocabulary (Radford et al. 2019): printable characters are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [number for number in range(256) if number not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_level()


class WordPlaces(NamedTuple):
    """Positions of the words of a batch among its tokens.

    Attributes:
        first: (B, W) first token of each word, 0 beyond a sentence's words.
        read: (B, W) the token whose state the word has: the first one, in a causal host the last one.
        lengths: (B,) number of words per sentence.
        word_of: (B, T) word of each token; a token outside words has the word before it.
        begins: (B, T) bool, the first tokens of words.
    """

    first: torch.Tensor
    read: torch.Tensor
    lengths: torch.Tensor
    word_of: torch.Tensor
    begins: torch.Tensor


def begins_of(
    rules: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    word_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the tokens that begin a word, and the tokens that belong to a word: two bool tensors (B, T).

    A sentence without words gets one word, its first token, so that it can be classified.

    Args:
        rules: (V + 2, 2), see ``word_rules``.
        input_ids: (B, T).
        attention_mask: (B, T), above 0 for tokens.
        word_index: (B, T) word of each token in the caller's words, or ``NO_WORD``; if None, words come from the ids.
    """
    if word_index is not None:
        inside = word_index != NO_WORD
        if attention_mask is not None:
            inside = inside & (attention_mask > 0)
        begins = inside & (word_index != _before(word_index, NO_WORD))
    else:
        number = input_ids.clamp(max=len(rules) - 2)
        if attention_mask is not None:
            number = number.masked_fill(attention_mask <= 0, len(rules) - 1)
        own, for_next = rules[number].unbind(dim=-1)
        begins, inside = own + _before(for_next, 2) >= 2, own >= 0
    found = begins.any(dim=1)
    if torch.compiler.is_compiling() or not all(found.tolist()):
        begins[:, 0].logical_or_(~found)
        inside[:, 0].logical_or_(~found)
    return begins, inside


def _before(values: torch.Tensor, start: int) -> torch.Tensor:
    """Values (B, T) shifted one position to the right; the first column is ``start``."""
    return F.pad(values[:, :-1], (1, 0), value=start)


def word_places(
    begins: torch.Tensor, inside: torch.Tensor, causal: bool = False, width: int | None = None
) -> WordPlaces:
    """Positions of words from the result of ``begins_of``; W is ``width``, by default the largest number of words."""
    tokens, lengths = begins.shape[1], begins.sum(dim=1)
    counts = [] if torch.compiler.is_compiling() or width else lengths.tolist()
    most = max(counts, default=width or tokens)
    number = torch.arange(tokens, device=begins.device)

    def positions(marked: torch.Tensor) -> torch.Tensor:
        found = torch.where(marked, number, LAST).sort(dim=1).values[:, :most]
        return found if counts and min(counts) == most else found.masked_fill(found == LAST, 0)

    first = read = positions(begins)
    if causal:
        further = inside & ~begins
        read = positions(inside & ~torch.cat([further[:, 1:], torch.zeros_like(further[:, :1])], dim=1))
    word_of = (begins.cumsum(dim=1) - 1).clamp_min(0)
    return WordPlaces(first, read, lengths, word_of, begins)


def few_places(
    rules: tuple[bytes, bytes], input_ids: torch.Tensor, attention_mask: torch.Tensor | None, causal: bool
) -> WordPlaces:
    """``word_places(*begins_of(…))`` in plain Python, for few tokens on the CPU; ``rules`` are ``rule_bytes``."""
    own_of, for_next_of = rules
    padding = len(own_of) - 1
    ids = input_ids.tolist()
    masks = [[1] * len(row) for row in ids] if attention_mask is None else attention_mask.tolist()
    first, last, word_of, begins = [], [], [], []
    for row, mask in zip(ids, masks, strict=True):
        firsts, lasts, numbers, starts, before = [], [], [], [], 2
        for at, (token, real) in enumerate(zip(row, mask, strict=True)):
            token = min(token, padding - 1) if real > 0 else padding
            own = own_of[token] + OUTSIDE
            starts.append(own + before >= 2)
            if starts[-1]:
                firsts.append(at)
                lasts.append(at)
            elif own >= 0:
                lasts[-1] = at
            numbers.append(max(len(firsts) - 1, 0))
            before = for_next_of[token]
        if not firsts:
            firsts, lasts, starts[0] = [0], [0], True
        for of_batch, of_row in zip((first, last, word_of, begins), (firsts, lasts, numbers, starts), strict=True):
            of_batch.append(of_row)
    lengths = [len(firsts) for firsts in first]
    for row in (*first, *last):
        row.extend([0] * (max(lengths) - len(row)))
    first, last, lengths, word_of, begins = map(torch.tensor, (first, last, lengths, word_of, begins))
    return WordPlaces(first, last if causal else first, lengths, word_of, begins)


class Continuation(NamedTuple):
    """Changes B-X to I-X on the further tokens of a word, if the label I-X exists.

    Attributes:
        partner: (C,) the id of I-X for B-X, of B-X for I-X, and the label's own id for other labels.
        inner: (C,) bool, whether the label is an I-X with a B-X.
    """

    partner: torch.Tensor
    inner: torch.Tensor

    @classmethod
    def of(cls, labels: list[str], device: torch.device | str = "cpu") -> "Continuation":
        """Make it for the labels of one task."""
        ids = {label: number for number, label in enumerate(labels)}
        partner, inner = [*range(len(labels))], [False] * len(labels)
        for label, begin in ids.items():
            if (label == "B" or label.startswith("B-")) and "I" + label[1:] in ids:
                within = ids["I" + label[1:]]
                partner[begin], partner[within], inner[within] = within, begin, True
        return cls(torch.tensor(partner, device=device), torch.tensor(inner, device=device))

    def __call__(self, logits: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        """Change the logits (B, T, C) of tokens that have their word's scores; ``begins`` (B, T) marks first tokens.

        On other tokens, I-X gets the higher score of B-X and I-X, and B-X the lower one. So the word keeps its type
        and its probability, and a pipeline of transformers joins its tokens.
        """
        other = logits.index_select(-1, self.partner)
        moved = torch.where(self.inner, torch.maximum(logits, other), torch.minimum(logits, other))
        return torch.where(begins.unsqueeze(-1), logits, moved)


# ---- reading a host's words ----


class WordReader:
    """Finds the words of one host.

    Args:
        host: a model that returns its hidden states.
        tokenizer: the host's fast tokenizer; it is prepared if necessary.

    Attributes:
        tokenizer: the prepared tokenizer.
        rules: ``word_rules`` of the tokenizer's vocabulary.
        causal: whether attention is causal. The state of a word is then that of its last token, which has read the
            whole word; otherwise it is that of its first token.
        num_layers: L, number of blocks, from the states that the host returns.

    Raises:
        HostError: the tokenizer is slow, does not mark words, or is not the host's.
    """

    def __init__(self, host: nn.Module, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = prepare_tokenizer(tokenizer)
        check_vocabulary(host, self.tokenizer)
        self.rules = word_rules(vocabulary_flags(self.tokenizer))
        self._rule_bytes = rule_bytes(self.rules)
        self.causal, self.num_layers = probe(host, self.rules)

    def places(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, word_index: torch.Tensor | None = None
    ) -> WordPlaces:
        """Positions of the words among ids (B, T); arguments as for ``begins_of``."""
        in_python = not torch.compiler.is_compiling() and word_index is None and input_ids.device.type == "cpu"
        if in_python and input_ids.numel() <= FEW:
            return few_places(self._rule_bytes, input_ids, attention_mask, self.causal)
        if self.rules.device != input_ids.device:
            self.rules = self.rules.to(input_ids.device)
        return word_places(*begins_of(self.rules, input_ids, attention_mask, word_index), self.causal)

    def key(self) -> str:
        """What the states of words depend on, except the host's weights, as text for names of cache files."""
        tokenizer = self.tokenizer
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # these depend on the last call
        special = [tokenizer.model_max_length, tokenizer.unk_token_id, sorted(tokenizer.all_special_ids)]
        return json.dumps([state, special, self.causal])


def check_vocabulary(host: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``HostError`` if a tokenizer has ids without an embedding in the host."""
    try:
        rows = host.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # a host without a table of embeddings
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise HostError(
            f"The tokenizer {tokenizer.name_or_path!r} gives ids up to {largest}, but the host "
            f"'{host.config.name_or_path}' has {rows} embeddings, so it is not the host's tokenizer. Give the right "
            "one (tokenizer=, --tokenizer_name), or first call resize_token_embeddings on the host."
        )


@torch.no_grad()
def probe(host: nn.Module, rules: torch.Tensor) -> tuple[bool, int]:
    """Find out whether a host's attention is causal, and how many blocks it has.

    The test runs two texts that differ only in their last token: in a causal host, all earlier states are equal.

    Args:
        rules: ``word_rules`` of the vocabulary, to choose ids of ordinary words.

    Raises:
        HostError: the host returns no hidden states, or states of another width than its configuration states.
    """
    words = (rules[:-2, 0] == 2).nonzero().flatten()
    one, other = words[len(words) // 2], words[len(words) // 3]
    ids = torch.stack([torch.stack([one, other, one]), torch.stack([one, other, other])]).to(host.device)
    training = [module for module in host.modules() if module.training]
    host.eval()
    try:
        states = call_host(host, torch.ones_like(ids), input_ids=ids, output_hidden_states=True).hidden_states
    finally:
        for module in training:
            module.training = True
    states = check_states(host, states, ids)
    changed = max(float((state[0, :2] - state[1, :2]).abs().max()) for state in states)
    return changed <= 1e-4 * max(float(states[-1].abs().max()), 1e-6), len(states) - 1
