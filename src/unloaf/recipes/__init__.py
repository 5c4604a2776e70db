"""Functions that return a full Config; the docstring states result, hardware and cost."""
