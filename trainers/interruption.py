"""Interrupted training: SIGTERM saves a checkpoint before the process exits; only complete checkpoints are resumed.

transformers has --enable_jit_checkpoint for this. It is not used here: it waits three seconds, may save in the middle
of a step, and lets the script continue as if training were finished.
"""

import json
import logging
import re
import signal
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_unihyperlora.errors import ConfigError, UniHyperLoraError, first_line

from .unusable import check_trainer

logger = logging.getLogger(__name__)

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports for a process that SIGTERM ended


class SaveOnSigterm(TrainerCallback):
    """After SIGTERM: finishes the step, saves a checkpoint, and exits with status 143.

    Outside training steps (before the first step, or while results are written) SIGTERM ends the process at once. All
    processes of a launch stop at the same step, whichever process received the signal.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.asked = False
        self._before = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # only the main thread can receive signals
            self._before = None

    def _ask(self, number, frame):
        logger.warning("SIGTERM: saving after this step")
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            if self.asked:
                accelerator.set_trigger()
            self.asked = accelerator.check_trigger()
        if self.asked:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.asked:
            logger.warning("Saved checkpoint-%d; --resume_from_checkpoint true resumes from it.", state.global_step)
            self.trainer.accelerator.wait_for_everyone()
            raise SystemExit(EXIT_STATUS)

    def restore(self) -> None:
        """Restore the earlier handler of SIGTERM."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


class SafeTrainer(Trainer):
    """A ``Trainer`` that saves at SIGTERM, resumes from complete checkpoints only, and ignores no argument.

    Raises:
        ConfigError: an argument cannot be honoured; raised before anything is written.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs):
        args = args or TrainingArguments("tmp_trainer")  # as the Trainer does
        check_trainer(args, model, kwargs.get("train_dataset"))
        try:
            super().__init__(model=model, args=args, **kwargs)
        except UniHyperLoraError:
            raise
        except (ValueError, ImportError) as error:  # arguments that contradict each other
            raise ConfigError(f"The Trainer cannot be set up: {' '.join(str(error).split())}") from error
        self._saves_checkpoint = False
        self._on_sigterm = SaveOnSigterm(self)
        self.add_callback(self._on_sigterm)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ``Trainer.train``; True resumes from the last complete checkpoint, or starts anew if there is none."""
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):  # the Trainer would, and warn of new tokens
            if (own := getattr(self.processing_class, name, None)) is not None:
                setattr(self.model.config.get_text_config(), name, own)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = resumable(self.args.output_dir)
        if resume_from_checkpoint and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_training_state(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._on_sigterm.restore()

    def _run_epoch(self, *args, **kwargs) -> None:
        """Run an epoch, unless the interrupted run had taken its last step: the Trainer would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # an earlier run's state must not make a half-written checkpoint look complete
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saves_checkpoint = False

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"lr_scheduler_type {self.args.lr_scheduler_type.value} does not accept its settings "
                f"({first_line(error)}). Correct lr_scheduler_kwargs, or choose another scheduler, such as linear."
            ) from error

    def _issue_warnings_after_load(self, load_result) -> None:
        """Refuse a checkpoint with tensors that this model does not have; transformers only warns."""
        if load_result.unexpected_keys:
            raise ConfigError(
                "The checkpoint belongs to another model or --method: it holds tensors that this model does not have "
                f"({', '.join(load_result.unexpected_keys[:3])}). Give a checkpoint that this run wrote."
            )
        super()._issue_warnings_after_load(load_result)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            known = ", ".join(sorted(name.removeprefix("eval_") for name in metrics if name.startswith("eval_")))
            raise ConfigError(
                f"The evaluation does not report metric_for_best_model {self.args.metric_for_best_model}. Choose one "
                f"of: {known}."
            ) from error

    def _get_dataloader(self, dataset, description: str, *args, is_training: bool = False, **kwargs) -> DataLoader:
        """As in ``Trainer``, but dataloader_drop_last applies to training only: evaluation reads all data."""
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = asked and is_training
        try:
            return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the Trainer's state comes next; it marks a complete checkpoint


def resumable(folder: str | Path) -> str | None:
    """The last complete checkpoint in an output folder; None, with a warning, if there is none."""
    found = last_complete_checkpoint(folder)
    if found is None:
        logger.warning("There is no complete checkpoint in %s: training starts from the beginning.", folder)
    return found and str(found)


def step_of(checkpoint: Path) -> int | None:
    """The step at which a checkpoint was saved, whatever its folder's name; None if it is incomplete.

    The step is in the Trainer's state. That file is written last, and deleted before a checkpoint is overwritten.
    """
    try:
        step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int and step >= 0 else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written completely."""
    return step_of(checkpoint) is not None


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in an output folder; None if there is none.

    A renamed checkpoint is recognised by the scheduler's state, which the folder of a finished run does not have.
    """
    folders = sorted(path for path in Path(folder).glob("*") if path.is_dir())
    named = {path for path in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)}
    found = [path for path in folders if path in named or (path / SCHEDULER_NAME).is_file()]
    steps = {path: step for path in found if (step := step_of(path)) is not None}
    for path in sorted(named - steps.keys()):
        logger.warning("%s is incomplete and is skipped.", path)
    return max(steps, key=steps.get, default=None)


def check_training_state(checkpoint: Path) -> None:
    """Raise ``ConfigError`` if a checkpoint lacks the state of the optimiser or the scheduler.

    The Trainer would silently start both anew.
    """
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).is_file()]
    if checkpoint.is_dir() and missing:
        raise ConfigError(
            f"Training cannot resume from {checkpoint}: it has no {' and no '.join(missing)}, as with "
            "save_only_model. Give another checkpoint, or start a new run from its adapter (--adapter)."
        )
