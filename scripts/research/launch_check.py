"""Starts a small run with every launch config, and compares its losses with those of a single process.

    python -m scripts.research.launch_check --output results/launch.json

The script needs no data and no network: it makes a random encoder of two blocks and sentences of random words. Each
run reads batches of 32 sentences: all at once, as two accumulated halves, or in two processes. For each launch it
records the exit status, the time, the losses, their largest difference from the single process's, and the host tensors
in the checkpoint; for a failed launch, the last error. A launch that this machine cannot run is recorded as not run,
with the reason. The file is written after every launch; with --only or --pathways, earlier results of other launches
stay. The script exits with 1 if a launch fails, a loss differs or a checkpoint holds tensors of a host.

The stream is trained without its random parts (--fidelity 1, no dropout). Each process draws them for its own
sentences, so with them the losses differ, as with another seed. ``stream, with noise`` shows how much, for some of the
launches.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraError, UniHyperLoraForTokenClassification
from modeling_unihyperlora.storage import write_json
from scripts.research.kill_and_resume import make_data, make_host, make_space

REPOSITORY = Path(__file__).parents[2]
BATCH, STEPS = 32, 8
PATHWAYS = ("inject", "stream", "stream, with noise")
NOISY = ("python", "python, accumulated", "torchrun")  # launches of "stream, with noise"
LARGEST_DIFFERENCE = 1e-4  # of losses, caused by another order of summation over a few steps


def make_adapter(pathway: str, folder: Path) -> None:
    """Save the untrained adapter that all launches train."""
    own = {"pathway": pathway.split(",")[0]} | ({"dropout": 0.0} if pathway == "stream" else {})
    more = {"space": make_space(folder), "reader": "small"} if "stream" in pathway else {}
    torch.manual_seed(0)
    config = UniHyperLoraConfig(**own)
    model = UniHyperLoraForTokenClassification.from_host(folder / "host", ["O", "B-X"], "ner", config, **more)
    model.save_pretrained(folder / pathway)


def launches(processes: int = 2) -> dict[str, tuple[list[str], int, int]]:
    """Name → (command before the script, number of processes, batches per step)."""
    python = [sys.executable]
    configs = sorted((REPOSITORY / "hub_configs" / "accelerate").glob("*.yaml"))
    accelerate = [*python, "-m", "accelerate.commands.launch", "--config_file"]
    return {
        "python": (python, 1, 1),
        "python, accumulated": (python, 1, 2),
        "torchrun": ([*python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], processes, 1),
        **{path.stem: ([*accelerate, str(path)], 1 if path.stem == "cpu" else processes, 1) for path in configs},
    }


def why_not(name: str) -> str | None:
    """Reason why a launch cannot run on this machine; None if it can."""
    if "gpu" in name and torch.cuda.device_count() < 2:
        return f"needs two GPUs; there are {torch.cuda.device_count()}"
    if "deepspeed" in name and importlib.util.find_spec("deepspeed") is None:
        return "needs pip install 'unihyperlora[deepspeed]'"
    return None


def run(name: str, how: tuple[list[str], int, int], pathway: str, folder: Path) -> dict[str, object]:
    """Run one launch; returns its status, seconds, losses and the number of host tensors in its checkpoint."""
    before, processes, accumulated = how
    output = folder / f"{name}-{pathway}".replace(" ", "").replace(",", "-")
    flags = ["--model_name_or_path", folder / "host", "--train_file", folder / "train.jsonl", "--do_train"]
    flags += ["--max_steps", STEPS, "--save_steps", STEPS, "--logging_steps", 1, "--learning_rate", 0.003]
    flags += ["--per_device_train_batch_size", BATCH // processes // accumulated, "--disable_tqdm", "true"]
    flags += ["--gradient_accumulation_steps", accumulated, "--seed", 0]
    flags += ["--fidelity", 1, "--copy_fidelity", 1] if pathway == "stream" else []
    flags += ["--use_cpu"] if torch.accelerator.is_available() else []  # as a user with an accelerator would
    flags += ["--lr_scheduler_type", "constant", "--max_flops_overhead_pct", 1e9, "--output_dir", output]
    flags += ["--adapter", folder / pathway]
    command = [*before, str(REPOSITORY / "scripts" / "run_ner.py"), *map(str, flags)]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | own | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    result = {"status": done.returncode, "seconds": round(time.perf_counter() - start, 1), "processes": processes}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [""]
        result["said"] = next((line for line in reversed(lines) if "Error: " in line), lines[-1])[:200]
        sys.stderr.write(done.stderr[-3000:])
        return result
    checkpoint = output / f"checkpoint-{STEPS}"
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    result["losses"] = [entry["loss"] for entry in history if "loss" in entry]
    result["host_tensors_in_checkpoint"] = sum(map(host_tensors, checkpoint.rglob("*")))
    return result


def host_tensors(path: Path) -> int:
    """Number of host tensors in a file of a checkpoint that this script wrote."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    elif path.name.endswith("model_states.pt"):  # DeepSpeed's
        state = torch.load(path, map_location="cpu", weights_only=False)  # trusted: this script wrote it
        names = [name for name, value in (state["module"] or {}).items() if value.numel() > 0]
        names += list(state.get("frozen_param_fragments") or {})
    else:
        return 0
    return sum(name.startswith("host.") for name in names)


def read_runs(path: Path) -> dict[tuple[str, str], dict[str, object]]:
    """Read the records of an earlier file: (pathway, launch) → record."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return {(run["pathway"], run["launch"]): run for run in runs}


def write_runs(path: Path, runs: dict[tuple[str, str], dict[str, object]]) -> None:
    """Write the records in the order of the pathways and launches."""
    order = [(pathway, name) for pathway in PATHWAYS for name in launches() if (pathway, name) in runs]
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    kind = {"kind": "launch", "command": "python -m scripts.research.launch_check --output results/launch.json"}
    write_json(path, {**kind, "hardware": hardware, "runs": [runs[key] for key in order]})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(launches()),
        help="launches; adds a single process if the file has none",
    )
    parser.add_argument("--pathways", nargs="+", default=list(PATHWAYS), choices=PATHWAYS)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the outcomes")
    args = parser.parse_args()
    in_part = args.only or args.pathways != list(PATHWAYS)
    earlier = read_runs(args.output) if in_part else {}
    runs, fine = {}, True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_host(folder / "host")
        make_data(folder / "train.jsonl", 4 * BATCH)
        os.environ["UNIHYPERLORA_CACHE"] = str(folder / "cache")
        for pathway in args.pathways:
            make_adapter(pathway, folder)
            noisy = "noise" in pathway
            single = earlier.get((pathway, "python"), {}).get("losses")
            chosen = {*(args.only or launches())} | ({"python"} if single is None else set())
            for name, how in launches().items():
                if name not in chosen or (noisy and name not in NOISY):
                    continue
                result = {"launch": name, "pathway": pathway}
                if why_not(name):
                    result["not_run"] = why_not(name)
                else:
                    result |= run(name, how, pathway, folder)
                    fine &= result["status"] == 0
                losses = result.get("losses")
                if name == "python":
                    single = losses
                if losses and single:
                    result["largest_difference"] = max(abs(a - b) for a, b in zip(losses, single, strict=True))
                    fine &= result["host_tensors_in_checkpoint"] == 0 and len(set(losses)) == STEPS  # the loss changes
                    fine &= noisy or result["largest_difference"] <= LARGEST_DIFFERENCE
                runs[pathway, name] = result
                write_runs(args.output, (read_runs(args.output) if in_part else {}) | runs)
                sys.stdout.write(json.dumps(result) + "\n")
                sys.stdout.flush()
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"launch_check: {error}")
