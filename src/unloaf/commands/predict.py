"""`unloaf predict`: the classes of images, by the main network of a run or by a subnet."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from unloaf.commands.options import check_depths, check_least
from unloaf.commands.parsing import parse
from unloaf.config.checks import check_device
from unloaf.printable import printable

if TYPE_CHECKING:
    from unloaf.release.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Classify images by the main network of a trained run or by a subnet."""

    option_groups = (("depths", "network"), ("top_k", "output"), ("batch_size", "data and device"))

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the run, as `unloaf train` named it."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")] = ()
    """Image files, or folders of which every image file below is taken."""
    depths: str | None = None
    """Kept blocks of each stage, as in 3,3,5,3, or chosen ones, as in 3,2:101,5,3; default: the main network."""
    recalibrate: int | None = None
    """Training images from which a subnet's batch-norm statistics are estimated; 0 for none; default: as in the run."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the best validation accuracy."""
    ema: bool = False
    """Take the moving average of the weights."""
    top_k: int = 5
    """Classes printed for each image, most probable first."""
    json: bool = False
    """Print everything as JSON."""
    csv: bool = False
    """Print a line for each image and class as CSV."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"])] = None
    """Images in a forward pass; default: as in the run."""
    data_dir: str | None = None
    """Folder of the run's image set; default: as in the run."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the run's network or images."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("predict: give at least one image file, or a folder of them, after the run folder")
        if self.json and self.csv:
            raise ValueError("json and csv are two forms of the same; give one of them")
        check_depths(self.depths)
        check_device(self.device)
        check_least(self, top_k=1, recalibrate=0, batch_size=1)


def run(words: list[str]) -> int:
    """Prints the classes of every image that can be read.

    Raises:
        ValueError: some could not be read, or nothing could be begun.
    """
    options = parse(Predict, words, prog="unloaf predict")
    from unloaf.release.predictions import predict_run

    given = {name: value for name, value in vars(options).items() if name not in ("json", "csv")}
    found = predict_run(**given, console=Console(stderr=True))
    {(True, False): _print_json, (False, True): _print_csv}.get((options.json, options.csv), _print_lines)(found)
    if found.bad:
        for name, reason in found.bad:
            print(f"bad: {printable(name)}: {reason}", file=sys.stderr)
        total = len(found.bad) + len(found.images)
        raise ValueError(f"{len(found.bad)} of {total} images cannot be read; give image files or folders of them")
    return 0


def _print_lines(found: Predictions) -> None:
    for note in found.notes:
        print(note)
    average = ", moving average of the weights" if found.weights == "model_ema" else ""
    network = f"{'main network' if found.main else 'subnet'} {found.subnet}"
    print(f"{found.run}, {found.checkpoint} (after epoch {found.epoch}){average}, {network}")
    for one in found.images:
        shares = zip(one.classes, one.probabilities, strict=True)
        told = ", ".join(f"{printable(name)} {100 * share:.2f} %" for name, share in shares)
        print(f"{printable(one.image)}: {told}")


def _print_json(found: Predictions) -> None:
    described = asdict(found) | {"run": str(found.run)}
    described["images"] = [
        {"image": one.image, "classes": dict(zip(one.classes, one.probabilities, strict=True))} for one in found.images
    ]
    described["bad"] = [{"image": name, "reason": reason} for name, reason in found.bad]
    print(json.dumps(described, indent=2))


def _print_csv(found: Predictions) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for one in found.images:
        for rank, (name, share) in enumerate(zip(one.classes, one.probabilities, strict=True), start=1):
            writer.writerow([printable(one.image), rank, printable(name), f"{share:.6g}"])
