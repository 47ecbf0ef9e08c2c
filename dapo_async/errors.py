"""The one tree of errors this project raises on purpose.

Every class here is a sentence a user can act on; the command line prints it and exits with ``exit_code``.
Anything else that escapes is a bug and keeps its traceback.
"""


def one_line(text: str, limit: int = 500) -> str:
    """A stranger's ``text`` as it may stand in one line of a log: cut, a question mark for what is not printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:limit])


class DapoError(Exception):
    """Base of all errors raised on purpose. The message says what, where, and what would be right."""

    exit_code = 1


class ConfigError(DapoError):
    """The configuration, its data or its model files cannot work as given."""

    exit_code = 2


class ProtocolError(DapoError):
    """A message from the wire is not acceptable. ``reason`` is a short word used as a counter's name.

    ``key`` says which lease a group claimed to answer, (kind, number), where that could be read.
    """

    def __init__(self, reason: str, detail: str, key: tuple[str, int] | None = None) -> None:
        self.detail = one_line(detail, 2000)  # a peer may have chosen parts of it
        super().__init__(f"{reason}: {self.detail}")
        self.reason = reason
        self.key = key


class WeightsError(DapoError):
    """A set of weights does not match its digest, its names or its shapes."""


class MismatchError(DapoError):
    """Workers and learner give different log-probs to the same tokens under the same weights."""


class StallError(DapoError):
    """A named wait passed its deadline or its limit. The message says who waited, for what, and for how long."""


class WorkerError(DapoError):
    """Workers ended more often than they may be restarted, or none could start."""


class SaveError(DapoError):
    """A checkpoint could not be written. Nothing of it is left, and earlier ones are as they were."""


class CheckpointError(DapoError):
    """A checkpoint is missing, incomplete, or does not belong to this configuration."""

    exit_code = 2


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is incomplete or not what was written; another one of the run may be whole."""
