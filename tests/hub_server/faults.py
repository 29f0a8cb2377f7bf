"""Faults on demand: a fault's kind, the requests that it affects, and how often it happens."""

import re
import threading
from dataclasses import dataclass, field

KINDS = ("status", "slow", "cut_upload", "cut_download", "truncated", "wrong_bytes", "wrong_hash")


@dataclass
class Fault:
    """One fault.

    Args:
        request: regular expression; searched in "METHOD /path".
        kind: "status" answers with ``status``; "slow" waits ``seconds`` first; "cut_upload" closes the connection
            after half of the request's body; "cut_download" after half of the answer's; "truncated" answers in good
            form with half of the body; "wrong_bytes" answers with one byte changed; "wrong_hash" finds that an
            uploaded file does not have the hash it was announced with.
        times: number of times that the fault happens; None for always.
    """

    request: str
    kind: str
    status: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    times: int | None = 1
    happened: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of fault; choose one of {KINDS}.")


class Faults:
    """The faults of a server; safe to ask from several threads."""

    def __init__(self):
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, request: str, *kinds: str) -> Fault | None:
        """Return the first due fault of ``kinds`` for this request, and count it as happened."""
        with self._lock:
            for fault in self._faults:
                due = fault.times is None or fault.happened < fault.times
                if due and fault.kind in kinds and re.search(fault.request, request):
                    fault.happened += 1
                    return fault
        return None
