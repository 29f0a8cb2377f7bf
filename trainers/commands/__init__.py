"""The command ``unihyperlora``; each subcommand is a module, which is imported when it is called.

A module has ``main(command_line)``. A ``UniHyperLoraError`` is printed as one line. This module does not import torch,
which takes seconds and which some subcommands do not need.
"""

import argparse
import functools
import importlib
import importlib.metadata
import os
import sys

# Subcommand → its module and one line of help, in the order of ``unihyperlora --help``.
COMMANDS = {
    "ner": ("ner", "train and score a tagger of words, on any host"),
    "classification": ("classification", "train and score a classifier of texts, on any host"),
    "tag": ("tag", "find the entities of texts"),
    "classify": ("classify", "find the class of texts"),
    "read": ("read", "read a corpus into canonical states, once for all tasks and hosts"),
    "inspect": ("inspect", "show what is in an adapter, and how it fits a host"),
    "push": ("push", "push an adapter to the Hub"),
    "export-onnx": ("export_onnx", "write host and adapter as ONNX"),
    "demo": ("demo", "one adapter on two hosts, side by side; --web: a page in the browser"),
}


def main(command_line: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    typed = sys.argv[1:] if command_line is None else command_line
    if not typed or typed[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if typed else 2
    if typed[0] in ("-V", "--version"):
        print(f"unihyperlora {importlib.metadata.version('unihyperlora')}")
        return 0
    name = typed[0]
    if name not in COMMANDS:
        print(f"unihyperlora: no subcommand {name!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        importlib.import_module(f".{COMMANDS[name][0]}", __name__).main(typed[1:])
    except Exception as error:
        if not _is_of_the_user(error):
            raise
        print(f"unihyperlora {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in ``unihyperlora tag … | head -1``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _is_of_the_user(error: Exception) -> bool:
    """Whether the user can fix an error. Checks class names, because importing ``UniHyperLoraError`` imports torch."""
    return not {"UniHyperLoraError", "OnnxFileError"}.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def new_parser(name: str, arguments: str, description: str) -> argparse.ArgumentParser:
    """Parser of a subcommand; its usage line shows the arguments, and "[options]" for all options."""
    wide = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=100)
    command = f"unihyperlora {name}"
    usage = f"{command} {arguments} [options]"
    return argparse.ArgumentParser(command, usage, description, formatter_class=wide, allow_abbrev=False)


def usage() -> str:
    """Text of ``unihyperlora --help``."""
    lines = [f"  {name:<16}{said}" for name, (_, said) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: unihyperlora SUBCOMMAND …",
            "",
            "One adapter file under 1 MB, trained once, that works on any host.",
            "",
            *lines,
            "",
            "unihyperlora SUBCOMMAND --help says more.",
        ]
    )
