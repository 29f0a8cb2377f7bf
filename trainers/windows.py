"""A sentence that is longer than a host reads at once, cut between words into windows that overlap."""

from dataclasses import dataclass

OVERLAP = 0.5  # of a window's sub-tokens may be read again in the next one
NO_WORD = -1  # the word of a special token, as ``modeling_unihyperlora.words`` has it


@dataclass(frozen=True)
class Window:
    """Sub-token ids of consecutive words of one sentence, with the special tokens around them.

    ``starts`` and ``sizes`` are of the words that are scored in this window; at its edges there may be others.
    """

    sentence: int
    first_word: int  # of those that are scored
    input_ids: list[int]
    word_index: list[int]  # for each sub-token the number of its word in the sentence, or ``NO_WORD``
    starts: list[int]  # position in ``input_ids`` of each word's first sub-token, in order
    sizes: list[int]  # how many sub-tokens each word has there


def cut(sentence: int, words: list[list[int]], room: int, before: list[int], after: list[int]) -> list[Window]:
    """Windows of at most ``room`` sub-tokens, of whole words; each word is scored in one of them."""
    at = [0]  # sub-tokens before each word of the sentence, and in all
    for pieces in words:
        at.append(at[-1] + len(pieces))
    spans = _spans(at, room)

    def context(word: int, first: int, end: int) -> float:
        """Sub-tokens that a span has on the shorter side of a word; beyond the sentence there is nothing to miss."""
        left = at[word] - at[first] if first > 0 else float("inf")
        right = at[end] - at[word + 1] if end < len(words) else float("inf")
        return min(left, right)

    scored: list[list[int]] = [[] for _ in spans]
    last = 0  # spans that end before a word have no further one
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
    """The words of each window, (first, end). The next window begins ``OVERLAP`` before the end of the last one, or
    later where it would not get any further.
    """
    count, spans, first, end = len(at) - 1, [], 0, 0
    while end < count:
        while first < end and (at[end] - at[first] > OVERLAP * room or at[end + 1] - at[first] > room):
            first += 1
        while end < count and at[end + 1] - at[first] <= room:
            end += 1
        spans.append((first, end))
        first += 1  # the next one begins later
    return spans
