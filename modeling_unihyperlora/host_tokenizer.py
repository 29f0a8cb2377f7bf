"""The tokenizer of an adapter is that of its host: ``AutoTokenizer`` and ``pipeline`` find it through this class."""

from transformers import PreTrainedConfig

from .errors import HostError
from .hosts import load_host_tokenizer


class HostTokenizer:
    """What ``AutoTokenizer`` uses for an adapter; registered with its configuration."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        revision: str | None = None,
        **kwargs,
    ):
        """The fast tokenizer of the host that the adapter names, or of another.

        Args:
            pretrained_model_name_or_path: the adapter's folder or Hub id.
            base_model_name_or_path: another host, as for the model.
            base_model_revision: its revision.
            revision: of the adapter.
            **kwargs: ``cache_dir``, ``token``, ``local_files_only``, ``subfolder``; what else ``AutoTokenizer`` passes
                is for tokenizers with files of their own.

        Raises:
            HostError: no host is named, or its tokenizer cannot be loaded.
        """
        hub = {name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if kwargs.get(name)}
        if base_model_name_or_path is None:
            where = {"revision": revision, "subfolder": kwargs.get("subfolder") or ""}
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **where, **hub)
            base_model_name_or_path = config.get("base_model_name_or_path")
            base_model_revision = config.get("base_model_revision")
        if not base_model_name_or_path:
            raise HostError(
                f"The adapter '{pretrained_model_name_or_path}' does not say which host to use, so it has no "
                "tokenizer either. Pass tokenizer= and base_model_name_or_path='a Hub id or a folder'."
            )
        return load_host_tokenizer(base_model_name_or_path, revision=base_model_revision, **hub)
