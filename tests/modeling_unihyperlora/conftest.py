"""Random hosts of every family, adapters in which every part matters, and a float64 reference of the whole method."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, MPNetConfig, MPNetModel

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.hosts import LAYOUTS, MODULE_TYPES
from modeling_unihyperlora.quantization import StoredTensor

VOCABULARY = 40
LABELS = ["O", "B-A", "I-A", "B-B", "I-B"]


@pytest.fixture(scope="session")
def make_host():
    """make_host("bert", width=…, layers=…, seed=…) → a random encoder without dropout, in evaluation mode."""

    def make(family: str = "bert", width: int = 32, layers: int = 3, seed: int = 0, inner: int | None = None):
        common = {"vocab_size": VOCABULARY, "pad_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if family == "distilbert":
                config = DistilBertConfig(
                    dim=width, n_layers=layers, n_heads=4, hidden_dim=inner or 2 * width, dropout=0.0, **common
                )
                config.attention_dropout = 0.0
                host = DistilBertModel(config)
            else:
                shape = {
                    "hidden_size": width,
                    "num_hidden_layers": layers,
                    "num_attention_heads": 4,
                    "intermediate_size": inner or 2 * width,
                    "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0,
                }
                config = (BertConfig if family == "bert" else MPNetConfig)(**shape, **common)
                host = (BertModel if family == "bert" else MPNetModel)(config, add_pooling_layer=False)
            for parameter in host.parameters():  # transformers' 0.02 would leave all tokens nearly alike
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
                else:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return host.eval()

    return make


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(sentences, tokens, seed) → ids and a mask; the last sentences are padded on the right."""

    def make(sentences: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (sentences, tokens), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, sentences):
            mask[row, max(2, tokens - 2 * row) :] = 0
        return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def stir():
    """stir(model, seed) gives every tensor of the adapter a random value, so that none can be left out unnoticed."""

    def stir_(model, seed: int = 1, scale: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, module in model.adapter.named_modules():
                if isinstance(module, StoredTensor):
                    noise = torch.randn(module.latent.shape, generator=generator)
                    width = module.latent.shape[-1]
                    if "waves" in name:
                        module.latent += 0.05 * noise
                    elif name == "router_bias":
                        module.latent.copy_(0.3 * noise - 1.5)  # the null choice wins often, but not always
                    elif name.endswith(("delta", "embedding", "bias")):
                        module.latent.copy_(0.3 * scale * noise)
                    else:
                        module.latent.copy_(scale * noise / math.sqrt(width))
            for buffer in model.adapter.buffers():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) / 4)
        return model

    return stir_


@pytest.fixture(scope="session")
def make_model(make_host, stir):
    """make_model(family, …) → a token classifier of 16 atoms, canonical width 12, with every part stirred."""

    def make(
        family: str = "bert",
        *,
        cls=UniHyperLoraForTokenClassification,
        host=None,
        labels=LABELS,
        task: str = "ner",
        fresh: bool = False,
        seed: int = 0,
        **config,
    ):
        shape = {"atoms": 16, "anchor_dim": 12, "mixer_hidden": 5} | config
        host = make_host(family, seed=seed) if host is None else host
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cls.from_host(host, labels=labels, task=task, config=UniHyperLoraConfig(**shape)).eval()
        return model if fresh else stir(model, seed + 1)

    return make


@pytest.fixture(scope="session")
def reference():
    """reference(model, batch) → logits and atom counts by the paper's formula in float64, and the values behind them.

    A copy of the host has each linear layer replaced by W x + b + ΔW(token) x, with ΔW of every token as an explicit
    matrix. Nothing of the package's computation is used but the stored values.
    """
    return _reference


def _reference(model, batch: dict[str, torch.Tensor], task: str | None = None) -> SimpleNamespace:
    task = task or model.config.active_task
    values = {
        name: module().detach().double().requires_grad_(True)
        for name, module in model.adapter.named_modules()
        if isinstance(module, StoredTensor)
    }
    host = copy.deepcopy(model.host)
    for module in host.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    run = _Run(model, values, task)
    layout = LAYOUTS[host.config.model_type]
    blocks = host.get_submodule(layout.blocks)
    for index, block in enumerate(blocks):
        for kind, module_type in enumerate(MODULE_TYPES):
            path = getattr(layout, module_type)
            parent, _, leaf = path.rpartition(".")
            own = _Linear(block.get_submodule(path), run, index, len(blocks), kind)
            setattr(block.get_submodule(parent), leaf, own)
        blocks[index] = _Block(block, run)
    host = host.double()
    hidden = host(**batch).last_hidden_state
    states = [*run.inputs, hidden]  # after 0, 1, … L blocks
    logits = values[f"tasks.{task}.head_bias"]
    weight = values[f"tasks.{task}.head_weight"].view(-1, 5, model.config.anchor_dim)
    for knot in range(5):
        state = states[math.floor(len(blocks) * knot / 4 + 0.5)]
        if model.task_type == "sequence_classification":
            real = batch["attention_mask"].double().unsqueeze(-1)
            state = (state * real).sum(dim=1) / real.sum(dim=1)
        scaled = state / state.square().mean(dim=-1, keepdim=True).sqrt()
        logits = logits + scaled @ run.inward(hidden.shape[-1]).T @ weight[:, knot].T
    counts = [torch.stack(x).mean(dim=0).view(hidden.shape[:2]) for x in (run.expected, run.active)]
    result = {"logits": logits, "hidden": hidden, "values": values}
    return SimpleNamespace(**result, expected_atoms=counts[0], active_atoms=counts[1])


class _Run:
    """The adapter in float64 and the choices of the current block."""

    def __init__(self, model, values, task):
        self.values, self.task, self.config = values, task, model.config
        self.mean_gate = model.adapter.tasks[task].mean_gate.half().double()
        self.chosen: list[list[tuple[int, torch.Tensor]]] = []  # for each token: (atom, gate)
        self.expected, self.active, self.inputs = [], [], []

    def wave(self, name: str, width: int) -> torch.Tensor:
        """P(w) (w, D), entry by entry as the formula is printed."""
        a, f, p, s = self.values[f"projector.{name}"]
        columns = []
        for m in range(len(a)):
            position = (torch.arange(width, dtype=torch.float64) + 0.5) / width
            angle = math.pi * (m + f[m]) * position + p[m] + s[m] * math.log10(width)
            columns.append(a[m] * math.sqrt(2 / width) * torch.sin(angle))
        return torch.stack(columns, dim=1)

    def inward(self, width: int) -> torch.Tensor:
        return self.wave("inward_waves", width).T

    def coefficients(self, block: int, blocks: int, kind: int) -> torch.Tensor:
        """(g_θ + δθ)(ℓ/L, type), (M,)."""
        place = torch.zeros(8, dtype=torch.float64)
        place[0], place[1], place[2 + kind] = 1, (block + 1) / blocks, 1
        wave = torch.sin(self.values["mixer.hidden"] @ place)
        mixed = self.values["mixer.output"] @ torch.cat([wave, torch.ones(1, dtype=torch.float64)])
        return mixed + place @ self.values[f"tasks.{self.task}.delta"]

    def route(self, state: torch.Tensor) -> None:
        """state (B, T, d)."""
        tokens = state.reshape(-1, state.shape[-1])
        zero = torch.zeros((), dtype=torch.float64)
        if self.config.router == "static":
            self.chosen = [list(enumerate(self.mean_gate))] * len(tokens)
            everything = torch.full((len(tokens),), float(self.config.atoms), dtype=torch.float64)
            self.expected.append(everything)
            self.active.append(everything)
            return
        weight, bias = self.values["router_weight"], self.values["router_bias"]
        task = weight @ self.values[f"tasks.{self.task}.embedding"]
        inward = self.inward(tokens.shape[-1])
        self.chosen, expected, active = [], [], []
        for x in tokens:
            scores = weight @ (inward @ x) / x.square().mean().sqrt() + bias + task
            best = sorted(range(len(scores)), key=lambda j: -scores[j].item())[: self.config.router_top_k]
            beats_null = [j for j in best if scores[j] > 0]
            # Below the null choice an atom is not used; the gradient of its gate is that of its probability.
            probability = {j: torch.sigmoid(scores[j]) for j in best}
            gates = {j: p if j in beats_null else p - p.detach() for j, p in probability.items()}
            self.chosen.append(list(gates.items()))
            expected.append(sum(probability.values(), zero))
            active.append(torch.tensor(float(len(beats_null)), dtype=torch.float64))
        self.expected.append(torch.stack(expected))
        self.active.append(torch.stack(active))


class _Block(nn.Module):
    def __init__(self, block: nn.Module, run: _Run):
        super().__init__()
        self.block, self.run = block, run

    def forward(self, hidden_states, *args, **kwargs):
        self.run.inputs.append(hidden_states)
        self.run.route(hidden_states)
        return self.block(hidden_states, *args, **kwargs)


class _Linear(nn.Module):
    def __init__(self, linear: nn.Linear, run: _Run, block: int, blocks: int, kind: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.run, self.place = run, (block, blocks, kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = self.run
        into = run.values["atoms_in"] @ run.inward(self.weight.shape[1])  # rows v_jᵀ P_in
        out = run.values["atoms_out"] @ run.wave("outward_waves", self.weight.shape[0]).T  # rows P_out u_j
        c = run.coefficients(*self.place)
        results = []
        for token, gates in zip(x.reshape(-1, x.shape[-1]), run.chosen, strict=True):
            delta = sum(gate * c[j] * torch.outer(out[j], into[j]) for j, gate in gates)
            results.append((self.weight + delta) @ token + self.bias)
        return torch.stack(results).view(*x.shape[:-1], -1)
