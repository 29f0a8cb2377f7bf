"""The tokenizer of a host, as every kind of data reads it."""

import json

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_unihyperlora.errors import DataError


def load_tokenizer(name_or_path: str, **kwargs) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a host, which pads on the right and sees a word alike wherever it stands in a sentence.

    Args:
        name_or_path: Hub id or folder.
        **kwargs: ``revision``, ``cache_dir``, ``token``, ``trust_remote_code``.

    Raises:
        DataError: it cannot be loaded or has no fast version.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise DataError(
            f"No tokenizer can be loaded from '{name_or_path}' ({str(error).strip().splitlines()[0]}). "
            "Name one with --tokenizer_name."
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} of '{name_or_path}' is a slow tokenizer, which cannot say to which word a "
            "sub-token belongs. Use a host with a tokenizer.json, or name one with --tokenizer_name."
        )
    _keep_words_apart(tokenizer)
    tokenizer.padding_side = "right"  # the positions of a window's words count from the left
    return tokenizer


def _keep_words_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a byte-level tokenizer see every given word as one that follows a space; others do so already."""
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    first = state["pre_tokenizer"] or {}
    byte_level = [step for step in first.get("pretokenizers", [first]) if step.get("type") == "ByteLevel"]
    for step in byte_level:
        step["add_prefix_space"] = True
    if byte_level:
        backend.pre_tokenizer = type(backend).from_str(json.dumps(state)).pre_tokenizer
