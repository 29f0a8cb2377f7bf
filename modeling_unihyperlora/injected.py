"""Entry file of an injected adapter: its ``auto_map`` names the models here, and the imports include all its code."""

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
