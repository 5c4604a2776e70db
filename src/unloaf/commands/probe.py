"""`unloaf probe`: a linear classifier on the features of an encoder that learned without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.config.checks import check_device


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Train a linear classifier on the frozen features of a run of task masked, and on those of its subnets."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, as `unloaf train` named it."""
    subnets: int | None = None
    """So many subnets beside the main network, drawn with the run's seed; default: all ordered ones."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation figure."""
    ema: bool = False
    """Take the moving average of the weights."""
    data_dir: str | None = None
    """Folder of the image set; default: as in the run."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the run's images."""

    def __post_init__(self) -> None:
        check_device(self.device)
        check_least(self, subnets=0)


def run(words: list[str]) -> int:
    """Prints a row for each network."""
    options = parse(Probe, words, prog="unloaf probe")
    from unloaf.runs.probe import probe_run

    rows = probe_run(**vars(options))
    splits = list(rows[0].top1)
    heads = ["depths", *(f"{split} top-1 %" for split in splits)]
    show(heads, [[str(row.subnet), *(f"{row.top1[split]:.2f}" for split in splits)] for row in rows])
    return 0
