"""An adapter as a folder that loads anywhere: its code travels beside its weights.

Saving needs nothing but these files. Pushing, model cards and exports are in the installed package only
(``hub.py``, ``card.py``, ``export.py``), so that the code which travels with an adapter stays small to read.
"""

import importlib
import json
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

from .errors import UniHyperLoraError
from .storage import replacing, save_adapter

# Every file that loading needs, in the order to read them; all lie in one folder and import each other by "from .x".
CODE_FILES = (
    "errors.py",
    "configuration_unihyperlora.py",
    "words.py",
    "modeling_unihyperlora.py",
    "modeling_base.py",
    "tuning.py",
    "publishing.py",
    "untrusted.py",
    "storage.py",
    "hosts.py",
    "layouts.py",
    "hold.py",
    "adapter.py",
    "routing.py",
    "mixed_tasks.py",
    "quantization.py",
    "projectors.py",
    "host_bound.py",
    "injection.py",
    "anchors.py",
    "calibration.py",
    "stream.py",
    "token_mixer.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_unihyperlora.UniHyperLoraConfig",
    "AutoModel": "modeling_unihyperlora.UniHyperLoraModel",
    "AutoModelForTokenClassification": "modeling_unihyperlora.UniHyperLoraForTokenClassification",
    "AutoModelForSequenceClassification": "modeling_unihyperlora.UniHyperLoraForSequenceClassification",
}


def copy_code(folder: Path) -> None:
    """Put the code that loads an adapter into its folder, each file whole or not at all."""
    for name in CODE_FILES:
        with replacing(Path(folder) / name) as temporary:
            shutil.copyfile(Path(__file__).with_name(name), temporary)


def from_package(module: str, what: str) -> ModuleType:
    """A module of the installed package.

    Raises:
        UniHyperLoraError: it is not installed; this code came with an adapter.
    """
    try:
        return importlib.import_module(f"modeling_unihyperlora.{module}")
    except ImportError as error:
        raise UniHyperLoraError(
            f"{what} needs the package ({error}); the code that came with this adapter only loads and saves. Run: "
            "pip install unihyperlora"
        ) from error


class Publishing:
    """What a model can do with itself: save, push, and leave for other formats."""

    def save_files(self, folder: str | Path) -> None:
        """``config.json`` and ``model.safetensors`` alone, as checkpoints have them.

        Raises:
            AdapterFileError: values are not finite or the folder cannot be written; what was there stays.
        """
        self.config.architectures = [type(self).__name__]
        content = json.loads(self.config.to_json_string(use_diff=False))
        save_adapter(self.adapter, content | {"auto_map": AUTO_MAP}, Path(folder))

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write the adapter and its heads, the code that loads them, the licence and a model card; no host tensor.

        A README.md that was written by hand is left as it is.

        Args:
            save_directory: the folder; made if needed.
            **kwargs: arguments that transformers passes to every model; ``is_main_process`` and ``push_to_hub`` with
                ``repo_id`` and the arguments of ``push_to_hub`` are honoured.

        Raises:
            AdapterFileError: values are not finite or the folder cannot be written; what was there stays.
            HubError: it cannot be pushed.
        """
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        self.save_files(folder)
        copy_code(folder)
        try:
            card = from_package("card", "A model card")
        except UniHyperLoraError:
            pass  # code from a repository: its card and licence stay with the repository
        else:
            card.write_licence(folder)
            card.write_card(folder)
        if kwargs.get("push_to_hub", False):
            names = ("commit_message", "private", "token", "revision", "create_pr")
            push = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            repo_id = kwargs.get("repo_id") or folder.absolute().name
            from_package("hub", "Pushing").push_folder(folder, repo_id, **push)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        base_model_name_or_path: str | None = None,
        **kwargs,
    ) -> str:
        """Push weights, configuration, code, card and licence as one commit, and nothing else.

        Args:
            repo_id: "user/name", or a name under the user who is logged in.
            private: of a repository that is made here; the account's default when None.
            token: for the Hub, if not the one logged in with.
            revision: branch to push to; made if needed.
            create_pr: propose a pull request instead.
            base_model_name_or_path: Hub id of the adapter's host, where it was loaded from a folder.
            **kwargs: other arguments that transformers passes to every model.

        Returns:
            The URL of the commit.

        Raises:
            HubError: it cannot be pushed; what the repository had is untouched.
        """
        hub = from_package("hub", "Pushing")
        with tempfile.TemporaryDirectory() as folder:
            self.save_files(Path(folder))
            push = hub.push_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                base_model_name_or_path=base_model_name_or_path,
            )
        return push.url

    # ---- ways out ----

    def merge_and_save(self, folder: str | Path, tokenizer=None) -> None:
        """A stock transformers encoder with the active task's update in its weights; see ``export.merge_and_save``."""
        from_package("export", "Exporting").merge_and_save(self, folder, tokenizer)

    def export_lora(self, folder: str | Path, rank: int) -> dict[str, float]:
        """The active task's update as a PEFT LoRA folder, and how far it is off; see ``export.export_lora``."""
        return from_package("export", "Exporting").export_lora(self, folder, rank)

    def export_onnx(self, path: str | Path) -> None:
        """Host and adapter as one ONNX file; see ``export_onnx.export_onnx``."""
        from_package("export_onnx", "Exporting").export_onnx(self, path)
