"""Faults during a push or a download: recovered, or reported in one sentence with the repository unchanged."""

import pytest
import torch

from modeling_unihyperlora import AdapterFileError, HostError, HubError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.publish import hub as hub_module
from modeling_unihyperlora.publish.hub import push_folder

OWN = {"base_model_name_or_path": "alice/source"}
COMMIT, PUT, CONFIG, WEIGHTS = "POST .*/commit/", "PUT /blobs/", "GET .*/ner/resolve/.*config.json", "GET /blobs/"


@pytest.fixture
def hub(hub, adapter_folder):
    """A Hub that has an adapter already; pushes are retried for only three seconds."""
    push_folder(adapter_folder("sequence"), "alice/ner", **OWN)
    hub.take_requests()
    return hub


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(hub_module, "PATIENCE", 3.0)


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "kind", "how"),
    [
        (COMMIT, "status", {"status": 429, "headers": {"Retry-After": "1"}}),
        (COMMIT, "status", {"status": 500}),
        (COMMIT, "slow", {"seconds": 0.3}),
        (COMMIT, "cut_upload", {}),
        (COMMIT, "cut_download", {}),  # the commit is made, its answer lost
        (PUT, "status", {"status": 500}),
        (PUT, "cut_upload", {}),
        ("POST .*/preupload/", "status", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("POST /api/repos/create", "status", {"status": 500}),
    ],
)
def test_a_push_survives(hub, adapter_folder, request_, kind, how):
    fault = hub.fault(request_, kind, **how)
    push = push_folder(adapter_folder("token"), "alice/ner", **OWN)
    assert fault.happened == 1
    repo = hub.store.repos["alice/ner"]
    assert len(repo.commits) == 3 and repo.branches["main"] == push.commit  # made, first adapter, this one: not twice
    entry = hub.store.entry(repo, "main", "model.safetensors")
    assert hub.store.content(entry) == (adapter_folder("token") / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("request_", "kind", "how", "says"),
    [
        (COMMIT, "status", {"status": 401}, "does not accept the token"),
        (COMMIT, "status", {"status": 403}, "may not write"),
        (COMMIT, "status", {"status": 404}, "the repository or branch does not exist"),
        (COMMIT, "status", {"status": 409}, "at the moment"),
        (COMMIT, "status", {"status": 412}, "somebody else has pushed"),
        (COMMIT, "status", {"status": 429, "headers": {"Retry-After": "60"}}, "limits the number of requests"),
        (COMMIT, "status", {"status": 500, "times": None}, "HTTP 500"),
        (COMMIT, "cut_upload", {"times": None}, "cannot be reached"),
        (PUT, "wrong_hash", {}, "other bytes than were sent"),
        ("POST ", "status", {"status": 401, "times": None}, "does not accept the token"),
    ],
)
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub, adapter_folder, request_, kind, how, says):
    state = hub.store.state("alice/ner")
    fault = hub.fault(request_, kind, **how)
    with pytest.raises(HubError, match=says) as error:
        push_folder(adapter_folder("token"), "alice/ner", **OWN)
    assert "unchanged" in one_sentence(error) and fault.happened
    assert hub.store.state("alice/ner") == state
    hub.faults.clear()
    push_folder(adapter_folder("token"), "alice/ner", **OWN)  # and the next one goes through
    assert hub.store.state("alice/ner") != state


def test_nobody_else_is_overwritten(hub, adapter_folder, monkeypatch):
    """Another user pushes between the check of the repository and the commit."""
    look = hub_module._remote_files

    def look_and_be_late(api, repo_id, revision):
        files = look(api, repo_id, revision)
        hub.store.put("alice/ner", {"notes.txt": b"of somebody else"})
        return files

    monkeypatch.setattr(hub_module, "_remote_files", look_and_be_late)
    with pytest.raises(HubError, match="somebody else has pushed"):
        push_folder(adapter_folder("token"), "alice/ner", **OWN)
    files = hub.store.files(hub.store.repos["alice/ner"], "main")
    assert "notes.txt" in files
    old = (adapter_folder("sequence") / "model.safetensors").read_bytes()
    assert hub.store.content(files["model.safetensors"]) == old


# ---- loading ----


@pytest.fixture
def load(hub, adapter_folder, tmp_path):
    push_folder(adapter_folder("token"), "alice/ner", **OWN)

    def load_(**more):
        return UniHyperLoraForTokenClassification.from_pretrained("alice/ner", cache_dir=str(tmp_path / "own"), **more)

    return load_


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "kind", "how"),
    [
        (WEIGHTS, "cut_download", {}),
        (WEIGHTS, "slow", {"seconds": 1.5}),  # the client waits one second here
        (WEIGHTS, "status", {"status": 429, "headers": {"Retry-After": "1"}}),
        (CONFIG, "cut_download", {}),
    ],
)
def test_loading_survives(hub, load, adapter_folder, request_, kind, how):
    fault = hub.fault(request_, kind, **how)
    model = load()
    assert fault.happened == 1
    there = UniHyperLoraForTokenClassification.from_pretrained(adapter_folder("token"))
    ids = {"input_ids": torch.tensor([[2, 5, 9, 3]])}
    assert torch.equal(model(**ids).logits, there(**ids).logits)


@pytest.mark.parametrize(
    ("request_", "kind", "how", "says"),
    [
        ("(GET|HEAD) .*/ner/resolve/", "status", {"status": 401, "times": None}, "No adapter 'alice/ner'"),
        ("(GET|HEAD) .*/ner/resolve/", "status", {"status": 403, "times": None}, "No adapter 'alice/ner'"),
        ("(GET|HEAD) .*/ner/resolve/", "status", {"status": 404, "times": None}, "No adapter 'alice/ner'"),
        (CONFIG, "truncated", {}, "No adapter 'alice/ner'"),
        (WEIGHTS, "truncated", {}, "model.safetensors cannot be loaded"),
        (WEIGHTS, "wrong_bytes", {}, "force_download=True"),
    ],
)
def test_loading_says_what_is_wrong(hub, load, request_, kind, how, says):
    fault = hub.fault(request_, kind, **how)
    with pytest.raises(AdapterFileError, match=says) as error:
        load()
    one_sentence(error)
    assert fault.happened
    hub.faults.clear()
    assert load(force_download=True).labels == ["O", "B-PER", "I-PER"]


def test_a_host_that_is_not_there(hub, load):
    with pytest.raises(HostError, match="alice/nowhere") as error:
        load(base_model_name_or_path="alice/nowhere")
    one_sentence(error)


def test_a_private_adapter_is_not_there_for_others(hub, load):
    hub.store.repos["alice/ner"].private = True
    assert load().labels
    with pytest.raises(AdapterFileError, match="No adapter 'alice/ner'"):
        load(token="token-of-bob", force_download=True)
