"""Exports of an injected update: a merged encoder, or a LoRA for PEFT.

Both turn the update of one task into fixed weights, so both need the static router, whose mask is the same for all
tokens. Neither format has a place for the head, which reads the states of five depths. So the head is written to a
separate file, in the host's own coordinates, and a ``README.md`` beside it shows how to apply it.
"""

import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import ExportError, MergeError
from ..space import KNOTS
from ..storage import replacing, write_json
from ..words import load_tokenizer

HEAD_NAME = "unihyperlora_head.safetensors"
HOW_TO_USE_THE_HEAD = """# {title}

{what}

The head of task `{task}` is in `{head}`: a weight (C, K, d) and a bias (C,) on the states of K depths, each divided
by its root mean square. Labels: {labels}.

```python
import torch
from safetensors.torch import load_file
{load}

head = load_file("{head}")
inputs = tokenizer("Ada Lovelace flew to Lisbon .", return_tensors="pt")
states = encoder(**inputs, output_hidden_states=True).hidden_states
knots = torch.stack([states[layer] for layer in {layers}], dim=-2)  # (1, T, K, d)
knots = knots / knots.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
logits = torch.einsum("btkd,ckd->btc", knots, head["weight"]) + head["bias"]
print(logits.argmax(dim=-1))
```
"""


def merge_and_save(model, folder: str | Path, tokenizer=None) -> None:
    """Write the host with the active task's update merged into its weights, the tokenizer, and the task's head.

    ``AutoModel.from_pretrained(folder)`` loads it without this package and gives the same states as the model. The
    model itself is unchanged afterwards.

    Args:
        model: a model with an injected update and the static router.
        folder: output folder; created if needed.
        tokenizer: the host's tokenizer; by default loaded by the host's name.

    Raises:
        MergeError: the model is a stream, or has the token router.
        HostError: the tokenizer cannot be loaded.
    """
    require_fixed_update(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(model.host.config.name_or_path, revision=model.config.base_model_revision or "main")
    was_merged = model.merged
    model.merge()
    try:
        with tempfile.TemporaryDirectory(dir=_made(folder)) as temporary:  # so that no file is left half written
            model.host.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                file.replace(Path(folder) / file.name)
    finally:
        if not was_merged:
            model.unmerge()
    load = 'from transformers import AutoModel, AutoTokenizer\n\nencoder = AutoModel.from_pretrained(".")\n'
    load += 'tokenizer = AutoTokenizer.from_pretrained(".")'
    what = "A transformers encoder with the update of a UniHyperLoRA adapter merged into its weights."
    _write_head(model, Path(folder), "Merged encoder", what, load)


def export_lora(model, folder: str | Path, rank: int) -> dict[str, float]:
    """Write the active task's update as a LoRA that PEFT loads onto the same host.

    The update of a layer is a sum of M rank-one atoms; the LoRA keeps its ``rank`` largest singular directions.

    Args:
        model: a model with an injected update and the static router.
        folder: output folder; created if needed.
        rank: rank of the LoRA, 1 or more; layers whose update has a lower rank are padded with zeros.

    Returns:
        "relative_error": Frobenius norm of the lost part, relative to that of the update, over all layers.
        "worst_relative_error": the same for the layer with the largest relative error.
        ``unihyperlora_export.json`` in the folder holds both too.

    Raises:
        MergeError: the model is a stream, or has the token router.
        ExportError: ``rank`` is not allowed.
    """
    require_fixed_update(model)
    task = model._task(None)
    sites = model.injection.map.sites
    most = min(min(site.linear.weight.shape) for site in sites)
    if type(rank) is not int or not 1 <= rank <= most:
        raise ExportError(f"rank={rank!r} is not allowed; give an integer from 1 to {most}, the host's width.")
    names = {id(module): name for name, module in model.host.named_modules()}
    tensors, lost, whole, worst = {}, 0.0, 0.0, 0.0
    for site in sites:
        delta = model.injection.delta_weight(site, task).detach()
        down, up, gone, norm = low_rank(delta, rank)
        name = f"base_model.model.{names[id(site.linear)]}"
        tensors |= {f"{name}.lora_A.weight": down.float(), f"{name}.lora_B.weight": up.float()}
        lost, whole = lost + gone**2, whole + norm**2
        worst = max(worst, gone / norm if norm else 0.0)
    errors = {"relative_error": math.sqrt(lost / whole) if whole else 0.0, "worst_relative_error": worst}
    _made(folder)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": model.config.base_model_name_or_path,
        "revision": model.config.base_model_revision,
        "r": rank,
        "lora_alpha": rank,  # PEFT multiplies by alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(names[id(site.linear)] for site in sites),
    }
    with replacing(Path(folder) / "adapter_model.safetensors") as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", config)
    write_json(Path(folder) / "unihyperlora_export.json", {"rank": rank, "task": task, **errors})
    load = "from peft import PeftModel\nfrom transformers import AutoModel, AutoTokenizer\n\n"
    load += f'host = "{model.config.base_model_name_or_path}"\n'
    load += 'encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(host), ".")\n'
    load += "tokenizer = AutoTokenizer.from_pretrained(host)"
    what = (
        f"The update of a UniHyperLoRA adapter as a LoRA of rank {rank}. It loses {errors['relative_error']:.2%} of "
        f"the update's Frobenius norm over all layers, {worst:.2%} in the layer that loses most."
    )
    _write_head(model, Path(folder), "LoRA of an adapter", what, load)
    return errors


def require_fixed_update(model) -> None:
    """Raise ``MergeError`` unless the update is the same for every token."""
    if model.config.pathway != "inject":
        raise MergeError(
            "A stream does not update weights: it computes beside the host, from the host's states. So it can neither "
            "be merged nor become a LoRA. Use export_onnx, which writes host and stream."
        )
    if model.config.router != "static":
        raise MergeError(
            "The update depends on each token (router='token'), so fixed weights cannot replace it. Load the adapter "
            "with router='static', which uses one fixed mask, the mean gate, and score it before the export."
        )


def low_rank(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Best low-rank factors of ``delta`` (out, in): A (rank, in), B (out, rank), norm of the error, norm of delta."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    root = values[:rank].sqrt()
    gone = float(values[rank:].square().sum().sqrt())
    return root[:, None] * right[:rank], left[:, :rank] * root, gone, float(values.square().sum().sqrt())


def host_head(model, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Head of a task in the host's coordinates: weight (C, K, d) and bias (C,)."""
    adapter, width = model.adapter, model.injection.map.hidden_size
    keys = [adapter.projector.key(width, knot) for knot in KNOTS]
    weight = torch.stack(adapter.head_weights(keys, task), dim=1)
    return weight.detach().float(), adapter.tasks[task].head_bias().detach().float()


def _write_head(model, folder: Path, title: str, what: str, load: str) -> None:
    task = model._task(None)
    weight, bias = host_head(model, task)
    with replacing(folder / HEAD_NAME) as temporary:
        save_file({"weight": weight.cpu().contiguous(), "bias": bias.cpu().contiguous()}, temporary)
    sentence = model.config.tasks[task]["type"] == "sequence_classification"
    text = HOW_TO_USE_THE_HEAD.format(
        title=title,
        what=what,
        task=task,
        head=HEAD_NAME,
        labels=", ".join(f"{number} {label}" for number, label in enumerate(model.labels)),
        load=load,
        layers=model.injection.knot_layers,
    )
    if sentence:  # take the mean over the tokens before the division
        text = text.replace("\nknots = knots /", "\nknots = knots.mean(dim=1, keepdim=True)\nknots = knots /")
    with replacing(folder / "README.md") as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def _made(folder: str | Path) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
