"""UniHyperLoRA models: a frozen host, the adapter on it, and a head on what the adapter computes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput

from .injection import InjectedRun
from .modeling_base import UniHyperLoraPreTrainedModel
from .stream import StreamRun


@dataclass
class UniHyperLoraOutput(BaseModelOutput):
    """``expected_atoms`` and ``active_atoms``: (B, T) mean over the blocks of E[k] and of the atoms in use."""

    expected_atoms: torch.Tensor | None = None
    active_atoms: torch.Tensor | None = None


@dataclass
class UniHyperLoraTokenClassifierOutput(TokenClassifierOutput):
    """``expected_atoms`` and ``active_atoms``: (B, T) mean over the blocks of E[k] and of the atoms in use."""

    expected_atoms: torch.Tensor | None = None
    active_atoms: torch.Tensor | None = None


@dataclass
class UniHyperLoraSequenceClassifierOutput(SequenceClassifierOutput):
    """``expected_atoms`` and ``active_atoms``: (B, T) mean over the blocks of E[k] and of the atoms in use."""

    expected_atoms: torch.Tensor | None = None
    active_atoms: torch.Tensor | None = None


class UniHyperLoraModel(UniHyperLoraPreTrainedModel):
    """The host with the active task's update and no head; returns states."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        word_index: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        task: str | None = None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
    ) -> UniHyperLoraOutput:
        """(B, T) ids, or images for a ViT → states (B, T, d); a stream alone leaves those of its host as they are."""
        run = self.run(
            task,
            attention_mask,
            output_hidden_states,
            task_ids,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            word_index=word_index,
        )
        return UniHyperLoraOutput(last_hidden_state=run.last_hidden_state, **_shared(run))


class UniHyperLoraForTokenClassification(UniHyperLoraPreTrainedModel):
    """A label for each token: a linear head on the canonical states of all knots, or on the stream's features."""

    task_type = "token_classification"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        word_index: torch.Tensor | None = None,
        canonical_states: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        task: str | None = None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
    ) -> UniHyperLoraTokenClassifierOutput:
        """(B, T) ids, labels (B, T) with -100 where none → logits (B, T, C), mean cross-entropy.

        ``word_index`` (B, T) says which word a token belongs to (``words.NO_WORD``: to none), as a prepared tokenizer
        gives it for words; a stream tells words by the ids where it is not given. On the further tokens of a word B-X
        is I-X where there is such a label.

        With ``num_items_in_batch`` the loss is the sum divided by it, so that parts of one batch add up. The stream
        may be given cached ``canonical_states`` (B, W, K, D) instead of ids; attention mask, labels and logits are
        then those of words, (B, W) and (B, W, C).

        ``task_ids``, B names of tasks or (B,) numbers of them in ``list(config.tasks)``, makes every sentence one of
        its own task. C is then the most labels that one of them has; other tasks have -inf for labels beyond theirs.
        """
        run = self.run(
            task,
            attention_mask,
            output_hidden_states,
            task_ids,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            word_index=word_index,
            canonical_states=canonical_states,
        )
        logits = run.token_logits()
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)
        return UniHyperLoraTokenClassifierOutput(loss=loss, logits=logits, **_shared(run))


class UniHyperLoraForSequenceClassification(UniHyperLoraPreTrainedModel):
    """A label for each sequence: a linear head on the mean over its tokens of what the token head reads."""

    task_type = "sequence_classification"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        word_index: torch.Tensor | None = None,
        canonical_states: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        task: str | None = None,
        task_ids: torch.Tensor | Sequence[str] | None = None,
    ) -> UniHyperLoraSequenceClassifierOutput:
        """(B, T) ids, images or cached states, labels (B,) → logits (B, C), mean cross-entropy.

        The loss, and the logits with ``task_ids``, are as for tokens.
        """
        run = self.run(
            task,
            attention_mask,
            output_hidden_states,
            task_ids,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            word_index=word_index,
            canonical_states=canonical_states,
        )
        logits = run.sentence_logits()
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return UniHyperLoraSequenceClassifierOutput(loss=loss, logits=logits, **_shared(run))


def _shared(run: InjectedRun | StreamRun) -> dict[str, torch.Tensor]:
    """What every output has of a run."""
    return {
        "hidden_states": run.hidden_states,
        "expected_atoms": run.expected_atoms,
        "active_atoms": run.active_atoms,
    }


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """(N, C) logits, (N,) labels with -100 ignored → mean over the labelled, or sum / ``num_items``; 0 if none is."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    items = (labels != -100).sum() if num_items is None else torch.as_tensor(num_items, device=logits.device)
    return total / items.clamp_min(1)
