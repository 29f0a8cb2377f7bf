"""Push an adapter to the Hub: weights, configuration, code, card and licence, nothing else.

unihyperlora push runs/conll user/conll --dry_run
unihyperlora push runs/conll user/conll --base_model_name_or_path distilbert-base-uncased
"""

import argparse
import logging

from modeling_unihyperlora.publish.hub import Push, push_folder

from . import new_parser


def parser() -> argparse.ArgumentParser:
    own = new_parser("push", "FOLDER USER/NAME", __doc__)
    add = own.add_argument
    add("folder", help="Folder of the adapter, as a run or save_pretrained wrote it.")
    add("repo", help="Where to: user/name.")
    add("--private", action="store_true", default=None, help="Make a new repository private.")
    add("--revision", help="Branch to push to; made if needed.")
    add("--create_pr", action="store_true", help="Propose a pull request.")
    add("--dry_run", action="store_true", help="Check and list the files; send nothing.")
    add("--token", help="Token for the Hub, if not the one logged in with.")
    add("--commit_message", metavar="TEXT", help="What the commit says.")
    add("--base_model_name_or_path", metavar="HOST", help="Hub id of a host that was loaded from a folder.")
    add("--transfer", metavar="FILE", help="Record of scripts/research/transfer.py for the card.")
    add("--host_license", metavar="NAME", help="Licence of the host, where its own card cannot be read.")
    add("--data_license", metavar="NAME", help="Licence of the data, where their own card cannot be read.")
    return own


def main(command_line: list[str] | None = None) -> Push:
    """Do what the command line asks for; returns what was pushed."""
    arguments = vars(parser().parse_args(command_line))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modeling_unihyperlora").setLevel(logging.INFO)
    push = push_folder(arguments.pop("folder"), arguments.pop("repo"), **arguments)
    if push.url and not push.changed:
        logging.getLogger("modeling_unihyperlora").info("Nothing was uploaded: the repository had it all.")
    return push
