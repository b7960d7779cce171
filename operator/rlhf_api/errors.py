"""The failures a person can meet, as one tree. Each class says whether trying again can help."""

from typing import Literal

FailureClass = Literal["user", "gate", "outOfMemory", "infrastructure", "bug"]
"""user: the input is wrong. gate: a quality threshold was missed. outOfMemory: host or GPU memory ran out.
infrastructure: the store, the node or the network failed. bug: everything else.
Only `outOfMemory` and `infrastructure` are worth another attempt."""

RETRIED: frozenset[FailureClass] = frozenset({"outOfMemory", "infrastructure"})


class RLHFError(Exception):
    """A failure with a class. `str(error)` is one message that says what is wrong and what to do."""

    failure: FailureClass = "bug"


class UserError(RLHFError):
    """The input is wrong: the message names the field or object, the value, and what would be right."""

    failure = "user"


class GateError(RLHFError):
    """A stage finished but its result misses a threshold that the run asked for."""

    failure = "gate"


class OutOfMemoryError(RLHFError):
    """Host or GPU memory ran out."""

    failure = "outOfMemory"


class StoreError(RLHFError):
    """The object store could not be reached or refused; nothing committed is lost."""

    failure = "infrastructure"


class IntegrityError(RLHFError):
    """An artifact's bytes are not those its manifest lists (truncated or altered)."""

    failure = "user"


class TrainingError(RLHFError):
    """Training left the region where it means anything (NaN loss, exploding KL); names the last good checkpoint."""

    failure = "user"
