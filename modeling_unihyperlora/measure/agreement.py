"""How much of a task a host keeps, without a label: agreement on the space's own text.

The space holds the coordinates of its anchors. They are what the task's reader was trained to read. A host gives other
coordinates for the same words. Agreement compares what the reader predicts from both. The host's coordinates come from
maps that were fitted to the other half of the text: a map flatters the words it was fitted to.
"""

import torch

from ..modeling_unihyperlora import StreamRun
from ..reader import StreamAdapter
from ..space import KNOTS, CanonicalSpace, anchor_states, fit_host, knot_layers, layers_read

BLOCK = 8  # neighbouring sentences that are held out together
BATCH = 64  # sentences
OUTSIDE = "O"


def agreement(model, tasks: list[str]) -> dict[str, float | None]:
    """For each task the share of equal predictions from the space's coordinates and from the host's, 0 to 1.

    For a task of tags the share is taken over the words that have another tag than O in at least one of the two; for a
    task of classes it is taken over the sentences. The host's maps are fitted once for all tasks.

    Args:
        model: a stream that is aligned with its host.
        tasks: names of its tasks.

    Returns:
        Task → share, or None if no word is tagged in either.
    """
    if not tasks:
        return {}
    adapter, words = model.adapter, model.bound_stream.words
    sentences = adapter.space.sentences()
    states = anchor_states(model.host, words, sentences)
    usable = torch.isfinite(states).all(dim=-1).all(dim=0)
    from_space = adapter.space.canonical().cpu().transpose(0, 1)
    from_host = held_out_coordinates(adapter.space, states, words.num_layers)
    shares = {}
    for name in tasks:
        first, second = (torch.cat(predictions(adapter, name, z, sentences)) for z in (from_space, from_host))
        own = model.config.tasks[name]
        if own["type"] == "sequence_classification":
            counted = torch.ones_like(first, dtype=torch.bool)
        else:
            outside = own["labels"].index(OUTSIDE) if OUTSIDE in own["labels"] else -1
            counted = usable & ((first != outside) | (second != outside))
        shares[name] = float((first == second)[counted].double().mean()) if bool(counted.any()) else None
    return shares


def held_out_coordinates(space: CanonicalSpace, states: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Coordinates of anchors by maps that were fitted to the others.

    Args:
        space: the canonical space.
        states: (layers, N, d) of the anchors; NaN where the host cannot read one, whose coordinates are 0 then.
        num_layers: L of the host.

    Returns:
        (N, K, D).
    """
    lengths = torch.tensor([len(sentence) for sentence in space.sentences()])
    half = (torch.arange(len(lengths)) // BLOCK % 2).repeat_interleave(lengths)
    layers, canonical = layers_read(num_layers), space.canonical().cpu()
    there = torch.nan_to_num(states)
    found = torch.zeros(states.shape[1], len(KNOTS), canonical.shape[-1])
    for number in range(2):
        held_out = half == number
        fit = fit_host(states.masked_fill(held_out[None, :, None], torch.nan), knot_layers(num_layers), canonical)
        of_layer = dict(zip(layers, there[:, held_out], strict=True))
        found[held_out] = fit(of_layer).unflatten(1, (len(KNOTS), -1))
    return found.masked_fill(~torch.isfinite(states).all(dim=-1).all(dim=0)[:, None, None], 0)


@torch.inference_mode()
def predictions(adapter: StreamAdapter, task: str, z: torch.Tensor, sentences: list[list[str]]) -> list[torch.Tensor]:
    """Likeliest labels from coordinates (N, K, D): a sentence has ids (W,), or of a task of classes one id (1,)."""
    device, found = adapter.space.text.device, []
    parts = z.split([*map(len, sentences)])
    for start in range(0, len(parts), BATCH):
        some = parts[start : start + BATCH]
        lengths = torch.tensor([len(part) for part in some], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(list(some), batch_first=True).to(device)
        best = StreamRun(adapter, padded, lengths).logits(task).argmax(dim=-1).cpu()
        found += [row[None] if row.dim() == 0 else row[: len(part)] for row, part in zip(best, some, strict=True)]
    return found
