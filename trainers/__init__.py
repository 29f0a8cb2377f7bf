"""Training of UniHyperLoRA adapters on transformers' Trainer."""

from .trainer import UniHyperLoraTrainer
from .training_args import UniHyperLoraTrainingArguments

__all__ = ["UniHyperLoraTrainer", "UniHyperLoraTrainingArguments"]
