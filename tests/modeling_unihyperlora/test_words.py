"""Words are the same on every tokenizer, from raw text and from given words."""

import copy
import itertools
import json
import pickle
import tempfile
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerLegacy, PreTrainedTokenizerFast, pipeline

from modeling_unihyperlora import (
    CanonicalSpace,
    ConfigError,
    HostError,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.words import (
    BARE,
    BLANK,
    ENDS,
    MARK,
    NO_WORD,
    SPECIAL,
    Continuation,
    WordReader,
    begins_of,
    few_places,
    is_mark,
    load_tokenizer,
    prepare_tokenizer,
    probe,
    rule_bytes,
    vocabulary_flags,
    word_places,
    word_rules,
)
from tests.modeling_unihyperlora.families import DECODERS, tiny_host
from tests.tokenizer_kinds import KINDS, LINES, make_tokenizer

SENTENCES = (
    'Angela Merkel met Tim Cook at Apple, in "Cupertino".',
    "He (Hong Kong) said: don't pay $5m — or “so”!",
    "U.S.-based John Smith flew to Al-Ain, 3-2.",
    "Send it to john.smith@example.com or not...",
    "北京 is near 东京都, she said",
    "Anna ❤️ Rome 😀and\tOslo\n\n 👩‍💻 👍🏽.",
    "[Paris] <Oslo> {Rome} a/b c_d e+f=g ~h",
    "...",
)
GIVEN = ["U.S.", "Al-Ain", "don't", "$5m", "Cupertino", ",", "john@example.com", "3-2", "北京", "😀."]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
HOSTS = {"bert": "encoder", "llama": "decoder"}


def rule(text: str) -> list[str]:
    """The words of a text, found character by character."""
    words, current, alone = [], "", False
    for character in text:
        kind = unicodedata.category(character)
        if character.isspace():
            words, current = [*words, current], ""
        elif current and (kind[0] == "M" or kind == "Cf" or "\U0001f3fb" <= character <= "\U0001f3ff"):
            current += character  # an accent, a joiner, the tone of a skin
        elif current and not alone and not is_mark(character):
            current += character
        else:
            words, current, alone = [*words, current], character, is_mark(character)
    return [word for word in [*words, current] if word]


def saved_and_loaded(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def found(tokenizer, encoded, text: str) -> list[str]:
    """The words found from token ids only, as parts of the text."""
    rules = word_rules(vocabulary_flags(tokenizer))
    places = word_places(*begins_of(rules, torch.tensor([encoded["input_ids"]])), causal=True)
    ends = zip(places.first[0], places.read[0], strict=True)
    offsets = encoded["offset_mapping"]
    return [text[offsets[first][0] : offsets[last][1]] for first, last in ends]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return prepare_tokenizer(make_tokenizer(kind))


@pytest.fixture(scope="module")
def anchor_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("anchors") / "anchors.txt"
    path.write_text("\n".join(" ".join(rule(line)) for line in LINES * 2), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def make_tagger(anchor_file):
    """make_tagger(kind, family, task class) → a stream whose head and reader are random, on a random host."""

    def make(kind: str, family: str = "bert", cls=UniHyperLoraForTokenClassification, labels=LABELS):
        tokenizer = make_tokenizer(kind)
        host = tiny_host(family, vocab_size=len(tokenizer) + 3, max_position_embeddings=128)
        space = CanonicalSpace.make([host], anchor_file, dim=8, atoms=16, tokenizers=[tokenizer])
        torch.manual_seed(0)
        given = {"tokenizer": tokenizer, "space": space, "reader": {"width": 12, "hidden": 8}}
        model = cls.from_host(host, labels, "t", **given).eval()
        with torch.no_grad():
            model.adapter.tasks["t"].head_weight.latent.normal_()
        return model

    return make


class TestWordsOfATokenizer:
    @pytest.mark.parametrize("text", SENTENCES)
    def test_raw_text_has_the_words_of_the_rule(self, kind, tokenizer, text):
        encoded = tokenizer(text, return_offsets_mapping=True)
        words = rule(text)
        got = found(tokenizer, encoded, text)
        assert len(got) == len(words)
        for mine, word in zip(got, words, strict=True):  # a normaliser may drop what belongs to a mark
            assert word.startswith(mine) and (mine == word or not word[len(mine) :].isalnum())

    @pytest.mark.parametrize("text", SENTENCES)
    def test_raw_text_and_its_words_are_one(self, tokenizer, text):
        raw, words = tokenizer(text), tokenizer(rule(text), is_split_into_words=True)
        assert words["input_ids"] == raw["input_ids"]
        rules, ids = word_rules(vocabulary_flags(tokenizer)), torch.tensor([raw["input_ids"]])
        for from_ids, from_index in zip(
            begins_of(rules, ids), begins_of(rules, ids, None, torch.tensor([words["word_index"]])), strict=True
        ):
            assert torch.equal(from_ids, from_index)

    @settings(max_examples=60, deadline=None)
    @given(text=st.text(alphabet="abZé5北东.,(\"'$€-—😀  \n", max_size=40))
    def test_of_any_text(self, tokenizer, text):
        raw = tokenizer(text, return_offsets_mapping=True)
        words = rule(text)
        if not words:
            return
        assert found(tokenizer, raw, text) == words
        assert tokenizer(words, is_split_into_words=True)["input_ids"] == raw["input_ids"]

    def test_given_words_are_neither_split_nor_joined(self, tokenizer):
        encoded = tokenizer(GIVEN, is_split_into_words=True, return_tensors="pt")
        reader = WordReader(tiny_host("bert", vocab_size=500, max_position_embeddings=128), tokenizer)
        places = reader.places(encoded["input_ids"], encoded["attention_mask"], encoded["word_index"])
        assert places.lengths.tolist() == [len(GIVEN)]
        last = word_places(
            *begins_of(reader.rules, encoded["input_ids"], None, encoded["word_index"]), causal=True
        ).read
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in GIVEN]
        ids = encoded["input_ids"][0]
        for number, own in enumerate(pieces):
            assert ids[places.first[0, number] : last[0, number] + 1].tolist() == own

    def test_the_hosts_own_tokenizer_has_the_same_words_in_plain_text(self, kind):
        """The host's own tokenizer works too, except for words that share one entry of its vocabulary."""
        text = "Zoe Lind met Eve (Lima Bay) at Bonn, in May."
        own = make_tokenizer(kind)
        encoded = own(text, return_offsets_mapping=True)
        assert [word.strip() for word in found(own, encoded, text)] == rule(text)

    def test_offsets_are_those_of_the_text(self, tokenizer):
        text = "Anna flew to  Rome, Ben stayed."
        encoded = tokenizer(text, return_offsets_mapping=True)
        for start, end in encoded["offset_mapping"]:
            assert text[start:end] == text[start:end].strip()

    def test_padding_keeps_the_given_words(self, tokenizer):
        rows = [tokenizer(words, is_split_into_words=True) for words in (["U.S.", "forces"], ["Rome"])]
        padded = tokenizer.pad([dict(row) for row in rows], return_tensors="pt")
        assert padded["word_index"].shape == padded["input_ids"].shape
        assert (padded["word_index"][padded["attention_mask"] == 0] == NO_WORD).all()
        both = tokenizer([["U.S.", "forces"], ["Rome"]], is_split_into_words=True, padding=True, return_tensors="pt")
        assert torch.equal(both["word_index"], padded["word_index"])

    def test_it_can_be_copied_pickled_and_saved(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        assert saved == type(make_tokenizer("unigram")).__name__
        words = tokenizer(GIVEN, is_split_into_words=True)
        for other in (
            copy.deepcopy(tokenizer),
            pickle.loads(pickle.dumps(tokenizer)),
            load_tokenizer(str(tmp_path)),
            prepare_tokenizer(AutoTokenizer.from_pretrained(tmp_path)),  # preparing twice changes nothing
        ):
            assert other(GIVEN, is_split_into_words=True)["word_index"] == words["word_index"]
            assert other(SENTENCES[0])["input_ids"] == tokenizer(SENTENCES[0])["input_ids"]

    def test_the_tokenizer_that_was_given_is_left_alone(self, kind):
        own = make_tokenizer(kind)
        before = own.backend_tokenizer.to_str(), own.pad_token, own.padding_side
        prepare_tokenizer(own)
        assert (own.backend_tokenizer.to_str(), own.pad_token, own.padding_side) == before


class TestTheStartOfAText:
    """Decoders use a text's first token as an attention sink, so it should not be a word."""

    def test_no_text_begins_with_a_word(self, tokenizer):
        special = tokenizer(LINES[0], return_special_tokens_mask=True)["special_tokens_mask"]
        assert special[0] == 1
        assert special[1] == 0  # one token is enough

    def test_the_token_is_added_once(self, tokenizer):
        again = prepare_tokenizer(saved_and_loaded(tokenizer))
        assert again(LINES[0])["input_ids"] == tokenizer(LINES[0])["input_ids"]

    @pytest.mark.parametrize("pair", [False, True])
    def test_it_takes_room(self, tokenizer, pair):
        both = (LINES[0], LINES[1]) if pair else (LINES[0],)
        bare = len(tokenizer(*both, add_special_tokens=False)["input_ids"])
        assert len(tokenizer(*both)["input_ids"]) == bare + tokenizer.num_special_tokens_to_add(pair=pair)
        assert len(tokenizer(*both, truncation=True, max_length=7)["input_ids"]) == 7

    @pytest.mark.parametrize(
        ("names", "wanted"),
        [
            ({"unk_token": "<|endoftext|>", "bos_token": "<s>", "eos_token": "</s>"}, ["<|endoftext|>"]),
            ({"bos_token": "<s>", "eos_token": "</s>"}, ["<s>"]),
            ({"eos_token": "</s>"}, ["</s>"]),
            ({"pad_token": "<pad>"}, []),
        ],
    )
    def test_which_token_it_is(self, names, wanted):
        """The separator of documents, else the token of the start, else that of the end; none without any."""
        backend = Tokenizer(models.BPE({"a": 0, "Ġa": 1, "Ġ": 2}, [("Ġ", "a")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.add_special_tokens([*names.values()])
        own = prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names))
        encoded = own("a")["input_ids"]
        assert own.convert_ids_to_tokens(encoded) == [*wanted, "Ġa"]
        begins, inside = begins_of(word_rules(vocabulary_flags(own)), torch.tensor([encoded]))
        assert int(begins.sum()) == 1
        assert begins[0, len(wanted)]
        assert not inside[0, : len(wanted)].any()


class TestLongTexts:
    def test_a_text_that_is_cut_is_said(self, tokenizer, monkeypatch):
        said = []
        monkeypatch.setattr("modeling_unihyperlora.words.logger.warning_once", said.append)
        tokenizer("Anna met Ben", truncation=True, max_length=100)
        assert not said
        tokenizer("Anna met Ben in Rome", truncation=True, max_length=4)
        assert len(said) == 1 and "its end is left out" in said[0]

    def test_the_stock_pipeline_reads_it_in_windows(self, make_tagger):
        model = make_tagger("wordpiece-uncased")
        tokenizer = copy.deepcopy(model.stream.words.tokenizer)
        tokenizer.model_max_length = 24
        text = " ".join(["Anna met Ben in Rome, and Tim flew to Oslo."] * 5)
        tag = pipeline(
            "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple", stride=8
        )
        assert max(entity["end"] for entity in tag(text)) > len(text) // 2


class TestStatesAndTags:
    @pytest.mark.parametrize("family", HOSTS)
    def test_raw_text_and_its_words_have_equal_states_and_tags(self, kind, family, make_tagger):
        model = make_tagger(kind, family)
        tokenizer = model.stream.words.tokenizer
        assert model.stream.words.causal == (HOSTS[family] == "decoder")
        for text in SENTENCES:
            raw = tokenizer(text, return_tensors="pt")
            words = tokenizer(rule(text), is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                from_raw = model.stream.read(raw["attention_mask"], {"input_ids": raw["input_ids"]})
                given = {name: words[name] for name in ("input_ids", "word_index")}
                from_words = model.stream.read(words["attention_mask"], given)
                assert torch.equal(from_raw.z, from_words.z)
                assert from_raw.lengths.tolist() == from_words.lengths.tolist() == [len(rule(text))]
                assert torch.equal(model(**raw).logits.argmax(-1), model(**words).logits.argmax(-1))

    @pytest.mark.parametrize("family", HOSTS)
    def test_a_given_word_is_read_at_one_token(self, kind, family, make_tagger):
        """An encoder reads a word at its first token, a decoder at its last; the state is the host's at that token."""
        model = make_tagger(kind, family)
        words = model.stream.words
        encoded = words.tokenizer(GIVEN, is_split_into_words=True, return_tensors="pt")
        places = words.places(encoded["input_ids"], encoded["attention_mask"], encoded["word_index"])
        index = encoded["word_index"][0].tolist()
        for number in range(len(GIVEN)):
            at = [position for position, word in enumerate(index) if word == number]
            assert places.read[0, number] == (at[-1] if family == "llama" else at[0])

    def test_the_stock_pipeline_returns_whole_words(self, kind, make_tagger, monkeypatch):
        model = make_tagger(kind)
        tokenizer = model.stream.words.tokenizer
        tag = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple")
        for text in SENTENCES[:3]:
            words = rule(text)
            for entity in tag(text):
                inside = rule(text[entity["start"] : entity["end"]])
                assert any(inside == words[at : at + len(inside)] for at in range(len(words))), entity

    def test_the_stock_pipeline_takes_words(self, kind, make_tagger):
        """Every word is one entity or none: all its tokens have the same type."""
        model = make_tagger(kind)
        tag = pipeline("token-classification", model=model, tokenizer=model.stream.words.tokenizer)
        encoded = model.stream.words.tokenizer(GIVEN, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        [entities] = tag([GIVEN], is_split_into_words=True)
        assert [LABELS.index(entity["entity"]) for entity in entities] == [
            label for label, word in zip(best, encoded["word_index"][0], strict=True) if word != NO_WORD and label
        ]
        for number in range(len(GIVEN)):
            own = [LABELS[best[at]] for at in (encoded["word_index"][0] == number).nonzero().flatten()]
            assert len({tag[1:] for tag in own}) == 1
            assert not any(tag.startswith("B-") for tag in own[1:])


class TestContinuation:
    def test_b_becomes_i_on_further_tokens(self):
        logits = torch.tensor([[[0.0, 2.0, 1.0, -1.0, -2.0]] * 3])
        got = Continuation.of(LABELS)(logits, torch.tensor([[True, False, True]]))
        assert torch.equal(got[0, [0, 2]], logits[0, [0, 2]])
        assert got[0, 1].tolist() == [0.0, 1.0, 2.0, -2.0, -1.0]

    def test_labels_without_a_pair_stay(self):
        labels = ["O", "B-X", "Y", "S-Z", "I-W"]
        logits = torch.randn(2, 3, 5)
        assert torch.equal(Continuation.of(labels)(logits, torch.zeros(2, 3, dtype=torch.bool)), logits)

    def test_probability_and_type_of_the_word_are_kept(self):
        logits = torch.randn(1, 50, 5)
        got = Continuation.of(LABELS)(logits, torch.zeros(1, 50, dtype=torch.bool))
        kinds = torch.tensor([0, 1, 1, 2, 2])
        assert torch.equal(kinds[got.argmax(-1)], kinds[logits.argmax(-1)])
        torch.testing.assert_close(got.softmax(-1).amax(-1), logits.softmax(-1).amax(-1))


class TestHosts:
    @pytest.mark.parametrize("family", DECODERS)
    def test_decoders_are_causal(self, family):
        host = tiny_host(family, vocab_size=300)
        assert probe(host, word_rules(vocabulary_flags(make_tokenizer("byte-level"))[:300])) == (True, 3)

    @pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert", "fnet", "deberta-v2"])
    def test_encoders_are_not(self, family):
        host = tiny_host(family, vocab_size=300)
        assert probe(host, word_rules(vocabulary_flags(make_tokenizer("byte-level"))[:300])) == (False, 3)

    def test_the_way_of_reading_is_part_of_the_maps_name(self):
        kinds = ("byte-level", "byte-level-digits", "wordpiece-cased", "wordpiece-uncased")
        host = tiny_host("bert", vocab_size=500)
        keys = [WordReader(host, make_tokenizer(kind)).key() for kind in kinds]
        keys.append(WordReader(tiny_host("llama", vocab_size=500), make_tokenizer("byte-level")).key())
        assert len(set(keys)) == len(keys)

    def test_the_maps_name_does_not_depend_on_what_was_read_before(self, tokenizer):
        words = WordReader(tiny_host("bert", vocab_size=500), tokenizer)
        before = words.key()
        words.tokenizer(["Anna met Ben", "Rome"], padding=True, truncation=True, max_length=4)
        assert words.key() == before


class TestBadInput:
    def test_a_vocabulary_without_borders(self):
        backend = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])), pad_token="a")
        with pytest.raises(HostError, match="does not mark where words begin"):
            vocabulary_flags(prepare_tokenizer(backend))

    def test_a_slow_tokenizer(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
        with pytest.raises(HostError, match="slow tokenizer"):
            prepare_tokenizer(BertTokenizerLegacy(str(tmp_path / "vocab.txt")))

    def test_a_folder_without_one(self, tmp_path):
        with pytest.raises(HostError, match="--tokenizer_name"):
            load_tokenizer(str(tmp_path))

    def test_nothing_to_pad_with(self):
        backend = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"Ġa": 0, "b": 1}, [])))
        with pytest.raises(HostError, match="pad_token"):
            prepare_tokenizer(backend)

    def test_without_a_pad_token_it_pads_with_the_end_of_text(self, make_tagger):
        own = make_tokenizer("byte-level")
        assert own.pad_token is None
        model = make_tagger("byte-level", "llama")
        tokenizer = model.stream.words.tokenizer
        batch = tokenizer(["Anna met Ben", "Rome"], padding=True, return_tensors="pt")
        alone = tokenizer("Rome", return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(
                model(**batch).logits[1, :1], model(**alone).logits[0, :1], atol=1e-5, rtol=1e-4
            )

    def test_a_vocabulary_larger_than_the_hosts(self):
        with pytest.raises(HostError, match="not the host's"):
            WordReader(tiny_host("bert", vocab_size=50), make_tokenizer("unigram"))

    def test_tokens_that_were_added_later_are_words(self, make_tagger):
        model = make_tagger("byte-level")
        tokenizer = copy.deepcopy(model.stream.words.tokenizer)
        tokenizer.add_tokens(["<place>"])
        tokenizer.add_tokens([f"<more{number}>" for number in range(5)])
        model.host.resize_token_embeddings(len(tokenizer))
        encoded = tokenizer("Anna in <place> and <more4>", return_tensors="pt")
        places = model.stream.words.places(encoded["input_ids"], encoded["attention_mask"])
        assert places.lengths.tolist() == [5]
        with torch.no_grad():
            assert torch.isfinite(model(**encoded).logits).all()

    @pytest.mark.parametrize("text", ["...", "", "  ", '"'])
    def test_texts_of_marks_or_of_nothing(self, kind, make_tagger, text):
        model = make_tagger(kind, cls=UniHyperLoraForSequenceClassification, labels=["no", "yes"])
        encoded = model.stream.words.tokenizer(text, return_tensors="pt")
        if encoded["input_ids"].shape[1] == 0:
            with pytest.raises(ConfigError, match="empty"):
                model(**encoded)
        else:
            with torch.no_grad():
                assert torch.isfinite(model(**encoded).logits).all()

    def test_a_word_without_a_token_takes_no_other_words_tag(self, kind, make_tagger):
        """Some normalisers drop a lone joiner; the words around it keep their own tokens."""
        words = ["Anna", "\u200b", "Rome"]
        model = make_tagger(kind)
        encoded = model.stream.words.tokenizer(words, is_split_into_words=True, return_tensors="pt")
        index = encoded["word_index"][0]
        places = model.stream.words.places(encoded["input_ids"], encoded["attention_mask"], encoded["word_index"])
        assert index[places.first[0, 0]] == 0 and index[places.first[0, -1]] == 2

    def test_ids_have_to_be_given(self, make_tagger):
        with pytest.raises(ConfigError, match="without input_ids"):
            make_tagger("unigram")(inputs_embeds=torch.randn(1, 3, 32))

    def test_a_tokenizer_is_a_loaded_one(self):
        with pytest.raises(HostError, match="must be a loaded one; got str"):
            prepare_tokenizer("bert-base-cased")


class TestRules:
    def test_two_numbers_say_what_the_flags_say(self):
        """Every pair of entries, with the rule written out in words."""
        kinds = [
            0,
            *(sum(some) for size in range(1, 5) for some in itertools.combinations((1, 2, 4, 8), size)),
            SPECIAL,
        ]
        flags = torch.tensor(kinds, dtype=torch.uint8)
        rules = word_rules(flags)
        for before, own in itertools.product(range(len(kinds)), repeat=2):
            over, bare = kinds[before] & (ENDS | SPECIAL), kinds[before] & BARE
            wanted = bool(kinds[own] & BLANK) or (bool(kinds[own] & MARK or over) and not bare)
            begins, inside = begins_of(rules, torch.tensor([[0, before, own]]))
            assert bool(inside[0, 2]) == (kinds[own] != SPECIAL)
            assert bool(begins[0, 2]) == (wanted and kinds[own] != SPECIAL)

    def test_padding_is_outside_words_and_what_follows_it_begins_one(self):
        rules = word_rules(torch.zeros(4, dtype=torch.uint8))
        ids, mask = torch.tensor([[1, 1, 2, 3], [1, 2, 3, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
        begins, inside = begins_of(rules, ids, mask)
        assert begins.tolist() == [[False, False, True, False], [True, False, False, False]]
        assert torch.equal(inside, mask > 0)
        begins, inside = begins_of(rules, ids, torch.zeros_like(mask))  # a sentence without words has one
        assert begins.tolist() == inside.tolist() == [[True, False, False, False]] * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_python_finds_the_words_of_few_tokens(masked, causal):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([0, BLANK, BLANK | MARK, MARK | ENDS, ENDS, BARE | BLANK, SPECIAL], dtype=torch.uint8)
    for sentences, tokens in [(1, 1), (1, 16), (3, 9), (8, 5)] * 20:
        rules = word_rules(kinds[torch.randint(0, len(kinds), (11,), generator=generator)])
        ids = torch.randint(0, 14, (sentences, tokens), generator=generator)  # some are beyond the vocabulary
        mask = (torch.rand(sentences, tokens, generator=generator) < 0.7).long() if masked else None
        found = few_places(rule_bytes(rules), ids, mask, causal)
        expected = word_places(*begins_of(rules, ids, mask), causal)
        for name, own, wanted in zip(found._fields, found, expected, strict=True):
            assert torch.equal(own, wanted) and own.dtype == wanted.dtype, name


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_tokens_changes_no_logits(kind, family, make_tagger, monkeypatch):
    model = make_tagger(kind, family)
    batch = model.stream.words.tokenizer(["Paris, in 2024 (maybe)!", "Rome"], padding=True, return_tensors="pt")
    few = model(**batch).logits
    monkeypatch.setattr("modeling_unihyperlora.words.FEW", 0)
    assert torch.equal(model(**batch).logits, few) and few.std() > 0


class _Places(torch.nn.Module):
    """The part of an ONNX host that finds the words."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.register_buffer("rules", word_rules(torch.tensor([0, BLANK, MARK | ENDS, SPECIAL], dtype=torch.uint8)))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(word_places(*begins_of(self.rules, ids, mask), self.causal, ids.shape[1]))


@pytest.mark.parametrize("causal", [False, True])
def test_words_are_found_in_onnx_for_any_number_of_tokens(causal, tmp_path):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    finds = _Places(causal).eval()
    ids, mask = torch.tensor([[3, 1, 0, 2, 1, 3], [3, 1, 3, 3, 3, 3]]), torch.ones(2, 6, dtype=torch.long)
    shapes = {name: {0: "batch", 1: "tokens"} for name in ("ids", "mask")}
    torch.onnx.export(
        finds, (ids, mask), tmp_path / "words.onnx", dynamic_shapes=shapes, dynamo=True, opset_version=18
    )
    session = onnxruntime.InferenceSession(tmp_path / "words.onnx")
    generator = torch.Generator().manual_seed(0)
    for sentences, tokens in ((2, 6), (1, 9), (3, 4)):
        ids = torch.randint(0, 4, (sentences, tokens), generator=generator)
        mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (sentences, 1), generator=generator)).long()
        given = {into.name: value.numpy() for into, value in zip(session.get_inputs(), (ids, mask), strict=True)}
        for got, expected in zip(session.run(None, given), finds(ids, mask), strict=True):
            assert torch.equal(torch.tensor(got), expected)
