"""UniHyperLoRA: one small adapter file that works on any encoder."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from .configuration_unihyperlora import UniHyperLoraConfig
from .errors import (
    AdapterFileError,
    BudgetError,
    ConfigError,
    DataError,
    ExportError,
    HostError,
    HubError,
    MergeError,
    UniHyperLoraError,
)
from .layouts import HostLayout
from .modeling_unihyperlora import (
    UniHyperLoraForSequenceClassification,
    UniHyperLoraForTokenClassification,
    UniHyperLoraModel,
)
from .space import CanonicalSpace

__version__ = "0.2.0"

AutoConfig.register("unihyperlora", UniHyperLoraConfig, exist_ok=True)
AutoModel.register(UniHyperLoraConfig, UniHyperLoraModel, exist_ok=True)
AutoModelForTokenClassification.register(UniHyperLoraConfig, UniHyperLoraForTokenClassification, exist_ok=True)
AutoModelForSequenceClassification.register(UniHyperLoraConfig, UniHyperLoraForSequenceClassification, exist_ok=True)

__all__ = [
    "AdapterFileError",
    "BudgetError",
    "CanonicalSpace",
    "ConfigError",
    "DataError",
    "ExportError",
    "HostError",
    "HostLayout",
    "HubError",
    "MergeError",
    "UniHyperLoraConfig",
    "UniHyperLoraError",
    "UniHyperLoraForSequenceClassification",
    "UniHyperLoraForTokenClassification",
    "UniHyperLoraModel",
]
