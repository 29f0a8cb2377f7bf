"""Make a canonical space from hosts: ``python -m scripts.research.make_space --hosts A B --output FILE``.

The space that the package ships is made by ``make space`` (see the Makefile for its hosts).
"""

import argparse
import sys
from pathlib import Path

from modeling_unihyperlora import CanonicalSpace, UniHyperLoraError


def main(command_line: list[str] | None = None) -> None:
    """Make a space and write it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--hosts", nargs="+", required=True, help="Hub ids or folders")
    parser.add_argument("--anchor_file", help="UTF-8 text, one sentence a line; the package's own if none")
    parser.add_argument("--dim", type=int, default=64, help="coordinates a knot")
    parser.add_argument("--name", default="own")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(command_line)
    own = {"dim": args.dim, "name": args.name, "version": args.version}
    space = CanonicalSpace.make(args.hosts, args.anchor_file, **own)
    space.save(args.output)
    print(f"{args.output}: space {space.name} {space.version}, {args.output.stat().st_size:,} bytes, {space.digest}")


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"make_space: {error}")
