"""Methods to compare with, under the same script, data order and result schema."""

from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from modeling_unihyperlora.errors import HostError


def make_probe(host: str, labels: list[str], **kwargs) -> PreTrainedModel:
    """A linear head on the last states (B, T, d) of a frozen host; the head alone is trained.

    Args:
        host: Hub id or folder.
        labels: names of the ids 0 … C-1.
        **kwargs: ``revision``, ``cache_dir``, ``token``, ``trust_remote_code``.

    Raises:
        HostError: the host cannot be loaded.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    try:
        model = AutoModelForTokenClassification.from_pretrained(host, **names, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HostError(f"The host '{host}' cannot be loaded for a probe ({reason}). Check its name.") from error
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    model.accepts_loss_kwargs = False  # its loss is a mean over the batch, whatever its signature promises
    return model


def measure_probe(model: nn.Module) -> dict[str, int]:
    """Figures that a probe has: bytes of its float32 head and the parameters trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "head_bytes": sum(p.numel() * p.element_size() for p in trained),
        "trainable_parameters": sum(p.numel() for p in trained),
    }
