"""Random hosts of all families, adapters with random values in all parts, and a float64 reference of the method."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_unihyperlora import UniHyperLoraConfig, UniHyperLoraForTokenClassification
from modeling_unihyperlora.layouts import MODULE_TYPES
from modeling_unihyperlora.storage import StoredTensor
from tests.modeling_unihyperlora.families import VOCABULARY, tiny_host

LABELS = ["O", "B-A", "I-A", "B-B", "I-B"]


@pytest.fixture(scope="session")
def make_host():
    """make_host("bert", width=…, layers=…, seed=…) → a random encoder without dropout, in evaluation mode."""
    return tiny_host


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
    """stir(model, seed) sets all tensors of the adapter except its space to random values; so every part matters."""

    def stir_(model, seed: int = 1, scale: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, module in model.adapter.named_modules():
                if isinstance(module, StoredTensor) and not name.startswith("space."):
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
            for name, buffer in model.adapter.named_buffers():
                if name.endswith("mean_gate"):
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) / 4)
        return model

    return stir_


@pytest.fixture(scope="session")
def make_model(make_host, stir):
    """make_model(family, …) → an injected update of 16 atoms, canonical width 12, a token head; all of it stirred."""

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
        shape = {"pathway": "inject", "atoms": 16, "anchor_dim": 12, "mixer_hidden": 5} | config
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
    names = {module: name for name, module in model.host.named_modules()}
    for linear, site in {site.linear: site for site in model.injection.map.sites}.items():
        own = _Linear(host.get_submodule(names[linear]), run, site.module_types)
        host.set_submodule(names[linear], own)
    wrapped = {block: _Block(host.get_submodule(names[block]), run) for block in model.injection.map.blocks}
    for name, module in model.host.named_modules(remove_duplicate=False):  # a block may be there twice
        if module in wrapped:
            host.set_submodule(name, wrapped[module])
    host = host.double()
    hidden = host(**batch).last_hidden_state
    states = [*run.inputs, hidden]  # after 0, 1, … L blocks
    logits = values[f"tasks.{task}.head_bias"]
    weight = values[f"tasks.{task}.head_weight"].view(-1, 5, model.config.anchor_dim)
    for knot in range(5):
        state = states[math.floor((len(states) - 1) * knot / 4 + 0.5)]
        if model.task_type == "sequence_classification":
            mask = batch.get("attention_mask", torch.ones(hidden.shape[:2]))
            real = mask.double().unsqueeze(-1)
            state = (state * real).sum(dim=1) / real.sum(dim=1)
        scaled = state / state.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).sqrt()
        logits = logits + scaled @ run.inward(hidden.shape[-1]).T @ weight[:, knot].T
    counts = [torch.stack(x).mean(dim=0).view(hidden.shape[:2]) for x in (run.expected, run.active)]
    result = {"logits": logits, "hidden": hidden, "values": values}
    return SimpleNamespace(**result, expected_atoms=counts[0], active_atoms=counts[1])


class _Run:
    """The adapter in float64, and the routing of the current block."""

    def __init__(self, model, values, task):
        self.values, self.task, self.config = values, task, model.config
        self.mean_gate = model.adapter.tasks[task].mean_gate.half().double()
        self.blocks = model.host.config.num_hidden_layers
        self.heads = model.host.config.num_attention_heads
        self.family = model.host.config.model_type
        self.chosen: list[list[tuple[int, torch.Tensor]]] = []  # for each token: (atom, gate)
        self.expected, self.active, self.inputs = [], [], []

    def tokens_last(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if self.family == "squeezebert" else x

    def wave(self, name: str, width: int) -> torch.Tensor:
        """P(w) (w, D), computed entry by entry from the paper's formula."""
        a, f, p, s = self.values[f"projector.{name}"]
        columns = []
        for m in range(len(a)):
            position = (torch.arange(width, dtype=torch.float64) + 0.5) / width
            angle = math.pi * (m + f[m]) * position + p[m] + s[m] * math.log10(width)
            columns.append(a[m] * math.sqrt(2 / width) * torch.sin(angle))
        return torch.stack(columns, dim=1)

    def inward(self, width: int) -> torch.Tensor:
        return self.wave("inward_waves", width).T

    def coefficients(self, kind: int) -> torch.Tensor:
        """(g_θ + δθ)(ℓ/L, type), (M,)."""
        place = torch.zeros(8, dtype=torch.float64)
        place[0], place[1], place[2 + kind] = 1, len(self.inputs) / self.blocks, 1
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
            scores = weight @ (inward @ x) / x.square().mean().clamp_min(1e-12).sqrt() + bias + task
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

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)  # a host may ask a block for its attention type

    def forward(self, hidden_states, *args, **kwargs):
        state = self.run.tokens_last(hidden_states)
        self.run.inputs.append(state)
        self.run.route(state)
        return self.block(hidden_states, *args, **kwargs)


class _Linear(nn.Module):
    def __init__(self, linear: nn.Module, run: _Run, roles: tuple[str, ...]):
        super().__init__()
        self.linear, self.run, self.kinds = linear, run, [MODULE_TYPES.index(role) for role in roles]

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    def rows(self, position: int, outputs: int) -> list[int]:
        """Indices of the layer's outputs that belong to the role at this position."""
        if self.run.family in ("deberta", "gpt_neox"):  # head by head, in each the query's, the key's, the value's
            width = outputs // (self.run.heads * len(self.kinds))
            starts = [(head * len(self.kinds) + position) * width for head in range(self.run.heads)]
        else:
            width = outputs // len(self.kinds)
            starts = [position * width]
        return [row for start in starts for row in range(start, start + width)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run, plain = self.run, self.linear(x)
        x, plain = run.tokens_last(x), run.tokens_last(plain)
        sentences, length = run.inputs[-1].shape[:2]
        if x.shape[:-1] not in ((sentences, length), (sentences * length,)):  # OPT has the tokens in one row there
            return run.tokens_last(plain)  # relative positions
        into = run.values["atoms_in"] @ run.inward(x.shape[-1])  # rows v_jᵀ P_in
        deltas = []
        for gates in run.chosen:
            delta = x.new_zeros(plain.shape[-1], x.shape[-1])
            for position, kind in enumerate(self.kinds):
                rows, c = self.rows(position, plain.shape[-1]), run.coefficients(kind)
                out = run.values["atoms_out"] @ run.wave("outward_waves", len(rows)).T  # rows P_out u_j
                own = sum(gate * c[j] * torch.outer(out[j], into[j]) for j, gate in gates)
                delta = delta.index_add(0, torch.tensor(rows), own)
            deltas.append(delta)
        update = torch.stack([delta @ token for delta, token in zip(deltas, x.flatten(0, -2), strict=True)])
        return run.tokens_last(plain + update.view_as(plain))


@pytest.fixture
def saved(make_model, tmp_path):
    """A model, and the folder with its saved files."""
    model = make_model()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"
