"""`unloaf inspect`: a model looked over before it is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.streams import say


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe a model before it is trained: what can be skipped, what a step would cost. Nothing is trained."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """timm/NAME, tv/NAME, cifar/NAME, hf/FOLDER or hf/CLASS, or module:function of yours, which is imported and run."""
    img_size: int | None = None
    """Side of the images in pixels; default: the model's own."""
    num_classes: int | None = None
    """Classes of the head; default: 1000, 10 for cifar/."""
    json: bool = False
    """Print everything as JSON."""

    def __post_init__(self) -> None:
        check_least(self, img_size=1, num_classes=1)


def run(words: list[str]) -> int:
    """Prints what is found, as text or JSON."""
    options = parse(Inspect, words, prog="unloaf inspect")
    from unloaf.inspection import inspect_model, sections

    found = inspect_model(options.model, img_size=options.img_size, num_classes=options.num_classes)
    if options.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    for section in sections(found):
        for line in section.lines:
            say(line)
        if section.rows:
            show(section.heads, section.rows)
    return 0
