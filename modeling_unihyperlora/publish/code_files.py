"""Which files of code travel with an adapter."""

# Every file that loading a stream needs, in the order to read them; all lie in one folder and import each other by
# "from .x".
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
# What an injected update needs as well.
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
    """The code that travels with an adapter of a pathway."""
    return STREAM_FILES if pathway == "stream" else STREAM_FILES + INJECTED_FILES
