"""A run in a process of its own: its memory is its own to measure, and what ends it does not end the others."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import modeling_unihyperlora
from modeling_unihyperlora import UniHyperLoraError
from scripts.research.runner import call

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
SHARED_IMPORTS = ["scripts.research.runner"]  # read once, by the process that the others are forked from


class RunDied(UniHyperLoraError):
    """The process of a run ended without a word, such as one that the system stopped for its memory."""


def run_in_own_process(script: str, flags: list[str], do: Callable[[str, list[str]], object] = call) -> None:
    """Do a run of a script in a new process and wait for its end.

    Raises:
        UniHyperLoraError: of the kind and with the words of the run's own.
        RunDied: it came to another end.
    """
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload(SHARED_IMPORTS)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, do, script, flags))
    process.start()
    sender.close()
    try:
        kind, message = receiver.recv()
    except EOFError:
        kind, message = None, None
    process.join()
    if kind is not None:
        raise getattr(modeling_unihyperlora, kind, UniHyperLoraError)(message)
    if process.exitcode:
        raise RunDied(
            f"its process ended with status {process.exitcode}; what it wrote above may say why (-9 is often a lack "
            "of memory). The same command again goes on with this run."
        )


def _work(sender: Connection, do: Callable[[str, list[str]], object], script: str, flags: list[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        do(script, flags)
    except UniHyperLoraError as error:
        sender.send((type(error).__name__, str(error)))


def _end_with_parent() -> None:
    """Two processes must never write one folder: where the benchmark was killed, a new one may be on its way."""
    multiprocessing.parent_process().join()
    os._exit(1)
