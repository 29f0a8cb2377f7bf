"""An adapter as a folder that loads anywhere: its code, card and licence beside its weights."""

import shutil
from pathlib import Path

from ..storage import replacing
from .card import write_card, write_licence
from .code_files import code_files


def copy_code(folder: Path, pathway: str) -> None:
    """Put the code that loads an adapter into its folder, each file whole or not at all."""
    for name in code_files(pathway):
        with replacing(Path(folder) / name) as temporary:
            shutil.copyfile(Path(__file__).parents[1] / name, temporary)


def complete(folder: Path, pathway: str) -> None:
    """Put code, licence and card beside the weights of an adapter."""
    copy_code(folder, pathway)
    write_licence(folder)
    write_card(folder)
