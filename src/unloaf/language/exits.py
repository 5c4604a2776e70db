"""How good each exit of a language model is, and how fast it would draft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.language.decoding import head_in_layers
from unloaf.language.draft_length import LONGEST
from unloaf.language.partial import PartialModel
from unloaf.language.prompts import check_model
from unloaf.stages import Stage, evaluating, inner_module


class ExitRow(NamedTuple):
    """One exit on a text.

    Attributes:
        depth: layers before it; the main network's own is the last one.
        nats: mean loss per token.
        perplexity: its exponential.
        agreement: the share of tokens where it and the main network have the same most probable next one.
        overlap: the mean of the sum of the lower of both probabilities: how often a token that is drawn is taken.
        draft_tokens: how many tokens it would best draft each time.
        speed: greedy decoding with it over decoding without, counted in layers, with so many; 1 for the main network.
    """

    depth: int
    nats: float
    perplexity: float
    agreement: float
    overlap: float
    draft_tokens: int
    speed: float


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that a round of so many drafted ones brings, each taken with the same chance if all before it are.

    Source: Leviathan et al. 2023, equation 1.

    >>> expected_tokens(0.5, 2)
    1.75
    """
    return sum(acceptance**count for count in range(drafted + 1))


def expected_speed(acceptance: float, *, draft: int, main: int, head: float) -> tuple[float, int]:
    """Self-speculative over plain decoding where time goes by layers, and how many drafted tokens give the most.

    A round of K tokens runs the draft's layers K + 1 times, the others once, and the head K + 1 times.

    Args:
        acceptance: the chance at which a drafted token is taken.
        draft: layers of the draft.
        main: layers of the main network.
        head: what the head costs, in layers.

    >>> expected_speed(1.0, draft=1, main=8, head=0.0)
    (5.67, 16)
    """
    plain = main + head

    def speed(drafted: int) -> float:
        cost = (drafted + 1) * draft + drafted * head + main - draft + head
        return expected_tokens(acceptance, drafted) * plain / cost

    best = max(range(1, LONGEST + 1), key=speed)
    return round(speed(best), 2), best


class _Sums:
    """Of one exit, over tokens."""

    def __init__(self) -> None:
        self.nats = self.agreement = self.overlap = 0.0
        self.tokens = 0

    def add(self, logits: Tensor, main: Tensor, labels: Tensor) -> None:
        """(tokens, classes) of the exit and of the main network, (tokens,)."""
        own = logits.double() if logits.dtype == torch.float64 else logits.float()
        self.nats += float(F.cross_entropy(own, labels, reduction="sum"))
        self.agreement += int((own.argmax(-1) == main.argmax(-1)).sum())
        self.overlap += float(torch.minimum(own.softmax(-1), main.to(own.dtype).softmax(-1)).sum())
        self.tokens += len(labels)


def judge_exits(
    model: nn.Module, stages: Sequence[Stage], batches: Iterable[Tensor], depths: Sequence[int] | None = None
) -> list[ExitRow]:
    """What each exit makes of a text; the main network comes last.

    Args:
        model: a causal language model of transformers.
        stages: they hold all its layers.
        batches: tokens on the model's device, (rows, length) each, at least two long; each predicts the next one.
        depths: numbers of layers; default: all.

    Raises:
        ValueError: no tokens, no such depth, or a model that cannot stop at a layer in the middle.

    >>> import torch, transformers, unloaf
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4,
    ...     num_attention_heads=2)
    >>> model, text = transformers.LlamaForCausalLM(config).eval(), torch.arange(32)[None]
    >>> stages = unloaf.find_stages(model, {"input_ids": text})
    >>> rows = unloaf.language.judge_exits(model, stages, [text], depths=[1, 2])
    >>> [row.depth for row in rows], rows[-1].agreement, rows[-1].speed
    ([1, 2, 4], 1.0, 1.0)
    """
    inner = inner_module(model)
    check_model(inner)
    partial = PartialModel(inner, stages)
    chosen = checked_depths(depths, partial.depth)
    sums = {depth: _Sums() for depth in chosen}
    with evaluating(inner), partial.open():
        for tokens in batches:
            if tokens.ndim != 2 or tokens.shape[1] < 2:
                raise ValueError(f"tokens {tuple(tokens.shape)}: give (rows, length), 2 long at least")
            _add_batch(partial, tokens, sums)
    if not sums[chosen[-1]].tokens:
        raise ValueError("the text has no tokens; give a longer one")
    head = head_in_layers(inner, list(partial.blocks.values()))
    return [_row(depth, sums[depth], partial.depth, head) for depth in chosen]


def checked_depths(depths: Sequence[int] | None, main: int) -> list[int]:
    """The depths in order, the main network's last.

    Raises:
        ValueError: one is not from 1 to the main network's.
    """
    for depth in depths or ():
        if not 1 <= depth <= main:
            raise ValueError(f"depth {depth}: the model has {main} layers; give 1 to {main - 1}")
    return sorted({*(range(1, main) if depths is None else depths), main})


def _add_batch(partial: PartialModel, tokens: Tensor, sums: dict[int, _Sums]) -> None:
    labels = tokens[:, 1:].flatten()
    main, _ = partial(tokens, use_cache=False)
    main = main[:, :-1].flatten(0, 1)
    hidden, before = None, 0
    for depth, one in sums.items():
        if depth == partial.depth:
            one.add(main, main, labels)
            return
        logits, hidden = partial(tokens, first=before, last=depth, hidden=hidden, use_cache=False)
        one.add(logits[:, :-1].flatten(0, 1), main, labels)
        before = depth


def _row(depth: int, sums: _Sums, main: int, head: float) -> ExitRow:
    nats, agreement = sums.nats / sums.tokens, sums.agreement / sums.tokens
    speed, drafted = (1.0, 0) if depth == main else expected_speed(agreement, draft=depth, main=main, head=head)
    perplexity = float(torch.tensor(nats, dtype=torch.float64).exp())
    return ExitRow(depth, nats, perplexity, agreement, sums.overlap / sums.tokens, drafted, speed)
