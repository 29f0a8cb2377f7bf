"""Several processes: shared results are computed once, and no launcher writes the host to a checkpoint."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from modeling_unihyperlora.space import CanonicalSpace, kept
from trainers.launching import fill_in_frozen, whole
from trainers.training_args import UniHyperLoraTrainingArguments

REPOSITORY = Path(__file__).parents[2]


def _ask(folder: Path) -> None:
    def make() -> dict[str, torch.Tensor]:
        (folder / f"made-{os.getpid()}").touch()
        time.sleep(0.5)
        return {"x": torch.arange(3)}

    values = kept(folder / "cache" / "x.safetensors", make, lambda tensors: tensors["x"].tolist())
    (folder / f"got-{os.getpid()}").write_text(json.dumps(values))


def test_of_several_processes_one_computes(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=_ask, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert [json.loads(path.read_text()) for path in tmp_path.glob("got-*")] == [[0, 1, 2]] * 3


def test_a_state_without_its_frozen_part_is_filled_in():
    model = torch.nn.ModuleDict({"host": torch.nn.Linear(2, 2), "adapter": torch.nn.Linear(2, 2)})
    model.register_load_state_dict_pre_hook(fill_in_frozen)
    before = model["host"].weight.clone()
    state = {f"adapter.{name}": value + 1 for name, value in model["adapter"].state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert torch.equal(model["host"].weight, before)
    assert torch.equal(model["adapter"].weight, state["adapter.weight"])
    with whole(model), torch.no_grad():  # nothing is shared out
        model["adapter"].weight.zero_()
    assert not model["adapter"].weight.any()


@pytest.mark.slow
def test_every_launcher_has_the_same_losses_and_leaves_the_host_out(tmp_path):
    chosen = ["python, accumulated", "torchrun", "ddp_cpu", "fsdp"]
    command = [sys.executable, "-m", "scripts.research.launch_check", "--pathways", "inject", "stream"]
    command += ["--only", *chosen, "--output", str(tmp_path / "launch.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "launch.json").read_text())["runs"]
    assert [run["launch"] for run in runs] == ["python", *chosen] * 2
    assert all(run["largest_difference"] <= 1e-4 and run["host_tensors_in_checkpoint"] == 0 for run in runs)


@pytest.mark.parametrize("processes,accelerator,on_cpu", [(2, False, True), (2, True, False), (1, False, False)])
def test_several_processes_without_an_accelerator_are_joined_on_the_cpu(processes, accelerator, on_cpu, monkeypatch):
    """Without use_cpu, accelerate would not connect the processes."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # which would wait for the other one
    assert UniHyperLoraTrainingArguments(output_dir="out").use_cpu is on_cpu


def _train(rank: int, folder: Path, host: Path, port: int) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()} | {"UNIHYPERLORA_CACHE": str(folder / "cache")}
    from modeling_unihyperlora import space
    from trainers import state_cache
    from trainers.running import run  # before the functions are counted: the maps of a source's copies are its own
    from trainers.tasks import NER

    def counted(module, name: str) -> None:
        real = getattr(module, name)

        def call(*args, **kwargs):
            (folder / f"{name}-{rank}-{time.time_ns()}").touch()
            return real(*args, **kwargs)

        setattr(module, name, call)

    torch.set_num_threads(1)
    counted(space, "word_states")
    counted(space, "fit_host")
    counted(state_cache, "read_words")
    flags = f"--model_name_or_path {host} --train_file {folder / 'data.jsonl'} --output_dir {folder / 'out'}"
    flags += f" --pathway stream --space {folder / 'space.safetensors'} --reader small --max_flops_overhead_pct 1e9"
    flags += " --do_train --max_steps 2 --per_device_train_batch_size 4 --save_strategy no --use_cpu"
    flags += " --disable_tqdm true"
    run(NER, [*flags.split()])


@pytest.mark.slow
def test_two_gloo_processes_calibrate_and_read_the_text_once(tmp_path, monkeypatch):
    from scripts.research.kill_and_resume import make_data, make_host

    make_host(tmp_path / "host")
    make_data(tmp_path / "data.jsonl", 16)
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache of the space"))
    sentences = (json.loads(line)["tokens"] for line in (tmp_path / "data.jsonl").read_text().splitlines())
    (tmp_path / "anchors.txt").write_text("\n".join(map(" ".join, sentences)) * 4)
    CanonicalSpace.make([str(tmp_path / "host")], tmp_path / "anchors.txt", dim=8).save(tmp_path / "space.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (tmp_path, tmp_path / "host", port), nprocs=2)
    counts = {name: len(list(tmp_path.glob(f"{name}-*"))) for name in ("word_states", "fit_host", "read_words")}
    assert counts == dict.fromkeys(counts, 2), "once for the host, once for its causal copy"
