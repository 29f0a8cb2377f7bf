"""The code published with an adapter: exactly what loading and scoring import, and short enough to read."""

from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_unihyperlora.injection import AUTO_MAP as INJECTED_MAP
from modeling_unihyperlora.modeling_unihyperlora import AUTO_MAP as STREAM_MAP
from modeling_unihyperlora.publish.bundle import copy_code
from modeling_unihyperlora.publish.code_files import INJECTED_FILES, STREAM_FILES, code_files

MAPS = {"stream": STREAM_MAP, "inject": INJECTED_MAP}


def brought_along(folder: Path, names: set[str]) -> set[str]:
    """Files that transformers would copy for classes in these files, found by its own method."""
    found = {f"{name}.py" for name in names}
    for name in names:
        found |= {Path(file).name for file in get_relative_import_files(folder / f"{name}.py")}
    return found


@pytest.fixture(params=MAPS)
def bundle(request, tmp_path):
    """A pathway, and a folder with the code that is published for it."""
    copy_code(tmp_path, request.param)
    return request.param, tmp_path


def test_the_models_bring_all_files_along_and_no_other(bundle):
    pathway, folder = bundle
    models = {name.split(".")[0] for kind, name in MAPS[pathway].items() if kind != "AutoConfig"}
    assert brought_along(folder, models) == set(code_files(pathway)) == {path.name for path in folder.iterdir()}


def test_the_configuration_brings_along_what_checks_it(bundle):
    """AutoConfig loads first, when only its own file and its imports are available."""
    pathway, folder = bundle
    own = brought_along(folder, {MAPS[pathway]["AutoConfig"].split(".")[0]})
    assert "configuration_unihyperlora.py" in own and ("injected_configuration.py" in own) == (pathway == "inject")
    assert "modeling_unihyperlora.py" not in own and own <= set(code_files(pathway))


def test_a_streams_bundle_is_read_in_half_an_hour(tmp_path):
    copy_code(tmp_path, "stream")
    lines = {name: (tmp_path / name).read_text(encoding="utf-8").count("\n") for name in STREAM_FILES}
    assert len(lines) <= 8, f"{len(lines)} files with {sum(lines.values()):,} lines travel with a stream: {lines}"
    assert not set(STREAM_FILES) & set(INJECTED_FILES)
