"""`unloaf eval`: a trained run and its subnets evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from unloaf.commands.judged import main_lines, say_subnets
from unloaf.commands.options import check_least, check_subnets
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.config.checks import check_device
from unloaf.config.figures import FIGURES
from unloaf.files.writing import check_writable
from unloaf.streams import say, standard_error


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Judge a trained run, also one that is still training: its main network and, if asked, subnets."""

    option_groups = (("subnets", "what is evaluated"), ("batch_size", "data and device"), ("output", "output"))

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, as `unloaf train` named it."""
    subnets: Annotated[str | None, tyro.conf.arg(metavar="all|pareto|N")] = None
    """Also evaluate all ordered subnets, those on the Pareto front (pareto), or a number drawn with the run's
    seed, and write subnets.csv into the run folder."""
    recalibrate: int | None = None
    """Training images from which the batch-norm statistics of a subnet are estimated; default: as in the run."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    split: Literal["val", "test"] | None = None
    """Images to evaluate on; default: both for the main network, val for subnets if there is one."""
    ema: bool = False
    """Judge the moving average of the weights."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"])] = None
    """Images in a forward pass; default: as in the run."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """Processes that read images; default: as in the run."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the run."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the run's network or images."""
    output: str | None = None
    """Write the table of subnets to this file instead; its folder is made; only with --subnets."""

    def __post_init__(self) -> None:
        check_subnets(self.subnets)
        if self.subnets is None and self.output is not None:
            raise ValueError(
                f"output {self.output} is for the table of subnets; give --subnets with it, or leave --output out"
            )
        check_device(self.device)
        check_least(self, recalibrate=2, batch_size=2, workers=0)


def run(words: list[str]) -> int:
    """Prints the accuracy of the main network and of subnets."""
    options = parse(Eval, words, prog="unloaf eval")
    run, given = Path(options.run), {name: value for name, value in vars(options).items() if name not in _NOT_JUDGING}
    output = Path(options.output) if options.output else run / "subnets.csv"
    from unloaf.measure.records import accuracy_table
    from unloaf.runs.judge import judge_run, write_subnets

    if options.subnets is not None:
        check_writable(output)
    judgement = judge_run(run, **given, console=Console(file=standard_error()))
    for line in main_lines(judgement):
        say(line)
    if judgement.subnets:
        say_subnets(judgement)
        show(*accuracy_table(judgement.subnets, FIGURES[judgement.task]))
        write_subnets(judgement, output)
        say(f"all {len(judgement.judged)} that were evaluated: {output}")
    return 0


_NOT_JUDGING = ("run", "output")
