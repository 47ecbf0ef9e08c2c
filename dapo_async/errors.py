"""The one tree of errors this project raises on purpose.

Every class here is a sentence a user can act on; the command line prints it and exits with ``exit_code``.
Anything else that escapes is a bug and keeps its traceback.
"""


class DapoError(Exception):
    """Base of all errors raised on purpose. The message says what, where, and what would be right."""

    exit_code = 1


class ConfigError(DapoError):
    """The configuration, its data or its model files cannot work as given."""

    exit_code = 2


class ProtocolError(DapoError):
    """A message from the wire is not acceptable. ``reason`` is a short word used as a counter's name."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class WeightsError(DapoError):
    """A set of weights does not match its digest, its names or its shapes."""


class StallError(DapoError):
    """A named wait passed its deadline or its limit. The message says who waited, for what, and for how long."""


class WorkerError(DapoError):
    """Workers ended more often than they may be restarted, or none could start."""


class SaveError(DapoError):
    """A checkpoint could not be written. Nothing of it is left, and earlier ones are as they were."""


class CheckpointError(DapoError):
    """A checkpoint is missing, incomplete, or does not belong to this configuration."""

    exit_code = 2
