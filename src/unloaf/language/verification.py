"""How tokens are chosen, and which drafted ones the main network takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Guess(NamedTuple):
    """What the draft says of the next token.

    Attributes:
        token: (rows,).
        distribution: (rows, classes), from which it was drawn; the logits where it is the most probable one.
    """

    token: Tensor
    distribution: Tensor


class Verdict(NamedTuple):
    """What the main network says of a draft.

    Attributes:
        accepted: (rows,), how many of a row's drafted tokens it takes, from the first one on.
        token: (rows,), its own, which follows them.
        overlap: (rows, guesses), the chance at which each guess would have been taken behind those before it.
    """

    accepted: Tensor
    token: Tensor
    overlap: Tensor


class Choice(Protocol):
    """How a token follows from logits."""

    def guess(self, logits: Tensor) -> Guess:
        """The next token of each row by the draft, whose logits are (rows, classes)."""
        ...

    def confidence(self, guess: Guess) -> Tensor:
        """(rows,): the highest probability in the draft's distribution."""
        ...

    def verify(self, guesses: Sequence[Guess], count: int, logits: Tensor) -> Verdict:
        """Takes the first ``count`` guesses or some of them, by the main network's logits, (rows, count + 1, classes).

        A guess beyond those was not drafted.
        """
        ...


class Greedy:
    """The most probable token.

    >>> draft, main = torch.tensor([[2.0, 0.0]]), torch.tensor([[[0.0, 2.0], [2.0, 0.0]]])
    >>> verdict = Greedy().verify([Greedy().guess(draft)], 1, main)
    >>> verdict.accepted, verdict.token
    (tensor([0]), tensor([1]))
    """

    def guess(self, logits: Tensor) -> Guess:
        """See `Choice`."""
        return Guess(logits.argmax(-1), logits)

    def confidence(self, guess: Guess) -> Tensor:
        """See `Choice`."""
        return _at_least_float(guess.distribution).softmax(-1).amax(-1)

    def verify(self, guesses: Sequence[Guess], count: int, logits: Tensor) -> Verdict:
        """See `Choice`."""
        chosen = logits.argmax(-1)
        tokens = torch.stack([guess.token for guess in guesses], dim=1) if guesses else chosen[:, :0]
        right = tokens == chosen[:, : len(guesses)]
        accepted = right[:, :count].long().cumprod(-1).sum(-1)
        return Verdict(accepted, chosen.gather(1, accepted[:, None]).squeeze(1), right.float())


class Sampled:
    """A token drawn from the softmax of logits / temperature.

    Args:
        temperature: above 0.
        generator: of random numbers, on the device of the logits.
    """

    def __init__(self, temperature: float, generator: torch.Generator | None) -> None:
        self.temperature, self.generator = temperature, generator

    def guess(self, logits: Tensor) -> Guess:
        """See `Choice`."""
        distribution = self._distribution(logits)
        return Guess(self._drawn(distribution), distribution)

    def confidence(self, guess: Guess) -> Tensor:
        """See `Choice`."""
        return guess.distribution.amax(-1)

    def verify(self, guesses: Sequence[Guess], count: int, logits: Tensor) -> Verdict:
        """Takes a drafted token with the chance min(1, p / q), replaces the first other one by max(p - q, 0), scaled.

        What comes out has the main network's distribution p, whatever the draft's q is.

        Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.
        """
        main = self._distribution(logits)
        # Nothing was drafted for the last place: there the main network's own distribution is left.
        q = torch.stack([guess.distribution for guess in guesses], dim=1) if guesses else main[:, :0]
        drafted = torch.cat([q[:, :count], torch.zeros_like(main[:, :1])], dim=1)
        taken = self._taken([guess.token for guess in guesses[:count]], drafted, main)
        accepted = taken.long().cumprod(-1).sum(-1)
        rows = torch.arange(len(main), device=main.device)
        own = main[rows, accepted]
        rest = (own - drafted[rows, accepted]).clamp(min=0)
        # Where p and q are equal to rounding nothing is left, and nothing is rejected but by rounding.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, own)
        overlap = torch.minimum(main[:, : len(guesses)], q).sum(-1)
        return Verdict(accepted, self._drawn(rest), overlap)

    def _taken(self, tokens: Sequence[Tensor], drafted: Tensor, main: Tensor) -> Tensor:
        if not tokens:
            return torch.zeros(len(main), 0, dtype=torch.bool, device=main.device)
        index = torch.stack(list(tokens), dim=1)[..., None]
        p, q = (one[:, : len(tokens)].gather(-1, index).squeeze(-1) for one in (main, drafted))
        chance = torch.rand(p.shape, generator=self.generator, device=p.device, dtype=p.dtype)
        return chance * q < p

    def _distribution(self, logits: Tensor) -> Tensor:
        return (_at_least_float(logits) / self.temperature).softmax(-1)

    def _drawn(self, distribution: Tensor) -> Tensor:
        return torch.multinomial(distribution, 1, generator=self.generator).squeeze(-1)


def _at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
