"""The Trainer of UniHyperLoRA: budget loss, a learning rate per part, checkpoints with the adapter only."""

import logging
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import HubStrategy

from modeling_unihyperlora.errors import AdapterFileError, ConfigError, HubError, first_line
from modeling_unihyperlora.hosts import NoHost, describe_host
from modeling_unihyperlora.measure.accounting import PARTS, check_budget, part_of
from modeling_unihyperlora.publish.card import write_card
from modeling_unihyperlora.publish.hub import Push, create_repository, push_folder
from modeling_unihyperlora.sites import is_among
from modeling_unihyperlora.storage import LATENTS_NAME, load_latents, save_latents

from .first_candidate import StartIsACandidate
from .interruption import resumable
from .launching import fill_in_frozen, whole
from .searchable import SearchableTrainer
from .sources import Source, SourceStates
from .state_cache import StreamCollator
from .stored_data import StoredRows, StoredSource
from .training_args import UniHyperLoraTrainingArguments
from .unusable import check_adapter_trainer, check_noise, check_optimizer, check_pathway

logger = logging.getLogger(__name__)


class UniHyperLoraTrainer(SearchableTrainer):
    """Trains a UniHyperLoRA model with L = L_task + λ_F·E[k] + λ_Q·‖δθ‖².

    E[k] is the mean over the batch's labelled tokens (sentences in sequence classification). A stream has no router,
    so it has no E[k]. The reader of a stream has dropout, and it reads each sentence twice in a step. The loss then
    has one more term: ``consistency`` times the mean of ½·(KL(p‖q) + KL(q‖p)), where p and q are the predictions of
    the two passes (R-Drop, Liang et al. 2021). With gradient accumulation and several processes, every term is
    normalised over the whole batch: the loss does not depend on how a batch is split. ``task_loss``,
    ``lambda_q_loss``, for a stream ``consistency_loss`` and, for an injected update, ``lambda_f_loss`` are logged
    separately.

    Args:
        model: a UniHyperLoRA model.
        args: training arguments.
        sources: hosts to train a task of a stream on; the model's own host comes first.
        **kwargs: passed to ``Trainer``. Data sets of stored states (``stored_data``) need no ``sources`` and no
            ``data_collator``.

    Raises:
        DataError: stored states are of another space.
        BudgetError: the weights file or the multiply-adds exceed the budget; raised before training.
        ConfigError: an argument cannot be honoured; raised before training.
    """

    args: UniHyperLoraTrainingArguments

    def __init__(
        self,
        model=None,
        args: UniHyperLoraTrainingArguments | None = None,
        sources: list[Source] | None = None,
        **kwargs,
    ):
        if isinstance(kwargs.get("train_dataset"), StoredRows):
            sources = [StoredSource(kwargs["train_dataset"])]
            kwargs["train_dataset"] = SourceStates(sources)
        self.sources = sources or []
        if self.sources and kwargs.get("model_init") is not None:
            raise ConfigError(
                "sources belong to one model, but model_init makes a new model for every trial. Search a stream with "
                "--do_search, which starts a separate run for each trial."
            )
        for data in (*(source.data for source in self.sources), kwargs.get("eval_dataset")):
            if isinstance(data, StoredRows):
                data.check_space(model.adapter.space)
                kwargs.setdefault("data_collator", StreamCollator())
        self._trains = kwargs.get("train_dataset") is not None  # the checks of training do not apply to scoring
        self.args = args = args or UniHyperLoraTrainingArguments("tmp_trainer")  # as the Trainer does
        check_adapter_trainer(args, self._trains, bool(self.sources))
        if self._trains:
            check_noise(args, bool(self.sources), not all(isinstance(x, StoredSource) for x in self.sources))
        if model is not None:
            self.make_ready(model)
        super().__init__(model=model, args=args, **kwargs)
        if args.load_best_model_at_end and args.train_scope == "delta":
            self.add_callback(StartIsACandidate(self))
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_updates, self._noted_update = 0, -1
        self._active = [0.0, 0]

    def make_ready(self, model) -> None:
        """Check a model and set its train scope.

        Raises:
            BudgetError: the model is over budget.
            ConfigError: an argument is for the other pathway, or only δθ is to be trained but the task's reader is
                new.
        """
        if self._trains:
            check_pathway(self.args, model)
            check_budget(model, self.args.max_adapter_bytes, self.args.max_flops_overhead_pct)
        model.set_train_scope(self.args.train_scope)

    # ---- loss ----

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        twice = self.sources and self.args.train_scope == "task" and self.args.consistency > 0 and model.training
        if twice:  # dropout differs between the two copies of a sentence
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
            num_items_in_batch = None if num_items_in_batch is None else 2 * num_items_in_batch
        labelled = inputs["labels"] != -100  # before the Trainer removes the labels for label smoothing
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        items = labelled.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        items, across = items.to(loss.device).clamp_min(1), self._processes_in(num_items_in_batch)
        own = self.unwrapped.adapter.tasks[self.unwrapped.config.active_task]
        shares = {"lambda_q_loss": self.args.lambda_q * own.delta().square().sum() * labelled.sum()}
        if self.unwrapped.config.pathway == "inject":
            atoms, active = outputs["expected_atoms"], outputs["active_atoms"]
            if labelled.dim() == 1:  # one label a sentence: the mean over its tokens
                real = inputs.get("attention_mask", torch.ones_like(atoms)).to(atoms.dtype)
                atoms, active = ((x * real).sum(dim=1) / real.sum(dim=1).clamp_min(1) for x in (atoms, active))
            shares["lambda_f_loss"] = self.args.lambda_f * (atoms * labelled).sum()
            if not model.training:
                self._active[0] += float((active * labelled).sum())
                self._active[1] += int(labelled.sum())
        if twice:
            shares["consistency_loss"] = self.args.consistency * _disagreement(outputs["logits"], labelled)
        terms = {name: across * share / items for name, share in shares.items()}
        if model.training:
            self._note_losses({"task_loss": loss, **terms})
        loss = loss + sum(terms.values())
        return (loss, outputs) if return_outputs else loss

    def _processes_in(self, num_items_in_batch) -> int:
        """Factor that undoes the launcher's mean over processes, if ``num_items_in_batch`` counts all their items."""
        counted_over_all = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes if counted_over_all else 1

    @property
    def unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Training data of a stream: a task is trained with noise and copies of the sources, δθ without either."""
        if self.sources:
            trains_task = self.args.train_scope == "task"
            self.train_dataset.fidelity = self.args.fidelity if trains_task else 1.0
            self.train_dataset.copy_fidelity = self.args.copy_fidelity
            self.train_dataset.copy_share = self.args.copy_share
            for source in self.sources if trains_task and self.args.copy_share else ():
                source.line_up_copies()
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.sources:
            return super()._get_train_sampler(train_dataset)
        return self.train_dataset.sampler(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    # ---- logging ----

    def _note_losses(self, terms: dict[str, torch.Tensor]) -> None:
        for name, value in terms.items():
            self._loss_sums[name] = self._loss_sums.get(name, 0.0) + value.detach()
        if self.state.global_step != self._noted_update:  # several micro-batches may make one update
            self._loss_updates, self._noted_update = self._loss_updates + 1, self.state.global_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loss_updates:
            for name, total in self._loss_sums.items():
                logs[name] = float(self.accelerator.gather(total).mean()) / self._loss_updates
            self._loss_sums, self._loss_updates = {}, 0
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Adds ``<prefix>_active_atoms_per_token``: number of used atoms, averaged over labelled tokens and blocks."""
        self._active = [0.0, 0]
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor(self._active, device=self.args.device)
        active, items = self.accelerator.reduce(sums, reduction="sum").tolist()
        if items:
            output.metrics[f"{metric_key_prefix}_active_atoms_per_token"] = active / items
        return output

    # ---- optimiser ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser with a parameter group for each part of the adapter, with and without weight decay.

        The groups hold only parameters that the train scope trains. With ``optimizer_cls_and_kwargs``, its "lr"
        replaces ``learning_rate``, if given.
        """
        if self.optimizer is None:
            adapter = self.unwrapped.adapter
            prefix = "adapter."
            decayed = set(self.get_decay_parameter_names(self.unwrapped))
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in adapter.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((part_of(name), prefix + name in decayed), []).append(parameter)
            optimizer_class, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.unwrapped
            )
            check_optimizer(optimizer_class, kwargs)
            parts = [
                {
                    "params": groups[part, decay],
                    "lr": self.args.learning_rate_of(part, kwargs.get("lr")),
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for part, decay in sorted(groups, key=lambda group: (PARTS.index(group[0]), group[1]))
            ]
            try:
                self.optimizer = optimizer_class(parts, **kwargs)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"The optimiser {optimizer_class.__name__} does not accept its settings ({first_line(error)}). "
                    "Correct optim_args or optimizer_cls_and_kwargs, the learning rates or the weight decay."
                ) from error
        return self.optimizer

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ``Trainer.train``."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = resumable(self.args.output_dir)
        if resume_from_checkpoint and not Path(resume_from_checkpoint, LATENTS_NAME).is_file():
            self._load_from_checkpoint(resume_from_checkpoint)  # raises the error before training
        if self.model_init is None:
            config, model = self.unwrapped.config, self.unwrapped
            task = config.tasks[config.active_task]
            task["trained"] = True  # its reader and head are no longer new
            if model.injection is None and self.args.train_scope == "delta":
                task.pop("refined", None)
                refined = model.stream.refined if model.stream else None
                task |= {"refined": refined} if refined else {}  # δθ needs this map
            elif isinstance(model.host, NoHost):
                read_by = [host for source in self.sources for host in source.hosts]
                known = {host["fingerprint"] for host in config.source_hosts}
                config.source_hosts += [host for host in read_by if host["fingerprint"] not in known]
            else:
                blocks = (model.injection.map if model.injection else model.stream.words).num_layers
                if not is_among(model.host, blocks, config.source_hosts):
                    config.source_hosts.append(describe_host(model.host, config.base_model_name_or_path, blocks))
        if self.is_deepspeed_enabled:
            self.unwrapped.register_load_state_dict_pre_hook(fill_in_frozen)
        if resume_from_checkpoint and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_from_checkpoint(resume_from_checkpoint)  # before the weights are sharded
        self._loss_sums, self._loss_updates, self._noted_update = {}, 0, -1
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter's folder; a checkpoint gets only two of its files, and the latents needed to resume."""
        folder = Path(output_dir or self.args.output_dir)
        with whole(self.unwrapped.adapter):
            if not self.args.should_save:
                return
            if self._saves_checkpoint:
                self.unwrapped.save_files(folder)
                save_latents(self.unwrapped.adapter, folder / LATENTS_NAME)
            else:
                self.unwrapped.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save without the host's weights, which DeepSpeed and FSDP would otherwise write too."""
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            save_fsdp_optimizer(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
            )
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint into the adapter; skipped for a ``model`` wrapped by FSDP, which ``train`` has loaded."""
        if model is not None:
            return
        path = Path(resume_from_checkpoint) / LATENTS_NAME
        if not path.is_file():
            raise AdapterFileError(
                f"Training cannot resume from {resume_from_checkpoint}: it has no {LATENTS_NAME}. Give a "
                "checkpoint-<step> folder that training wrote."
            )
        load_latents(self.unwrapped.adapter, path)

    def _load_best_model(self) -> None:
        with whole(self.unwrapped.adapter):
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before training, so that a wrong name or token fails at once."""
        if self.is_world_process_zero():
            own = {"token": token or self.args.hub_token, "private": self._private(private)}
            self.hub_model_id = create_repository(self._repo_id, **own)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts,
    ) -> Push | None:
        """Save the adapter and push it, without tokenizer, arguments or checkpoints.

        Args:
            commit_message, token, revision, private: as for ``Trainer``.
            blocking: has no effect; the push always blocks.
            **facts: ``base_model_name_or_path`` and the facts of ``hub.push_folder`` for the card.

        Returns:
            What was pushed; None in all processes but the main one.

        Raises:
            HubError: the push failed; the repository is unchanged.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return push_folder(
            self.args.output_dir,
            self._repo_id,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self._private(private),
            **facts,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the current adapter if ``hub_strategy="every_save"``; training continues if the push fails."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        own = {"token": self.args.hub_token, "revision": self.args.hub_revision, "private": self._private(None)}
        message = f"Training in progress, step {self.state.global_step}"
        try:
            push_folder(checkpoint_folder, self._repo_id, commit_message=message, **own)
        except HubError as error:
            logger.warning("%s Training continues.", error)

    def create_model_card(self, **facts) -> None:
        """Write the adapter's model card to the output folder; see ``card.write_card``."""
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir), **facts)

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _private(self, private: bool | None) -> bool | None:
        return self.args.hub_private_repo if private is None else private


def _disagreement(logits: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
    """Sum of KL(p‖q) + KL(q‖p) over labelled words or sentences; p and q are the first and second half of a batch."""
    one, two = labelled.chunk(2)
    first, second = logits.float().log_softmax(dim=-1).chunk(2)
    first, second = first[one], second[two]
    return ((first.exp() - second.exp()) * (first - second)).sum()
