"""The transfer matrix: its runs, that none is repeated, its figures, and its errors.

Runs are simulated, except in the last test.
"""

import json
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from modeling_unihyperlora import BudgetError, CanonicalSpace, ConfigError, DataError, HostError
from modeling_unihyperlora.space import PACKAGE_SPACE
from scripts.research import benchmark, runner, transfer, transfer_plan
from scripts.research.records import SETTINGS
from scripts.research.results_tables import front_page, transfer_table
from scripts.research.transfer_picture import draw
from trainers.tasks import CLASSIFICATION

SCORES = {
    "source": 0.9,
    "own_stream": 0.8,
    "zero_shot": 0.6,
    "refined": 0.62,
    "delta": 0.65,
    "probe": 0.4,
    "lora": 0.85,
}
HOSTS = {"one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture
def hosts(tmp_path, monkeypatch) -> dict[str, str]:
    """Folders that stand in for hosts."""

    def load_host(name):
        if Path(name).name not in HOSTS:
            raise HostError(f"The host '{name}' cannot be loaded")
        return Path(name).name

    def describe_host(host, name, num_layers):
        assert host == name
        return {"name": name, "family": "bert", "hidden_size": 8, "num_layers": num_layers, "fingerprint": host}

    monkeypatch.setattr(transfer, "load_host", load_host)
    monkeypatch.setattr(transfer, "describe_host", describe_host)
    monkeypatch.setattr(transfer, "num_layers_of", HOSTS.get)
    for name in HOSTS:
        (tmp_path / "private" / name).mkdir(parents=True)
    return {name: str(tmp_path / "private" / name) for name in HOSTS}


@pytest.fixture
def files(tmp_path) -> list[str]:
    flags = []
    for name in ("train", "validation"):
        row = {"tokens": ["words", "of", name], "ner_tags": ["O", "B-X", "O"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        flags += [f"--{name}_file", str(tmp_path / f"{name}.jsonl")]
    return flags


@pytest.fixture
def runs(monkeypatch) -> list[SimpleNamespace]:
    """All simulated runs: column, flags as {name: value or [values]}, command line."""
    done = []

    def pretended(task, command_line):
        flags = flags_of(command_line)
        folder = Path(flags["output_dir"])
        column = folder.name.split("-")[0]
        done.append(SimpleNamespace(column=column, name=folder.name, flags=flags, command_line=command_line))
        seed, host = int(flags["seed"]), Path(flags["model_name_or_path"]).name
        results = {"eval_f1": SCORES.get(column, 0.02) + seed / 100, "eval_accuracy": 0.99, "train_runtime": None}
        if column in ("source", "own_stream", "delta", "probe", "lora"):
            results["train_runtime"] = 10.0 + seed
        if column not in ("probe", "lora"):
            results |= {"adapter_bytes": 887_000 + HOSTS[host], "space": "english 1 abc"}
        if "adapter" in flags:
            results |= {"calibration_seconds": 2.0 + seed, "calibration_r2": [0.5, 0.25 + seed]}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_text("weights")
        (folder / "all_results.json").write_text(json.dumps(results))
        data = {"name": "tweets", "splits": {"train": {"sentences": 3, "sha256": "ab"}}}
        arguments = dict.fromkeys(SETTINGS) | {"seed": seed, "learning_rate": 0.01, "data": data}
        (folder / "run_arguments.json").write_text(json.dumps(arguments | {"model_name_or_path": str(folder)}))
        return results

    def control(name):
        def make(adapter, folder, **arguments):
            assert (Path(adapter) / "model.safetensors").is_file()
            done.append(SimpleNamespace(column=f"{name}_made", name=Path(folder).parent.name, flags=arguments))
            return folder

        return make

    monkeypatch.setattr(runner, "run", pretended)
    monkeypatch.setattr(transfer_plan, "shuffle_anchors", control("shuffled"))
    monkeypatch.setattr(transfer_plan, "random_map", control("random_map"))
    return done


def flags_of(command_line) -> dict[str, str | list[str]]:
    """Flags as argparse reads them: the last of a repeated flag wins."""
    flags, name = {}, None
    for part in command_line:
        if part.startswith("--"):
            name = part[2:]
            flags[name] = []
        else:
            flags[name].append(part)
    return {name: values[0] if len(values) == 1 else values for name, values in flags.items()}


@pytest.fixture
def go(hosts, files, tmp_path, runs):
    """go("--seeds", 0, …) → the matrix of one source and two targets."""

    def go_(*flags, source=("one",), target=("two", "three"), output: str = "out"):
        where = ["--source_hosts", *map(hosts.get, source), "--output_dir", str(tmp_path / output)]
        where += ["--target_hosts", *map(hosts.get, target)] if target else []
        return transfer.main([*where, *files, *map(str, flags)])

    return go_


def by_name(runs) -> dict[str, SimpleNamespace]:
    return {run.name: run for run in runs if not run.column.endswith("_made")}


class TestRuns:
    def test_each_column_is_called_as_it_says(self, go, runs, hosts, tmp_path):
        go("--num_train_epochs", 6, "--learning_rate", 0.004, "--reader", "small", "--baseline_args", "--bf16")
        found = by_name(runs)
        targets, columns = ("two", "three"), {*transfer_plan.COLUMNS}
        assert set(found) == {"source-s0", *(f"{column}-{target}-s0" for column in columns for target in targets)}
        assert all(run.flags["seed"] == "0" and "do_eval" in run.flags for run in found.values())
        assert all(run.flags["train_file"].endswith("train.jsonl") for run in found.values())

        source = found["source-s0"].flags
        assert source["model_name_or_path"] == hosts["one"] and "source_hosts" not in source
        own = found["own_stream-two-s0"].flags
        for flags in (source, own):
            assert flags["pathway"] == "stream" and {"do_train", "cache_eval_states"} <= flags.keys()
            assert (flags["num_train_epochs"], flags["learning_rate"], flags["reader"]) == ("6", "0.004", "small")
            assert flags["space"] == str(PACKAGE_SPACE)
        assert own["model_name_or_path"] == hosts["two"] and "adapter" not in own

        adapter = str(tmp_path / "out/runs/source-s0")
        zero_shot, delta = found["zero_shot-two-s0"].flags, found["delta-two-s0"].flags
        for flags in (zero_shot, delta):
            assert flags["adapter"] == adapter and flags["model_name_or_path"] == hosts["two"]
            assert "cache_eval_states" in flags and not {"reader", "space"} & flags.keys()
        assert "do_train" not in zero_shot
        refined, text = found["refined-two-s0"].flags, tmp_path / "out/unlabelled.txt"
        assert refined == zero_shot | {
            "refine_file": str(text),
            "refine_host": hosts["one"],
            "output_dir": refined["output_dir"],
        }
        assert text.read_text() == "words of train\n"
        expected = {"train_scope": "delta", "max_steps": "500", "eval_steps": "100", "save_steps": "100"}
        expected |= {"save_strategy": "steps", "eval_strategy": "steps", "metric_for_best_model": "f1", "do_train": []}
        assert delta | expected == delta and "load_best_model_at_end" in delta

        for column, steps in (("probe", "500"), ("lora", "500")):
            flags = found[f"{column}-three-s0"].flags
            assert (flags["method"], flags["max_steps"], flags["bf16"]) == (column, steps, [])
            assert not {"adapter", "learning_rate", "reader", "space", "cache_eval_states"} & flags.keys()
        assert found["lora-three-s0"].flags["lora_r"] == "8"
        assert "bf16" not in own

    def test_a_control_is_made_of_the_source_and_scored_without_training(self, go, runs, hosts, tmp_path):
        go("--seeds", 3)
        for column in ("shuffled", "random_map"):
            flags = by_name(runs)[f"{column}-two-s3"].flags
            assert flags["adapter"] == str(tmp_path / f"out/runs/{column}-two-s3/adapter") and "do_train" not in flags
        made = {run.column: run.flags for run in runs if run.name.endswith("two-s3") and run.column.endswith("_made")}
        assert made == {"shuffled_made": {"seed": 3}, "random_map_made": {"seed": 3, "host": hosts["two"]}}

    def test_several_sources_are_one_adapter(self, go, runs, hosts):
        go("--only", "zero_shot", source=("one", "four"))
        first, *others = runs
        assert first.flags["model_name_or_path"] == hosts["one"] and first.flags["source_hosts"] == hosts["four"]
        assert {run.column for run in others} == {"zero_shot"}

    def test_leave_one_out_trains_on_all_others(self, go, runs, hosts):
        matrix = go("--leave_one_out", "--only", "zero_shot", source=("one", "two", "three"), target=())
        found = by_name(runs)
        assert len(found) == 6
        source, target = found["source-without-two-s0"].flags, found["zero_shot-two-s0"].flags
        assert [source["model_name_or_path"], source["source_hosts"]] == [hosts["one"], hosts["three"]]
        assert target["adapter"].endswith("source-without-two-s0") and target["model_name_or_path"] == hosts["two"]
        assert matrix["targets"]["two"]["source_hosts"] == ["one", "three"]
        assert matrix["targets"]["one"]["source_f1"]["mean"] == 0.9 and matrix["source_f1"] is None

    def test_a_finished_run_is_not_done_again(self, go, runs, tmp_path):
        matrix = go("--seeds", 0, 1)
        count = len(runs)
        assert go("--seeds", 0, 1) == matrix and len(runs) == count
        (tmp_path / "out/runs/probe-two-s1/all_results.json").unlink()  # as if it had been cut short
        go("--seeds", 0, 1)
        assert [run.name for run in runs[count:]] == ["probe-two-s1"]

    def test_a_limit_that_was_kept_changes_no_run(self, go, runs):
        go("--only", "zero_shot", "--max_flops_overhead_pct", 10)
        count = len(runs)
        matrix = go("--only", "zero_shot", "--max_flops_overhead_pct", 90, "--logging_steps", 7)
        assert len(runs) == count and matrix["targets"]["two"]["zero_shot_f1"] is not None

    @pytest.mark.parametrize("change", ["flag", "data", "host", "space"])
    def test_other_flags_data_hosts_or_spaces_make_it_stale(self, go, runs, tmp_path, monkeypatch, change):
        (tmp_path / "space").write_text("a space")
        for module in (transfer, transfer_plan):
            monkeypatch.setattr(module, "PACKAGE_SPACE", tmp_path / "space")
        go("--only", "zero_shot", "probe")
        count, flags = len(runs), []
        if change == "flag":
            flags = ["--max_train_samples", 5]
        elif change == "data":
            (tmp_path / "validation.jsonl").write_text("other\n")
        elif change == "space":
            (tmp_path / "space").write_text("other")
        else:
            describe = transfer.describe_host
            other = {"fingerprint": "of other weights"}
            monkeypatch.setattr(
                transfer, "describe_host", lambda *of: describe(*of) | (other if of[1] == "one" else {})
            )
        go("--only", "zero_shot", "probe", *flags)
        again = {run.name for run in runs[count:]}
        on_source = {"source-s0", "zero_shot-two-s0", "zero_shot-three-s0"}
        assert again == on_source | (set() if change in ("host", "space") else {"probe-two-s0", "probe-three-s0"})

    def test_an_interrupted_matrix_goes_on(self, go, runs, monkeypatch, tmp_path):
        main = runner.run

        def broken(task, command_line):
            if len(runs) == 4:
                Path(flags_of(command_line)["output_dir"]).mkdir()
                raise KeyboardInterrupt
            return main(task, command_line)

        monkeypatch.setattr(runner, "run", broken)
        with pytest.raises(KeyboardInterrupt):
            go()
        assert not (tmp_path / "out/transfer_matrix.json").exists()
        names = [run.name for run in runs]
        monkeypatch.setattr(runner, "run", main)
        go()
        assert not {run.name for run in runs[4:]} & set(names)

    def test_of_two_processes_one_does_a_run(self, runs, monkeypatch, tmp_path):
        pretended = runner.run
        monkeypatch.setattr(runner, "run", lambda *args: (time.sleep(0.1), pretended(*args)))
        flags = ("--seed", "0", "--model_name_or_path", "one")
        cell = runner.Cell("zero_shot-two-s0", flags, runner.Cell("source-s0", flags))
        with ThreadPoolExecutor(2) as both:  # a runner each, as in two processes
            [*both.map(lambda _: runner.Runner(tmp_path, "run_ner", {}).run(cell), range(2))]
        assert [run.name for run in runs] == ["source-s0", "zero_shot-two-s0"]

    def test_only_some_columns_then_the_rest(self, go, runs):
        matrix = go("--only", "probe")
        assert {run.column for run in runs} == {"probe"}
        assert matrix["targets"]["two"]["zero_shot_f1"] is None and matrix["source_f1"] is None
        matrix = go("--only", "zero_shot")
        assert matrix["targets"]["two"]["probe_f1"]["mean"] == pytest.approx(0.4)
        assert matrix["targets"]["two"]["zero_shot_f1"]["mean"] == pytest.approx(0.6)
        assert matrix["targets"]["two"]["lora_r8_f1"] is None

    def test_lora_on_some_targets_and_seeds_of_the_baselines(self, go, runs):
        matrix = go("--seeds", 0, 1, "--baseline_seeds", 1, "--lora_hosts", "three", "--only", "lora", "probe")
        assert set(by_name(runs)) == {"lora-three-s1", "probe-two-s1", "probe-three-s1"}
        assert matrix["targets"]["two"]["lora_r8_f1"] is None

    def test_weights_of_the_baselines_are_not_kept(self, go, tmp_path):
        go()
        kept = {path.parent.name for path in tmp_path.rglob("model.safetensors")}
        assert "source-s0" in kept and not {name for name in kept if name.startswith(("probe", "lora"))}

    def test_a_run_that_fails_is_named(self, go, monkeypatch):
        def fails(task, command_line):
            raise BudgetError("too big")

        monkeypatch.setattr(runner, "run", fails)
        with pytest.raises(BudgetError, match="run source-s0: too big"):
            go()

    def test_classification_is_scored_by_its_script(self, go, runs, monkeypatch):
        pretended = runner.run

        def only_classes(task, command_line):
            assert task is CLASSIFICATION
            return pretended(task, command_line)

        monkeypatch.setattr(runner, "run", only_classes)
        matrix = go("--task", "classification", "--only", "zero_shot")
        assert matrix["targets"]["two"]["zero_shot_accuracy"]["mean"] == pytest.approx(0.99)
        assert matrix["source_f1"]["mean"] == pytest.approx(0.9)


class TestMatrix:
    def test_figures_over_seeds(self, go):
        matrix = go("--seeds", 0, 2, "--delta_steps", 50)
        row = matrix["targets"]["three"]
        assert row["zero_shot_f1"] == {
            "mean": pytest.approx(0.61),
            "sd": pytest.approx(0.02 / 2**0.5),
            "seeds": {"0": 0.6, "2": 0.62},
        }
        means = {"own_stream": 0.81, "probe": 0.41, "lora_r8": 0.86, "delta_50": 0.66, "shuffled": 0.03}
        assert {name: row[f"{name}_f1"]["mean"] for name in means} == pytest.approx(means)
        assert row["random_map_f1"]["mean"] == pytest.approx(0.03)
        assert row["calibration_seconds"]["mean"] == 3.0
        assert row["calibration_r2"]["mean"] == [0.5, 1.25] and row["calibration_r2"]["seeds"]["2"] == [0.5, 2.25]
        assert row["zero_shot_over_own_stream"]["mean"] == pytest.approx((0.6 / 0.8 + 0.62 / 0.82) / 2)
        assert row["gap_recovered"] == pytest.approx((0.61 - 0.41) / (0.81 - 0.41))
        assert matrix["space"] == row["space"] == "english 1 abc"
        assert row["refined_f1"]["mean"] == pytest.approx(0.63)
        assert row["refined_over_own_stream"]["mean"] == pytest.approx((0.62 / 0.8 + 0.64 / 0.82) / 2)
        assert row["train_seconds"]["source"]["mean"] == 11.0 and row["train_seconds"]["zero_shot"] is None
        assert matrix["source_f1"]["mean"] == pytest.approx(0.91)
        assert matrix["adapter_bytes"] == row["adapter_bytes"] == 887_001
        assert (row["num_layers"], row["source_hosts"]) == (3, ["one"])

    @pytest.mark.parametrize(("own", "expected"), [(0.44, 2.0), (0.42, None), (None, None)])
    def test_a_gap_of_less_than_three_points_is_not_recovered(self, own, expected):
        own = own and {"mean": own}
        found = transfer.gap_recovered({"mean": 0.48}, {"mean": 0.40}, own)
        assert found == (expected and pytest.approx(expected))

    def test_one_seed_has_no_deviation(self, go):
        assert go()["source_f1"] == {"mean": 0.9, "sd": None, "seeds": {"0": 0.9}}

    def test_it_is_written_and_names_no_folder_of_the_machine(self, go, tmp_path):
        matrix = go("--max_eval_samples", 7, f"--anchor_file={tmp_path}/private/anchors.txt", "--cache_dir", tmp_path)
        text = (tmp_path / "out/transfer_matrix.json").read_text()
        assert json.loads(text) == matrix
        assert str(tmp_path) not in text and "private" not in text
        assert matrix["flags"][:3] == ["--max_eval_samples", "7", "--anchor_file=anchors.txt"]
        assert matrix["settings"]["learning_rate"] == 0.01 and "seed" not in matrix["settings"]
        assert matrix["data"]["name"] == "tweets" and matrix["versions"]["torch"] and matrix["hardware"]["cores"]

    @pytest.mark.parametrize("flags", [[], ["--only", "probe"], ["--seeds", 0, 1, "--lora_hosts", "two"]])
    def test_the_picture_is_as_wide_as_a_page(self, go, tmp_path, flags):
        go(*flags)
        raw = (tmp_path / "out/transfer_matrix.png").read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", raw[16:20]) == (900,)

    def test_the_picture_says_what_is_in_the_matrix(self, go, tmp_path, monkeypatch):
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure

        matrix, written = go(), []
        text, title = Axes.text, Figure.suptitle
        monkeypatch.setattr(Axes, "text", lambda *args, **kw: written.append(args[3]) or text(*args, **kw))
        monkeypatch.setattr(Figure, "suptitle", lambda self, t, **kw: written.append(t) or title(self, t, **kw))
        draw(matrix, tmp_path / "again.png")
        assert "One adapter file, trained on one, on hosts it has never seen" in written
        for shown in ("two", "zero-shot  0.600", "0.800  stream trained on this host", "0.020  control: random map"):
            assert shown in written

    def test_it_can_be_kept_and_rendered(self, go, tmp_path, monkeypatch):
        go("--seeds", 0, 1, "--lora_hosts", "two")
        results = tmp_path / "results"
        results.mkdir()
        monkeypatch.setattr(benchmark, "RESULTS", results)
        for page, marks in (
            ("README.md", benchmark.MARKS),
            ("docs/how-to/hosts.md", benchmark.HOST_MARKS),
            ("docs/how-to/scaling.md", ()),
            ("docs/how-to/states.md", ()),
        ):
            (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / page).write_text("\n".join(marks))
        benchmark.main(["record", str(tmp_path / "out"), "--name", "tweets-transfer"])
        assert (results / "tweets-transfer.png").read_bytes() == (tmp_path / "out/transfer_matrix.png").read_bytes()
        assert json.loads((results / "tweets-transfer.json").read_text())["kind"] == "transfer"
        benchmark.main(["render"])
        front, lines = ((results / page).read_text().splitlines() for page in ("README.md", "transfer.md"))
        assert "(tweets-transfer.png)" in "".join(front) and "(tweets-transfer.png)" in "".join(lines)
        (short,) = (line for line in front if line.startswith("| tweets | one |") and "| three |" in line)
        assert short.startswith("| tweets | one | 0.9050 ± 0.0071 | three | 0.6050 ± 0.0071 | ")
        (row,) = (line for line in lines if line.startswith("| three |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:6] == ["one", *(f"{score:.4f} ± 0.0071" for score in (0.905, 0.605, 0.625, 0.805))]
        assert "–" in cells and cells[-3:] == ["0.50", "2.5 ± 0.7", "0.50 0.75"]
        assert "Space: english 1 abc." in "".join(lines)
        assert "tweets" not in (tmp_path / "README.md").read_text()  # the short table is of runs

    def test_the_front_page_shows_the_picture_with_the_most_scores(self, go):
        few, many = go("--only", "zero_shot"), go()
        lines = front_page({}, {"few": few, "many": many, "few-again": few})
        assert "(many.png)" in "".join(lines)

    def test_columns_without_a_figure_are_not_shown(self, go):
        lines = transfer_table("tweets", go("--seeds", 0, "--only", "zero_shot"))
        (header,) = (line for line in lines if line.startswith("| target"))
        assert "zero-shot |" in header and "probe" not in header and "gap" not in header
        assert any(line.startswith("Flags of the adapters' runs: `") for line in lines)

    def test_half_a_matrix_is_not_kept(self, tmp_path):
        (tmp_path / "transfer_matrix.json").write_text("{}")
        with pytest.raises(ConfigError, match="holds no complete table"):
            benchmark.main(["record", str(tmp_path), "--name", "x"])


class TestRefusals:
    """Bad input gives one clear error, before any run."""

    @pytest.mark.parametrize(
        ("flags", "hosts_given", "error", "expected"),
        [
            ([], {"target": ("two", "one")}, ConfigError, "one is a source and a target.*--leave_one_out"),
            ([], {"target": ()}, ConfigError, "No target"),
            (["--leave_one_out"], {}, ConfigError, "leave --target_hosts out"),
            (["--leave_one_out"], {"target": ()}, ConfigError, "at least two hosts"),
            ([], {"target": ("two", "two")}, ConfigError, "Two hosts are called two"),
            (["--seeds"], {}, ConfigError, "--seeds needs one or more"),
            (["--seeds", 1, 1], {}, ConfigError, "one or more different"),
            (["--lora_hosts", "four"], {}, ConfigError, "--lora_hosts four is not a target. Choose: two, three"),
            (["--delta_steps", 0], {}, ConfigError, "--delta_steps 0 trains nothing"),
            (["--seed", 1], {}, ConfigError, "This script sets --seed"),
            (["--seed=5"], {}, ConfigError, "This script sets --seed=5"),
            (["--validation_file", "none.jsonl"], {}, DataError, "none.jsonl cannot be read"),
            (["--target_hosts", "no/such-host"], {}, HostError, "no/such-host"),
            (["--only", "magic"], {}, SystemExit, "2"),
        ],
    )
    def test_bad_arguments(self, go, runs, tmp_path, flags, hosts_given, error, expected):
        with pytest.raises(error, match=expected):
            go(*flags, **hosts_given)
        assert not runs and not (tmp_path / "out").exists()

    def test_the_same_folder_under_two_names(self, go, hosts, tmp_path):
        (tmp_path / "link").symlink_to(hosts["one"])
        with pytest.raises(ConfigError, match="is a source and a target"):
            go("--target_hosts", tmp_path / "link")

    def test_an_output_folder_that_cannot_be_made(self, go, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match="cannot be created: .*file is a file"):
            go(output="file")

    def test_without_matplotlib(self, go, runs, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"pip install 'unihyperlora\[plots\]'"):
            go()
        assert not runs


@pytest.mark.slow
def test_with_real_runs(tiny_host, tokenizer, tmp_path, write_jsonl, monkeypatch):
    """On two tiny hosts: an adapter trained on one scores on the other, and the columns have the right figures."""
    monkeypatch.setenv("UNIHYPERLORA_CACHE", str(tmp_path / "cache"))
    people, places = "anna ben carla david".split(), "paris rome oslo lima".split()
    rows = [
        (f"{p} flew from {a} to {b} .".split(), "B-PER O O B-LOC O B-LOC O".split())
        for p in people
        for a in places
        for b in places
    ]
    anchors = tmp_path / "anchors.txt"
    anchors.write_text("".join(" ".join(words) + "\n" for words, _ in rows), encoding="utf-8")
    torch.manual_seed(1)
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(
        tmp_path / "wide"
    )
    tokenizer.save_pretrained(tmp_path / "wide")
    CanonicalSpace.make([tiny_host], anchors, dim=16).save(tmp_path / "space.safetensors")
    flags = f"""
        --source_hosts {tiny_host} --target_hosts {tmp_path / "wide"} --output_dir {tmp_path / "out"}
        --train_file {write_jsonl("train.jsonl", rows)} --validation_file {write_jsonl("dev.jsonl", rows[::7])}
        --delta_steps 2 --baseline_steps 2 --use_cpu --space {tmp_path / "space.safetensors"} --reader small
        --max_flops_overhead_pct 1e6 --per_device_train_batch_size 16 --num_train_epochs 8 --learning_rate 1e-2
        --disable_tqdm true
    """
    matrix = transfer.main(flags.split())
    row = matrix["targets"]["wide"]
    assert matrix["source_f1"]["mean"] > 0.9
    assert row["delta_2_f1"]["mean"] >= row["zero_shot_f1"]["mean"]
    assert all(row[f"{column['key']}_f1"] is not None for column in matrix["columns"])
    assert min(row["zero_shot_f1"]["mean"], row["refined_f1"]["mean"]) > row["shuffled_f1"]["mean"]
    assert matrix["adapter_bytes"] == (tmp_path / "out/runs/source-s0/model.safetensors").stat().st_size
