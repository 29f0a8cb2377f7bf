"""Records a round trip on a local Hub: train, push, load in clean processes on two hosts, all faults.

    python -m tests.hub_server.round_trip --hosts SOURCE_FOLDER OTHER_FOLDER --train_file train.jsonl \
        --validation_file dev.jsonl --work /tmp/round-trip --output results/hub-round-trip.json

Run it with another interpreter to record other versions of transformers and huggingface_hub. Nothing but this machine
is talked to. Bytes are those of whole HTTP messages, header lines and all.
"""

import argparse
import hashlib
import json
import os
import platform
from pathlib import Path

from tests.hub_server import HubServer, client_environment, run_client

ADAPTER = "alice/adapter"
SENTENCE = "Angela Merkel met Nokia in Helsinki ."

TRAIN = """
from scripts import run_ner
result = run_ner.main(FLAGS)["eval_f1"]
"""
PUSH = """
from trainers.commands import push as push_command
push = push_command.main([FOLDER, REPO])
result = {"changed": push.changed, "files": push.files}
"""
LOAD = """
import torch, transformers, huggingface_hub
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

result = {"transformers": transformers.__version__, "huggingface_hub": huggingface_hub.__version__, "logits": {}}
for host in HOSTS:
    inputs = AutoTokenizer.from_pretrained(host)(SENTENCE, return_tensors="pt")
    model = AutoModelForTokenClassification.from_pretrained(ADAPTER, base_model_name_or_path=host, **FLAG)
    with torch.no_grad():
        result["logits"][host] = model(**inputs).logits.tolist()
    result["code"] = type(model).__module__.split(".")[0]
tagger = pipeline("token-classification", model=ADAPTER, **FLAG)
result["tagged"] = [[piece["word"], piece["entity"]] for piece in tagger(SENTENCE)]
"""
# what goes wrong, at which request of a push or a load, how, and whether it is to be survived
COMMIT, PUT, FILE, BLOB = "POST .*/commit/", "PUT /blobs/", "GET .*/resolve/.*/config.json", "GET /blobs/"
FAULTS = [
    ("load", "401", "/resolve/", "status", {"status": 401, "times": None}, False),
    ("load", "404", "/resolve/", "status", {"status": 404, "times": None}, False),
    ("load", "429, Retry-After 1", BLOB, "status", {"status": 429, "headers": {"Retry-After": "1"}}, True),
    ("load", "slow answer", BLOB, "slow", {"seconds": 3.0}, True),
    ("load", "cut in the middle of the download", BLOB, "cut_download", {}, True),
    ("load", "truncated weights", BLOB, "truncated", {}, False),
    ("load", "truncated configuration", FILE, "truncated", {}, False),
    ("load", "wrong bytes", BLOB, "wrong_bytes", {}, False),
    ("push", "401", COMMIT, "status", {"status": 401}, False),
    ("push", "403", COMMIT, "status", {"status": 403}, False),
    ("push", "404", COMMIT, "status", {"status": 404}, False),
    ("push", "409", COMMIT, "status", {"status": 409}, False),
    ("push", "412", COMMIT, "status", {"status": 412}, False),
    ("push", "429, Retry-After 1", COMMIT, "status", {"status": 429, "headers": {"Retry-After": "1"}}, True),
    ("push", "500 once", COMMIT, "status", {"status": 500}, True),
    ("push", "500 always", COMMIT, "status", {"status": 500, "times": None}, False),
    ("push", "slow answer", COMMIT, "slow", {"seconds": 1.0}, True),
    ("push", "cut in the middle of the upload", PUT, "cut_upload", {}, True),
    ("push", "cut in the middle of the commit", COMMIT, "cut_upload", {}, True),
    ("push", "answer to the commit lost", COMMIT, "cut_download", {}, True),
    ("push", "wrong hash", PUT, "wrong_hash", {}, False),
]
PUSH_FAULT = """
import modeling_unihyperlora.publish.hub as hub
hub.PATIENCE = 5.0
try:
    hub.push_folder(FOLDER, REPO)
    result = "survived"
except hub.HubError as error:
    result = str(error)
"""
LOAD_FAULT = """
from modeling_unihyperlora import AdapterFileError, UniHyperLoraForTokenClassification
try:
    UniHyperLoraForTokenClassification.from_pretrained(ADAPTER, base_model_name_or_path=HOST)
    result = "survived"
except AdapterFileError as error:
    result = str(error)
"""


def code(body: str, **values) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + body


def traffic(hub: HubServer, repo: str, folder: Path) -> dict[str, int]:
    """Requests and bytes to and from the server since the last call, for one repository and its weights."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    taken = [r for r in hub.take_requests() if repo in r.path or weights in r.path or "/api/repos/" in r.path]
    sums = {"to_hub_bytes": sum(r.received for r in taken), "from_hub_bytes": sum(r.sent for r in taken)}
    return {"requests": len(taken)} | sums


def largest_difference(one: list, other: list) -> float:
    if isinstance(one, list):
        return max(largest_difference(a, b) for a, b in zip(one, other, strict=True))
    return abs(one - other)


def record(arguments: argparse.Namespace) -> dict:
    work = Path(arguments.work).resolve()
    work.mkdir(parents=True)
    with HubServer() as hub:
        hosts = [f"alice/{Path(folder).name}" for folder in arguments.hosts]
        for name, folder in zip(hosts, arguments.hosts, strict=True):
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
            hub.store.put(name, files)
        here = client_environment(hub.url, work / "trainer")
        flags = ["--model_name_or_path", hosts[0], "--train_file", os.path.abspath(arguments.train_file)]
        flags += ["--validation_file", os.path.abspath(arguments.validation_file), "--pathway", "stream"]
        flags += ["--max_train_samples", "256", "--max_eval_samples", "128", "--max_steps", "40", "--do_train"]
        flags += ["--do_eval", "--per_device_train_batch_size", "16", "--use_cpu"]
        flags += ["--output_dir", str(work / "run"), "--save_strategy", "no", "--disable_tqdm", "true"]
        flags += ["--push_to_hub", "--hub_model_id", ADAPTER]
        score = run_client(code(TRAIN, FLAGS=flags), here, timeout=900)
        run = work / "run"
        pushes = {"training_with_push_to_hub": traffic(hub, ADAPTER, run) | {"eval_f1": score}}
        hub.store.blobs.pop(hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest())  # sent once more
        for name in ("first_push", "second_push"):
            hub.take_requests()
            done = run_client(code(PUSH, FOLDER=str(work / "run"), REPO="alice/again"), here)
            sent = [r for r in hub.requests if r.method == "PUT" or "/commit/" in r.path]
            pushes[name] = {"files_changed": len(done["changed"]), "uploads": len(sent)} | traffic(
                hub, "alice/again", run
            )
        own = {"HOSTS": hosts, "SENTENCE": SENTENCE, "ADAPTER": ADAPTER}
        folder = own | {"ADAPTER": str(work / "run"), "FLAG": {}}
        there = run_client("import modeling_unihyperlora\n" + code(LOAD, **folder), here)
        hub.take_requests()
        loads = {}
        for name, package in (("code_of_the_repository", False), ("installed_package", True)):
            clean = client_environment(hub.url, work / name)
            flag = {} if package else {"trust_remote_code": True}
            body = code(LOAD, **own, FLAG=flag)
            result = run_client("import modeling_unihyperlora\n" + body if package else body, clean, package=package)
            requests = list(hub.requests)
            differences = {host: largest_difference(there["logits"][host], result["logits"][host]) for host in hosts}
            loads[name] = {
                "code": result["code"],
                "largest_logit_difference": differences,
                "tagged": result["tagged"],
                "adapter": traffic(hub, ADAPTER, run),
                "with_both_hosts_from_hub_bytes": sum(r.sent for r in requests),
            }
            offline = run_client(
                "import modeling_unihyperlora\n" + body if package else body, clean, package=package, offline=True
            )
            loads[name]["offline_again_equal"] = offline["logits"] == result["logits"]
        files = {path: entry.size for path, entry in hub.store.files(hub.store.repos[ADAPTER], "main").items()}
        tried = [] if arguments.no_faults else FAULTS
        faults = [try_fault(hub, work, hosts[-1], *fault) for fault in tried]
    versions = {name: there[name] for name in ("transformers", "huggingface_hub")}
    return {
        "kind": "hub_round_trip",
        "versions": versions | {"python": platform.python_version()},
        "files_bytes": files,
        "adapter_bytes": files["model.safetensors"],
        "pushes": pushes,
        "loads": loads,
        "faults": faults,
    }


def try_fault(
    hub: HubServer, work: Path, host: str, way: str, name: str, request: str, kind: str, how: dict, survivable: bool
) -> dict:
    """Push over other content, or load into an empty cache, with one fault."""
    environment = client_environment(hub.url, work / f"fault-{way}-{name}".replace(" ", "-"))
    repo, before = "alice/faults", None
    if way == "push":
        hub.store.put(repo, {"config.json": b"{}", "model.safetensors": b"what was there before"})
        weights = (work / "run" / "model.safetensors").read_bytes()
        hub.store.blobs.pop(hashlib.sha256(weights).hexdigest(), None)  # or it would not be sent
        before = hub.store.state(repo)
        body = code(PUSH_FAULT, FOLDER=str(work / "run"), REPO=repo)
    else:
        body = code(LOAD_FAULT, ADAPTER=ADAPTER, HOST=host)
    fault = hub.fault(request, kind, **how)
    outcome = run_client(body, environment)
    hub.faults.clear()
    found = {"way": way, "fault": name, "happened": fault.happened, "outcome": outcome.replace(str(work), "WORK")}
    as_expected = bool(fault.happened) and (outcome == "survived") == survivable and "\n" not in outcome
    if way == "push":
        state = hub.store.state(repo)
        weights_there = hub.store.content(hub.store.entry(hub.store.repos[repo], "main", "model.safetensors"))
        found["remote_state"] = "as before" if state == before else "pushed" if weights_there == weights else "damaged"
        as_expected &= found["remote_state"] == ("pushed" if survivable else "as before")
    return found | {"as_expected": as_expected}


def main(command_line: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs=2, required=True, help="Folders: the host to train on, and another.")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--work", required=True, help="A folder to make, for everything but the record.")
    parser.add_argument("--output", required=True, help="The record, JSON.")
    parser.add_argument("--no_faults", action="store_true", help="The way alone; the tests try the faults as well.")
    arguments = parser.parse_args(command_line)
    found = record(arguments)
    Path(arguments.output).write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
