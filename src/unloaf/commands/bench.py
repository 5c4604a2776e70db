"""`unloaf bench step`: what a training step costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console

from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.commands.tables import print_table
from unloaf.config.checks import check_device
from unloaf.streams import standard_error


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Measure time and memory of a training step against common training."""

    option_groups = (("model", "what is measured"), ("amp", "device"), ("repeats", "rounds"), ("output", "output"))

    model: tuple[str, ...] = ("timm/resnet50",)
    """Networks, as for train, NAME@SIDE for a side of their own; standard for the eight of the performance page."""
    img_size: int | None = None
    """Side of the images in pixels; default: 32 for cifar/, else the model's own if it has only one, else 64."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 16
    """Images per step."""
    num_classes: int | None = None
    """Classes of the head; default: 1000, 10 for cifar/."""
    num_subnets: int = 6
    """Subnets per step of ST and ST++."""
    methods: tuple[str, ...] = ("st", "st-inter-stage", "st++", "st++-one-side", "gkt")
    """Methods to measure, also stochastic-depth; common training always is."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    """Blocks as they are (eager), compiled one by one, or both; where the machine cannot compile, eager figures stand
    instead."""
    amp: bool = False
    """Mixed precision: bfloat16."""
    channels_last: bool = False
    """Keep images and weights in channels-last memory format."""
    device: str = "auto"
    """auto takes a CUDA device when there is one; or cpu, cuda, cuda:1."""
    repeats: int = 10
    """Rounds over all methods; medians count."""
    minutes: float | None = None
    """Begin nothing after so long; each network and mode gets an equal share, and what is measured by then counts."""
    output: str | None = None
    """Folder for step_time.json, step_time.csv and step_time.svg, written again after each network and mode."""
    plot: str | None = None
    """File for the picture alone, .svg."""

    def __post_init__(self) -> None:
        if not self.model or not self.modes or not self.methods:
            raise ValueError("model, methods and modes take one or more names; give them, or leave the flag out")
        if self.plot is not None and not self.plot.endswith(".svg"):
            raise ValueError(f"plot {self.plot!r}: give a file that ends in .svg")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ValueError(f"minutes {self.minutes}: give a number above 0")
        check_device(self.device)
        check_least(self, img_size=1, batch_size=1, num_classes=2, num_subnets=1, repeats=1)


_FORMER_FLAGS: dict[str, str] = dict.fromkeys(("--input-size", "--input_size"), "--img-size, as in the other commands")


def run(words: list[str]) -> int:
    """Measures, prints the tables."""
    if words in (["-h"], ["--help"]):
        words = ["step", *words]
    if words[:1] != ["step"]:
        raise ValueError(f"{' '.join(['bench', *words[:1]])}: give 'bench step'")
    options = vars(parse(BenchStep, words[1:], prog="unloaf bench step", former=_FORMER_FLAGS))
    from unloaf.bench import bench_step, tables

    for table in tables(bench_step(**options, console=Console(file=standard_error()))):
        print_table(table)
    return 0
