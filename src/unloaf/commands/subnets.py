"""`unloaf subnets`: what the subnets of a run or a model cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from unloaf.commands.judged import main_lines, say_subnets
from unloaf.commands.options import check_least, check_subnets
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.config.checks import check_device
from unloaf.config.figures import FIGURES, Figures
from unloaf.files.writing import check_writable
from unloaf.streams import say, standard_error

if TYPE_CHECKING:
    from unloaf.evaluation import SubnetRow
    from unloaf.measure.costs import Timing


@dataclass(frozen=True, kw_only=True)
class Subnets:
    """What the subnets of a run or of a model cost, and of a run how good they are."""

    option_groups = (
        ("subnets", "which subnets"),
        ("all", "all of a classifier"),
        ("latency", "time"),
        ("checkpoint", "of a run"),
        ("img_size", "of a model"),
        ("output", "output"),
    )

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|MODEL")]
    """Folder of a run, or a network as for train."""
    subnets: Annotated[str, tyro.conf.arg(metavar="all|pareto|N")] = "16"
    """All ordered ones, a number of them beside the main network, or, of a run, pareto: the Pareto front."""
    all: tyro.conf.FlagCreatePairsOff[bool] = False
    """Of a run: calibration, agreement with the main network, latency and the ensemble of all ordered subnets too."""
    against: Annotated[str | None, tyro.conf.arg(metavar="DATASET|FOLDER")] = None
    """all: images that the network does not know, a data set as for train or a folder with train and val in it: how
    well they are told by low confidence and by disagreement."""
    against_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """all: folder of that data set; default: that of the run's."""
    json: bool = False
    """all: print everything as JSON."""
    plot: str | None = None
    """all: write a picture of accuracy, calibration and agreement over cost to this SVG file."""
    latency: bool = False
    """Measure how long a forward pass takes."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["-b"])] = (1, 32)
    """Images in a measured pass, one number or several."""
    repeats: int = 30
    """Passes that are timed, of each subnet and batch size; with --all 0 measures no time."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the run's network or images."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    split: Literal["val", "test"] | None = None
    """Images on which the subnets are evaluated; default: val if there is one."""
    ema: bool = False
    """Judge the moving average of the weights."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the run."""
    img_size: int | None = None
    """Side of the images in pixels; default: its own."""
    num_classes: int | None = None
    """Classes of the head; default: 1000, 10 for cifar/."""
    output: str | None = None
    """Write the table to this CSV file too; of all also a .json file for --analysis of report or an .html page;
    its folder is made."""

    def __post_init__(self) -> None:
        check_subnets(self.subnets)
        if not self.batch_size or min(self.batch_size) < 1:
            raise ValueError(f"batch_size {self.batch_size}: give one or more numbers of at least 1")
        check_device(self.device)
        check_least(self, repeats=0 if self.all else 1, img_size=1, num_classes=1)
        for name in ("against", "against_dir", "json", "plot"):
            if getattr(self, name) and not self.all:
                raise ValueError(f"{name.replace('_', '-')} is for all subnets of a run; give --all with it")
        if self.all and not _is_run(self.source):
            raise ValueError(f"{self.source} is a model; --all is for a run, which is trained")

    @property
    def runs(self) -> tuple[str, ...]:
        """As the other analyses have them."""
        return (self.source,)

    @property
    def timed(self) -> tuple[int, ...]:
        """Batch sizes to measure."""
        return self.batch_size if self.latency else ()


def run(words: list[str]) -> int:
    """Prints the table, writes it to a file if asked to."""
    options = parse(Subnets, words, prog="unloaf subnets", former={"--num": "--subnets"})
    if options.all:
        from unloaf.commands.all_subnets import run_all

        return run_all(options)
    from unloaf.measure.costs import write_csv
    from unloaf.measure.pareto import pareto_front
    from unloaf.measure.records import cost_records, cost_table

    if options.output is not None:
        check_writable(Path(options.output))
    rows, times, figures = _costs_of_run(options) if _is_run(options.source) else _costs_of_model(options)
    cost = "latency_ms" if options.timed else "gmacs"
    judged = figures.decide(rows[0]) is not None
    front = {row.subnet for row in pareto_front(rows, cost=cost, by=figures.of_rows)} if judged else None
    shown = [i for i, row in enumerate(rows) if not front or options.subnets != "pareto" or row.subnet in front]
    show(*cost_table([rows[i] for i in shown], [times[i] for i in shown] if times else [], front, figures))
    for timing in times[0][:1] if times else []:
        print(f"median and 95th percentile of {timing.repeats} passes, on {timing.device}, {timing.threads} thread(s)")
    if front is not None:
        price = "milliseconds at the smallest batch" if options.timed else "GMACs"
        print(f"* no other subnet is as accurate and as cheap in {price}, and better in one of the two")
    if options.output is not None:
        records = cost_records(rows, times)
        if front is not None:
            records = [record | {"pareto": row.subnet in front} for record, row in zip(records, rows, strict=True)]
        write_csv(records, Path(options.output))
        say(f"all {len(rows)}: {options.output}")
    return 0


def _is_run(source: str) -> bool:
    family, slash, _ = source.partition("/")
    is_model = not slash or family in ("cifar", "timm", "tv", "hf")
    return not is_model or (Path(source) / "args.yaml").is_file()


_Found = tuple["Sequence[SubnetRow]", "Sequence[Sequence[Timing]]", Figures]


def _costs_of_run(options: Subnets) -> _Found:
    if options.img_size is not None or options.num_classes is not None:
        raise ValueError("a run has its images and classes; leave --img-size and --num-classes out")
    from unloaf.runs.judge import judge_run

    names = ("subnets", "checkpoint", "split", "ema", "data_dir", "device", "timed", "repeats", "run_own_code")
    given = {name: getattr(options, name) for name in names}
    judgement = judge_run(Path(options.source), **given, console=Console(file=standard_error()))
    for line in main_lines(judgement):
        say(line)
    say_subnets(judgement)
    return judgement.judged, judgement.times, FIGURES[judgement.task]


def _costs_of_model(options: Subnets) -> _Found:
    if options.subnets == "pareto":
        raise ValueError("subnets pareto: a model that is not trained has no accuracy; give a run, or all or a number")
    from unloaf.inspection import cost_of_model

    names = ("subnets", "timed", "repeats", "device", "img_size", "num_classes")
    given = {name: getattr(options, name) for name in names}
    rows, times = cost_of_model(options.source, **given, console=Console(file=standard_error()))
    return rows, times, FIGURES["classification"]
