"""How much worse subnets are inside a network than the same architectures trained alone (Ye et al. 2022, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from unloaf.analysis.cells import Cell, Judged, fits
from unloaf.analysis.comparison import Spread
from unloaf.config import Config
from unloaf.engine.setup import Training, prepare
from unloaf.methods.table import METHODS
from unloaf.recipes import recipe
from unloaf.stages import Stage
from unloaf.subnet import Subnet

COMMON = "common"
_OF_DIGITS = {"common": "common", "stochastic-depth": "stochastic_depth", "st": "st", "st++": "stpp", "gkt": "gkt"}


@dataclass(frozen=True)
class LoafingRow:
    """A subnet inside a network that was trained by a method, at one seed, and the same architecture trained alone.

    Accuracies are in percent, with batch-norm statistics that were re-estimated in both.

    Attributes:
        method: by which the network was trained that the subnet is in.
        depths: the subnet.
        main: whether it is the main network; alone is then the main network of common training.
        seed: of both runs.
        inside: accuracy inside the network; None where its run diverged.
        alone: accuracy of the same architecture trained alone by common training; None where its run diverged.
        gap: points that the subnet loses inside the network, alone - inside.
    """

    method: str
    depths: str
    main: bool
    seed: int
    inside: float | None
    alone: float | None
    gap: float | None


def digits_configs(methods: Sequence[str]) -> dict[str, Config]:
    """The settings of `unloaf demo` by the flags of methods; for one that the demo has not, those of common training.

    >>> [config.lr for config in digits_configs(["common", "st++"]).values()]
    [0.2, 0.05]
    """
    found = {name: recipe(f"digits_{_OF_DIGITS[name]}") for name in methods if name in _OF_DIGITS}
    return {name: found.get(name) or replace(recipe("digits_common"), method=name) for name in methods}  # type: ignore[arg-type]


def subnets_to_compare(config: Config, asked: Sequence[str] = ()) -> tuple[tuple[str, ...], str]:
    """The subnets that are trained alone, and the main network, by their depths.

    Args:
        config: of the main network.
        asked: depths as in "3-3-5-2"; default: `spread_depths`.

    Raises:
        ValueError: the network has no such subnet, or none at all but itself.
    """
    stages = stages_of(config)
    main = str(Subnet.full(stages))
    if not stages:
        raise ValueError(f"model {config.model} has no residual blocks that could be skipped, so it has no subnets")
    for text in asked:
        if not fits(stages, text):
            legal = "; ".join(f"{s.name}: {', '.join(map(str, s.legal_depths))}" for s in stages)
            raise ValueError(f"subnets {text}: {config.model} has no such subnet; legal depths are {legal}")
    found = tuple(dict.fromkeys(text.replace(",", "-") for text in asked)) or spread_depths(stages)
    if not set(found) - {main}:
        raise ValueError(
            f"subnets {' '.join(found) or '(none)'}: give at least one that is not the main network, {main}"
        )
    return tuple(text for text in found if text != main), main


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of the network that a configuration trains; () if it has none."""
    return untrained(config).stages


def untrained(config: Config) -> Training:
    """The network of a configuration and its stages, of any weights."""
    plain = replace(config, method=COMMON, subnet_inputs="auto", initial_checkpoint=None, partial_weights=False)
    return prepare(plain, resumed=True)


def spread_depths(stages: Sequence[Stage], count: int = 3) -> tuple[str, ...]:
    """Subnets of a quarter, a half and three quarters of each stage, as far as they are different networks.

    >>> spread_depths([Stage("a", tuple(f"a.{i}" for i in range(6)), (False,) + (True,) * 5)])
    ('2', '3', '5')
    """
    found = []
    for part in range(1, count + 1):
        least = [ceil(stage.depth * part / (count + 1)) for stage in stages]
        depths = [next(d for d in s.legal_depths if d >= n) for s, n in zip(stages, least, strict=True)]
        found.append("-".join(map(str, depths)))
    main = "-".join(str(stage.depth) for stage in stages)
    return tuple(text for text in dict.fromkeys(found) if text != main)


def loafing_cells(configs: Mapping[str, Config], subnets: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The runs that are needed: each method's network, and each subnet as a network of its own.

    Args:
        configs: settings by the flags of methods, common training among them: the subnets are trained by these.
        subnets: by their depths.
        seeds: of each.
    """
    cells = []
    for seed in seeds:
        for name, config in configs.items():
            cells.append(Cell(f"{METHODS[name].label}, seed {seed}", replace(config, seed=seed)))
        for depths in subnets:
            alone = replace(configs[COMMON], seed=seed, depths=depths, eval_subnets=0)  # it may have none
            cells.append(Cell(f"{depths} alone, seed {seed}", alone))
    return cells


def loafing_rows(judged: Sequence[Judged], subnets: Sequence[str], main: str) -> list[LoafingRow]:
    """A row for each method, subnet and seed, of the runs of `loafing_cells`, subnets as they are given.

    Args:
        judged: runs of `loafing_cells`, evaluated with these subnets.
        subnets: by their depths.
        main: depths of the main network.
    """
    networks = {(run.cell.config.method, run.cell.config.seed): run for run in judged if run.cell.config.depths is None}
    alone = {(run.cell.config.depths, run.cell.config.seed): run.main_reestimated for run in judged}
    rows = []
    for (method, seed), run in networks.items():
        common = networks.get((COMMON, seed))
        for depths in (*subnets, main):
            is_main = depths == main
            inside = run.main_reestimated if is_main else run.subnets.get(depths)
            other = (common and common.main_reestimated) if is_main else alone[depths, seed]
            gap = None if inside is None or other is None else other - inside
            rows.append(LoafingRow(METHODS[method].label, depths, is_main, seed, inside, other, gap))
    return rows


def spread_of(rows: Sequence[LoafingRow], name: str) -> Spread | None:
    """Mean and deviation over seeds of inside, alone or gap; None where no run has one."""
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return Spread.of(values) if values else None


def mean_gaps(rows: Sequence[LoafingRow]) -> dict[str, Spread]:
    """Of each method the gap, mean over its subnets, main network not counted, spread over seeds.

    >>> rows = [LoafingRow("ST", d, d == "3", 0, 90.0, a, a - 90.0) for d, a in (("1", 91.0), ("2", 94.0), ("3", 95.0))]
    >>> mean_gaps(rows)["ST"].mean
    2.5
    """
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if not row.main and row.gap is not None:
            found.setdefault(row.method, {}).setdefault(row.seed, []).append(row.gap)
    return {
        method: Spread.of([sum(gaps) / len(gaps) for gaps in by_seed.values()]) for method, by_seed in found.items()
    }


def loafing_table(rows: Sequence[LoafingRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a line for each subnet, with its accuracy alone, and inside the network of each method and gap.

    >>> rows = [LoafingRow("common training", "1", False, seed, 60.0, 95.0 + seed, 35.0 + seed) for seed in (0, 2)]
    >>> loafing_table(rows)[1]
    [['1', '96.0 ± 1.4', '60.0 ± 0.0', '36.0 ± 1.4']]
    """
    methods, depths = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("method", "depths"))
    heads = ["subnet", "alone\ntop-1 %"]
    for method in methods:
        heads += [f"inside\n{method}", "gap,\npoints"]
    lines = []
    for subnet in depths:
        mine = [row for row in rows if row.depths == subnet]
        main, alone = mine[0].main, [row for row in mine if row.method == mine[0].method]  # the same for all methods
        line = [f"{subnet} (main)" if main else subnet, _text(spread_of(alone, "alone"))]
        for method in methods:
            found = [row for row in mine if row.method == method]
            baseline = main and method == METHODS[COMMON].label
            line += [_text(spread_of(found, "inside")), "" if baseline else _text(spread_of(found, "gap"))]
        lines.append(line)
    return heads, lines


def _text(spread: Spread | None) -> str:
    return "diverged" if spread is None else str(spread)
