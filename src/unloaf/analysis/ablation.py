"""Settings compared by training each of them with several seeds, beside common training of the same cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unloaf.analysis.cells import Cell, Judged, Store
from unloaf.analysis.comparison import Spread
from unloaf.analysis.grids import Grid, GridRow, at_equal_cost


@dataclass(frozen=True)
class AblationRow:
    """A row of a grid at one seed; accuracies in percent, None where a run diverged or was not asked for.

    Attributes:
        label: of the row.
        series: of the picture.
        at: place in the picture.
        seed: of the run.
        main: accuracy of the main network, with the batch-norm statistics of its training.
        mean_subnet: of subnets, statistics re-estimated, the main network not counted.
        worst_subnet: lowest of them.
        cost: FLOPs of the training relative to common training of the first row's epochs and network.
        epochs_at_cost: of common training that cost as much as this row, rounded up.
        common_at_cost: accuracy of the main network after that, with the row's other settings.
        seconds: spent training.
        failed: how the run diverged; empty if it did not.
    """

    label: str
    series: str
    at: float
    seed: int
    main: float | None
    mean_subnet: float | None
    worst_subnet: float | None
    cost: float | None
    epochs_at_cost: int | None
    common_at_cost: float | None
    seconds: float
    failed: str


def ablation_rows(
    grid: Grid, store: Store, seeds: Sequence[int], *, equal_cost: bool = True
) -> tuple[list[AblationRow], list[Judged]]:
    """Trains what is not there yet; rows in the order of the grid, each with all seeds, and the runs behind them.

    Args:
        grid: what is compared.
        store: where the runs are kept.
        seeds: of each row.
        equal_cost: train common training for as many epochs as cost what a row costs, too.

    Raises:
        StoppedError: see `Store.results`.
        ValueError: a row cannot be trained.
    """
    keys = [(row, seed) for row in grid.rows for seed in seeds]
    runs = store.results([Cell(f"{row.label}, seed {seed}", replace(row.config, seed=seed)) for row, seed in keys])
    found = {(row.label, seed): run for (row, seed), run in zip(keys, runs, strict=True)}
    baselines: dict[tuple[str, int], Judged] = {}
    if equal_cost:
        wanted = [(row, seed) for row, seed in keys if _has_baseline(row, found[row.label, seed])]
        cells = [
            Cell(
                f"common training at the cost of {row.label}, seed {seed}",
                replace(at_equal_cost(row.config, _flops(found, row, seeds)), seed=seed),
            )
            for row, seed in wanted
        ]
        baselines = {(row.label, s): run for (row, s), run in zip(wanted, store.results(cells), strict=True)}
    unit = _unit(runs)
    rows = [_row(row, seed, found[row.label, seed], baselines.get((row.label, seed)), unit) for row, seed in keys]
    return rows, [*runs, *baselines.values()]


def _has_baseline(row: GridRow, run: Judged) -> bool:
    return row.config.method != "common" and not run.failed


def _flops(found: dict[tuple[str, int], Judged], row: GridRow, seeds: Sequence[int]) -> float:
    """Mean over the seeds, so that all of them have a baseline of the same epochs."""
    return statistics.fmean(run.flops for seed in seeds if not (run := found[row.label, seed]).failed)


def _unit(runs: Sequence[Judged]) -> float:
    """FLOPs of common training for one image in each step of an epoch, over the first run's epochs."""
    known = [run for run in runs if not run.failed]
    return known[0].step_flops * known[0].cell.config.epochs if known else 1.0


def _row(row: GridRow, seed: int, run: Judged, baseline: Judged | None, unit: float) -> AblationRow:
    tops = list(run.subnets.values())
    return AblationRow(
        label=row.label,
        series=row.series,
        at=row.at,
        seed=seed,
        main=run.main,
        mean_subnet=statistics.fmean(tops) if tops else None,
        worst_subnet=min(tops) if tops else None,
        cost=None if run.failed else run.flops * run.step_flops * row.config.epochs / unit,
        epochs_at_cost=None if baseline is None else baseline.cell.config.epochs,
        common_at_cost=None if baseline is None else baseline.main,
        seconds=run.seconds,
        failed=run.failed,
    )


def column(rows: Sequence[AblationRow], name: str) -> Spread | None:
    """Mean and deviation over seeds; None where no seed has a figure."""
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return Spread.of(values) if values else None


def ablation_table(rows: Sequence[AblationRow], *, axis: str = "") -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a line for each row of the grid, means and deviations over seeds; the picture alone has an axis.

    >>> row = AblationRow("ordered", "", 0, 0, 98.0, 97.0, 95.0, 1.5, 38, 97.5, 3.0, "")
    >>> ablation_table([row, AblationRow(*("ordered", "", 0, 1, 99.0, 97.0, 95.0, 1.5, 38, 98.5, 3.0, ""))])[1]
    [['ordered', '98.5 ± 0.7', '97.0 ± 0.0', '95.0 ± 0.0', '1.50x', '98.0 ± 0.7', '38']]
    """
    tops = ("main\ntop-1 %", "mean subnet\ntop-1 %", "worst subnet\ntop-1 %")
    heads = ["row", *tops, "cost", "common training\nat this cost", "its\nepochs", "diverged"]
    lines = []
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        cost, wild = column(mine, "cost"), sum(bool(row.failed) for row in mine)
        epochs = [row.epochs_at_cost for row in mine if row.epochs_at_cost is not None]
        tops = [_text(column(mine, name)) for name in ("main", "mean_subnet", "worst_subnet")]
        lines.append([
            label, *tops, "–" if cost is None else f"{cost.mean:.2f}x", _text(column(mine, "common_at_cost")),
            str(epochs[0]) if epochs else "–", f"{wild} of {len(mine)}" if wild else "",
        ])  # fmt: skip
    if not any(line[-1] for line in lines):
        return heads[:-1], [line[:-1] for line in lines]
    return heads, lines


def _text(spread: Spread | None) -> str:
    return "–" if spread is None else str(spread)
