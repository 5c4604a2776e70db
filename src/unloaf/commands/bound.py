"""`unloaf bound`: how far subnets are from the main network in cross-entropy, beside the theoretical bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from unloaf.commands.analyses import analysis_of, bar, give, opened_runs
from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.config.checks import check_device


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Compare the cross-entropy of subnets and main network over training with the bound that their KL gives.

    It looks at each checkpoint that a run kept: train with --checkpoint-hist EPOCHS to keep those of all epochs.
    """

    option_groups = (
        ("subnets", "which networks"),
        ("split", "images"),
        ("ema", "of a run"),
        ("json", "output"),
    )

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of runs on the same data, such as common training's and ST's."""
    subnets: int = 4
    """Subnets beside the main network, the same ones at each checkpoint."""
    split: Literal["train", "val", "test"] = "train"
    """Images on which they are compared; the theorem is about the training images, whose losses are small."""
    images: int = 2048
    """How many of them, drawn once for all; fewer where there are no more."""
    ema: bool = False
    """Take the moving average of the weights."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the runs."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the runs' networks or images."""
    json: bool = False
    """Print everything as JSON."""
    output: str | None = None
    """Write a line for each subnet and checkpoint to this CSV file, all to a .json file that the report takes, or
    a page to an .html file; its folder is made."""
    plot: str | None = None
    """Write a picture of gap and bound over the epochs to this SVG file."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("bound: give at least one run folder")
        check_device(self.device)
        check_least(self, subnets=1, images=1)

    @property
    def checkpoint(self) -> str:
        """That with which a run is opened; each is looked at."""
        return "last"


def run(words: list[str]) -> int:
    """Prints the table, writes files if asked to."""
    options = parse(Bound, words, prog="unloaf bound")
    from unloaf.analysis.bound import bound_rows, bound_table
    from unloaf.display import show_progress
    from unloaf.evaluation import choose_subnets
    from unloaf.pages.studies import bound_picture
    from unloaf.runs.opened import checkpoints_of

    opened = opened_runs(options)
    counts = [len(choose_subnets(run.training.stages, options.subnets + 1)) - 1 for run in opened]
    total = sum(n * len(checkpoints_of(run.run)) for n, run in zip(counts, opened, strict=True))
    with show_progress(bar(), total=total, label="subnets", lines=True) as display:
        rows, missing = bound_rows(
            opened, split=options.split, subnets=options.subnets, images=options.images,
            on_row=lambda row: display.advance(f"{row.run}, epoch {row.epoch:g}, {row.depths}"),
        )  # fmt: skip
    notes = [
        f"{options.split} images, in nats; means over images and subnets. gap: distance of the cross-entropies on an "
        "image; bound: the largest that its KL and the main network's cross-entropy allow",
        *missing,
    ]
    found = analysis_of("bound", rows, notes, opened)
    give(options, rows, notes=notes, table=bound_table, picture=lambda: bound_picture(rows), analysis=found)
    return 0
