"""`unloaf logits`: how large the logits of networks and of their subnets are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from unloaf.commands.analyses import analysis_of, bar, give, opened_runs
from unloaf.commands.options import check_least, check_subnets
from unloaf.commands.parsing import parse
from unloaf.config.checks import check_device


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Compare the size of the logits of networks and of the subnets inside them, for classification."""

    option_groups = (
        ("subnets", "which networks"),
        ("split", "evaluation"),
        ("checkpoint", "of a run"),
        ("json", "output"),
    )

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of runs on the same data: by several methods, or networks of several sizes, each trained alone."""
    subnets: Annotated[str, tyro.conf.arg(metavar="all|N")] = "8"
    """All ordered subnets, or so many of each run beside its main network."""
    seed: int = 0
    """Of the draw of subnets."""
    split: Literal["val", "test"] | None = None
    """Images on which the networks are evaluated; default: val if there is one."""
    recalibrate: int | None = None
    """Training images from which the batch-norm statistics of subnets are estimated; default: as in the run."""
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
    """Write the table to this CSV file, all to a .json file for --analysis of report, or a page to an .html file;
    its folder is made."""
    plot: str | None = None
    """Write a picture of accuracy over the size of the logits to this SVG file."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("logits: give at least one run folder")
        check_subnets(self.subnets)
        if self.subnets == "pareto":
            raise ValueError("subnets pareto: give all or a number")
        check_device(self.device)
        check_least(self, seed=0, recalibrate=2)


def run(words: list[str]) -> int:
    """Prints the table, writes files if asked to."""
    options = parse(Logits, words, prog="unloaf logits")
    from unloaf.analysis.logits import logits_rows, logits_table
    from unloaf.display import show_progress
    from unloaf.evaluation import choose_subnets
    from unloaf.pages.analyses import logits_picture

    opened = opened_runs(options, recalibrate=options.recalibrate)
    count = None if options.subnets == "all" else int(options.subnets)
    asked = None if count is None else count + 1
    total = sum(len(choose_subnets(run.training.stages, asked, seed=options.seed)) for run in opened)
    with show_progress(bar(), total=total, label="networks", lines=True) as display:
        rows = logits_rows(
            opened, split=options.split, subnets=count, seed=options.seed,
            on_row=lambda row: display.advance(f"{row.run}, {row.depths}"),
        )  # fmt: skip
    notes = [
        "magnitude: L2 norm of an image's logits, mean and standard deviation over the images; confidence: highest "
        "probability; batch-norm statistics of subnets re-estimated"
    ]
    found = analysis_of("logits", rows, notes, opened)
    give(options, rows, notes=notes, table=logits_table, picture=lambda: logits_picture(rows), analysis=found)
    return 0
