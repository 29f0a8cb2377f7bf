"""Loading from the Hub in fresh processes: with the published code, or with the installed package."""

import json
import re

import pytest
import torch

from modeling_unihyperlora.publish.code_files import INJECTED_FILES, STREAM_FILES
from modeling_unihyperlora.publish.hub import stage
from tests.hub_server import HubServer, client_environment, run_client

from .conftest import CLASSES, SENTENCE

IDS = [[2, 5, 9, 10, 6, 3]]
EVIL = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"

LOAD = """
import torch
from transformers import (
    AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline
)

ids = {"input_ids": torch.tensor(IDS)}
other = {"base_model_name_or_path": "alice/other"}


def logits(auto, repo, **more):
    model = auto.from_pretrained(repo, **FLAG, **more)
    with torch.no_grad():
        return model(**ids).logits.tolist()


result = {
    "injected": logits(AutoModelForTokenClassification, "alice/injected"),
    "token": logits(AutoModelForTokenClassification, "alice/token"),
    "token, other host": logits(AutoModelForTokenClassification, "alice/token", **other),
    "token, v1": logits(AutoModelForTokenClassification, "alice/token", revision="v1"),
    "sequence": logits(AutoModelForSequenceClassification, "alice/sequence"),
    "states": AutoModel.from_pretrained("alice/token", **FLAG)(**ids).last_hidden_state.tolist(),
    "tokenizer": AutoTokenizer.from_pretrained("alice/token", **FLAG)(SENTENCE)["input_ids"],
}
tagger = pipeline("token-classification", model="alice/token", ignore_labels=[], **FLAG)
result["tagged"] = [[piece["word"], piece["entity"], float(piece["score"])] for piece in tagger(SENTENCE)]
tagger = pipeline("token-classification", model="alice/token", model_kwargs=other, ignore_labels=[], **FLAG)
result["tagged, other host"] = [[piece["word"], piece["entity"], float(piece["score"])] for piece in tagger(SENTENCE)]
[label] = pipeline("text-classification", model="alice/sequence", **FLAG)(SENTENCE)
result["label"] = [label["label"], label["score"]]
result["module"] = type(tagger.model).__module__
"""


def code(body: str, **values) -> str:
    given = {"IDS": IDS, "SENTENCE": SENTENCE, "FLAG": {"trust_remote_code": True}} | values
    return "".join(f"{name} = {value!r}\n" for name, value in given.items()) + body


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    return tmp_path_factory.mktemp("marker") / "ran"


@pytest.fixture(scope="module")
def first_version(make_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    make_adapter(seed=9).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(put_hosts, adapter_folder, first_version, tmp_path_factory, marker):
    """Two adapters, one with an earlier version; a host and an adapter whose code leaves a trace when it runs."""
    with HubServer() as server:
        put_hosts(server)

        def put(repo, folder):
            staged = tmp_path_factory.mktemp("staged")
            stage(folder, staged, repo, "alice/source")
            return server.store.put(repo, {path.name: path.read_bytes() for path in staged.iterdir()})

        commit = put("alice/token", first_version)
        server.store.repos["alice/token"].tags["v1"] = commit
        put("alice/token", adapter_folder("token"))
        put("alice/sequence", adapter_folder("sequence"))
        put("alice/injected", adapter_folder("token", "inject"))
        put("alice/evil", adapter_folder("token"))
        evil = EVIL.format(marker=str(marker)).encode()
        server.store.put("alice/evil", {name: evil for name in STREAM_FILES})
        host = dict(server.store.files(server.store.repos["alice/source"], "main"))
        files = {path: server.store.content(entry) for path, entry in host.items()}
        config = json.loads(files["config.json"]) | {
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
        }
        server.store.put("alice/evil-host", files | {"config.json": json.dumps(config).encode(), "evil.py": evil})
        yield server


@pytest.fixture(scope="module")
def expected(adapter_folder, first_version, tiny_host, other_host):
    """The outputs of this process, loaded from folders."""
    ids = {"input_ids": torch.tensor(IDS)}

    def logits(kind, folder, host):
        model = CLASSES[kind].from_pretrained(folder, base_model_name_or_path=str(host))
        with torch.no_grad():
            return model(**ids).logits.tolist()

    return {
        "injected": logits("token", adapter_folder("token", "inject"), tiny_host),
        "token": logits("token", adapter_folder("token"), tiny_host),
        "token, other host": logits("token", adapter_folder("token"), other_host),
        "token, v1": logits("token", first_version, tiny_host),
        "sequence": logits("sequence", adapter_folder("sequence"), tiny_host),
    }


def check(result, expected):
    """Outputs are equal to the last bit; JSON keeps all digits of a float."""
    for name, logits in expected.items():
        assert result[name] == logits, name
    assert all(result["token"] != result[name] for name in ("injected", "token, v1", "token, other host"))
    assert torch.tensor(result["states"]).shape == (1, 6, 64)
    assert len(result["tokenizer"]) == 7  # five words between [CLS] and [SEP]
    assert result["tagged"] and result["tagged"] != result["tagged, other host"]
    assert result["label"][0] in ("bad", "good")


def test_without_the_package(hub, expected, marker, tmp_path):
    """The package cannot be imported; trust_remote_code for the adapter does not extend to its host."""
    body = (
        LOAD
        + """
import os, sys
from transformers import AutoConfig
try:
    import modeling_unihyperlora
    raise SystemExit("the package is here")
except ImportError:
    pass


def refusal(repo, **more):
    try:
        AutoModelForTokenClassification.from_pretrained(repo, **more)
        return "loaded"
    except Exception as error:
        return type(error).__name__ + ": " + str(error)


result["no flag"] = refusal("alice/evil")
result["flag False"] = refusal("alice/evil", trust_remote_code=False)
result["host with code"] = refusal("alice/token", trust_remote_code=True, base_model_name_or_path="alice/evil-host")
names = {name.split(".")[0] for name in sys.modules if "unihyperlora" in name}
result["packages"] = sorted(name for name in names if not name.startswith("__editable__"))  # pip has it
result["no pushing"] = ""
try:
    tagger.model.push_to_hub("alice/again")
except Exception as error:
    result["no pushing"] = str(error)
injected = AutoModelForTokenClassification.from_pretrained("alice/injected", **FLAG)
for name, model in (("saved", tagger.model), ("saved, injected", injected)):
    model.save_pretrained(os.environ["HF_HOME"] + "/" + name)
    result[name] = sorted(os.listdir(os.environ["HF_HOME"] + "/" + name))
"""
    )
    result = run_client(code(body), client_environment(hub.url, tmp_path / "home"), package=False, cwd=tmp_path)
    check(result, expected)
    assert result["module"].startswith("transformers_modules.alice.token.")
    assert result["packages"] == ["modeling_unihyperlora", "transformers_modules"]  # the first is blocked
    assert result["no flag"].startswith("ValueError") and "trust_remote_code" in result["no flag"]
    assert result["flag False"].startswith("ValueError")
    assert result["host with code"].startswith("HostError") and "alice/evil-host" in result["host with code"]
    assert "pip install unihyperlora" in result["no pushing"]
    assert result["saved"] == sorted(["config.json", "model.safetensors", *STREAM_FILES])
    assert result["saved, injected"] == sorted(["config.json", "model.safetensors", *STREAM_FILES, *INJECTED_FILES])
    assert not marker.exists()


def test_with_the_package_no_code_of_a_repository_runs(hub, expected, marker, tmp_path):
    """Without trust_remote_code there is no prompt; with it, the installed code is still used."""
    body = (
        LOAD
        + """
result["evil"] = logits(AutoModelForTokenClassification, "alice/evil")
result["evil, flag"] = logits(AutoModelForTokenClassification, "alice/evil", trust_remote_code=True)
"""
    )
    environment = client_environment(hub.url, tmp_path / "home")
    result = run_client("import modeling_unihyperlora\n" + code(body, FLAG={}), environment, cwd=tmp_path)
    check(result, expected)
    assert result["module"] == "modeling_unihyperlora.modeling_unihyperlora"
    assert result["evil"] == result["evil, flag"] == expected["token"]
    assert not marker.exists()


@pytest.mark.slow
def test_offline_from_the_cache_and_from_a_folder(hub, expected, adapter_folder, tmp_path):
    """A loaded adapter loads again without a network; a folder never needs a network."""
    environment = client_environment(hub.url, tmp_path / "home")
    online = run_client(code(LOAD), environment, package=False, cwd=tmp_path)
    hub.take_requests()
    again = run_client(code(LOAD), environment, package=False, offline=True, cwd=tmp_path)
    assert again == online
    folder = code(LOAD).replace('"alice/token"', repr(str(adapter_folder("token"))))
    folder = folder.replace('"alice/sequence"', repr(str(adapter_folder("sequence")))).replace(', revision="v1"', "")
    result = run_client(folder, environment, package=False, offline=True, cwd=tmp_path)
    assert result["token"] == expected["token"] and result["sequence"] == expected["sequence"]
    assert result["tagged"] == online["tagged"]
    assert hub.take_requests() == []


@pytest.mark.slow
def test_the_snippets_of_the_card_run_as_pasted(hub, tmp_path):
    """Each python block of the pushed README.md in a fresh process: the first without the package."""
    entry = hub.store.files(hub.store.repos["alice/token"], "main")["README.md"]
    blocks = re.findall(r"```python\n(.*?)```", hub.store.content(entry).decode(), flags=re.DOTALL)
    assert len(blocks) == 2
    environment = client_environment(hub.url, tmp_path / "home")
    tagged = run_client(
        blocks[0] + "result = [[float(x['score']) > 0, x['word']] for x in tagger('anna lives')]",
        environment,
        package=False,
    )
    described = run_client(blocks[1] + "result = model.describe()", environment)
    assert all(scored for scored, _ in tagged)
    assert "UniHyperLoRA on alice/source" in described
