"""A local Hub with two hosts, and an adapter with random values in all parts."""

import random

import huggingface_hub
import pytest
import torch
import transformers
from transformers import BertConfig, BertModel

from modeling_unihyperlora import (
    CanonicalSpace,
    UniHyperLoraConfig,
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
)
from modeling_unihyperlora.storage import StoredTensor
from tests.conftest import WORDS, tiny_tokenizer
from tests.hub_server import HubServer

LABELS = {"token": ["O", "B-PER", "I-PER"], "sequence": ["bad", "good"]}
CLASSES = {"token": UniHyperLoraForTokenClassification, "sequence": UniHyperLoraForSequenceClassification}
SENTENCE = "anna lives in paris ."


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Use one thread, as the client processes do; with more, sums would be rounded differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def other_host(tmp_path_factory):
    """Folder of a random BERT of 3 blocks x 48 with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("other_host")
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(vocab_size=len(tiny_tokenizer()), max_position_embeddings=64, **shape)
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def anchor_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("anchors") / "anchors.txt"
    generator = random.Random(5)
    path.write_text("\n".join(" ".join(generator.choices(WORDS, k=8)) for _ in range(60)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def space_file(tiny_host, anchor_file, tmp_path_factory):
    """A canonical space of 12 coordinates, made on the tiny host."""
    path = tmp_path_factory.mktemp("space") / "space.safetensors"
    CanonicalSpace.make([tiny_host], anchor_file, dim=12, atoms=16, name="tiny").save(path)
    return path


@pytest.fixture(scope="session")
def make_adapter(tiny_host, space_file):
    """make_adapter("token", pathway="stream", **config) → a model on the tiny host with random values everywhere."""

    def make(kind: str = "token", *, pathway: str = "stream", host=None, seed: int = 0, **config):
        own = {"atoms": 16, "anchor_dim": 16} if pathway == "inject" else {}
        given = {"labels": LABELS[kind], "task": kind, "config": UniHyperLoraConfig(pathway=pathway, **own | config)}
        if pathway == "stream":
            given |= {"space": space_file, "reader": {"width": 10, "hidden": 6}}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = CLASSES[kind].from_host(tiny_host if host is None else host, **given).eval()
            with torch.no_grad():
                for name, module in model.adapter.named_modules():
                    if isinstance(module, StoredTensor) and not name.startswith("space.") and "waves" not in name:
                        module.latent.copy_(torch.randn_like(module.latent) / 2)
                for buffer_name, buffer in model.adapter.named_buffers():
                    if buffer_name.endswith("mean_gate"):
                        buffer.copy_(torch.rand_like(buffer) / 4)
        return model

    return make


@pytest.fixture(scope="session")
def adapter_folder(make_adapter, tmp_path_factory):
    """adapter_folder("token", pathway="stream") → a saved adapter of that kind."""
    made = {}

    def folder(kind: str = "token", pathway: str = "stream"):
        if (kind, pathway) not in made:
            made[kind, pathway] = tmp_path_factory.mktemp(f"adapter_{kind}_{pathway}")
            make_adapter(kind, pathway=pathway).save_pretrained(made[kind, pathway])
        return made[kind, pathway]

    return folder


@pytest.fixture(scope="session")
def put_hosts(tiny_host, other_host):
    """put_hosts(hub) uploads both hosts to the Hub, as alice/source and alice/other."""

    def put(hub: HubServer) -> None:
        for name, folder in (("source", tiny_host), ("other", other_host)):
            hub.store.put(f"alice/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})

    return put


@pytest.fixture
def hub(monkeypatch, put_hosts, tmp_path):
    """A Hub that this process uses, logged in as alice."""
    with HubServer() as server:
        put_hosts(server)
        settings = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        settings |= {"HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}"}
        settings |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": 1, "HF_HUB_ETAG_TIMEOUT": 1}
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it keeps the endpoint that it was made with
        monkeypatch.setenv("HF_TOKEN", "token-of-alice")
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
