"""Makes a canonical space from hosts: ``python -m scripts.research.make_space --hosts A B --output FILE``.

``make space HOSTS="A B"`` makes the package's space in this way. FILE.json records the origin of the space: names,
sizes and fingerprints of the hosts, and the digest of the text.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from modeling_unihyperlora import CanonicalSpace, ConfigError, UniHyperLoraError
from modeling_unihyperlora.hosts import describe_host, load_host
from modeling_unihyperlora.sites import num_layers_of
from modeling_unihyperlora.space import join_anchors
from modeling_unihyperlora.storage import write_json
from trainers.results import require_writable


def main(command_line: list[str] | None = None) -> None:
    """Make a space and write it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--hosts", nargs="+", required=True, help="Hub ids or folders")
    parser.add_argument("--anchor_file", help="UTF-8 text, one sentence per line; default: the package's own")
    parser.add_argument("--dim", type=int, default=64, help="coordinates per knot")
    parser.add_argument("--name", default="own")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args(command_line)
    for name, least in (("dim", args.dim), ("version", args.version)):
        if least < 1:
            raise ConfigError(f"--{name} {least} is too small; give 1 or more.")
    require_writable(args.output.parent)
    own = {"dim": args.dim, "name": args.name, "version": args.version}
    space = CanonicalSpace.make(args.hosts, args.anchor_file, **own)
    space.save(args.output)
    origin = origin_of(space, args.hosts)
    write_json(args.output.with_name(args.output.name + ".json"), origin)
    size, hosts = args.output.stat().st_size, ", ".join(host["name"] for host in origin["hosts"])
    print(f"{args.output}: space {space.name} {space.version} ({space.digest}), {size:,} bytes, made from {hosts}")


def origin_of(space: CanonicalSpace, hosts: list[str]) -> dict[str, object]:
    """Description of a space and of its origin, without local paths."""
    described = []
    for name in hosts:
        host = load_host(name)
        described.append(describe_host(host, Path(name).name if Path(name).is_dir() else name, num_layers_of(host)))
    text = hashlib.sha256(join_anchors(space.sentences())).hexdigest()
    return space.shape() | {"kind": "space", "digest": space.digest, "hosts": described, "anchor_text_sha256": text}


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"make_space: {error}")
