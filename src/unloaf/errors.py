"""What can stop a run, beyond a plain ValueError for bad input. Imports no torch."""

from collections.abc import Mapping


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite; the weights are still the last finite ones.

    Attributes:
        terms: the loss terms of that step by name, in nats.
    """

    def __init__(self, message: str, *, terms: Mapping[str, float]) -> None:
        super().__init__(message)
        self.terms = dict(terms)


class NonFiniteWeightsError(FloatingPointError):
    """A weight became NaN or infinite; the last checkpoint is from before."""


class CheckpointError(Exception):
    """A checkpoint cannot be written, or what is on the disk is not what was written.

    >>> from unloaf import CheckpointError
    >>> raise CheckpointError("state.json: has 4,096 of 8,192 bytes")
    Traceback (most recent call last):
    unloaf.errors.CheckpointError: state.json: has 4,096 of 8,192 bytes
    """


class DiskFullError(OSError):
    """There is no room for a file; what was there before is intact."""


class StoppedError(Exception):
    """A signal ended the run between two steps; its checkpoint is written.

    Attributes:
        code: exit code of the process, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


def in_one_line(error: Exception) -> str:
    """First line of an error, at most 300 letters, after its class unless it is a ValueError.

    Whole, that of a C++ compiler filled a thousand lines.

    >>> in_one_line(KeyError("layer4"))
    "KeyError: 'layer4'"
    """
    first = next(iter(str(error).strip().splitlines()), "")[:300]
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
