"""What a forward pass reads and changes beside its input: buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Held(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor
    version: int
    copy: Tensor

    @property
    def now(self) -> Tensor | None:
        return self.module._buffers.get(self.name)

    @property
    def moved(self) -> bool:
        """By a pass that wrote into the buffer, or put another one of its form in its place."""
        return self.buffer._version != self.version if self.now is self.buffer else not self.grown

    @property
    def grown(self) -> bool:
        """Whether it was replaced by a larger one: a table, of which an attribute of the module may tell. It stays."""
        now = self.now
        return (
            now is not None and now is not self.buffer and (now.shape, now.dtype) != (self.copy.shape, self.copy.dtype)
        )

    def put(self, buffer: Tensor) -> None:
        self.module._buffers[self.name] = buffer

    def write_back(self) -> None:
        if self.buffer._version != self.version:
            with torch.no_grad():
                self.buffer.resize_(self.copy.shape).copy_(self.copy)


class Buffers:
    """The buffers of some modules as they are now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        copies: dict[int, Tensor] = {}
        self._held = [
            _Held(m, name, b, b._version, copies.setdefault(id(b), b.detach().clone()))
            for m in modules
            for name, b in m._buffers.items()
            if b is not None and not b.is_inference() and not nn.parameter.is_lazy(b)
        ]

    @property
    def moved(self) -> set[nn.Module]:
        """The modules of which a buffer has changed."""
        return {held.module for held in self._held if held.moved}

    def put_back(self, *, replaced: bool = True) -> None:
        """Undo what passes have written into them, and, if asked, which of them they have replaced."""
        for held in self._held:
            if replaced and not held.grown:
                held.put(held.buffer)
            held.write_back()

    @contextmanager
    def again(self) -> Iterator[Callable[[], None]]:
        """Passes inside begin with the buffers as they were here, and leave them as they are now.

        Gives a function that lets one more pass begin with them.
        """
        moved = [(held, held.now) for held in self._held if held.moved]
        still = [held for held in self._held if not held.moved and not held.grown]

        def begin() -> None:
            for held in still:
                if not held.grown:
                    held.put(held.buffer)
                held.write_back()
            # Passes before may hold the moved ones in their graph: these get copies of their own.
            copies = {id(held.copy): held.copy.clone() for held, _ in moved}
            for held, _ in moved:
                if not held.grown:
                    held.put(copies[id(held.copy)])

        begin()
        try:
            yield begin
        finally:
            begin()
            for held, buffer in moved:
                if not held.grown:
                    assert buffer is not None
                    held.put(buffer)
