"""The state before the first step as one of the checkpoints that the best is chosen from.

The Trainer's --load_best_model_at_end compares checkpoints that training made. Where training starts from something
that works already, as δθ does on a new host, the start itself has to be among them: else a run that only does harm
ends with the least harmful checkpoint.
"""

from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class StartIsACandidate(TrainerCallback):
    """Evaluates and saves checkpoint-0; a later checkpoint has to be better to be taken instead.

    A resumed run has this behind it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0 or state.best_metric is not None:
            return
        self.trainer._determine_best_metric(self.trainer.evaluate(), trial=None)
        self.trainer._save_checkpoint(self.trainer.model, trial=None)
        # The Trainer takes a best step of 0 for none, so it does not note this itself.
        state.best_model_checkpoint = str(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-0")
