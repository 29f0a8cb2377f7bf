"""The errors of the package: one base class, one sub-class for each thing a user can put right."""


class UniHyperLoraError(Exception):
    """Base of every error raised on purpose; the message says what was given, what is allowed, what to do."""


class ConfigError(UniHyperLoraError, ValueError):
    """A setting or a run configuration is not usable."""


class HostError(UniHyperLoraError):
    """The host model cannot carry the adapter."""


class AdapterFileError(UniHyperLoraError):
    """An adapter file is missing, damaged, or does not fit its configuration."""


class DataError(UniHyperLoraError):
    """A data set cannot be used as it is."""


class BudgetError(UniHyperLoraError):
    """The adapter would not stay inside its budget of bytes or of multiply-adds.

    Attributes:
        excess: what is over (or, below zero, under) the budget, by name.
    """

    def __init__(self, message: str, excess: dict[str, float] | None = None):
        super().__init__(message)
        self.excess = excess or {}


class MergeError(UniHyperLoraError):
    """The update cannot be folded into the host's weights without changing what the model computes."""


class HubError(UniHyperLoraError):
    """The adapter cannot be pushed; what the repository had before is still there."""


class ExportError(UniHyperLoraError):
    """The adapter cannot be written in another format."""


def first_line(error: Exception) -> str:
    """What an error says, in one line; other libraries say it in many. With the HTTP status behind it, if any."""
    status, line = http_status(error), (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :.")
    return line if status is None or str(status) in line else f"{line}: HTTP {status}"


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or what caused it, had for an answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None
