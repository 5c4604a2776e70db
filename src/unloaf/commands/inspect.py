"""`unloaf inspect`: a model looked over before it is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.files.writing import check_writable, write_whole
from unloaf.printable import printable
from unloaf.streams import say, standard_error

if TYPE_CHECKING:
    from unloaf.inspection import Inspection


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe a model before it is trained: what can be skipped, what a step would cost. Nothing is trained."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...")] = ()
    """timm/NAME, tv/NAME, cifar/NAME, hf/FOLDER or hf/CLASS, or module:function of yours, which is imported and run; of
    several the stages are compared."""
    img_size: int | None = None
    """Side of the images in pixels; default: the model's own."""
    num_classes: int | None = None
    """Classes of the head; default: 1000, 10 for cifar/."""
    json: bool = False
    """Print everything as JSON."""

    plot: str | None = None
    """Write a picture of the stages of the models to this SVG file."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("inspect: give at least one MODEL")
        check_least(self, img_size=1, num_classes=1)


def run(words: list[str]) -> int:
    """Prints what is found, as text or JSON."""
    options = parse(Inspect, words, prog="unloaf inspect")
    from unloaf.inspection import inspect_model, layout_rows, layout_table

    if options.plot is not None:
        check_writable(Path(options.plot))
    names = dict.fromkeys(options.models)
    found = [inspect_model(name, img_size=options.img_size, num_classes=options.num_classes) for name in names]
    if options.json:
        print(json.dumps(asdict(found[0]) if len(found) == 1 else [asdict(one) for one in found], indent=2))
    elif len(found) == 1:
        _show(found[0])
    else:
        show(*layout_table(layout_rows(found)))
    if options.plot is not None:
        from unloaf.pages.analyses import layout_picture

        write_whole(Path(options.plot), layout_picture(layout_rows(found)), advice="give another file")
        if options.json:
            standard_error().write(f"{printable(f'picture: {options.plot}')}\n")
        else:
            say(f"picture: {options.plot}")
    return 0


def _show(found: Inspection) -> None:
    from unloaf.inspection import sections

    for section in sections(found):
        for line in section.lines:
            say(line)
        if section.rows:
            show(section.heads, section.rows)
