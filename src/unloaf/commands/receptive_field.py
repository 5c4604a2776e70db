"""`unloaf receptive-field`: which part of an image networks and their subnets look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro

from unloaf.commands.analyses import analysis_of, bar, give, opened_runs
from unloaf.commands.options import check_depths, check_least
from unloaf.commands.parsing import parse
from unloaf.config.checks import check_device


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """Compare effective receptive fields of networks and of the subnets inside them, for classification."""

    option_groups = (
        ("subnets", "which networks"),
        ("sides", "images"),
        ("checkpoint", "of a run"),
        ("json", "output"),
    )

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of runs on the same data."""
    subnets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEPTHS ...")] = ()
    """Depths, as in 1-1-1 3-3-3; default: the main network and three others, drawn."""
    seed: int = 0
    """Of the draw of subnets."""
    sides: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SIDE ...")] = ()
    """Shorter sides of the inputs in pixels; default: that of the run."""
    images: int = 16
    """Images over which contributions are summed."""
    split: Literal["val", "test"] | None = None
    """From which images they are; default: val if there is one."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    ema: bool = False
    """Take the moving average of the weights."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the runs."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the runs' networks or images."""
    json: bool = False
    """Print everything as JSON, the contribution of each pixel too."""
    output: str | None = None
    """Write the table to this CSV file, all to a .json file for --analysis of report, or a page to an .html file;
    its folder is made."""
    plot: str | None = None
    """Write a picture of the receptive fields to this SVG file."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("receptive-field: give at least one run folder")
        for depths in self.subnets:
            check_depths(depths)
            if ":" in depths:
                raise ValueError(f"subnets {depths}: give a depth for each stage, as in 3-3-1")
        if self.sides and min(self.sides) < 1:
            raise ValueError(f"sides {self.sides}: give numbers of at least 1")
        check_device(self.device)
        check_least(self, seed=0, images=1)


def run(words: list[str]) -> int:
    """Prints the table, writes files if asked to."""
    options = parse(ReceptiveField, words, prog="unloaf receptive-field")
    from unloaf.analysis.receptive_field import field_table, receptive_fields
    from unloaf.display import show_progress
    from unloaf.pages.analyses import field_picture

    opened = opened_runs(options)
    names = ("subnets", "sides", "images", "split", "seed")
    total = len(opened) * (len(options.subnets) or 4) * (len(options.sides) or 1)
    with show_progress(bar(), total=total, label="networks", lines=True) as display:
        rows = receptive_fields(
            opened,
            **{name: getattr(options, name) for name in names},
            on_row=lambda row: display.advance(f"{row.run}, {row.depths}, {row.side} px"),
        )
    notes = [
        "area of the smallest square around the centre that holds so much of all contributions, in percent of the image"
    ]
    found = analysis_of("receptive-field", rows, notes, opened)
    draw = partial(field_picture, rows)
    give(options, rows, notes=notes, table=field_table, picture=draw, leave_out=("contributions",), analysis=found)
    return 0
