"""`unloaf recipes`: the recipes, or one with its settings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Annotated

import tyro

from unloaf.commands.help import beside, text_width, wrapped
from unloaf.commands.parsing import parse
from unloaf.config import dump_config
from unloaf.config.figures import FIGURES
from unloaf.recipes import RECIPES, recipe


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes, which are settings for `unloaf train --recipe NAME`, or show one of them."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """The recipe to show; default: a list of all."""


def run(words: list[str]) -> int:
    """Prints the list, or the settings of one recipe and what its source says."""
    name = parse(Recipes, words, prog="unloaf recipes").name
    print("\n".join(_list() if name is None else _one(name)))
    return 0


def _list() -> list[str]:
    """A line for each recipe, at most 60 columns wide; their sources stand below."""
    numbers = {source: f"[{n}]" for n, source in enumerate(dict.fromkeys(r.source for r in RECIPES.values()), start=1)}
    lines = [f"{'name':<39}{'epochs':>7}{'top-1':>6}  source"]
    configs = {name: entry.config() for name, entry in RECIPES.items()}
    for (model, images), names in groupby(RECIPES, lambda name: (configs[name].model, name.partition("_")[0])):
        lines += ["", f"{model} on {images}"]
        for name in names:
            published = RECIPES[name].published.replace("common + ", "+")
            lines.append(f"  {name:<37}{configs[name].epochs:>7}{published:>6}  {numbers[RECIPES[name].source]}")
    note = (
        "top-1: of the main network, in percent, as published (for COCO mAP, of masks for Mask R-CNN, of keypoints for "
        "simple-baseline); +4.53: so much above common training. `unloaf recipes NAME` shows a recipe, `unloaf train "
        "--recipe NAME` trains by it."
    )
    sources = [(number, source) for source, number in numbers.items()]
    return [*lines, "", "sources:", *beside(sources, text_width(), 8), "", *wrapped(note, text_width())]


def _one(name: str) -> list[str]:
    config, entry, width = recipe(name), RECIPES[name], text_width()
    function = entry.config.func if isinstance(entry.config, partial) else entry.config
    about = str(inspect.getdoc(function)).partition("\n>>>")[0].strip().split("\n\n")
    figure = FIGURES[config.task].chief.label
    published = f"; published {figure}: {entry.published}" if entry.published else ""
    head = f"{name}: {config.model}, {config.method}, {config.epochs} epochs{published} ({entry.source})"
    lines = [*wrapped(head, width), *(line for paragraph in about for line in ("", *wrapped(paragraph, width)))]
    settings = dump_config(config, only_changed=True).splitlines()
    note = f"`unloaf train --recipe {name}` trains by it; flags override its settings."
    return [*lines, "", "settings that are not the defaults:", *(f"  {s}" for s in settings), "", *wrapped(note, width)]
