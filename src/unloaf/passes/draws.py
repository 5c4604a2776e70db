"""Random numbers that a model draws in its own forward."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RandomState = tuple[Tensor, ...]  # of torch's generators: the CPU's, and the device's


class Draws:
    """Lets all passes of a step draw alike what belongs to no module whose calls are shared: masks, noise, an order.

    What a module draws (dropout) comes with its recorded output, and passes that compute it draw for themselves. What
    the model's own forward draws is drawn by each pass, also in the prefix that it shares. Where the main pass is seen
    to do so, each other one begins with its random state, and a replayed call leaves the state that the call left: so
    they draw what separate passes would, each begun with that state. With ``own`` that is so from the beginning.
    """

    def __init__(self, device: torch.device, *, own: bool = False) -> None:
        self.device, self.own, self._last = device, own, ()
        self._start = self._end = self.mark(shared=True)
        self._python = self._python_end = random.getstate()

    def mark(self, *, shared: bool) -> RandomState:
        """The state now; what was drawn since the last mark, a shared call drew, or else the model's own forward."""
        states = [torch.default_generator.get_state()]
        if self.device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self.device).get_rng_state())
        self.own = self.own or not (shared or all(map(torch.equal, states, self._last)))
        self._last = tuple(states)
        return self._last

    def end(self) -> None:
        """After the main pass."""
        self._end, self._python_end = self.mark(shared=False), random.getstate()
        self.own = self.own or self._python_end != self._python

    @contextmanager
    def again(self) -> Iterator[None]:
        """Another pass."""
        if not self.own:
            yield
            return
        self.set(self._start)
        random.setstate(self._python)
        try:
            yield
        finally:
            self.set(self._end)
            random.setstate(self._python_end)

    def set(self, state: RandomState) -> None:
        """Draw from here on what was drawn after this state."""
        torch.default_generator.set_state(state[0])
        if len(state) > 1:
            torch.get_device_module(self.device).set_rng_state(state[1])
