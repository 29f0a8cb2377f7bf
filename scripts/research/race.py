"""A race: contenders run in turns in one process, and each is compared with the first one of the same turn."""

import math
import statistics
import time
from collections.abc import Callable

import torch

SHORTEST = 0.02  # minimum seconds of a measurement; a faster contender runs several times
LEAST_ROUNDS, MOST_ROUNDS = 5, 25


def race(contenders: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, object]:
    """Let contenders run in turns, and compare them with the first one.

    Returns:
        ``rounds``, ``first_ms``, and for every other contender ``ratio``, ``quartiles`` of the ratio, and ``more_ms``,
        the median of its extra time; or only ``left_out`` with the reason.
    """
    (first, run_first), *_ = contenders.items()
    alone = _timed(run_first, 1, device)
    if alone * len(contenders) * (LEAST_ROUNDS + 2) > 2 * seconds:
        return {"left_out": f"{LEAST_ROUNDS} rounds would take more than {seconds:g} s"}
    for contender in contenders.values():
        contender()
    once = {name: _timed(contender, 1, device) for name, contender in contenders.items()}
    repeats = {name: max(1, math.ceil(SHORTEST / spent)) for name, spent in once.items()}
    round_seconds = sum(once[name] * repeats[name] for name in once)
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(seconds / round_seconds)))
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        shift = number % len(names)  # so that the order changes
        for name in names[shift:] + names[:shift]:
            spent[name].append(_timed(contenders[name], repeats[name], device))
    figures: dict[str, object] = {"rounds": rounds, "first_ms": _ms(statistics.median(spent[first]))}
    for name in names[1:]:
        pairs = list(zip(spent[name], spent[first], strict=True))
        ratios = [own / base for own, base in pairs]
        more = statistics.median(own - base for own, base in pairs)
        figures[name] = {
            "ratio": rounded(statistics.median(ratios)),
            "quartiles": quartiles(ratios),
            "more_ms": _ms(more),
        }
    return figures


def _timed(function: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of one run; on the CPU those of this process, so that what else runs on the machine does not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait(device)
    start = clock()
    for _ in range(repeats):
        function()
    wait(device)
    return (clock() - start) / repeats


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [rounded(low), rounded(high)]


def rounded(value: float) -> float:
    return round(value, 4)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
