"""Where a command line becomes a run or, with --do_search, a search over runs."""

import sys

from .arguments import parse
from .running import Task, run_parsed


def main(task: Task, command_line: list[str] | None = None) -> dict[str, object]:
    """Do what the command line asks for.

    Args:
        task: the kind of task.
        command_line: what was typed; that of the process if None.

    Returns:
        The content of ``all_results.json``.

    Raises:
        UniHyperLoraError: bad input, with what was given, what is allowed and what to do.
    """
    typed = sys.argv[1:] if command_line is None else command_line
    arguments = parse(typed, task.arguments)
    if not arguments[0].do_search:
        return run_parsed(task, *arguments)
    from .search import search  # needs Optuna, which only a search does

    return search(task, typed)
