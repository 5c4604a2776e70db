"""`unloaf damage`: how good trained networks are without some of their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import tyro

from unloaf.commands.analyses import analysis_of, bar, give, opened_runs
from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.config.checks import check_device


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Delete blocks of trained networks, one and several at random, and evaluate what is left."""

    option_groups = (
        ("most", "which blocks"),
        ("split", "evaluation"),
        ("checkpoint", "of a run"),
        ("json", "output"),
    )

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of runs on the same data, such as common training's and ST's."""
    most: int | None = None
    """Blocks that are deleted at most; default: as many as can be."""
    draws: int = 8
    """Random networks for each number of blocks from 2 on; of 1 all are evaluated."""
    seed: int = 0
    """Of the random networks, the same for all runs of a network."""
    split: Literal["val", "test"] | None = None
    """Images on which the networks are evaluated; default: val if there is one."""
    recalibrate: bool = False
    """Re-estimate the batch-norm statistics of each damaged network, as those of subnets are; by default it keeps
    those of its training."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    ema: bool = False
    """Evaluate the moving average of the weights."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the runs."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the runs' networks or images."""
    json: bool = False
    """Print everything as JSON."""
    output: str | None = None
    """Write a line for each damaged network to this CSV file, all to a .json file for --analysis of report, or a
    page to an .html file; its folder is made."""
    plot: str | None = None
    """Write a picture of accuracy over the number of deleted blocks to this SVG file."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("damage: give at least one run folder")
        check_device(self.device)
        check_least(self, most=1, draws=1, seed=0)


def run(words: list[str]) -> int:
    """Prints the table, writes files if asked to."""
    options = parse(Damage, words, prog="unloaf damage")
    from unloaf.analysis.damage import damage_rows, damage_table, damaged
    from unloaf.display import show_progress
    from unloaf.pages.analyses import damage_picture

    opened = opened_runs(options)
    given = {name: getattr(options, name) for name in ("most", "draws", "seed")}
    total = sum(len(damaged(run.training.stages, **given)) for run in opened)
    with show_progress(bar(), total=total, label="networks", lines=True) as display:
        rows = damage_rows(
            opened, **given, split=options.split, recalibrate=options.recalibrate,
            on_row=lambda row: display.advance(f"{row.run}, {row.deleted} deleted"),
        )  # fmt: skip
    figures = opened[0].training.task.figures
    figure = f"{figures.chief.label}, %" if figures.unit == "%" else figures.chief.label
    shown: Any = {"figure": figure, "digits": 1 if figures.unit == "%" else 4}
    notes = [
        f"{figure}, mean and standard deviation over the networks that lack so many blocks; "
        f"batch-norm statistics {'re-estimated' if options.recalibrate else 'as in training'}"
    ]
    give(
        options,
        rows,
        notes=notes,
        table=partial(damage_table, **shown),
        picture=partial(damage_picture, rows, **shown),
        analysis=analysis_of("damage", rows, notes, opened, **shown),
    )
    return 0
