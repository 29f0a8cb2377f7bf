"""Training of UniHyperLoRA adapters on transformers' Trainer.

The two names are loaded when they are asked for, so that ``unihyperlora --help`` needs no torch.
"""

import importlib

_WHERE = {"UniHyperLoraTrainer": "trainer", "UniHyperLoraTrainingArguments": "training_args"}

__all__ = ["UniHyperLoraTrainer", "UniHyperLoraTrainingArguments"]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
