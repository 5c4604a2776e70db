"""How many tokens are drafted before the main network looks at them."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 16
_BINS = 10
_PRIOR = 2.0  # tokens that the draft's own probability counts for
_MEMORY = 0.9  # of a round's cost in the next
_LONGEST_REST = 32  # rounds


class DraftLength:
    """Goes on drafting while the next token is worth more than it costs.

    One more token costs a pass through the draft's layers and the head. It brings a token if it is accepted, and all
    before it are; the chance of that is counted for each tenth of the draft's own probability. A token is worth what
    one has cost so far in this text, counted in layers. Where the draft was worth nothing it rests, each time for twice
    as many rounds: a useless draft costs little more than none.

    Args:
        draft: layers of the draft.
        main: layers of the main network.
        head: what the head costs, in layers.

    Source: the rule of the marginal value, Charnov 1976, for the chances of Leviathan et al. 2023, section 3.

    >>> length = DraftLength(draft=1, main=8, head=0.5)
    >>> length.begin(rows=1)
    >>> length.goes_on([0.9]), length.goes_on([0.1])
    (True, False)
    """

    def __init__(self, *, draft: int, main: int, head: float) -> None:
        self._step, self._rest = draft + head, main - draft + head
        self._accepted, self._seen = [0.0] * _BINS, [0.0] * _BINS
        self._cost, self._tokens = main + head, 1.0
        self._whole = main + head
        self._reached: list[float] = []
        self._steps = self._vain = self._resting = 0

    def rests(self) -> bool:
        """Whether this round has no draft, as those before were in vain."""
        if not self._resting:
            return False
        self._resting -= 1
        self._add(self._whole, 1.0)
        return True

    def begin(self, rows: int) -> None:
        """Before the first token of a round."""
        self._reached, self._steps = [1.0] * rows, 1

    def goes_on(self, confidences: Sequence[float]) -> bool:
        """Whether a token is drafted whose probability by the draft is this, for each row."""
        chances = [before * self._chance(now) for before, now in zip(self._reached, confidences, strict=True)]
        if sum(chances) / len(chances) * self._cost / self._tokens < self._step:
            return False
        self._reached, self._steps = chances, self._steps + 1
        return True

    def learn(self, confidence: float, overlap: float) -> None:
        """That a token of this probability would be accepted with this chance."""
        self._accepted[_bin(confidence)] += overlap
        self._seen[_bin(confidence)] += 1

    def end(self, tokens: float) -> None:
        """A round with a draft has brought so many tokens, in the mean of its rows."""
        self._add(self._steps * self._step + self._rest, tokens)
        self._vain = self._vain + 1 if self._steps == 1 else 0
        self._resting = min(2**self._vain, _LONGEST_REST) - 1

    def _add(self, cost: float, tokens: float) -> None:
        self._cost, self._tokens = _MEMORY * self._cost + cost, _MEMORY * self._tokens + tokens

    def _chance(self, confidence: float) -> float:
        here = _bin(confidence)
        return (self._accepted[here] + _PRIOR * confidence) / (self._seen[here] + _PRIOR)


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)
