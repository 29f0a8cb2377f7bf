"""One adapter file on two hosts, side by side: in the terminal, or as a page in the browser.

    unihyperlora demo
    unihyperlora demo runs/conll --hosts HOST ANOTHER_HOST
    unihyperlora demo --web

A page is served on this machine alone; adapters and hosts can be typed there. It needs
pip install 'unihyperlora[web]'. Without --web the adapter must be one that tags.
"""

from . import new_parser

SENTENCES = (
    "Angela Merkel met Tim Cook at Apple, in Cupertino.",
    "Flying to New York with Jessica tomorrow, then iPhone shopping at the Apple store!",
    "The BBC says that Arsenal play in Munich on Tuesday.",
)


def main(command_line: list[str] | None = None) -> None:
    parser = new_parser("demo", "[ADAPTER …]", __doc__)
    add = parser.add_argument
    add("adapters", nargs="*", metavar="ADAPTER", help="its folder or Hub id; by default those of the package")
    add("--hosts", nargs=2, metavar=("LEFT", "RIGHT"), help="folder or Hub id of the two hosts")
    add("--web", action="store_true", help="serve a page in the browser")
    add("--port", type=int, help="where the page is served; 7860 or the next one that is free")
    arguments = parser.parse_args(command_line)
    from modeling_unihyperlora import ConfigError
    from modeling_unihyperlora.storage import ready_adapters

    from ..web_demo import HOSTS, page, serve

    hosts = tuple(arguments.hosts or HOSTS[:2])
    if arguments.web:
        serve(page([*arguments.adapters, *ready_adapters()], hosts), arguments.port)
        return
    if len(arguments.adapters) > 1 or arguments.port is not None:
        raise ConfigError(
            "Several adapters and --port are for the page in the browser. Give --web, or leave them out."
        )
    in_the_terminal(arguments.adapters[0] if arguments.adapters else "people-places-organisations", hosts)


def in_the_terminal(adapter: str, hosts: tuple[str, str]) -> None:
    """Print what a tagger finds in a few sentences on two hosts."""
    from rich.console import Console
    from transformers.utils import logging

    from modeling_unihyperlora import UniHyperLoraForTokenClassification

    from ..tagging import tag

    found = {}
    logging.disable_progress_bar()
    for host in hosts:
        with Console(stderr=True).status(f"Reading with {host} …"):
            model = UniHyperLoraForTokenClassification.from_pretrained(adapter, base_model_name_or_path=host)
            found[host] = tag(model, list(SENTENCES))
    Console().print(side_by_side(found))


def side_by_side(found: dict):
    """Table of the entities found in the same texts, with a column per host; ``found`` is host → tagged texts."""
    from rich.table import Table

    from .tag import coloured

    table = Table(*found, show_lines=True)
    for texts in zip(*found.values(), strict=True):
        table.add_row(*map(coloured, texts))
    return table
