"""Push an adapter to the Hub: its weights, configuration, code, card and licence, and nothing else of its folder.

    unihyperlora push runs/conll2003 user/conll2003-adapter --dry_run     # what would be pushed
    unihyperlora push runs/conll2003 user/conll2003-adapter --private \
        --base_model_name_or_path sentence-transformers/all-MiniLM-L6-v2

The files and their bytes are listed before and after. A second push of the same content uploads nothing.
"""

import argparse
import logging

from modeling_unihyperlora.publish.hub import Push, push_folder


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unihyperlora push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", help="Folder of the adapter, as a run or save_pretrained wrote it.")
    add("repo", help="Where to: user/name.")
    add("--private", action="store_true", default=None, help="Make a new repository private.")
    add("--revision", help="Branch to push to; made if needed.")
    add("--create_pr", action="store_true", help="Propose a pull request.")
    add("--dry_run", action="store_true", help="Check and list the files; send nothing.")
    add("--token", help="Token for the Hub, if not the one logged in with.")
    add("--commit_message", help="What the commit says.")
    add("--base_model_name_or_path", help="Hub id of the adapter's host, where it was loaded from a folder.")
    add("--transfer", help="Record of scripts/research/transfer.py for the card's transfer matrix.")
    add("--host_license", help="Licence of the host, where its own card cannot be read.")
    add("--data_license", help="Licence of the data, where their own card cannot be read.")
    return parser


def main(command_line: list[str] | None = None) -> Push:
    """Do what the command line asks for; returns what was pushed."""
    arguments = vars(parser().parse_args(command_line))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modeling_unihyperlora").setLevel(logging.INFO)
    push = push_folder(arguments.pop("folder"), arguments.pop("repo"), **arguments)
    if push.url and not push.changed:
        logging.getLogger("modeling_unihyperlora").info("Nothing was uploaded: the repository had it all.")
    return push
