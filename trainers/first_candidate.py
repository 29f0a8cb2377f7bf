"""Makes the state before the first step a candidate for the best checkpoint.

The Trainer's --load_best_model_at_end compares only checkpoints that training wrote. When the starting point already
works, as with δθ on a new host, it must be a candidate too. Otherwise a run that only makes the model worse would end
with the least bad checkpoint.
"""

from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class StartIsACandidate(TrainerCallback):
    """Evaluates and saves checkpoint-0 at the start of training; a resumed run skips this."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0 or state.best_metric is not None:
            return
        self.trainer._determine_best_metric(self.trainer.evaluate(), trial=None)
        self.trainer._save_checkpoint(self.trainer.model, trial=None)
        # The Trainer reads a best step of 0 as "no best step", so it does not set this itself.
        state.best_model_checkpoint = str(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-0")
