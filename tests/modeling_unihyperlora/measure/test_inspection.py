"""``unihyperlora inspect``: its output agrees with the file and the host."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_unihyperlora import CanonicalSpace, UniHyperLoraForTokenClassification
from modeling_unihyperlora.measure.inspection import inspect_adapter, inspect_on_host
from modeling_unihyperlora.storage import WEIGHTS_NAME
from trainers.commands import main as unihyperlora
from trainers.commands.inspect import main


@pytest.fixture
def host_folder(make_host, tmp_path):
    make_host(layers=4).save_pretrained(tmp_path / "host")
    return str(tmp_path / "host")


@pytest.fixture
def adapter_folder(make_model, make_host, tmp_path):
    make_model(host=make_host(layers=4)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_rows_are_the_tensors_of_the_file(adapter_folder):
    report = inspect_adapter(adapter_folder)
    stored = load_file(adapter_folder / WEIGHTS_NAME)
    assert report["bytes"] == (adapter_folder / WEIGHTS_NAME).stat().st_size
    sizes = {name: stored[name].numel() * stored[name].element_size() for name in stored}
    for row in report["tensors"]:
        assert row["bytes"] == sizes.pop(row["name"]) + sizes.pop(f"{row['name']}.scale", 0)
    assert not sizes
    bits = {row["name"]: row["bits"] for row in report["tensors"]}
    assert (bits["atoms_in"], bits["mixer.hidden"], bits["tasks.ner.delta"], bits["router_bias"]) == (8, 4, 4, 16)


def test_on_the_host_that_it_was_trained_on_and_on_another(adapter_folder, host_folder, make_host, tmp_path):
    own = inspect_on_host(adapter_folder, host_folder)
    assert own["sites"] == dict.fromkeys(own["sites"], 4) and own["blocks"] == 4
    assert not any("not trained on this host" in warning for warning in own["warnings"])
    make_host("roberta", layers=2).save_pretrained(tmp_path / "other")
    other = inspect_on_host(adapter_folder, str(tmp_path / "other"))
    assert other["blocks"] == 2 and any("not trained on this host" in warning for warning in other["warnings"])


def test_the_streams_fit_and_what_to_expect_of_it(tiny_host, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    words = "anna ben carla david paris rome oslo lima lives works in at near the a and from to flew .".split()
    order = torch.randint(0, len(words), (40, 8), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "anchors.txt").write_text("\n".join(" ".join(words[i] for i in line) for line in order))
    space = CanonicalSpace.make([tiny_host], tmp_path / "anchors.txt", dim=8, atoms=12, name="tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the reader
        model = UniHyperLoraForTokenClassification.from_host(
            str(tiny_host), labels=["O", "B-A"], task="ner", reader={"width": 8, "hidden": 6}, space=space
        )
    model.save_pretrained(tmp_path / "adapter")
    report = inspect_on_host(tmp_path / "adapter", str(tiny_host))
    fit = model.stream.fit.r2
    assert [knot["r2"] for knot in report["knots"]] == fit and [k["depth"] for k in report["knots"]][::4] == [0, 1]
    assert report["agreement"] == {} and not any("predicts" in warning for warning in report["warnings"])  # untrained
    with torch.no_grad():
        model.adapter.tasks["ner"].head_weight.latent.normal_(generator=torch.Generator().manual_seed(0))
    model.config.tasks["ner"]["trained"] = True
    model.save_pretrained(tmp_path / "trained")
    own = inspect_on_host(tmp_path / "trained", str(tiny_host))["agreement"]["ner"]
    shuffled = model.adapter.space.coordinates.latent
    shuffled.data.copy_(shuffled.data[torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(0))])
    model.save_pretrained(tmp_path / "shuffled")
    shuffled_share = inspect_on_host(tmp_path / "shuffled", str(tiny_host))["agreement"]["ner"]
    assert own > shuffled_share + 0.2, (own, shuffled_share)
    main([str(tmp_path / "shuffled"), "--host", str(tiny_host)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "expect low scores" in printed and "Calibration on this host" in printed


def test_as_a_command(adapter_folder, host_folder, capsys):
    """The command prints the tables, and errors in one line."""
    assert unihyperlora(["inspect", str(adapter_folder), "--host", host_folder]) == 0
    printed = capsys.readouterr().out
    for expected in ("atoms_in", "16 × 12", "B-A", "ner (active)", "24/24", "extra multiply-adds"):
        assert expected in printed
    config = adapter_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"atoms": 17}))
    assert unihyperlora(["inspect", str(adapter_folder)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("unihyperlora inspect: ") and "the configuration requires" in said
