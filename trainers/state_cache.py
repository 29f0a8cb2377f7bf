"""Canonical states of a data set, computed once: the host is frozen, so the stream trains on them without it.

One float16 file a host, anchor set and data set, named by a digest of all three, in ``cache_folder()``. It is written
under another name first, so that a file with the right name is whole; it is memory-mapped, not loaded.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_unihyperlora.calibration import cache_folder
from modeling_unihyperlora.hosts import fingerprint
from modeling_unihyperlora.storage import replacing

from .decoding import IGNORED
from .ner_windows import SentenceWindows

logger = logging.getLogger(__name__)


class CanonicalStates(Dataset):
    """The words of windows as their canonical states, with their labels.

    Args:
        model: a stream model on the host whose states are wanted; its adapter's values do not matter, its anchors do.
        windows: the data set.
        batch_size: windows the host reads at a time.
    """

    def __init__(self, model, windows: SentenceWindows, collate: Callable, batch_size: int = 32):
        positions = [_word_positions(model, window["input_ids"]) for window in windows]
        self.labels = [[window["labels"][i] for i in at] for window, at in zip(windows, positions, strict=True)]
        self.offsets = np.cumsum([0, *map(len, positions)])
        knots, _, _ = model.stream.fit.matrix.shape
        shape = (int(self.offsets[-1]), knots, model.config.stream_dim)
        path = cache_folder() / f"states-{_digest(model, windows)}.f16"
        if not path.is_file() or path.stat().st_size != 2 * int(np.prod(shape)):
            logger.info("Computing the states of %d sentences once, %s", len(windows), path)
            with replacing(path) as temporary:
                self._write(np.memmap(temporary, np.float16, "w+", shape=shape), model, windows, collate, batch_size)
        self.states = np.memmap(path, np.float16, "r", shape=shape)

    def _write(self, states: np.memmap, model, windows, collate, batch_size: int) -> None:
        model.eval()
        order = sorted(range(len(windows)), key=lambda index: len(windows[index]["input_ids"]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([windows[index] for index in chosen]).to(model.host.device)
            z, lengths, _, _ = model.stream.read_host(batch["attention_mask"], {"input_ids": batch["input_ids"]})
            for row, index in enumerate(chosen):
                states[self.offsets[index] : self.offsets[index + 1]] = z[row, : lengths[row]].cpu().numpy()
        states.flush()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        states = np.array(self.states[self.offsets[index] : self.offsets[index + 1]], dtype=np.float32)
        return {"canonical_states": torch.from_numpy(states), "labels": torch.tensor(self.labels[index])}


class StreamCollator:
    """Batches of cached states (W words each, padded), or of token ids by another collator."""

    def __init__(self, for_tokens: Callable):
        self.for_tokens = for_tokens

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        if "canonical_states" not in items[0]:
            return self.for_tokens(items)
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "canonical_states": pad([item["canonical_states"] for item in items], batch_first=True),
            "word_counts": torch.tensor([len(item["labels"]) for item in items]),
            "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=IGNORED),
        }


def _word_positions(model, input_ids: list[int]) -> list[int]:
    positions, lengths, _ = model.stream.word_positions(torch.tensor([input_ids]), None)
    return positions[0, : lengths[0]].tolist()


def _digest(model, windows: SentenceWindows) -> str:
    digest = hashlib.sha256(fingerprint(model.host).encode())
    digest.update(model.stream.fit.matrix.numpy().tobytes())
    for window in windows:
        digest.update(np.array(window["input_ids"], dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()[:24]
