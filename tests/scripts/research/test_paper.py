"""benchmark.py paper: its runs, that none is repeated, and its errors. Runs are simulated."""

import importlib
import json
import os
import subprocess
import sys
import time

import pytest

from modeling_unihyperlora import BudgetError, ConfigError, DataError
from scripts.research import benchmark, own_process, paper, runner
from scripts.research.own_process import RunDied, run_in_own_process
from scripts.research.records import SETTINGS, read_paper_runs
from scripts.research.runner import call
from trainers.results import RESULT_KEYS


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "paper.jsonl"


@pytest.fixture
def config(tmp_path):
    """config("lora", "lora-iter1-x") → path of a run config."""

    def write(method: str, run_id: str, tunes: bool = False, metric: str = "seqeval") -> str:
        text = f"run_id: {run_id}\nmethod: {method}\nmodel: {{host_model_name: some/host}}\n"
        text += f"dataset: {{name: x}}\nevaluation: {{metric: {metric}}}\n"
        if tunes:
            text += "adapter: {freeze_base_adapter: true, train_bias_delta_only: true}\n"
        (tmp_path / f"{run_id}.yaml").write_text(text)
        return str(tmp_path / f"{run_id}.yaml")

    return write


@pytest.fixture
def done(monkeypatch):
    """Names of the simulated runs in order; runs in ``done.fail`` fail."""

    class Done(list):
        fail = ""
        lines = {}

    done = Done()

    def pretended(task, line):
        folder = line[line.index("--output_dir") + 1]
        name = folder.rsplit("/", 1)[1]
        done.append(name)
        done.lines[name] = line
        if done.fail and done.fail in name:
            raise DataError("a bad line")
        run = dict.fromkeys(SETTINGS) | {"method": "lora", "data": {"name": "x"}}
        os.makedirs(folder, exist_ok=True)
        for file, content in {"all_results": dict.fromkeys(RESULT_KEYS), "run_arguments": run}.items():
            with open(f"{folder}/{file}.json", "w") as out:
                json.dump(content, out)

    monkeypatch.setattr(paper, "run_in_own_process", call)
    monkeypatch.setattr(runner, "run", pretended)
    return done


def test_it_goes_on_where_it_stopped(config, done, results, tmp_path):
    lora, sat = config("lora", "lora-iter1-x"), config("sat_lora", "sat_lora-iter1-x")
    command = ["paper", lora, sat, "--seeds", "0", "1", "--output_dir", str(tmp_path / "runs"), "--use_cpu"]
    done.fail = "sat_lora-iter1-x-s1"
    with pytest.raises(DataError, match="run sat_lora-iter1-x-s1: a bad line"):
        benchmark.main(command)
    assert done == ["lora-iter1-x-s0", "lora-iter1-x-s1", "sat_lora-iter1-x-s0", "sat_lora-iter1-x-s1"]
    done.clear()
    done.fail = ""
    benchmark.main(command)
    assert done == ["sat_lora-iter1-x-s1"]
    assert "--use_cpu" in done.lines["sat_lora-iter1-x-s1"]
    names = [f"{name}-iter1-x-s{seed}" for name in ("lora", "sat_lora") for seed in (0, 1)]
    assert [*read_paper_runs(results)] == names
    done.clear()
    with open(lora, "a") as file:
        file.write("training: {max_steps: 7}\n")
    benchmark.main(command)
    assert done == names[:2], "a config that was changed is run again, and no other"


def test_tuning_starts_from_the_source_of_its_seed(config, done, results, tmp_path):
    source, tuned = config("unihyperlora", "source-x"), config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    command = ["paper", tuned, "--seeds", "3", "--output_dir", str(tmp_path / "runs")]
    with pytest.raises(ConfigError, match="source training as --source"):
        benchmark.main(command)
    benchmark.main([*command, "--source", source])
    assert done == ["source-x-s3", "unihyperlora-iter1-x-s3"]
    line = done.lines["unihyperlora-iter1-x-s3"]
    assert line[line.index("--adapter") + 1] == str(tmp_path / "runs" / "source-x-s3")


def test_each_data_set_has_a_source_of_its_own(done, results, tmp_path):
    data, where = ("sst2", "boolq"), ["--output_dir", str(tmp_path / "runs")]
    tuned = [f"unihyperlora-iter1-{name}" for name in data]
    sources = [f"unihyperlora-source-iter1-{name}" for name in data]
    with pytest.raises(ConfigError, match=r"unihyperlora-iter1-boolq tunes .* the same data \(boolq\)"):
        benchmark.main(["paper", *tuned, *where, "--source", sources[0]])
    with pytest.raises(ConfigError, match="train on the same data; give one of them"):
        benchmark.main(["paper", tuned[0], *where, "--source", sources[0], f"{sources[0]}.yaml"])
    assert not done
    benchmark.main(["paper", *tuned, *where, "--source", *sources])
    assert done == [f"{name}-s0" for pair in zip(sources, tuned, strict=True) for name in pair]
    for source, name in zip(sources, tuned, strict=True):
        line = done.lines[f"{name}-s0"]
        assert line[line.index("--adapter") + 1] == str(tmp_path / "runs" / f"{source}-s0")


def test_another_space_of_the_package_makes_streams_stale_alone(config, done, results, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(paper, "PACKAGE_SPACE", tmp_path / "one")
    command = ["paper", config("unihyperlora", "unihyperlora-iter1-x"), config("lora", "lora-iter1-x")]
    command += ["--output_dir", str(tmp_path / "runs")]
    benchmark.main(command)
    done.clear()
    monkeypatch.setattr(paper, "PACKAGE_SPACE", tmp_path / "two")
    benchmark.main(command)
    assert done == ["unihyperlora-iter1-x-s0"]


def test_a_source_of_another_kind_of_task(config, done, results, tmp_path):
    source = config("unihyperlora", "source-x", metric="accuracy")
    tags = config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    benchmark.main(["paper", tags, "--source", source, "--output_dir", str(tmp_path / "runs")])
    scripts = [json.loads((tmp_path / "runs" / name / "cell.json").read_text())["script"] for name in done]
    assert dict(zip(done, scripts, strict=True)) == {
        "source-x-s0": "run_classification",
        "unihyperlora-iter1-x-s0": "run_ner",
    }
    assert set(read_paper_runs(results)) == {*done}, "the source is recorded too"


def test_a_config_that_is_made_from_fragments(done, results, tmp_path):
    names = ["lora-iter1-sst2", "lora-iter1-conll2003"]
    benchmark.main(["paper", *names, "--output_dir", str(tmp_path / "runs")])
    assert done == [f"{name}-s0" for name in names]
    scripts = [json.loads((tmp_path / "runs" / name / "cell.json").read_text())["script"] for name in done]
    assert scripts == ["run_classification", "run_ner"]


def test_every_config_on_every_host(config, done, results, tmp_path):
    source, tuned = config("unihyperlora", "source-x"), config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    lora, where = config("lora", "lora-iter1-x"), ["--output_dir", str(tmp_path / "runs")]
    command = ["paper", source, lora, tuned, "--source", source, *where, "--hosts", "org/small", "/hosts/large"]
    benchmark.main(command)
    names = [f"{run}-iter1-x-{host}-s0" for host in ("small", "large") for run in ("lora", "unihyperlora")]
    assert done == [names[0], "source-x-s0", *names[1:]]
    host = {name: line[line.index("--model_name_or_path") + 1] for name, line in done.lines.items() if name in names}
    assert host == dict(zip(names, ["org/small"] * 2 + ["/hosts/large"] * 2, strict=True))
    assert "--model_name_or_path" not in done.lines["source-x-s0"], "the source stays on its own host"
    done.clear()
    with open(lora, "a") as file:
        file.write("# a comment\n")
    benchmark.main(command)
    assert not done, "a comment changes no run"
    with pytest.raises(ConfigError, match="two hosts named small"):
        benchmark.main([*command, "/hosts/small"])


def test_rates_that_are_tried_are_runs_of_their_own(config, done, results, tmp_path):
    where = ["--output_dir", str(tmp_path / "runs")]
    benchmark.main(["paper", config("lora", "lora-iter1-x"), *where, "--learning_rates", "0.001", "0.01"])
    assert done == ["lora-iter1-x-lr0.001-s0", "lora-iter1-x-lr0.01-s0"]
    assert done.lines[done[1]][done.lines[done[1]].index("--learning_rate") + 1] == "0.01"
    assert {run["kind"] for run in read_paper_runs(results).values()} == {"paper_rate"}
    source, tuned = config("unihyperlora", "source-x"), config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    benchmark.main(["paper", tuned, "--source", source, *where, "--learning_rates", "0.1"])
    assert read_paper_runs(results)["source-x-s0"]["kind"] == "paper"


def test_where_things_are_on_this_machine(config, done, results, tmp_path):
    (tmp_path / "hosts").mkdir()
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(f"{name}\n")
    local, lora = tmp_path / "local.yaml", config("lora", "lora-iter1-x")
    command = ["paper", lora, "--local", str(local), "--output_dir", str(tmp_path / "runs")]
    local.write_text("hosts: {some/host: hosts}\ndata: {x: {train: train.jsonl, validation: dev.jsonl}}\n")
    benchmark.main(command)
    line = " ".join(done.lines["lora-iter1-x-s0"])
    for said in ("model_name_or_path {}/hosts", "train_file {}/train.jsonl", "validation_file {}/dev.jsonl"):
        assert f"--{said.format(tmp_path)}" in line
    assert "--refine_host" not in line
    done.clear()
    benchmark.main(command)
    assert not done
    (tmp_path / "dev.jsonl").write_text("changed\n")
    benchmark.main(command)
    assert done == ["lora-iter1-x-s0"], "other data are another run"
    source, tuned = config("unihyperlora", "source-x"), config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    with open(tuned) as file:
        text = file.read().replace("adapter: {", "adapter: {refine_host: some/host, ")
    with open(tuned, "w") as file:
        file.write(text)
    benchmark.main(["paper", tuned, *command[1:], "--source", source])
    line = done.lines["unihyperlora-iter1-x-s0"]
    assert line[line.index("--refine_host") + 1] == str(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hosts: {some/host: nowhere}", "names nowhere, which does not exist"),
        ("data: {x: {train: local.yaml}}", "data 'x' has train. Write hosts"),
        ("host: {a: b}", "must hold the blocks"),
        ("hosts: [a]", "is not a block of names"),
        ("hosts: {a: b", "cannot be read"),
    ],
)
def test_a_bad_file_of_places(config, done, tmp_path, content, expected):
    (tmp_path / "local.yaml").write_text(content)
    command = ["paper", config("lora", "lora-iter1-x"), "--local", str(tmp_path / "local.yaml")]
    with pytest.raises(ConfigError, match=expected):
        benchmark.main([*command, "--output_dir", str(tmp_path / "runs")])
    assert not done


SCRIPT = """
import os
from modeling_unihyperlora import BudgetError

def main(script, flags):
    if flags == ["refuse"]:
        raise BudgetError("too much")
    if flags == ["die"]:
        os.kill(os.getpid(), 9)
    with open(flags[0], "w") as file:
        file.write(str(os.getpid()))
"""


def test_a_run_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "a_script_of_the_test.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(own_process, "SHARED_IMPORTS", ["modeling_unihyperlora"])
    main = importlib.import_module("a_script_of_the_test").main
    run_in_own_process("", [str(tmp_path / "written")], main)
    assert int((tmp_path / "written").read_text()) != os.getpid()
    with pytest.raises(BudgetError, match="^too much$"):
        run_in_own_process("", ["refuse"], main)
    with pytest.raises(RunDied, match="status -9"):
        run_in_own_process("", ["die"], main)


WAITS = """
import pathlib, time

def main(script, flags):
    while True:
        pathlib.Path(flags[0]).touch()
        time.sleep(0.05)
"""
BEGIN = """
import sys
import a_script_that_waits
from scripts.research.own_process import run_in_own_process

if __name__ == "__main__":
    run_in_own_process("", sys.argv[1:], a_script_that_waits.main)
"""


@pytest.mark.slow
def test_a_run_ends_with_the_benchmark_that_was_killed(tmp_path):
    sign = tmp_path / "sign of life"
    (tmp_path / "a_script_that_waits.py").write_text(WAITS)
    (tmp_path / "begin.py").write_text(BEGIN)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, str(tmp_path / "begin.py"), str(sign)]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
    wait_for(sign.exists)
    parent.kill()
    parent.wait()
    wait_for(lambda: time.time() - sign.stat().st_mtime > 5)


def wait_for(what, seconds: float = 120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_is_refused_before_the_first_run(config, done, results, tmp_path):
    lora, tuned = config("lora", "lora-iter1-x"), config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    where = ["--output_dir", str(tmp_path / "runs")]
    with pytest.raises(ConfigError, match="This command sets --seed"):
        benchmark.main(["paper", lora, *where, "--seed", "1"])
    with pytest.raises(ConfigError, match="does not train a universal adapter"):
        benchmark.main(["paper", tuned, *where, "--source", lora])
    with pytest.raises(ConfigError, match="unihyperlora-iter1-x.yaml comes after a flag"):
        benchmark.main(["paper", lora, *where, tuned])
    (tmp_path / "copy.yaml").write_text((tmp_path / "lora-iter1-x.yaml").read_text())
    with pytest.raises(ConfigError, match="have the same run_id lora-iter1-x"):
        benchmark.main(["paper", lora, str(tmp_path / "copy.yaml"), *where])
    with pytest.raises(ConfigError, match="cannot be read"):
        benchmark.main(["paper", lora, str(tmp_path / "none.yaml"), *where])
    assert not done and not (tmp_path / "runs").exists()
