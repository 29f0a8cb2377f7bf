"""Starts a run in a separate process, so that its memory can be measured and its crash does not end other runs."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import modeling_unihyperlora
from modeling_unihyperlora import UniHyperLoraError
from scripts.research.runner import call

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
SHARED_IMPORTS = ["scripts.research.runner"]  # imported once, by the process that forks the others


class RunDied(UniHyperLoraError):
    """The process of a run ended without an error message, for example because memory ran out."""


def run_in_own_process(script: str, flags: list[str], do: Callable[[str, list[str]], object] = call) -> None:
    """Run a script in a new process and wait for its end.

    Raises:
        UniHyperLoraError: the run's own error, of the same class and with the same message.
        RunDied: the process ended in another way.
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
            f"its process ended with status {process.exitcode}; its output above may say why (-9 often means that "
            "memory ran out). Give the same command again to repeat this run."
        )


def _work(sender: Connection, do: Callable[[str, list[str]], object], script: str, flags: list[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        do(script, flags)
    except UniHyperLoraError as error:
        sender.send((type(error).__name__, str(error)))


def _end_with_parent() -> None:
    """End this process with its parent: a restarted benchmark must not share a run's folder with this process."""
    multiprocessing.parent_process().join()
    os._exit(1)
