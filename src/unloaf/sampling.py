"""Rules that draw a subnet. A draw is a pure function of (seed, step, index): see `draw_generator`."""

from __future__ import annotations

import hashlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch

from unloaf.stages import Stage
from unloaf.subnet import Subnet


class Sampler(Protocol):
    """Anything that draws a subnet, inside ``parent`` if one is given."""

    def sample(self, stages: Sequence[Stage], generator: torch.Generator, parent: Subnet | None = None) -> Subnet:
        """Draw a subnet; all randomness comes from the generator."""
        ...


def check_seed(seed: int) -> int:
    """A whole number, of numpy too, as an int; ValueError for any other: 2.0 or None would draw something, too."""
    try:
        return operator.index(seed)
    except TypeError:
        raise ValueError(f"seed is {seed!r}; give a whole number") from None


def draw_generator(seed: int, step: int, index: int, *, purpose: str = "subnet") -> torch.Generator:
    """A CPU generator that depends on its arguments alone: every rank and every resumed run draws the same.

    Draws of different purposes (a subnet, the side of its input) are independent of each other.

    >>> from unloaf.sampling import draw_generator
    >>> a, b = draw_generator(0, 7, 1), draw_generator(0, 7, 1)
    >>> int(torch.randint(1000, (1,), generator=a)) == int(torch.randint(1000, (1,), generator=b))
    True
    """
    digest = hashlib.blake2b(f"{purpose}/{check_seed(seed)}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _pick(options: Sequence[int], weights: Sequence[float], generator: torch.Generator) -> int:
    position = torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator)
    return options[int(position)]


def _first_blocks(keep: Sequence[bool], depth: int) -> tuple[bool, ...]:
    """Of the blocks kept, keep the first ``depth``."""
    left = depth
    kept = []
    for flag in keep:
        kept.append(flag and left > 0)
        left -= flag
    return tuple(kept)


class _DepthSampler(ABC):
    """Ordered subnets: per stage the first k blocks, k out of a space, stages independent of each other."""

    @abstractmethod
    def space(self, stages: Sequence[Stage]) -> tuple[tuple[int, ...], ...]:
        """The depths allowed in each stage, ascending."""

    def _weight(self, dropped: int) -> float:
        """Relative probability of dropping this many blocks of the parent."""
        return 1.0

    def sample(self, stages: Sequence[Stage], generator: torch.Generator, parent: Subnet | None = None) -> Subnet:
        """Draw an ordered subnet, of the parent (by default the main network)."""
        parent = parent or Subnet.full(stages)
        keep = []
        for space, kept in zip(self.space(stages), parent.keep, strict=True):
            depth = sum(kept)
            # A parent drawn by another rule may lie below the space: it is then kept as it is.
            options = [k for k in space if k <= depth] or [depth]
            keep.append(_first_blocks(kept, _pick(options, [self._weight(depth - k) for k in options], generator)))
        return Subnet(tuple(keep), parent.shortcut)


@dataclass(frozen=True)
class OrderedSampler(_DepthSampler):
    """Per stage, the first k blocks, k uniform over the allowed depths: the default of stimulative training.

    Args:
        min_depths: the smallest depth of each stage; default: the smallest possible.

    Raises (when drawing):
        ValueError: not one minimum per stage, or one that a stage cannot have.

    Source: Ye et al. 2022 (ST), ordered residual sampling.

    >>> from unloaf import OrderedSampler, Stage
    >>> OrderedSampler(min_depths=(2,)).space([Stage("s", ("a", "b", "c"), (False, True, True))])
    ((2, 3),)
    """

    min_depths: tuple[int, ...] | None = None

    def space(self, stages: Sequence[Stage]) -> tuple[tuple[int, ...], ...]:
        """The depths allowed in each stage."""
        if self.min_depths is None:
            return tuple(stage.legal_depths for stage in stages)
        return _at_least(stages, self.min_depths)


def _at_least(stages: Sequence[Stage], minimum: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    Subnet.from_depths(stages, minimum)  # names the stage and its legal depths if one is impossible
    return tuple(tuple(k for k in s.legal_depths if k >= m) for s, m in zip(stages, minimum, strict=True))


@dataclass(frozen=True)
class InterStageSampler(_DepthSampler):
    """Ordered subnets that leave every stage a basic capacity and vary most where the stage is longest (InterSSR).

    Args:
        depths: the allowed depths of each stage, e.g. ``((3,), (3, 4), (3, 4, 5, 6), (3,))``. Default: no stage goes
            below the depth of the shortest stage; where all stages are equally deep, or there is only one, every stage
            keeps at least half of its blocks (our reading of the paper for any network).

    Raises (when drawing):
        ValueError: the space does not fit the stages.

    Source: Ye et al. 2023 (ST++), inter-stage sampling rule, table II.

    >>> from unloaf import InterStageSampler, Stage
    >>> def stage(name, depth):
    ...     return Stage(name, tuple(f"{name}.{i}" for i in range(depth)), (False,) + (True,) * (depth - 1))
    >>> InterStageSampler().space([stage(f"layer{i + 1}", depth) for i, depth in enumerate((3, 4, 6, 3))])
    ((3,), (3, 4), (3, 4, 5, 6), (3,))
    """

    depths: tuple[tuple[int, ...], ...] | None = None

    def space(self, stages: Sequence[Stage]) -> tuple[tuple[int, ...], ...]:
        """The depths allowed in each stage."""
        if self.depths is None:
            sizes = [stage.depth for stage in stages]
            basic = [min(sizes)] * len(sizes) if len(set(sizes)) > 1 else [math.ceil(size / 2) for size in sizes]
            return tuple(tuple(k for k in s.legal_depths if k >= m) for s, m in zip(stages, basic, strict=True))
        if len(self.depths) != len(stages) or not all(self.depths):
            raise ValueError(
                f"the space {self.depths} names depths for {len(self.depths)} stages; "
                f"give one non-empty tuple for each of {', '.join(stage.name for stage in stages)}"
            )
        for bound in (min, max):
            Subnet.from_depths(stages, [bound(allowed) for allowed in self.depths])
        for stage, allowed in zip(stages, self.depths, strict=True):
            if not set(allowed) <= set(stage.legal_depths):
                raise ValueError(
                    f"stage {stage.name!r} cannot have all depths of {allowed}; legal: {stage.legal_depths}"
                )
        return tuple(tuple(sorted(set(allowed))) for allowed in self.depths)


@dataclass(frozen=True)
class ExponentialDecaySampler(_DepthSampler):
    """Per stage keep k of d blocks with probability proportional to ``base ** (d - k)``: larger subnets are likelier.

    Inside a parent the decay is inherited: d is then the parent's depth.

    Args:
        base: in (0, 1]; 1 is the uniform rule.
        min_depths: the smallest depth of each stage; default: the smallest possible.

    Source: our reading of Tang et al. 2023 (GKT), which samples larger subnets more often.

    >>> import torch
    >>> from unloaf import ExponentialDecaySampler, Stage
    >>> stage = Stage("blocks", tuple("abcd"), (True,) * 4)
    >>> ExponentialDecaySampler(base=0.5).sample([stage], torch.Generator().manual_seed(0)).depths
    (3,)
    """

    base: float = 0.5
    min_depths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.base <= 1:
            raise ValueError(f"base is {self.base}; give a number above 0 and up to 1 (1 draws all depths alike)")

    def space(self, stages: Sequence[Stage]) -> tuple[tuple[int, ...], ...]:
        """The depths allowed in each stage."""
        return OrderedSampler(self.min_depths).space(stages)

    def _weight(self, dropped: int) -> float:
        return self.base**dropped


@dataclass(frozen=True)
class StochasticSampler:
    """Any subset of the skippable blocks is skipped, each on its own.

    Args:
        survival: probability that a block is kept; 0.5 draws all subsets alike.
        final_survival: if given, the probability falls linearly over the network, from 1 before the first block to this
            at the last one (stochastic depth), and ``survival`` is not used.

    At least one block of each stage is kept: a stage drawn empty is drawn again.

    Source: Ye et al. 2022 (ST), stochastic residual sampling; Huang et al. 2016 for the linear decay.

    >>> import torch
    >>> from unloaf import Stage, StochasticSampler
    >>> stage = Stage("blocks", tuple("abcd"), (True,) * 4)
    >>> str(StochasticSampler().sample([stage], torch.Generator().manual_seed(0)))
    '3:1011'
    """

    survival: float = 0.5
    final_survival: float | None = None

    def __post_init__(self) -> None:
        for name in ("survival", "final_survival"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; give a probability above 0 and up to 1")

    def sample(self, stages: Sequence[Stage], generator: torch.Generator, parent: Subnet | None = None) -> Subnet:
        """Draw any subset of the parent's skippable blocks (by default the main network's)."""
        parent = parent or Subnet.full(stages)
        total = sum(stage.depth for stage in stages)
        keep, before = [], 0
        for stage, kept in zip(stages, parent.keep, strict=True):
            positions = range(before + 1, before + stage.depth + 1)
            survival = torch.tensor([self._survival(p, total) for p in positions])
            drawn: list[bool] = []
            while not any(drawn):
                coins = (torch.rand(stage.depth, generator=generator) < survival).tolist()
                drawn = [k and (coin or not s) for k, coin, s in zip(kept, coins, stage.skippable, strict=True)]
            keep.append(tuple(drawn))
            before += stage.depth
        return Subnet(tuple(keep), parent.shortcut)

    def _survival(self, position: int, total: int) -> float:
        return self.survival if self.final_survival is None else 1 - position / total * (1 - self.final_survival)


@dataclass(frozen=True)
class RawSampler:
    """The unraveled view: each skippable block runs whole, as its residual branch alone, or not at all, one in three.

    A baseline, not a default: paths made of branches alone are hard to train. Needs blocks that can run without their
    skip connection (additive ones, and ResNet blocks of timm, torchvision and transformers).

    Source: Ye et al. 2022 (ST), raw sampling, after Veit et al. 2016; the even odds are our reading.

    >>> import torch
    >>> from unloaf import RawSampler, Stage
    >>> stage = Stage("blocks", tuple("abcd"), (True,) * 4, (True,) * 4)
    >>> str(RawSampler().sample([stage], torch.Generator().manual_seed(0)))
    '2:0b10'
    """

    def sample(self, stages: Sequence[Stage], generator: torch.Generator, parent: Subnet | None = None) -> Subnet:
        """Draw a raw subnet of the parent (by default the main network): no path that the parent lacks."""
        parent = parent or Subnet.full(stages)
        shortcuts = parent.shortcut or tuple((True,) * stage.depth for stage in stages)
        drawn = [
            _raw_stage(stage, kept, cut, generator)
            for stage, kept, cut in zip(stages, parent.keep, shortcuts, strict=True)
        ]
        return Subnet(tuple(keep for keep, _ in drawn), tuple(cut for _, cut in drawn))


def _raw_stage(
    stage: Stage, kept: Sequence[bool], shortcut: Sequence[bool], generator: torch.Generator
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Draw (branch taken, skip connection kept) for each block, again until a block of the stage is kept."""
    while True:
        pairs = []
        for branch, cut, skippable in zip(kept, shortcut, stage.skippable, strict=True):
            options = [(b, s) for b, s in ((True, True), (True, False), (False, True)) if b <= branch and s <= cut]
            free = skippable and len(options) > 1
            pairs.append(
                options[_pick(range(len(options)), [1.0] * len(options), generator)] if free else (branch, cut)
            )
        if any(branch for branch, _ in pairs):
            return tuple(b for b, _ in pairs), tuple(s for _, s in pairs)


def sample_chains(
    sampler: Sampler, stages: Sequence[Stage], *, groups: int, chains: int, seed: int, step: int
) -> list[Subnet]:
    """Subnet-in-subnet sampling: each subnet inside the one before, each chain of ``groups`` inside the main network.

    Returns:
        ``groups * chains`` subnets, chain after chain.

    Source: Tang et al. 2023 (GKT), subnet-in-subnet sampling.

    >>> from unloaf import OrderedSampler, Stage
    >>> from unloaf.sampling import sample_chains
    >>> stage = Stage("blocks", tuple("abcdefgh"), (True,) * 8)
    >>> chain = sample_chains(OrderedSampler(), [stage], groups=3, chains=1, seed=0, step=0)
    >>> chain[2] <= chain[1] <= chain[0]
    True
    """
    drawn: list[Subnet] = []
    for index in range(groups * chains):
        parent = drawn[-1] if index % groups else None
        drawn.append(sampler.sample(stages, draw_generator(seed, step, index), parent))
    return drawn


def enumerate_subnets(stages: Sequence[Stage], sampler: _DepthSampler | None = None) -> list[Subnet]:
    """All ordered subnets of a sampler's space, the main network first if it is among them.

    >>> from unloaf import Stage, enumerate_subnets
    >>> stage = Stage("blocks", tuple("abc"), (True,) * 3)
    >>> [str(subnet) for subnet in enumerate_subnets([stage])]
    ['3', '2', '1']
    """
    space = (sampler or OrderedSampler()).space(stages)
    return [Subnet.from_depths(stages, depths) for depths in product(*(sorted(k, reverse=True) for k in space))]
