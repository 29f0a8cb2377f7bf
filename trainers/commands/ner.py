"""``unihyperlora ner``: the flags of scripts/run_ner.py."""

from ..entry import main as run_entry
from ..tasks import NER


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Start the run that the command line asks for; returns the content of ``all_results.json``."""
    return run_entry(NER, command_line)
