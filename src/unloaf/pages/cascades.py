"""A picture of cascades: accuracy over mean cost. Computes nothing; returns SVG text, writes no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
