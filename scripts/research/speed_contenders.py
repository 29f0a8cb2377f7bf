"""The contenders of scripts/research/speed.py: adapters of both pathways, the bare host, and PEFT's methods.

Every contender has its own copy of the host, so that its hooks do not slow down others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.configuration_unihyperlora import read_config
from modeling_unihyperlora.hosts import load_host
from modeling_unihyperlora.sites import HostMap
from modeling_unihyperlora.space import read_anchors
from modeling_unihyperlora.space_making.make import PACKAGE_ANCHORS
from modeling_unihyperlora.words import load_tokenizer
from trainers.baselines import make_baseline, require_peft
from trainers.sources import disturb
from trainers.state_cache import CanonicalStates, StreamCollator, WordStates
from trainers.training_args import UniHyperLoraTrainingArguments

LABELS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
PATHWAYS = ("stream", "inject", "inject_merged")
PEERS = ("host", "lora", "lora_merged", "vblora")
TRAINED = (
    *("stream", "stream_delta", "inject", "inject_delta", "inject_delta_checkpointed"),
    *("lora", "lora_no_dropout", "lora_checkpointed"),
)
LORA_RANK = 8
LEARNING_RATE = 1e-3


@dataclass
class Ground:
    """Makes the contenders on one host and device.

    Args:
        host: Hub id or folder.
        adapter: folder or Hub id of an adapter; a new adapter is made if it is None or of the other pathway.
        device: "cpu" or "cuda".
        make_host: makes a copy of the host; by default loads ``host``.
        reader: size of a new stream's reader.
        space: file of a new stream's canonical space; by default the package's own.
    """

    host: str
    adapter: str | None = None
    device: str = "cpu"
    make_host: Callable[[], nn.Module] | None = None
    reader: str = "large"
    space: str | None = None

    def __post_init__(self):
        self.tokenizer = load_tokenizer(self.host)

    def new_host(self) -> nn.Module:
        host = load_host(self.host) if self.make_host is None else self.make_host()
        return host.eval().to(self.device)

    def batch(self, sentences: int, tokens: int) -> dict[str, torch.Tensor]:
        """A batch of running text without padding: the package's anchor sentences, each row from another start."""
        text, rows = anchors(), []
        for row in range(sentences):
            start = row * 9 % len(text)
            words = [word for sentence in (text[start:] + text[:start]) for word in sentence]
            rows.append(" ".join(words[:tokens]))
        encoded = self.tokenizer(rows, truncation=True, max_length=tokens, return_tensors="pt")
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def pathway_model(self, pathway: str, router: str = "token") -> UniHyperLoraForTokenClassification:
        """The given adapter if it has this pathway, else a new one with random weights instead of zeros."""
        own = {"host": self.new_host()} | ({"tokenizer": self.tokenizer} if pathway == "stream" else {})
        if self.adapter is not None and read_config(Path(self.adapter) / "config.json").pathway == pathway:
            changes = {"router": router} if pathway == "inject" else {}
            return UniHyperLoraForTokenClassification.from_pretrained(self.adapter, **own, **changes).eval()
        if pathway == "stream":
            own |= {"reader": self.reader, "space": self.space}
        else:
            own["config"] = UniHyperLoraConfig(pathway=pathway, router=router)
        model = UniHyperLoraForTokenClassification.from_host(labels=LABELS, **own)
        task, generator = model.adapter.tasks["default"], torch.Generator(device=self.device).manual_seed(0)
        fresh = [task.head_weight.latent, *([] if pathway == "stream" else [model.adapter.atoms_out.latent])]
        with torch.no_grad():  # these are zero in a new adapter
            for latent in fresh:
                latent.normal_(0, 0.05, generator=generator)
        return model.eval()

    def fresh_stream(self, task: str) -> UniHyperLoraForTokenClassification:
        """A new stream whose first task has this name."""
        own = {"tokenizer": self.tokenizer, "reader": self.reader, "space": self.space}
        return UniHyperLoraForTokenClassification.from_host(self.new_host(), LABELS, task, **own)

    def stream_folder(self, folder: Path) -> str:
        """Folder of the given adapter if it is a stream, else of a new stream, which is saved to ``folder``."""
        if self.adapter is not None and read_config(Path(self.adapter) / "config.json").pathway == "stream":
            return self.adapter
        self.pathway_model("stream").save_pretrained(folder)
        return str(folder)

    def forward(self, name: str) -> Callable[[dict[str, torch.Tensor]], object]:
        """A contender of ``PATHWAYS`` or ``PEERS``, as a function of a batch."""
        model = self._forward_model(name)
        return lambda batch: model(**batch)

    def _forward_model(self, name: str) -> nn.Module:
        if name == "host":
            return self.new_host()
        if name in ("stream", "inject"):
            return self.pathway_model(name)
        if name == "inject_merged":
            model = self.pathway_model("inject", router="static")
            model.merge()
            return model
        require_peft()
        from peft import LoraConfig, VBLoRAConfig, get_peft_model

        host = self.new_host()
        sites = [site.linear for site in HostMap(host).sites]
        targets = [name for name, module in host.named_modules() if any(module is linear for linear in sites)]
        if name == "vblora":
            length = math.gcd(256, *(width for linear in sites for width in linear.weight.shape))
            return get_peft_model(
                host, VBLoRAConfig(r=4, vector_length=length, num_vectors=256, target_modules=targets)
            ).eval()
        peft = get_peft_model(host, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)).eval()
        if name == "lora_merged":
            peft.merge_adapter()
        return peft

    # ---- training ----

    def step(self, name: str, sentences: Sequence[list[str]], tokens: int) -> Callable[[Sequence[int]], None]:
        """A training step of a contender of ``TRAINED``, as a function of the indices of its sentences.

        Args:
            sentences: sentences to train on, with random labels.
            tokens: maximum length of a window.
        """
        windows = Windows(sentences, self.tokenizer, tokens)
        if name.startswith("lora"):
            model = make_baseline("lora", "token_classification", self.host, LABELS, LORA_RANK).to(self.device)
            model.train(name != "lora_no_dropout")
        else:
            pathway, _, scope = name.removesuffix("_checkpointed").partition("_")
            model = self.pathway_model(pathway)
            model.config.tasks[model.config.active_task]["trained"] = True
            model.set_train_scope(scope or "task")
            model.train()
        if name.endswith("_checkpointed"):
            model.gradient_checkpointing_enable()
        data = windows
        if name.startswith("stream"):
            data = CanonicalStates(WordStates(model.host, model.stream.words, windows), lambda: [model.stream.fit])
        collate = StreamCollator(self._pad)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

        def step(chosen: Sequence[int]) -> None:
            batch = {key: value.to(self.device) for key, value in collate([data[index] for index in chosen]).items()}
            optimizer.zero_grad()
            if name == "stream":
                batch["canonical_states"] = disturb(batch["canonical_states"], UniHyperLoraTrainingArguments.fidelity)
            model(**batch).loss.backward()
            optimizer.step()

        return step

    def _pad(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        inputs = [{key: item[key] for key in item if key != "labels"} for item in items]
        batch = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
        labels = [torch.tensor(item["labels"]) for item in items]
        batch["labels"] = nn.utils.rnn.pad_sequence(labels, True, -100)
        return dict(batch)


class Windows(Dataset):
    """Tokenised sentences with a random label at the first sub-token of each word."""

    def __init__(self, sentences: Sequence[list[str]], tokenizer, tokens: int):
        self.items = []
        for number, words in enumerate(sentences):
            encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=tokens)
            at = encoded.word_ids()
            first = [word is not None and word != before for word, before in zip(at, [None, *at], strict=False)]
            drawn = torch.randint(len(LABELS), (len(at),), generator=torch.Generator().manual_seed(number)).tolist()
            labels = [label if begins else -100 for label, begins in zip(drawn, first, strict=True)]
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            self.items.append(inputs | {"labels": labels})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


def anchors() -> list[list[str]]:
    """The sentences of the package's anchor text."""
    return read_anchors(PACKAGE_ANCHORS)


def texts(count: int, words: int | None) -> list[list[str]]:
    """``count`` sentences of the package's anchor text, unchanged or with exactly ``words`` words each."""
    text = anchors()
    if words is None:
        return [text[index % len(text)] for index in range(count)]
    flat = [word for sentence in text for word in sentence]
    return [(flat[start:] + flat[:start])[:words] for start in range(0, 61 * count, 61)]
