"""Pushes: which files go where, and which files are not sent again."""

import json
import logging
import shutil

import pytest
import torch

from modeling_unihyperlora import AdapterFileError, ConfigError, HubError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.publish.hub import files_of, push_folder
from trainers.commands import push as push_command

OWN = {"base_model_name_or_path": "alice/source"}
FILES = files_of("stream")


def remote(hub, repo="alice/ner", revision="main") -> dict[str, bytes]:
    store = hub.store
    return {path: store.content(entry) for path, entry in store.files(store.repos[repo], revision).items()}


def test_exactly_the_adapter_is_pushed(hub, adapter_folder, tmp_path):
    """The folder of a run also holds other files, which must not be pushed."""
    folder = tmp_path / "run"
    shutil.copytree(adapter_folder(), folder)
    (folder / "checkpoint-2").mkdir()
    for name in ("tokenizer.json", "training_args.bin", "trainer_state.json", "checkpoint-2/optimizer.pt", ".env"):
        (folder / name).write_text("no")
    push = push_folder(folder, "alice/ner", **OWN)
    files = remote(hub)
    assert set(files) == {*FILES, ".gitattributes"}
    assert push.files == {name: len(files[name]) for name in FILES} and set(push.changed) == set(FILES)
    assert push.others == {".gitattributes": len(files[".gitattributes"])}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"])["base_model_name_or_path"] == "alice/source"
    assert push.url.endswith(push.commit) and push.commit == hub.store.repos["alice/ner"].branches["main"]


def test_a_second_push_of_the_same_uploads_nothing(hub, adapter_folder):
    first = push_folder(adapter_folder(), "alice/ner", **OWN)
    state = hub.store.state("alice/ner")
    hub.take_requests()
    second = push_folder(adapter_folder(), "alice/ner", **OWN)
    asked = [f"{request.method} {request.path}" for request in hub.take_requests()]
    assert not [line for line in asked if line.startswith("PUT") or "/commit/" in line]
    assert second.changed == [] and second.commit == first.commit
    assert hub.store.state("alice/ner") == state


def test_no_path_of_this_machine_gets_out(hub, adapter_folder, tiny_host, caplog):
    with caplog.at_level(logging.WARNING):
        push_folder(adapter_folder(), "alice/ner")
    for name, content in remote(hub).items():
        assert str(tiny_host.parent).encode() not in content, name
    assert "--base_model_name_or_path" in caplog.text
    content = json.loads(remote(hub)["config.json"])
    assert content["base_model_name_or_path"] is None
    assert [host["name"] for host in content["source_hosts"]] == [tiny_host.name]


def test_a_dry_run_sends_nothing(hub, adapter_folder):
    hub.take_requests()
    push = push_folder(adapter_folder(), "alice/ner", dry_run=True)
    assert hub.take_requests() == [] and "alice/ner" not in hub.store.repos
    assert set(push.files) == set(FILES) and push.url == ""


def test_the_script_lists_before_and_after(hub, adapter_folder, caplog):
    with caplog.at_level(logging.INFO, logger="modeling_unihyperlora"):
        push = push_command.main([str(adapter_folder()), "alice/ner", "--private"])
    before, after = (record.message for record in caplog.records if "bytes in" in record.message)
    size = f"{push.files['model.safetensors']:,}  model.safetensors"
    assert size in before and size in after and push.url in after
    assert hub.store.repos["alice/ner"].private
    with caplog.at_level(logging.INFO, logger="modeling_unihyperlora"):
        push_command.main([str(adapter_folder()), "alice/ner"])
    assert "Nothing was uploaded" in caplog.text


def test_another_branch_and_a_pull_request(hub, adapter_folder):
    push_folder(adapter_folder("sequence"), "alice/ner", **OWN)
    main = hub.store.state("alice/ner")["main"]
    push_folder(adapter_folder(), "alice/ner", revision="tags", **OWN)
    pull = push_folder(adapter_folder(), "alice/ner", create_pr=True, **OWN)
    state = hub.store.state("alice/ner")
    assert state["main"] == main
    assert state["tags"]["model.safetensors"] == state["refs/pr/1"]["model.safetensors"] != main["model.safetensors"]
    assert pull.url.endswith("/discussions/1")


def test_a_model_pushes_itself(hub, make_adapter, tmp_path):
    model = make_adapter()
    url = model.push_to_hub("alice/ner", private=True, commit_message="From a model", **OWN)
    assert set(remote(hub)) == {*FILES, ".gitattributes"}
    assert url.endswith(hub.store.repos["alice/ner"].branches["main"])
    back = UniHyperLoraForTokenClassification.from_pretrained("alice/ner", cache_dir=str(tmp_path))
    ids = {"input_ids": torch.tensor([[2, 5, 9, 3]])}
    assert torch.equal(model(**ids).logits, back(**ids).logits)
    assert model(**ids).logits.std() > 0.01  # not the zeros of a fresh head


def test_own_words_in_a_card_stay(hub, adapter_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(adapter_folder(), folder)
    (folder / "README.md").write_text("Mine.\n")
    push_folder(folder, "alice/ner", **OWN)
    assert remote(hub)["README.md"] == b"Mine.\n"


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), AdapterFileError, "has no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{}"), AdapterFileError, "not the configuration"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), AdapterFileError, "safetensors"),
    ],
)
def test_what_is_no_adapter_is_not_pushed(hub, adapter_folder, tmp_path, damage, error, says):
    folder = tmp_path / "run"
    shutil.copytree(adapter_folder(), folder)
    damage(folder)
    with pytest.raises(error, match=says):
        push_folder(folder, "alice/ner", **OWN)
    assert "alice/ner" not in hub.store.repos


def test_a_link_out_of_the_folder_is_not_pushed(hub, adapter_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(adapter_folder(), folder)
    secret = tmp_path / "secret"
    secret.write_text("a password")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(AdapterFileError, match="leads out of the folder"):
        push_folder(folder, "alice/ner", **OWN)


def test_a_host_for_others_must_be_on_the_hub(hub, adapter_folder, tiny_host):
    with pytest.raises(ConfigError, match="not a name on the Hub"):
        push_folder(adapter_folder(), "alice/ner", base_model_name_or_path=str(tiny_host))


@pytest.mark.parametrize(
    ("token", "repo", "status", "says"),
    [
        ("token-of-bob", "alice/source", 403, "may not write"),
        ("token-of-nobody", "alice/ner", 401, "does not accept the token"),
    ],
)
def test_who_may_not_write_is_told(hub, adapter_folder, token, repo, status, says):
    state = hub.store.state("alice/source")
    with pytest.raises(HubError, match=says) as caught:
        push_folder(adapter_folder(), repo, token=token, **OWN)
    assert f"HTTP {status}" in str(caught.value) and "\n" not in str(caught.value)
    assert hub.store.state("alice/source") == state
