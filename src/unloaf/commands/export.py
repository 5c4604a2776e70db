"""`unloaf export`: a subnet of a run as an ordinary model, or a run as one elastic file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from unloaf.commands.options import check_depths, check_least
from unloaf.commands.parsing import parse
from unloaf.config.checks import check_device
from unloaf.streams import say


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a subnet of a run as an ordinary model, or a run as one elastic file."""

    option_groups = (("depths", "network"), ("format", "form"), ("data_dir", "data and device"), ("output", "output"))

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    depths: str | None = None
    """Kept blocks of each stage, as in 3,3,5,3, or chosen ones, as in 3,2:101,5,3; default: the main network."""
    recalibrate: int | None = None
    """Training images from which batch-norm statistics are estimated; 0 for none; default: as in the run."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    ema: bool = False
    """Export the moving average of the weights."""
    format: Literal["state_dict", "timm", "pt2", "onnx"] = "state_dict"
    """Weights with a JSON file beside them (of an hf/ run also a config.json), a model that timm reloads, a
    torch.export program, or ONNX."""
    elastic: bool = False
    """Write one file of which any depth can be run instead of one subnet."""
    subnets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEPTHS ...")] = ()
    """elastic: subnets that get batch-norm statistics of their own, as in 3-3-5-3; default: all ordered ones, up to
    64."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the run."""
    device: str = "auto"
    """auto takes an accelerator when there is one, for the statistics and the accuracy; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the run's network or images."""
    output: str | None = None
    """New folder for the results; default: one in RUN/export."""
    push_to_hub: str | None = None
    """Also upload it under this name, by the library of timm or Hugging Face; only with this option."""

    def __post_init__(self) -> None:
        check_depths(self.depths)
        if self.subnets and not self.elastic:
            raise ValueError("subnets are those of an elastic file; give --elastic with them, or --depths for one")
        if self.elastic and (self.depths is not None or self.format != "state_dict"):
            raise ValueError("elastic holds all depths in a format of its own; leave --depths and --format out")
        check_device(self.device)
        check_least(self, recalibrate=0)


def run(words: list[str]) -> int:
    """Writes the files, prints their sizes and how they are loaded."""
    options = parse(Export, words, prog="unloaf export")
    from unloaf.release import exports as release

    names = ("recalibrate", "checkpoint", "ema", "data_dir", "device", "run_own_code", "push_to_hub", "output")
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.elastic:
        written = release.export_elastic(options.run, subnets=options.subnets or None, **given)
    else:
        written = release.export_run(options.run, depths=options.depths, format=options.format, **given)
    sizes = (f"{name}: {size:,} bytes" for name, size in written.files.items())
    pushed = [f"pushed to {written.pushed} on the Hugging Face hub"] if written.pushed else []
    for line in (*written.notes, *sizes, f"export: {written.folder}", *pushed, *written.loading.split("\n")):
        say(line)
    return 0
