"""Nothing lost: SIGTERM saves before it leaves, and only a checkpoint that was written to its end is resumed from.

transformers' own --enable_jit_checkpoint waits three seconds, may save in the middle of a step, and lets the script
go on as if training had come to its end; so it is not used.
"""

import json
import logging
import signal
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

EXIT_STATUS = 128 + signal.SIGTERM  # a shell's word for a process that SIGTERM ended


class SaveOnSigterm(TrainerCallback):
    """After SIGTERM: ends the step, saves a checkpoint, and leaves with status 143.

    Outside of the steps (before the first one, or while the result is written) SIGTERM ends the process at once.
    All processes of a launch stop at the same step, whichever of them was told.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.asked = False
        self._before = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked = False
        try:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # a thread that is not the main one gets no signals
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
            logger.warning("Saved checkpoint-%d; --resume_from_checkpoint true goes on from it.", state.global_step)
            self.trainer.accelerator.wait_for_everyone()
            raise SystemExit(EXIT_STATUS)

    def restore(self) -> None:
        """Give SIGTERM back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


class SafeTrainer(Trainer):
    """A ``Trainer`` that SIGTERM makes save, and that resumes from complete checkpoints only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._on_sigterm = SaveOnSigterm(self)
        self.add_callback(self._on_sigterm)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ``Trainer.train``; True is the last complete checkpoint, or the beginning where there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = resumable(self.args.output_dir)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._on_sigterm.restore()

    def _run_epoch(self, *args, **kwargs) -> None:
        """None more where the last step was taken before the run was interrupted; the Trainer would take another."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # what an earlier run left there must not make a half-written one look whole
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the Trainer's state, which says that all is there, comes next


def resumable(folder: str | Path) -> str | None:
    """What to resume from in an output folder; None, with a warning, for the beginning."""
    found = last_complete_checkpoint(folder)
    if found is None:
        logger.warning("There is no complete checkpoint in %s: training starts from the beginning.", folder)
    return found and str(found)


def is_complete(checkpoint: Path) -> bool:
    """Whether it was written to its end: the Trainer's state, which comes last, is there and is that of its step."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return f"{PREFIX_CHECKPOINT_DIR}-{state['global_step']}" == checkpoint.name
    except (OSError, ValueError, KeyError, TypeError):
        return False


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of the most steps in an output folder; None if there is none."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = {int(number): path for path in found if (number := path.name.rpartition("-")[2]).isdigit()}
    for number in sorted(numbered, reverse=True):
        if is_complete(numbered[number]):
            return numbered[number]
        logger.warning("%s was not written to its end; it is passed over.", numbered[number])
    return None
