"""Runs the tests of all host families, encoders and decoders, and records which features work on which family.

    python -m scripts.research.host_families --output results/host-families.json
    python -m scripts.research.benchmark render

The tests are in tests/modeling_unihyperlora/test_families.py, including the slow ones. The name of a test is the name
of a feature.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import pytest

from modeling_unihyperlora import UniHyperLoraError
from modeling_unihyperlora.storage import write_json
from tests.modeling_unihyperlora.families import DECODERS

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "modeling_unihyperlora" / "test_families.py"
VERSIONS = ("torch", "transformers")


class Recorder:
    """Plugin of pytest that records the outcome of each test: family → feature → passed, failed or reason to skip."""

    def __init__(self):
        self.families: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        name, _, rest = report.nodeid.rpartition("::")[2].partition("[")
        family, feature = rest.removesuffix("]"), name.removeprefix("test_")
        if report.when == "call" or report.outcome != "passed":
            outcome = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.outcome
            self.families.setdefault(family, {})[feature] = outcome


def main(command_line: list[str] | None = None) -> dict[str, object]:
    """Run the tests and write the record.

    Returns:
        ``families`` (family → feature → outcome), ``decoders`` (families that are decoders) and ``versions``.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(command_line)
    recorder = Recorder()
    code = pytest.main(["-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(TESTS)], [recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"host_families: the tests could not be run ({code!r}).")
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    decoders = sorted({*DECODERS} & recorder.families.keys())
    record = {"kind": "host_families", "families": recorder.families, "decoders": decoders, "versions": versions}
    write_json(args.output, record)
    return record


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"host_families: {error}")
