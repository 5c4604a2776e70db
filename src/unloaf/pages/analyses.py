"""Pictures of analyses. Computes nothing but means; returns SVG text, writes no file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from unloaf.pages.plots import STYLE, line_look, svg_of

if TYPE_CHECKING:
    from unloaf.analysis.damage import DamageRow
    from unloaf.analysis.logits import LogitsRow
    from unloaf.analysis.receptive_field import ReceptiveField
    from unloaf.inspection import LayoutRow


def _legend(picture: Figure) -> None:
    """Below the picture, in two columns where the names are short."""
    names = [text for axes in picture.axes for text in axes.get_legend_handles_labels()[1]]
    columns = 2 if max(map(len, names), default=0) <= 30 else 1
    picture.legend(frameon=False, fontsize=11, loc="outside lower center", ncols=columns)


@matplotlib.rc_context(STYLE)
def damage_picture(rows: Sequence[DamageRow], *, figure: str, digits: int = 1) -> str:
    """A figure over the number of deleted blocks, as SVG: each damaged network a dot, a line through the means."""
    picture = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes: Any = picture.subplots()
    runs = list(dict.fromkeys(row.run for row in rows))
    for index, run in enumerate(runs):
        colour, dashes = line_look(index)
        shift = 0.1 * (index - (len(runs) - 1) / 2)
        mine = [row for row in rows if row.run == run]
        axes.scatter([r.deleted + shift for r in mine], [r.value for r in mine], s=12, color=colour, alpha=0.4, lw=0)
        counts = sorted({row.deleted for row in mine})
        means = [statistics.fmean(row.value for row in mine if row.deleted == count) for count in counts]
        axes.plot(counts, means, color=colour, linestyle=dashes, linewidth=2, label=run_label(run, mine[0].method))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("blocks deleted")
    axes.set_ylabel(figure)
    axes.grid(axis="y")
    _legend(picture)
    return svg_of(picture, background="white")


@matplotlib.rc_context(STYLE)
def logits_picture(rows: Sequence[LogitsRow]) -> str:
    """Accuracy over the size of the logits, as SVG: main networks large, their subnets small."""
    picture = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes: Any = picture.subplots()
    for index, run in enumerate(dict.fromkeys(row.run for row in rows)):
        colour, _ = line_look(index)
        mine = [row for row in rows if row.run == run]
        subnets = [row for row in mine if not row.main]
        axes.scatter([r.magnitude for r in subnets], [r.top1 for r in subnets], s=26, color=colour, alpha=0.6, lw=0)
        for row in mine:
            if row.main:
                label = run_label(run, row.method)
                axes.errorbar(
                    row.magnitude, row.top1, xerr=row.magnitude_sd, fmt="o", markersize=10, color=colour, capsize=3,
                    markeredgecolor="white", label=label,
                )  # fmt: skip
    axes.set_xlabel("L2 norm of an image's logits\nmean, and standard deviation over the images")
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid()
    _legend(picture)
    return svg_of(picture, background="white")


@matplotlib.rc_context(STYLE)
def field_picture(rows: Sequence[ReceptiveField]) -> str:
    """Contributions of the pixels as shades, a panel for each network and side, as SVG.

    Each panel is the logarithm of its own contributions, from none to the highest, so that the dark area tells how far
    a network sees.
    """
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    picture = Figure(figsize=(2.6 * columns, 3.1 * lines), layout="constrained")
    panels = picture.subplots(lines, columns, squeeze=False).flatten()
    for axes, row in zip(panels, rows, strict=False):
        highest = max(max(line) for line in row.contributions)
        shades = [[math.log10(1 + 999 * value / highest) for value in line] for line in row.contributions]
        axes.imshow(shades, cmap="Blues", vmin=0, vmax=3, interpolation="nearest")
        axes.set_title(f"{_short(row.run)}\n{row.depths}, {row.side} px", fontsize=10.5, parse_math=False)
        axes.set_xlabel(f"50 % in {row.areas[2]:.0f} % of the image", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(True)
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    return svg_of(picture, background="white")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"


@matplotlib.rc_context(STYLE)
def layout_picture(rows: Sequence[LayoutRow]) -> str:
    """The stages of models as bars of their blocks, a line for each model, as SVG.

    A block that can be skipped is filled, one that cannot is pale; stages alternate in colour.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    picture = Figure(figsize=(9.0, 1.1 + 0.75 * len(models)), layout="constrained")
    axes: Any = picture.subplots()
    for place, model in enumerate(models):
        left = 0.0
        for index, row in enumerate(row for row in rows if row.model == model):
            colour = "#8a8a8a" if not row.stage else line_look(2 + index % 2)[0]
            for block in range(row.blocks):
                pale = block < row.blocks - row.skippable  # heads of stages change the shape
                axes.barh(
                    place, 0.92, left=left + block, height=0.5, color=colour, alpha=0.3 if pale else 1.0, linewidth=0
                )
            axes.text(left + row.blocks / 2, place - 0.33, str(row.blocks), ha="center", va="bottom", fontsize=11)
            left += row.blocks + 0.6
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -0.75)
    axes.set_xticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("blocks of each stage; pale: cannot be skipped; grey: in no stage")
    return svg_of(picture, background="white")


def run_label(run: str, method: str) -> str:
    """A run's name with its method, if it does not say it; a name that begins with "_" would have no legend."""
    short = run if len(run) <= 40 else f"{run[:18]}...{run[-19:]}"
    text = short if run in (method, method.lower()) else f"{short} ({method})"
    return f" {text}" if text.startswith("_") else text
