"""The models with the code of the injected update: what an adapter of that pathway names in its ``auto_map``."""

from .injected_configuration import UniHyperLoraConfig
from .injection import Injection
from .modeling_unihyperlora import (
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
    UniHyperLoraModel,
)

__all__ = [
    "Injection",
    "UniHyperLoraConfig",
    "UniHyperLoraForSequenceClassification",
    "UniHyperLoraForTokenClassification",
    "UniHyperLoraModel",
]
