"""Cascades as a picture, accuracy over mean cost, and as a section of a page. Computes nothing, writes no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unloaf.pages.layout import Figure as Pictures
from unloaf.pages.layout import Picture, Section, Table, Words
from unloaf.pages.plots import STYLE, line_look, svg_of

if TYPE_CHECKING:
    from unloaf.runs.anytime import AnytimeJudgement


@matplotlib.rc_context(STYLE)
def accuracy_over_gmacs(judgements: Sequence[AnytimeJudgement]) -> str:
    """Accuracy over the mean GMACs of an image, as SVG.

    A line for each run joins its thresholds, a filled dot is the one that was set on validation images; hollow dots are
    subnets that run alone, squares main networks as they were trained.
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes: Any = figure.subplots()
    for index, judgement in enumerate(judgements):
        colour, dashes = line_look(index)
        points = sorted((point.gmacs, point.top1) for point in judgement.curve)
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=2, zorder=3)
        axes.plot(judgement.test.gmacs, judgement.test.top1, "o", color=colour, markersize=9, zorder=5)
        for row in judgement.rows:
            if row.kind != "cascade":
                marker = "s" if row.kind == "main" else "o"
                axes.plot(row.gmacs, row.top1, marker, color=colour, fillstyle="none", markersize=8, zorder=4)
    axes.set_xlabel("GMACs of an image, mean")
    axes.set_ylabel(f"top-1 accuracy, % of {judgements[0].judged_on} images")
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    looks = [line_look(index) for index in range(len(judgements))]
    handles = [Line2D([], [], color=colour, linestyle=dashes, linewidth=2) for colour, dashes in looks]
    dots: Any = [("o", "full"), ("o", "none"), ("s", "none")]
    handles += [Line2D([], [], linestyle="", color="#777777", marker=m, fillstyle=fill) for m, fill in dots]
    names = [judgement.run.name for judgement in judgements]
    axes.legend(
        handles, [*names, "threshold set", "subnet alone", "main network"], loc="best", frameon=False, fontsize=11
    )
    return svg_of(figure, background="white")


_ABOUT = (
    "Accuracy over the mean GMACs of an image: a line for each run joins its thresholds, a filled dot is the one that "
    "was set on validation images; hollow dots are subnets that run alone, squares main networks."
)
_WORDS = {
    "main network": "As it was trained; re-estimated: with statistics estimated anew, as the exits have them.",
    "best subnet alone": "The one that the same validation images choose for the same target.",
    "exit alone": "A subnet of the cascade that answers every image itself.",
    "Anytime": "The cascade: each image is answered by the first exit that is sure.",
    "of main": "Mean GMACs over those of the main network.",
    "left at each exit": "Share of the images that were answered there.",
}


def cascades_section(judgements: Sequence[AnytimeJudgement]) -> Section:
    """What `unloaf anytime` found, with the points of the curves as the data of the picture."""
    from unloaf.runs.anytime_records import csv_records, curve_table, network_table, said_of

    records = csv_records(judgements)
    heads = list(records[0])
    data = heads, [[record[head] for head in heads] for record in records]
    picture = Picture("Accuracy over mean cost", accuracy_over_gmacs(judgements), f"{_ABOUT} The tables below have the "
                      "numbers.", data, broad=True)  # fmt: skip
    return Section(
        "Cascades that answer early",
        [
            Pictures([picture], _ABOUT),
            Table("Networks and cascades", *network_table(judgements), words=(1,)),
            Table("Cascades at other thresholds", *curve_table(judgements)),
            *(f"{line}." for judgement in judgements for line in said_of(judgement)),
            Words(_WORDS),
        ],
    )
