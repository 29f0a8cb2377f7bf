"""A page in the browser: one adapter file on two hosts, side by side.

    unihyperlora demo --web
    unihyperlora demo --web runs/conll --hosts HOST ANOTHER_HOST

The page is served on this machine alone. Other adapters and hosts, folders or Hub ids,
can be typed there. Needs pip install 'unihyperlora[web]'.
"""

from . import new_parser


def main(command_line: list[str] | None = None) -> None:
    parser = new_parser("demo", "--web [ADAPTER …]", __doc__)
    add = parser.add_argument
    add("--web", action="store_true", help="serve the page")
    add("adapters", nargs="*", metavar="ADAPTER", help="its folder or Hub id; by default those of the package")
    add("--hosts", nargs=2, metavar=("LEFT", "RIGHT"), help="folder or Hub id of the two hosts")
    add("--port", type=int, help="where the page is served; 7860 or the next one that is free")
    arguments = parser.parse_args(command_line)
    from modeling_unihyperlora import ConfigError

    if not arguments.web:
        raise ConfigError("Give --web for the page in the browser. `make demo` trains and moves a small task instead.")
    from modeling_unihyperlora.storage import ready_adapters

    from ..web_demo import HOSTS, page, serve

    serve(page([*arguments.adapters, *ready_adapters()], tuple(arguments.hosts or HOSTS[:2])), arguments.port)
