"""Kills a tiny run at random moments, resumes it until it is done, and compares its weights with an unkilled run.

    python -m scripts.research.kill_and_resume --kills 5 --output results/kill-and-resume.json

The script needs no data and no network: it makes a random encoder of two blocks and sentences of random words. For
each pathway and scope, it starts the work of scripts/run_ner.py in a process, kills it (with SIGKILL and SIGTERM in
turn) after a random time, and starts the same command with --resume_from_checkpoint true, until all kills are used.
The last process may finish. Each kill waits for one of STAGES in turn and for a random time after its start, since so
short a run spends most of its time before training. The final files must equal those of an unkilled run, bit for bit;
otherwise the script exits with 1.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from modeling_unihyperlora import CanonicalSpace, UniHyperLoraError
from modeling_unihyperlora.storage import LATENTS_NAME, content_digest, write_json
from trainers.running import run
from trainers.tasks import NER

WORDS = [f"w{number}" for number in range(200)]
STAGES = ("before the first step", "training")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_host(folder: Path) -> None:
    """Save a random BERT, 2 blocks x 32, whose vocabulary has WORDS, and letters for other words."""
    letters = [character for code in range(97, 123) for character in (chr(code), f"##{chr(code)}")]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS, *letters])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **names)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=128, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_space(folder: Path) -> Path:
    """Make a space with eight coordinates from the host in ``folder``/host; returns its file."""
    CanonicalSpace.make([folder / "host"], dim=8).save(folder / "space.safetensors")
    return folder / "space.safetensors"


def make_data(path: Path, sentences: int) -> None:
    """Write random sentences in which one word in four has the tag B-X."""
    draw = random.Random(0)
    rows = [[draw.randrange(len(WORDS)) for _ in range(draw.randint(4, 12))] for _ in range(sentences)]
    tagged = (
        {"tokens": [WORDS[i] for i in row], "ner_tags": ["B-X" if i % 4 == 0 else "O" for i in row]} for row in rows
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in tagged), encoding="utf-8")


def work(command_line: list[str], cache: Path, log: Path) -> None:
    """Body of a process: runs the script's work."""
    os.environ["UNIHYPERLORA_CACHE"] = str(cache)
    torch.set_num_threads(1)
    with open(log, "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run(NER, command_line)


def start(command_line: list[str], cache: Path, log: Path) -> multiprocessing.Process:
    """Start the work in a new process; forked, because imports take longer than the training."""
    log.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=work, args=(command_line, cache, log))
    process.start()
    return process


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of the written tensors, and of the float latents in the last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    files = (folder / "model.safetensors", last / LATENTS_NAME)
    return {path.name: content_digest(load_file(path), {}) for path in files}  # a file may order its tensors otherwise


def stage(log: Path) -> int:
    """Index in STAGES of the stage that a process has reached, according to its log."""
    return int(log.is_file() and "'loss'" in log.read_text())


def wait_for(aim: int, process: multiprocessing.Process, log: Path) -> None:
    """Wait until a process has reached a stage or has ended."""
    while process.exitcode is None and stage(log) < aim:
        process.join(0.01)


def kill_and_compare(pathway: str, scope: str, kills: int, folder: Path, seed: int) -> dict[str, object]:
    """Run once without interruption, then with ``kills`` kills; see the module.

    Scope "delta" tunes the adapter that scope "task" has trained.
    """
    name, log = f"{pathway}-{scope}", folder / "log"
    flags = ["--model_name_or_path", folder / "host", "--train_file", folder / "train.jsonl", "--pathway", pathway]
    flags += ["--train_scope", scope, "--logging_steps", 1]
    flags += [] if scope == "task" else ["--adapter", folder / f"{pathway}-task-whole"]
    flags += ["--space", folder / "space.safetensors", "--reader", "small"] if name == "stream-task" else []
    flags += ["--do_train", "--max_steps", 30, "--save_steps", 4, "--save_total_limit", 3, "--learning_rate", 0.01]
    flags += ["--per_device_train_batch_size", 8, "--use_cpu", "--disable_tqdm", "true"]
    flags += ["--max_flops_overhead_pct", 1e9]
    flags = [str(flag) for flag in flags]
    began = time.perf_counter()
    unkilled = start([*flags, "--output_dir", str(folder / f"{name}-whole")], folder / f"{name}-cache-whole", log)
    reached = []
    for aim in range(len(STAGES)):
        wait_for(aim, unkilled, log)
        reached.append(time.perf_counter() - began)
    unkilled.join()
    seconds = time.perf_counter() - began
    lasts = [end - begin for begin, end in zip(reached, [*reached[1:], seconds], strict=True)]
    if unkilled.exitcode != 0:
        raise SystemExit(f"The unkilled run ended with status {unkilled.exitcode}:\n{log.read_text()[-2000:]}")
    whole = digest(folder / f"{name}-whole")

    draw, output = random.Random(f"{seed} {name}"), folder / f"{name}-killed"
    line = [*flags, "--output_dir", str(output), "--resume_from_checkpoint", "true"]
    deaths: list[dict[str, object]] = []
    rounds, cache = 0, folder / f"{name}-cache-killed"
    while len(deaths) < kills:
        process = start(line, cache, log)
        aim = len(deaths) % len(STAGES)
        wait_for(aim, process, log)
        process.join(draw.uniform(0, 1) * lasts[aim])
        if process.exitcode is None:
            how = (signal.SIGKILL, signal.SIGTERM)[len(deaths) % 2]
            os.kill(process.pid, how)
            process.join()
        if process.exitcode == 0:  # it finished before the kill: compare, and start a new round
            rounds += 1
            if digest(output) != whole:
                return {"pathway": pathway, "scope": scope, "kills": deaths, "rounds": rounds, "identical": False}
            shutil.rmtree(output)
            shutil.rmtree(cache, ignore_errors=True)
            continue
        steps = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]
        at = {"stage": STAGES[stage(log)], "last_checkpoint": max(steps, default=None)}
        deaths.append({"signal": how.name, "status": process.exitcode, **at})
    process = start(line, cache, log)
    process.join()
    identical = process.exitcode == 0 and digest(output) == whole
    return {
        "pathway": pathway,
        "scope": scope,
        "kills": deaths,
        "rounds": rounds + 1,
        "identical": identical,
        "seconds_whole": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=5, help="kills for each pathway and scope")
    parser.add_argument("--pathways", nargs="+", default=["inject", "stream"], choices=["inject", "stream"])
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times of the kills")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the outcomes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_host(folder / "host")
        make_data(folder / "train.jsonl", 60)
        make_space(folder)
        runs = []
        for pathway, scope in itertools.product(args.pathways, ("task", "delta")):
            runs.append(kill_and_compare(pathway, scope, args.kills, folder, args.seed))
            identical = "identical" if runs[-1]["identical"] else "DIFFERENT"
            sys.stdout.write(f"{pathway}, {scope}: {len(runs[-1]['kills'])} kills, weights {identical}\n")
            sys.stdout.flush()
    write_json(
        args.output,
        {
            "kind": "kills",
            "command": " ".join(["python -m scripts.research.kill_and_resume", *sys.argv[1:]]),
            "runs": runs,
        },
    )
    sys.exit(0 if all(run["identical"] for run in runs) else 1)


if __name__ == "__main__":
    try:
        main()
    except UniHyperLoraError as error:
        sys.exit(f"kill_and_resume: {error}")
