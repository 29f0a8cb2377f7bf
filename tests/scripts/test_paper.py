"""benchmark.py paper: which runs there are, that none is done twice, and what is refused. Runs are pretended."""

import json
import os

import pytest

import benchmark
import paper
import run_classification
import run_ner
from modeling_unihyperlora import ConfigError, DataError
from trainers.results import RESULT_KEYS
from transfer_plan import call


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "paper"


@pytest.fixture
def config(tmp_path):
    """config("lora", "lora-iter1-x") → path of a run config."""

    def write(method: str, run_id: str, tunes: bool = False) -> str:
        text = f"run_id: {run_id}\nmethod: {method}\nmodel: {{host_model_name: some/host}}\n"
        if tunes:
            text += "adapter: {freeze_base_adapter: true, train_bias_delta_only: true}\n"
        (tmp_path / f"{run_id}.yaml").write_text(text)
        return str(tmp_path / f"{run_id}.yaml")

    return write


@pytest.fixture
def done(monkeypatch):
    """Names of the runs that were pretended, in their order; what is in ``done.fail`` fails."""

    class Done(list):
        fail = ""
        lines = {}

    done = Done()

    def pretended(line):
        folder = line[line.index("--output_dir") + 1]
        name = folder.rsplit("/", 1)[1]
        done.append(name)
        done.lines[name] = line
        if done.fail and done.fail in name:
            raise DataError("a bad line")
        run = dict.fromkeys(benchmark.SETTINGS) | {"method": "lora", "data": {"name": "x"}}
        os.makedirs(folder, exist_ok=True)
        for file, content in {"all_results": dict.fromkeys(RESULT_KEYS), "run_arguments": run}.items():
            with open(f"{folder}/{file}.json", "w") as out:
                json.dump(content, out)

    monkeypatch.setattr(paper, "run_in_own_process", call)
    for script in (run_ner, run_classification):
        monkeypatch.setattr(script, "main", pretended)
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
    assert sorted(path.stem for path in results.iterdir()) == names
    done.clear()
    with open(lora, "a") as file:
        file.write("training: {max_steps: 7}\n")
    benchmark.main(command)
    assert done == names[:2], "a config that was changed is run again, and no other"


def test_tuning_starts_from_the_source_of_its_seed(config, done, results, tmp_path):
    source, tuned = config("unihyperlora", "source-x"), config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    command = ["paper", tuned, "--seeds", "3", "--output_dir", str(tmp_path / "runs")]
    with pytest.raises(ConfigError, match="give its source training as --source"):
        benchmark.main(command)
    benchmark.main([*command, "--source", source])
    assert done == ["source-x-s3", "unihyperlora-iter1-x-s3"]
    line = done.lines["unihyperlora-iter1-x-s3"]
    assert line[line.index("--adapter") + 1] == str(tmp_path / "runs" / "source-x-s3")


def test_what_is_refused_before_the_first_run(config, done, results, tmp_path):
    lora, tuned = config("lora", "lora-iter1-x"), config("unihyperlora", "unihyperlora-iter1-x", tunes=True)
    where = ["--output_dir", str(tmp_path / "runs")]
    with pytest.raises(ConfigError, match="--seed is chosen by this command"):
        benchmark.main(["paper", lora, *where, "--seed", "1"])
    with pytest.raises(ConfigError, match="trains no universal adapter"):
        benchmark.main(["paper", tuned, *where, "--source", lora])
    (tmp_path / "copy.yaml").write_text((tmp_path / "lora-iter1-x.yaml").read_text())
    with pytest.raises(ConfigError, match="have the same run_id lora-iter1-x"):
        benchmark.main(["paper", lora, str(tmp_path / "copy.yaml"), *where])
    with pytest.raises(ConfigError, match="cannot be read"):
        benchmark.main(["paper", lora, str(tmp_path / "none.yaml"), *where])
    assert not done and not (tmp_path / "runs").exists()
