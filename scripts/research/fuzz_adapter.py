"""Fuzzes adapter files: a damaged file must be refused with the package's error, or load and score the same.

    python -m scripts.research.fuzz_adapter --files 10000 --output results/adapter-fuzz.json

The script makes a small adapter of each pathway on a random host. It then damages copies: flips bits, truncates files,
changes the header, swaps, changes or removes tensors, and changes config.json. Half of the files with changed tensors
get a new, valid digest, as an attacker could do, so that the digest does not reveal the change. config.json may be
edited by hand and has no digest: an adapter that loads with a changed one may score differently, which is counted
separately.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

from modeling_unihyperlora import (
    CanonicalSpace,
    UniHyperLoraConfig,
    UniHyperLoraError,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.storage import WEIGHTS_NAME, StoredTensor, signed_metadata, write_json

SECONDS = 20  # a file that takes longer counts as hanging
WORDS = [f"word{i}" for i in range(40)]
LABELS = ["O", "B-A", "I-A"]
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    13,
    4096,
    4097,
    10**12,
    0.5,
    1e300,
    "",
    "x",
    "ner",
    "stream",
    [],
    [1],
    {},
    {"a": 1},
]

Folder = dict[str, bytes]  # file name → content


class Sample:
    """An adapter, its host, and its logits on a batch."""

    def __init__(self, pathway: str):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        self.host = BertModel(BertConfig(vocab_size=45, **shape)).eval()
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
        backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
        self.batch = self.tokenizer(["word1 word2 word3", "word7 word5"], padding=True, return_tensors="pt")
        with tempfile.TemporaryDirectory() as folder:
            model = self.inject() if pathway == "inject" else self.stream(Path(folder) / "anchors.txt")
            for name, module in model.adapter.named_modules():
                if isinstance(module, StoredTensor) and not name.startswith("space."):
                    module.latent.data += 0.3 * torch.randn_like(module.latent)
            model.save_pretrained(folder)
            model.detach()
            self.files = {name: (Path(folder) / name).read_bytes() for name in ("config.json", WEIGHTS_NAME)}
        self.logits = self.score(self.files)
        self.hooks = self.hooks_now()  # transformers itself registers hooks to record states

    def inject(self) -> UniHyperLoraForTokenClassification:
        config = UniHyperLoraConfig(pathway="inject", atoms=12, anchor_dim=8, mixer_hidden=4)
        return UniHyperLoraForTokenClassification.from_host(self.host, LABELS, "ner", config)

    def stream(self, anchors: Path) -> UniHyperLoraForTokenClassification:
        """A stream with two tasks, whose readers differ in size and bits."""
        anchors.write_text("\n".join(" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(40)))
        space = CanonicalSpace.make([self.host], anchors, dim=8, atoms=12, tokenizers=[self.tokenizer])
        own = {"reader": {"width": 8, "hidden": 6}, "space": space, "tokenizer": self.tokenizer}
        model = UniHyperLoraForTokenClassification.from_host(self.host, LABELS[:2], "places", **own)
        model.add_task("ner", LABELS, {"width": 6, "hidden": 4}, bits=4)
        return model

    def hooks_now(self) -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.host.modules()]

    def score(self, files: Folder) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            load = UniHyperLoraForTokenClassification.from_pretrained
            model = load(folder, host=self.host, tokenizer=self.tokenizer)
        try:
            with torch.no_grad():
                return model(input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"]).logits
        finally:
            model.detach()


# ---- kinds of damage; each returns the new content of the file ----


def flip_bits(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        bit = chance.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip_bits_of_the_header(content: bytes, chance: random.Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    return flip_bits(content[:end], chance) + content[end:]


def cut_off(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def lengthen(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.choice((1, 8, 1000)))


def overwrite_a_run(content: bytes, chance: random.Random) -> bytes:
    start, length = chance.randrange(len(content)), chance.choice((1, 16, 512))
    run = chance.choice((b"\0" * length, chance.randbytes(length)))[: len(content) - start]
    return content[:start] + run + content[start + len(run) :]


def change_the_header(content: bytes, chance: random.Random) -> bytes:
    """Change the dtype, shape, offset, name or metadata of a tensor in the header, which stays valid JSON."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = chance.sample(names, 2)
    kind = chance.randrange(7)
    if kind == 0:
        header[one]["dtype"] = chance.choice(["F32", "I8", "U8", "F16", "BF16", "BOOL", "F8_E4M3", "I64", "Q4"])
    elif kind == 1:
        header[one]["shape"] = chance.choice([[], [0], [2**40], [-1], header[one]["shape"][::-1], [1, 2, 3], "x"])
    elif kind == 2:
        header[one]["data_offsets"] = [chance.randrange(2**20), chance.randrange(2**20)]
    elif kind == 3:
        header[chance.choice(["extra", "host.x", "", "a" * 5000])] = header.pop(one)
    elif kind == 4:
        header["__metadata__"] = chance.choice([{}, {"format": 3}, None, {"unihyperlora_format": "9"}, {"sha256": ""}])
    elif kind == 5:
        del header[one]
    else:
        header[one], header[other] = header[other], header[one]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def change_tensors(content: bytes, chance: random.Random) -> bytes:
    """Swap, reshape, convert, delete or extend a tensor, or make it not finite; half of the files get a new digest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS_NAME
        path.write_bytes(content)
        tensors, metadata = load_file(path), _metadata(content)
        one = chance.choice(sorted(tensors))
        kind = chance.randrange(6)
        if kind == 0:
            unlike = [name for name, tensor in tensors.items() if tensor.shape != tensors[one].shape]
            other = chance.choice(sorted(unlike))
            tensors[one], tensors[other] = tensors[other], tensors[one]
        elif kind == 1:
            tensors[one] = tensors[one].reshape(tensors[one].shape[::-1]).contiguous()
        elif kind == 2:
            tensors[one] = tensors[one].to(chance.choice([torch.float32, torch.int8, torch.float16, torch.int64]))
        elif kind == 3 and tensors[one].is_floating_point():
            tensors[one].view(-1)[0] = chance.choice([float("nan"), float("inf"), float("-inf")])
        elif kind == 4:
            del tensors[one]
        else:
            tensors[one] = torch.cat([tensors[one].reshape(-1), tensors[one].reshape(-1)[:1]])
        save_file(tensors, path, metadata=signed_metadata(tensors) if chance.random() < 0.5 else metadata)
        return path.read_bytes()


def change_a_value_of_config(content: bytes, chance: random.Random) -> bytes:
    config = json.loads(content)
    place = config
    while True:
        key = chance.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or chance.random() < 0.3:
            break
        place = place[key]
    if isinstance(place, dict) and chance.random() < 0.2:
        place[chance.choice(["unknown", key + "x", "atoms", "labels"])] = place.pop(key)
    else:
        place[key] = chance.choice(VALUES)
    return json.dumps(config).encode()


def _metadata(content: bytes) -> dict[str, str]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


DAMAGES: dict[str, tuple[str, Callable[[bytes, random.Random], bytes]]] = {
    "bits flipped": (WEIGHTS_NAME, flip_bits),
    "bits of the header flipped": (WEIGHTS_NAME, flip_bits_of_the_header),
    "cut off": (WEIGHTS_NAME, cut_off),
    "lengthened": (WEIGHTS_NAME, lengthen),
    "a run overwritten": (WEIGHTS_NAME, overwrite_a_run),
    "header changed": (WEIGHTS_NAME, change_the_header),
    "tensors changed": (WEIGHTS_NAME, change_tensors),
    "config.json: bits flipped": ("config.json", flip_bits),
    "config.json: cut off": ("config.json", cut_off),
    "config.json: a value changed": ("config.json", change_a_value_of_config),
}
OUTCOMES = ("refused", "loaded, equal logits", "loaded, other logits", "failed")


def fuzz(files: int, seed: int = 0) -> dict[str, object]:
    """Damage ``files`` adapters, of both pathways in turn.

    Returns:
        ``outcomes`` (damage → outcome → number) and ``failures``: files that raised another error, hung, changed the
        host, or loaded other weights without an error.
    """
    samples = [Sample("inject"), Sample("stream")]
    chance, outcomes, failures = random.Random(seed), {name: Counter() for name in DAMAGES}, []
    signal.signal(signal.SIGALRM, _hangs)
    for number in range(files):
        sample, name = samples[number % 2], list(DAMAGES)[number // 2 % len(DAMAGES)]
        file, damage = DAMAGES[name]
        changed = sample.files | {file: damage(sample.files[file], chance)}
        signal.alarm(SECONDS)
        try:
            equal = torch.equal(sample.score(changed), sample.logits)
            outcome = "loaded, equal logits" if equal else "loaded, other logits"
            if not equal and file != "config.json":
                failures.append(f"file {number}: {name}: loaded with other logits")
        except UniHyperLoraError:
            outcome = "refused"
        except Exception as error:
            outcome = "failed"
            failures.append(f"file {number}: {name}: {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        outcomes[name][outcome] += 1
        if sample.hooks_now() != sample.hooks:
            failures.append(f"file {number}: {name}: hooks were left on the host")
    for sample in samples:
        if not torch.equal(sample.score(sample.files), sample.logits):
            failures.append("the host was changed")
    return {"files": files, "seed": seed, "outcomes": {n: dict(c) for n, c in outcomes.items()}, "failures": failures}


def _hangs(signum, frame):
    raise TimeoutError(f"hung for {SECONDS} seconds")


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args(command_line)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["UNIHYPERLORA_CACHE"] = cache
        report = fuzz(args.files, args.seed)
    if args.output:
        write_json(args.output, report | {"kind": "adapter_fuzz"})
    print(json.dumps(report, indent=2))
    if report["failures"]:
        sys.exit(f"fuzz_adapter: {len(report['failures'])} of {args.files} files failed.")


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"fuzz_adapter: {error}")
