"""Push an adapter to the Hub: only weights, configuration, code, card and licence.

unihyperlora push runs/conll user/conll --dry_run
unihyperlora push runs/conll user/conll --base_model_name_or_path distilbert-base-uncased
"""

import argparse
import logging

from modeling_unihyperlora.publish.hub import Push, listing, push_folder

from . import new_parser


def parser() -> argparse.ArgumentParser:
    own = new_parser("push", "FOLDER USER/NAME", __doc__)
    add = own.add_argument
    add("folder", help="Folder of the adapter, from a run or save_pretrained.")
    add("repo", help="Repository: user/name.")
    add("--private", action="store_true", default=None, help="Make a new repository private.")
    add("--revision", help="Branch to push to; created if needed.")
    add("--create_pr", action="store_true", help="Open a pull request.")
    add("--dry_run", action="store_true", help="Check and list the files; send nothing.")
    add("--token", help="Token for the Hub; default: that of the Hub login.")
    add("--commit_message", metavar="TEXT", help="Message of the commit.")
    add("--base_model_name_or_path", metavar="HOST", help="Hub id of a host that was loaded from a folder.")
    add("--transfer", metavar="FILE", help="Record of scripts/research/transfer.py for the card.")
    add("--host_license", metavar="NAME", help="Licence of the host, if its card cannot be read.")
    add("--data_license", metavar="NAME", help="Licence of the data, if their card cannot be read.")
    return own


def main(command_line: list[str] | None = None) -> Push:
    """Push as the command line asks; returns the result."""
    arguments = vars(parser().parse_args(command_line))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modeling_unihyperlora").setLevel(logging.INFO)
    push = push_folder(arguments.pop("folder"), arguments.pop("repo"), **arguments)
    if arguments["dry_run"]:
        print(f"To push to {push.repo_id}:\n{listing(push.files)}")
    if push.url and not push.changed:
        logging.getLogger("modeling_unihyperlora").info("Nothing was uploaded: the repository has all files already.")
    return push
