"""The code files that are published with an adapter."""

# The files that loading a stream needs, in reading order. They are in one folder and import each other as ".x".
STREAM_FILES = (
    "errors.py",
    "configuration_unihyperlora.py",
    "modeling_unihyperlora.py",
    "words.py",
    "space.py",
    "reader.py",
    "hosts.py",
    "storage.py",
)
# The files that an injected update needs in addition.
INJECTED_FILES = (
    "injected.py",
    "injected_configuration.py",
    "injection.py",
    "injected_adapter.py",
    "projectors.py",
    "routing.py",
    "mixed_tasks.py",
    "sat_lora.py",
    "sites.py",
    "layouts.py",
)


def code_files(pathway: str) -> tuple[str, ...]:
    """Names of the code files that are published with an adapter of a pathway."""
    return STREAM_FILES if pathway == "stream" else STREAM_FILES + INJECTED_FILES
