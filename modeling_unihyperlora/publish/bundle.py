"""Completes an adapter's folder, so that it loads anywhere: adds code, model card and licence."""

import shutil
from pathlib import Path

from ..storage import replacing
from .card import write_card, write_licence
from .code_files import code_files


def copy_code(folder: Path, pathway: str) -> None:
    """Copy the code that loads an adapter into its folder; each file is written atomically."""
    for name in code_files(pathway):
        with replacing(Path(folder) / name) as temporary:
            shutil.copyfile(Path(__file__).parents[1] / name, temporary)


def complete(folder: Path, pathway: str) -> None:
    """Add code, licence and model card to the folder of an adapter."""
    copy_code(folder, pathway)
    write_licence(folder)
    write_card(folder)
