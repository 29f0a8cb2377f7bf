"""Splits sentences that are too long for a host into overlapping windows, between words."""

from dataclasses import dataclass

OVERLAP = 0.5  # largest share of a window's sub-tokens that the next window may read again
NO_WORD = -1  # word number of special tokens, as in ``modeling_unihyperlora.words``


@dataclass(frozen=True)
class Window:
    """Sub-token ids of consecutive words of one sentence, with the special tokens around them.

    ``starts`` and ``sizes`` describe only the words that this window scores; words at its edges may be context only.
    """

    sentence: int
    first_word: int  # first word that this window scores
    input_ids: list[int]
    word_index: list[int]  # number of the word that each sub-token belongs to, or ``NO_WORD``
    starts: list[int]  # position in ``input_ids`` of the first sub-token of each scored word
    sizes: list[int]  # number of sub-tokens of each scored word


def cut(sentence: int, words: list[list[int]], room: int, before: list[int], after: list[int]) -> list[Window]:
    """Split a sentence into windows of whole words, at most ``room`` sub-tokens each; one window scores each word."""
    at = [0]  # number of sub-tokens before each word; the last entry is the total
    for pieces in words:
        at.append(at[-1] + len(pieces))
    spans = _spans(at, room)

    def context(word: int, first: int, end: int) -> float:
        """Sub-tokens of context on the word's shorter side; infinite on a side where the span reaches the border."""
        left = at[word] - at[first] if first > 0 else float("inf")
        right = at[end] - at[word + 1] if end < len(words) else float("inf")
        return min(left, right)

    scored: list[list[int]] = [[] for _ in spans]
    last = 0  # earlier spans end before the current word
    for word in range(len(words)):
        while spans[last][1] <= word:
            last += 1
        holding = [number for number in range(last, len(spans)) if spans[number][0] <= word]
        scored[max(holding, key=lambda number: context(word, *spans[number]))].append(word)
    windows = []
    for (first, end), own in zip(spans, scored, strict=True):
        if own:
            ids = [piece for pieces in words[first:end] for piece in pieces]
            starts = [len(before) + at[word] - at[first] for word in own]
            sizes = [len(words[word]) for word in own]
            inner = [word for word in range(first, end) for _ in words[word]]
            index = [NO_WORD] * len(before) + inner + [NO_WORD] * len(after)
            windows.append(Window(sentence, own[0], before + ids + after, index, starts, sizes))
    return windows


def _spans(at: list[int], room: int) -> list[tuple[int, int]]:
    """Words (first, end) of each window. The next window starts ``OVERLAP`` before the end of the last one, or later
    if it would otherwise add no word.
    """
    count, spans, first, end = len(at) - 1, [], 0, 0
    while end < count:
        while first < end and (at[end] - at[first] > OVERLAP * room or at[end + 1] - at[first] > room):
            first += 1
        while end < count and at[end + 1] - at[first] <= room:
            end += 1
        spans.append((first, end))
        first += 1  # the next window starts later
    return spans
