"""`unloaf anytime`: trained runs as cascades, accuracy over mean cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from unloaf.commands.options import check_depths, check_least
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.config.checks import check_device
from unloaf.files.writing import check_writable, write_whole
from unloaf.streams import say, standard_error

if TYPE_CHECKING:
    from unloaf.runs.anytime import AnytimeJudgement

_TARGETS = ("max_drop", "min_top1", "max_gmacs", "threshold")


@dataclass(frozen=True, kw_only=True)
class Anytime:
    """Judge runs as cascades: subnets answer one after another, each image by the first that is sure."""

    option_groups = (
        ("subnets", "cascade"),
        ("max_drop", "what the threshold is set for, one of them"),
        ("batch_size", "time"),
        ("checkpoint", "of a run"),
        ("json", "output"),
    )

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of the runs, such as common training's and ST's."""
    subnets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEPTHS ...")] = ()
    """The exits, each a part of the next, as in 3-3-1 3-3-3; default: the ordered ones that reach the target at the
    least cost, the main network last."""
    exits: int = 4
    """Most exits that are chosen."""
    confidence: Literal["max-probability", "entropy", "agreement"] = "max-probability"
    """On what an image leaves: its highest probability, 1 - entropy / log(classes), or the lower of the two highest
    probabilities where two exits agree."""
    recalibrate: int | None = None
    """Training images from which the batch-norm statistics of the exits are estimated; default: as in the run."""
    max_drop: float | None = None
    """Points of accuracy below the last exit, at the least mean GMACs; without any of these options 0.5."""
    min_top1: float | None = None
    """Accuracy in percent, at the least mean GMACs."""
    max_gmacs: float | None = None
    """Mean GMACs for an image, with the highest accuracy."""
    threshold: float | None = None
    """The threshold itself, only with --subnets."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["-b"])] = (1, 32)
    """Images in a measured call, one number or several."""
    repeats: int = 5
    """Rounds over up to 256 images that are timed; 0 measures no time."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    ema: bool = False
    """Judge the moving average of the weights."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the run."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the run's network or images."""
    json: bool = False
    """Print everything as JSON."""
    output: str | None = None
    """Write the tables to this CSV file too, or a page with them and the picture to an .html file; its folder is
    made."""
    plot: str | None = None
    """Write a picture of accuracy over mean GMACs to this SVG file."""
    export: str | None = None
    """Write the cascade of the one run into this new folder."""
    format: Literal["state_dict", "onnx"] = "state_dict"
    """export: weights, statistics and a JSON, for unloaf.load_anytime; or ONNX, a file for each exit, which computes
    what earlier ones have not."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("anytime: give at least one run folder")
        for depths in self.subnets:
            check_depths(depths)
        if len(self.subnets) == 1:
            raise ValueError(f"subnets {self.subnets[0]}: give at least two exits, the main network last")
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are all given; the threshold is set for one of them")
        if self.threshold is not None and not (self.subnets and 0 <= self.threshold <= 1):
            raise ValueError(f"threshold {self.threshold}: give a confidence from 0 to 1, and --subnets with it")
        if self.export is None and self.format != "state_dict":
            raise ValueError(f"format {self.format} is that of an export; give --export FOLDER with it")
        if self.export is not None and len(self.runs) > 1:
            raise ValueError("export writes one cascade; give one run with it")
        if not self.batch_size or min(self.batch_size) < 1:
            raise ValueError(f"batch_size {self.batch_size}: give one or more numbers of at least 1")
        check_device(self.device)
        check_least(self, exits=2, repeats=0, recalibrate=2, max_drop=0, min_top1=0, max_gmacs=0)


def run(words: list[str]) -> int:
    """Prints the tables, writes files if asked to."""
    options = parse(Anytime, words, prog="unloaf anytime")
    from unloaf.files.writing import check_new
    from unloaf.measure.costs import write_csv
    from unloaf.runs.anytime_records import csv_records, json_records

    for path in (options.output, options.plot):
        if path is not None:
            check_writable(Path(path))
    if options.export is not None:
        check_new(Path(options.export))
    judgements = [_judged(Path(folder), options) for folder in options.runs]
    if options.json:
        print(json.dumps(json_records(judgements), indent=2))
    else:
        _show(judgements)
    if options.output is not None and options.output.endswith(".html"):
        from unloaf.pages.cascades import cascades_section
        from unloaf.pages.runs import analysis_page
        from unloaf.runs.histories import read_histories

        write_whole(Path(options.output), analysis_page(cascades_section(judgements), read_histories(options.runs)))
        _tell(options, f"page: {options.output}")
    elif options.output is not None:
        write_csv(csv_records(judgements), Path(options.output))
        _tell(options, f"table: {options.output}")
    if options.plot is not None:
        from unloaf.pages.cascades import accuracy_over_gmacs

        write_whole(Path(options.plot), accuracy_over_gmacs(judgements), advice="give another file")
        _tell(options, f"picture: {options.plot}")
    return 0


def _judged(folder: Path, options: Any) -> AnytimeJudgement:
    from unloaf.measure.exits import Target
    from unloaf.runs.anytime import judge_anytime

    target = {name: getattr(options, name) for name in _TARGETS[:-1]}
    names = ("subnets", "threshold", "confidence", "exits", "repeats", "recalibrate", "checkpoint", "ema", "data_dir")
    judgement, anytime, opened = judge_anytime(
        folder,
        **{name: getattr(options, name) for name in (*names, "device", "run_own_code")},
        target=Target(**target) if any(value is not None for value in target.values()) else None,
        timed=options.batch_size if options.repeats else (),
        console=Console(file=standard_error()),
    )
    if options.export is not None:
        from unloaf.release.anytime_files import export_anytime
        from unloaf.release.anytime_segments import export_segments

        write = export_segments if options.format == "onnx" else export_anytime
        write(anytime, opened, Path(options.export))
        loading = "" if options.format == "onnx" else f": unloaf.load_anytime({options.export!r})"
        _tell(options, f"export: {options.export}{loading}")
    return judgement


def _tell(options: Any, line: str) -> None:
    """Beside JSON a line goes where it is no part of it."""
    if options.json:
        standard_error().write(f"{line}\n")
    else:
        say(line)


def _show(judgements: list[AnytimeJudgement]) -> None:
    from unloaf.runs.anytime_records import curve_table, network_table, said_of

    for judgement in judgements:
        for line in said_of(judgement):
            say(line)
    print()
    show(*network_table(judgements))
    first = judgements[0]
    print("batch-norm statistics re-estimated, but those of the main network, which are its own")
    print("best subnet alone: the one that the same validation images choose for the same target")
    if first.device:
        print(f"images/s: median over rounds of the same images, on {first.device}, {first.threads} thread(s)")
    print(f"\nat other thresholds, on the {first.judged_on} images:")
    show(*curve_table(judgements))
