"""``unihyperlora classification``: the flags of scripts/run_classification.py."""

from ..entry import main as run_entry
from ..tasks import CLASSIFICATION


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Start the run that the command line asks for; returns the content of ``all_results.json``."""
    return run_entry(CLASSIFICATION, command_line)
