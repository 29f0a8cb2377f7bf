"""Entry point of the scripts: starts a run or, with --do_search, a search over runs."""

import sys

from .arguments import parse
from .running import Task, run_parsed


def main(task: Task, command_line: list[str] | None = None) -> dict[str, object]:
    """Start the run or the search that the command line asks for.

    Args:
        task: kind of task.
        command_line: command-line arguments; by default those of this process.

    Returns:
        The content of ``all_results.json``.

    Raises:
        UniHyperLoraError: bad input; the message says what was given, what is allowed and what to do.
    """
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse(command_line, task.arguments)
    if not arguments[0].do_search:
        return run_parsed(task, *arguments)
    from .search import search  # only a search needs Optuna

    return search(task, command_line)
