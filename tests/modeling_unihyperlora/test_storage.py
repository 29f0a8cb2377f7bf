"""The adapter's file: trained values come back, and every other content is refused."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_unihyperlora import (
    AdapterFileError,
    ConfigError,
    UniHyperLoraConfig,
    UniHyperLoraError,
    UniHyperLoraForTokenClassification,
    storage,
)
from modeling_unihyperlora.injected_adapter import UniHyperLoraAdapter
from modeling_unihyperlora.measure.accounting import PARTS, bytes_of_parts
from modeling_unihyperlora.publish.hub import files_of
from modeling_unihyperlora.storage import (
    FORMAT_VERSION,
    WEIGHTS_NAME,
    adapter_tensors,
    load_adapter,
    load_latents,
    save_latents,
    signed_metadata,
)

load = UniHyperLoraForTokenClassification.from_pretrained


NER = {"type": "token_classification", "labels": ["x", "y"]}


def files_in(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(host) -> tuple:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())
    weights = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    return hooks, [p.requires_grad for p in host.parameters()], weights


def assert_untouched(host, before: tuple) -> None:
    after = snapshot(host)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], tensor) for name, tensor in before[2].items())


@pytest.fixture
def refuses(make_host):
    """refuses(folder, error, match): loading raises this error, and the host is unchanged."""

    def check(folder, error=AdapterFileError, match=None):
        host = make_host()
        before = snapshot(host)
        with pytest.raises(UniHyperLoraError, match=match) as caught:
            load(folder, host=host)
        assert type(caught.value) is error, caught.value
        assert_untouched(host, before)

    return check


def rewrite(folder, change, sign: bool = True) -> None:
    """Apply ``change`` to the tensors of the file and write a valid digest, as an attacker could."""
    path = folder / WEIGHTS_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file(tensors, path, metadata=signed_metadata(tensors) if sign else metadata)


def test_equal_contents_are_equal_files(saved, tmp_path):
    """Byte for byte, in any process; another process has another order of hashed names."""
    tensors = load_file(saved[1] / WEIGHTS_NAME)
    metadata = signed_metadata(tensors, {f"key {number}": "é" * number for number in range(9)})
    contents = set()
    for number in range(5):
        order = sorted(metadata, key=lambda name, number=number: hash((name, number)))
        storage.save_file(tensors, tmp_path / "one", {name: metadata[name] for name in order})
        contents.add((tmp_path / "one").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


class TestRoundTrip:
    @pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
    @pytest.mark.parametrize("router", ["token", "static"])
    def test_logits_are_equal(self, family, router, make_host, make_model, make_batch, tmp_path):
        model, batch = make_model(family, router=router), make_batch()
        model.save_pretrained(tmp_path)
        loaded = load(tmp_path, host=make_host(family))
        with torch.no_grad():
            before, after = model(**batch).logits, loaded(**batch).logits
        assert torch.equal(before, after), f"largest difference {(before - after).abs().max():.1e}"
        assert before.std() > 0.1 and not loaded.training

    def test_logits_are_equal_after_training(self, make_host, make_model, make_batch, tmp_path):
        model, batch = make_model(), make_batch()
        labels = torch.randint(0, 5, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        start = model(**batch).logits.detach()
        for scope in ("task", "delta"):
            model.config.tasks["ner"]["trained"] = scope == "delta"
            model.set_train_scope(scope)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
            for _ in range(5):
                model.train()(**batch, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval().save_pretrained(tmp_path)
        with torch.no_grad():
            trained, loaded = model(**batch).logits, load(tmp_path, host=make_host())(**batch).logits
        assert not torch.allclose(trained, start, atol=1e-2), "training moved nothing"
        assert torch.equal(trained, loaded)

    def test_second_generation_holds_the_same(self, saved, make_host, tmp_path):
        _, folder = saved
        load(folder, host=make_host()).save_pretrained(tmp_path / "again")
        digests = []
        for path in (folder / WEIGHTS_NAME, tmp_path / "again" / WEIGHTS_NAME):
            with safe_open(path, framework="pt") as file:
                digests.append(file.metadata()["sha256"])
        assert digests[0] == digests[1]
        first, again = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
        assert first == again

    def test_several_tasks(self, make_model, make_host, make_batch, stir, tmp_path):
        model, batch = make_model(task="zebra"), make_batch()
        model.add_task("ant", ["x", "y", "z"])
        stir(model)
        model.save_pretrained(tmp_path)
        loaded = load(tmp_path, host=make_host())
        assert loaded.config.active_task == "ant" and loaded.labels == ["x", "y", "z"]
        with torch.no_grad():
            for task in ("zebra", "ant"):
                assert torch.equal(loaded(**batch, task=task).logits, model(**batch, task=task).logits)

    def test_save_over_an_earlier_file(self, saved, make_host, make_batch):
        model, folder = saved
        with torch.no_grad():
            model.adapter.atoms_out.latent.neg_()
            model.save_pretrained(folder)
            batch = make_batch()
            assert torch.equal(load(folder, host=make_host())(**batch).logits, model(**batch).logits)
        assert set(files_in(folder)) == set(files_of("inject"))

    def test_only_the_main_process_writes(self, saved, tmp_path):
        saved[0].save_pretrained(tmp_path / "other", is_main_process=False)
        assert not (tmp_path / "other").exists()

    def test_readable_by_others_as_the_umask_says(self, saved):
        plain = saved[1] / "plain"
        plain.touch()
        assert (saved[1] / WEIGHTS_NAME).stat().st_mode == plain.stat().st_mode


def test_a_new_adapter_is_a_stream_unless_the_injected_update_is_asked_for_by_name():
    assert (UniHyperLoraConfig().pathway, UniHyperLoraConfig().projector) == ("stream", None)
    injected = UniHyperLoraConfig(pathway="inject")
    assert (injected.projector, injected.router, injected.router_top_k) == ("dimension", "token", 2)
    for meant in ({"projector": "dimension"}, {"projector": "host"}, {"router": "static"}):
        with pytest.raises(ConfigError, match="pathway='inject'"):
            UniHyperLoraConfig(**meant)


class TestSize:
    @pytest.fixture
    def shipped(self, tmp_path):
        """The default shapes with CoNLL's nine labels, saved without any host."""
        tasks = {"ner": {"type": "token_classification", "labels": [f"L{i}" for i in range(9)]}}
        config = UniHyperLoraConfig(pathway="inject", tasks=tasks, active_task="ner")
        adapter = UniHyperLoraAdapter(config)
        storage.save_adapter(adapter, json.loads(config.to_json_string(use_diff=False)), tmp_path)
        return adapter, tmp_path / WEIGHTS_NAME

    def test_under_a_megabyte_with_the_head(self, shipped):
        assert shipped[1].stat().st_size <= 1_000_000

    def test_delta_is_512_bytes(self, shipped):
        tensors = load_file(shipped[1])
        assert tensors["tasks.ner.delta"].numpy().nbytes == 512
        assert [name for name in tensors if "delta" in name] == ["tasks.ner.delta"]
        assert bytes_of_parts(shipped[0])["delta"] == 512

    def test_parts_add_up_to_the_data_of_the_file(self, shipped):
        adapter, path = shipped
        raw = path.read_bytes()
        header = int.from_bytes(raw[:8], "little")
        parts = bytes_of_parts(adapter)
        assert set(parts) == set(PARTS) - {"space", "reader"}
        assert sum(parts.values()) == len(raw) - 8 - header
        assert parts["dictionary"] == 2 * 128 * (256 + 2)  # int8 codes and a bfloat16 scale a row
        assert parts["projector"] == 4096

    def test_codes_use_the_bits_that_they_are_said_to(self, shipped):
        adapter, path = shipped
        tensors = load_file(path)
        for name in ("atoms_in", "atoms_out", "router_weight", "tasks.ner.head_weight"):
            assert tensors[name].dtype == torch.int8, name
        for name, values in (("mixer.hidden", 14 * 8), ("mixer.output", 128 * 15), ("tasks.ner.delta", 8 * 128)):
            assert tensors[name].dtype == torch.uint8 and tensors[name].numel() == (values + 1) // 2, name

    def test_no_tensor_of_the_host(self, saved):
        model, folder = saved
        tensors = load_file(folder / WEIGHTS_NAME)
        assert tensors.keys() == adapter_tensors(model.adapter).keys()
        shapes = {tuple(t.shape) for t in model.host.state_dict().values() if t.dim() == 2}
        assert not shapes & {tuple(t.shape) for t in tensors.values()}
        assert not any("host" in name or "layer" in name for name in tensors)


class TestDamagedFile:
    def test_any_bit_flip_is_found(self, saved):
        """Flips of 300 bits anywhere and of 300 in the header: each is refused, and the adapter is unchanged."""
        model, folder = saved
        path, raw = folder / WEIGHTS_NAME, (folder / WEIGHTS_NAME).read_bytes()
        adapter = UniHyperLoraAdapter(model.config)
        before = {name: t.clone() for name, t in adapter.state_dict().items()}
        header = 8 + int.from_bytes(raw[:8], "little")
        chance = random.Random(0)
        bits = [chance.randrange(8 * len(raw)) for _ in range(300)]
        bits += [chance.randrange(8 * header) for _ in range(300)]
        for bit in bits:
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(AdapterFileError):
                load_adapter(adapter, path)
        assert all(torch.equal(t, before[name]) for name, t in adapter.state_dict().items())
        path.write_bytes(raw)
        load_adapter(adapter, path)
        assert torch.equal(adapter.atoms_in(), model.adapter.atoms_in())

    @pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, -100, -1])
    def test_truncated(self, keep, saved, refuses):
        path = saved[1] / WEIGHTS_NAME
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * keep)] if keep == 0.5 else raw[:keep])
        refuses(saved[1], match="not a readable safetensors file")

    def test_something_appended(self, saved, refuses):
        path = saved[1] / WEIGHTS_NAME
        path.write_bytes(path.read_bytes() + b"\0")
        refuses(saved[1])

    def test_a_pickle_is_never_opened(self, saved, refuses, tmp_path):
        marker = tmp_path / "was run"

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        (saved[1] / WEIGHTS_NAME).write_bytes(pickle.dumps(Payload()))
        refuses(saved[1], match="not a readable safetensors file")
        torch.save({"atoms_in": torch.zeros(2)}, saved[1] / WEIGHTS_NAME)
        refuses(saved[1], match="not a readable safetensors file")
        assert not marker.exists()

    @pytest.mark.parametrize("content", [b"", b"\0" * 64, b"{}", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"{}"])
    def test_what_is_no_adapter(self, content, saved, refuses):
        (saved[1] / WEIGHTS_NAME).write_bytes(content)
        refuses(saved[1])

    def test_a_folder_in_place_of_the_file(self, saved, refuses):
        (saved[1] / WEIGHTS_NAME).unlink()
        (saved[1] / WEIGHTS_NAME).mkdir()
        refuses(saved[1])

    @pytest.mark.parametrize("name", [WEIGHTS_NAME, "config.json"])
    def test_a_file_is_missing(self, name, saved, refuses):
        (saved[1] / name).unlink()
        refuses(saved[1], match=name)

    def test_no_folder_at_all(self, tmp_path, refuses):
        refuses(tmp_path / "nowhere")
        with pytest.raises(AdapterFileError, match="no_such_adapter"):
            load("no_such_adapter")


def put(name: str, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]) if callable(value) else value)


def with_value(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


class TestWrongContents:
    """Files with a valid digest, which the check of the contents must refuse."""

    FLOATS = [
        "atoms_in.scale",
        "mixer.hidden.scale",
        "projector.inward_waves",
        "router_bias",
        "tasks.ner.embedding",
        "tasks.ner.head_bias",
        "tasks.ner.mean_gate",
    ]

    def test_signing_again_is_not_what_refuses(self, saved, make_host):
        rewrite(saved[1], lambda tensors: None)
        load(saved[1], host=make_host())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", FLOATS)
    def test_not_finite(self, name, value, saved, refuses):
        rewrite(saved[1], put(name, with_value(value)))
        refuses(saved[1], match=f"'{name}' holds NaN or infinite")

    @pytest.mark.parametrize("name", ["atoms_in", "atoms_in.scale", "mixer.output", "tasks.ner.delta", "router_bias"])
    def test_another_shape(self, name, saved, refuses):
        rewrite(saved[1], put(name, lambda t: torch.cat([t, t])))
        refuses(saved[1], match=f"'{name}' is")

    def test_transposed(self, saved, refuses):
        rewrite(saved[1], put("atoms_in", lambda t: t.T.contiguous()))
        refuses(saved[1], match=r"is torch.int8 \(12, 16\), but the configuration requires torch.int8 \(16, 12\)")

    @pytest.mark.parametrize("name", ["atoms_in", "atoms_in.scale", "mixer.output", "tasks.ner.delta", "router_bias"])
    def test_another_dtype(self, name, saved, refuses):
        rewrite(saved[1], put(name, lambda t: t.float()))
        refuses(saved[1], match=f"'{name}' is torch.float32")

    @pytest.mark.parametrize("name", ["atoms_in", "atoms_in.scale", "tasks.ner.delta", "tasks.ner.mean_gate"])
    def test_a_tensor_is_missing(self, name, saved, refuses):
        rewrite(saved[1], lambda tensors: {k: t for k, t in tensors.items() if k != name})
        refuses(saved[1], match=rf"missing tensors \['{name}'\]")

    @pytest.mark.parametrize("name", ["extra", "host.embeddings.word_embeddings.weight", "tasks.other.delta"])
    def test_a_tensor_too_many(self, name, saved, refuses):
        rewrite(saved[1], lambda tensors: tensors | {name: torch.zeros(2)})
        refuses(saved[1], match=rf"unknown tensors \['{name}'\]")

    def test_contents_changed_without_signing(self, saved, refuses):
        rewrite(saved[1], put("router_bias", with_value(1.0)), sign=False)
        refuses(saved[1], match="SHA-256")

    @pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "999999999999999999999"])
    def test_newer_format_in_the_header(self, version, saved, refuses):
        path = saved[1] / WEIGHTS_NAME
        tensors = load_file(path)
        save_file(tensors, path, metadata=signed_metadata(tensors) | {"unihyperlora_format": version})
        refuses(saved[1], match="Update the package")

    @pytest.mark.parametrize("version", ["0", "1"])
    def test_an_older_format_in_the_header_says_how_to_get_on(self, version, saved, refuses):
        path = saved[1] / WEIGHTS_NAME
        tensors = load_file(path)
        save_file(tensors, path, metadata=signed_metadata(tensors) | {"unihyperlora_format": version})
        refuses(saved[1], match=f"has format {version}, .*train the adapter again, or install 'unihyperlora<0.2'")

    @pytest.mark.parametrize("version", [None, "", "x", "-1", "1.0", "²"])
    def test_no_usable_format_in_the_header(self, version, saved, refuses):
        path = saved[1] / WEIGHTS_NAME
        tensors = load_file(path)
        metadata = {k: v for k, v in signed_metadata(tensors).items() if k != "unihyperlora_format"}
        save_file(tensors, path, metadata=metadata | ({} if version is None else {"unihyperlora_format": version}))
        refuses(saved[1])

    def test_a_plain_safetensors_file(self, saved, refuses):
        save_file({"x": torch.zeros(2)}, saved[1] / WEIGHTS_NAME)
        refuses(saved[1], match="not a UniHyperLoRA adapter")

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "BOOL", "U64", "X9"])
    def test_any_dtype_that_the_format_knows(self, dtype, saved, refuses):
        header = {"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}, "__metadata__": {"sha256": "0"}}
        text = json.dumps(header).encode()
        (saved[1] / WEIGHTS_NAME).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
        refuses(saved[1])


class TestWrongConfig:
    @staticmethod
    def edit(folder, **changes):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    @pytest.mark.parametrize(
        "changes,error,match",
        [
            ({"format_version": 3}, ConfigError, "format_version 3, but this package reads 2. Update the package"),
            ({"format_version": 1}, ConfigError, "format_version 1.*Train the adapter again, or install 'unihyper"),
            ({"format_version": 1, "stream_dim": 8}, ConfigError, "format_version 1.*Train the adapter again"),
            ({"format_version": "2"}, ConfigError, "format_version"),
            ({"router_topk": 2}, ConfigError, "Unknown configuration key 'router_topk'"),
            ({"model_type": "bert"}, AdapterFileError, "not the configuration of a UniHyperLoRA adapter"),
            ({"model_type": None}, AdapterFileError, "not the configuration of a UniHyperLoRA adapter"),
            ({"pathway": "stream2"}, ConfigError, "pathway='stream2'"),
            ({"router": "best"}, ConfigError, "router='best'"),
            ({"router_top_k": 4}, ConfigError, "router_top_k=4"),
            ({"router_top_k": True}, ConfigError, "router_top_k=True"),
            ({"atoms": "16"}, ConfigError, "atoms='16'"),
            ({"atoms": 0}, ConfigError, "atoms=0"),
            ({"atoms": 10**12}, ConfigError, "atoms=10"),
            ({"anchor_dim": 1.5}, ConfigError, "anchor_dim=1.5"),
            ({"delta_step": "x"}, ConfigError, "delta_step='x'"),
            ({"delta_step": 0}, ConfigError, "delta_step=0"),
            ({"delta_step": 1e-320}, ConfigError, "delta_step"),
            ({"tasks": [1]}, ConfigError, "tasks must be a dict"),
            ({"tasks": {"ner": 3}}, ConfigError, "'ner' must be a dict"),
            ({"tasks": {"ner": {"type": "token_classification"}}}, ConfigError, "at least two label"),
            ({"tasks": {"a.b": {"type": "token_classification", "labels": ["x", "y"]}}}, ConfigError, "a.b"),
            ({"tasks": {"items": {"type": "token_classification", "labels": ["x", "y"]}}}, ConfigError, "items"),
            ({"tasks": {"ner": {"type": "regression", "labels": ["x", "y"]}}}, ConfigError, "regression"),
            (
                {"tasks": {"ner": NER | {"scheme": "IOB3"}}},
                ConfigError,
                "is not allowed. Choose one of IOB1",
            ),
            ({"tasks": {"ner": NER | {"scheme": ["IOB2"]}}}, ConfigError, "scheme=.'IOB2'. is not allowed"),
            (
                {"tasks": {"ner": NER | {"type": "sequence_classification", "scheme": "IO"}}},
                ConfigError,
                "task of type token_classification",
            ),
            ({"active_task": "other"}, ConfigError, "active_task='other'"),
            ({"source_hosts": 5}, ConfigError, "source_hosts must be a list"),
            ({"source_hosts": ["a host"]}, ConfigError, "source_hosts has 'a host', which does not describe a host"),
            ({"source_hosts": [{"name": "x"}]}, ConfigError, "by 'name' and 'fingerprint'"),
            ({"id2label": 3}, AdapterFileError, "cannot be used"),
            ({"dtype": "no_such_type"}, AdapterFileError, "cannot be used"),
            ({"atoms": 17}, AdapterFileError, "but the configuration requires"),
            ({"anchor_dim": 13}, AdapterFileError, "but the configuration requires"),
            ({"mixer_hidden": 6}, AdapterFileError, "but the configuration requires"),
        ],
    )
    def test_each_is_named(self, changes, error, match, saved, refuses):
        self.edit(saved[1], **changes)
        refuses(saved[1], error, match)

    def test_labels_of_another_number(self, saved, refuses):
        tasks = json.loads((saved[1] / "config.json").read_text())["tasks"]
        tasks["ner"]["labels"].append("B-C")
        self.edit(saved[1], tasks=tasks)
        refuses(saved[1], match="tasks.ner.head_")

    @pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '"x"', "\x00"])
    def test_not_a_json_object(self, text, saved, refuses):
        (saved[1] / "config.json").write_text(text)
        refuses(saved[1])

    def test_not_utf8(self, saved, refuses):
        (saved[1] / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
        refuses(saved[1], match="not readable JSON")


class TestLatents:
    def test_bit_for_bit(self, saved, make_model, tmp_path):
        model, path = saved[0], tmp_path / "latents.safetensors"
        save_latents(model.adapter, path)
        other = make_model(seed=5)
        load_latents(other.adapter, path)
        for name, tensor in model.adapter.state_dict().items():
            assert torch.equal(other.adapter.state_dict()[name], tensor), name

    @pytest.mark.parametrize("kind", ["flip", "truncate", "other adapter", "other task", "missing"])
    def test_refused_whole(self, kind, saved, make_model, tmp_path):
        model, path = saved[0], tmp_path / "latents.safetensors"
        save_latents(model.adapter, path)
        other = make_model(seed=5)
        if kind == "flip":
            raw = np.frombuffer(path.read_bytes(), np.uint8).copy()
            raw[-5] ^= 4
            path.write_bytes(raw.tobytes())
        elif kind == "truncate":
            path.write_bytes(path.read_bytes()[:-3])
        elif kind == "missing":
            path.unlink()
        elif kind == "other adapter":
            other = make_model(seed=5, anchor_dim=8)
        else:
            other = make_model(seed=5, task="chunks")
        before = {name: t.clone() for name, t in other.adapter.state_dict().items()}
        with pytest.raises(AdapterFileError):
            load_latents(other.adapter, path)
        assert all(torch.equal(t, before[name]) for name, t in other.adapter.state_dict().items())
