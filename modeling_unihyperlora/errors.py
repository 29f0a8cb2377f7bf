"""The errors of the package: a base class, and one subclass for each kind of problem that a user can fix."""


class UniHyperLoraError(Exception):
    """Base class of all errors raised on purpose; messages say what was given, what is allowed and what to do."""


class ConfigError(UniHyperLoraError, ValueError):
    """A setting or a run configuration is not usable."""


class HostError(UniHyperLoraError):
    """The host model cannot carry the adapter."""


class AdapterFileError(UniHyperLoraError):
    """An adapter file is missing, damaged, or does not fit its configuration."""


class DataError(UniHyperLoraError):
    """A data set cannot be used as it is."""


class BudgetError(UniHyperLoraError):
    """The adapter exceeds its budget of bytes or of multiply-adds.

    Attributes:
        excess: name of the budget → amount over it; negative if under it.
    """

    def __init__(self, message: str, excess: dict[str, float] | None = None):
        super().__init__(message)
        self.excess = excess or {}


class MergeError(UniHyperLoraError):
    """The update cannot be merged into the host's weights without changing the model's output."""


class HubError(UniHyperLoraError):
    """The adapter cannot be pushed; the repository is unchanged."""


class ExportError(UniHyperLoraError):
    """The adapter cannot be written in another format."""


def first_line(error: Exception) -> str:
    """First line of an error's message, followed by its HTTP status if it has one."""
    status, line = http_status(error), (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :.")
    return line if status is None or str(status) in line else f"{line}: HTTP {status}"


def http_status(error: BaseException | None) -> int | None:
    """HTTP status of the response attached to an error or to one of its causes; None if there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None
