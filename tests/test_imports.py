"""Imports: no circles and no upward imports, also inside functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_unihyperlora", "trainers", "scripts")  # from the bottom to the top


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module → modules of the packages that it imports anywhere in its code.

    An import of a name from a package is an import of the module that has this name, or else of the package.
    """
    files = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def imported(module: str, path: Path) -> set[str]:
        folder = path.relative_to(root).parent.parts
        names = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = folder[: len(folder) - node.level + 1] if node.level else ()
                base = [*above, *filter(None, [node.module])]
                names += [".".join([*base, alias.name]) for alias in node.names]
        found = set()
        for name in names:
            while name and name not in files:
                name = name.rpartition(".")[0]
            found.add(name)
        return found - {"", module}

    return {module: imported(module, path) for module, path in files.items()}


def test_no_circle():
    TopologicalSorter(import_graph(ROOT)).prepare()  # CycleError names the modules


@pytest.mark.parametrize("level", range(len(PACKAGES)), ids=PACKAGES)
def test_nothing_is_imported_from_above(level):
    above = PACKAGES[level + 1 :]
    graph = import_graph(ROOT)
    own = [module for module in graph if module.split(".")[0] == PACKAGES[level]]
    assert own
    assert [(module, other) for module in own for other in graph[module] if other.split(".")[0] in above] == []


def test_the_graph_has_every_kind_of_import(tmp_path):
    for name, text in {
        "modeling_unihyperlora/__init__.py": "from .a import thing",
        "modeling_unihyperlora/a.py": "def f():\n    from . import b",
        "modeling_unihyperlora/b.py": "import os",
        "trainers/deep/c.py": "from ..d import x\nimport modeling_unihyperlora.b",
        "trainers/d.py": "from modeling_unihyperlora import a, thing",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert import_graph(tmp_path) == {
        "modeling_unihyperlora": {"modeling_unihyperlora.a"},
        "modeling_unihyperlora.a": {"modeling_unihyperlora.b"},
        "modeling_unihyperlora.b": set(),
        "trainers.deep.c": {"trainers.d", "modeling_unihyperlora.b"},
        "trainers.d": {"modeling_unihyperlora", "modeling_unihyperlora.a"},
    }
