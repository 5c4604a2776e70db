"""What can stop a run, beyond a plain ValueError for bad input. Imports no torch."""


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite; the weights are still the last finite ones."""
