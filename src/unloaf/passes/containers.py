"""Tensors in what modules take and return: tuples, lists and mappings, one within another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an output, in order; none where something in it may hold one that cannot be replaced.

    >>> len(tensors_in((torch.zeros(1), (torch.zeros(1), {"k": torch.zeros(1)}), None)))
    3
    >>> tensors_in((torch.zeros(1), object()))
    []
    """
    found: list[Tensor] = []
    return found if _collect(value, found) else []


def _collect(value: Any, found: list[Tensor]) -> bool:
    if isinstance(value, Tensor):
        found.append(value)
        return True
    items = _items(value)
    return isinstance(value, _PLAIN) if items is None else all(_collect(item, found) for item in items)


def version_of(tensor: Tensor) -> int:
    """How often it has been changed in place; torch lets nobody change what was made in inference mode.

    >>> version_of(torch.zeros(2).add_(1))
    1
    """
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def unchanged(value: Any, name: str) -> Iterator[None]:
    """Raise ValueError afterwards if a tensor of a batch was changed in place by what was called `name`.

    >>> with unchanged(batch := torch.zeros(2), "loss"):
    ...     batch + 1
    tensor([1., 1.])
    """
    before = [(tensor, version_of(tensor)) for tensor in tensors_in(value)]
    yield
    if any(version_of(tensor) != version for tensor, version in before):
        raise ValueError(f"{name} changed the batch that it was given in place, and other passes see it; copy it first")


def with_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with other tensors.

    >>> with_tensors([torch.tensor(1.0), {"k": torch.tensor(2.0)}, "text"], lambda tensor: tensor + 1)
    [tensor(2.), {'k': tensor(3.)}, 'text']
    """
    if isinstance(value, Tensor):
        return replace(value)
    items = _items(value)
    if items is None:
        return value
    made = [with_tensors(item, replace) for item in items]
    kind: Any = type(value)
    if isinstance(value, dict):
        named = dict(zip(value, made, strict=True))
        return kind(**named) if is_dataclass(value) else kind(named)
    return kind(*made) if hasattr(value, "_fields") else kind(made)


def _items(value: Any) -> Iterable[Any] | None:
    """What a container holds; None for anything else."""
    # An output of transformers is an OrderedDict and a dataclass.
    if isinstance(value, dict) and (type(value) in (dict, OrderedDict) or is_dataclass(value)):
        return value.values()
    return value if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")) else None
