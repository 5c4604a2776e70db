"""Pictures of all subnets of a run, as SVG. Computes nothing but means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from unloaf.pages.plots import STYLE, svg_of

if TYPE_CHECKING:
    from unloaf.analysis.subnets import SubnetAnalysisRow

_PANELS = {
    "top-1 accuracy, %": ("top1", "gmacs"),
    "top-1 accuracy, % ": ("top1", "latency_ms"),
    "ECE, %": ("ece", "gmacs"),
    "agreement, %": ("agreement", "gmacs"),
}
_COSTS = {"gmacs": "GMACs of an image", "latency_ms": "latency of an image, ms"}


@matplotlib.rc_context(STYLE)
def subnet_analysis_picture(rows: Sequence[SubnetAnalysisRow]) -> str:
    """Accuracy over GMACs and latency, calibration error and agreement over GMACs: a dot for each subnet.

    The main network is a square, the Pareto front a line, the ensemble a dashed line, as its cost is that of all.
    """
    networks = [row for row in rows if row.kind != "ensemble"]
    panels = {
        label: names for label, names in _PANELS.items() if all(getattr(r, names[1]) is not None for r in networks)
    }
    figure = Figure(figsize=(9.6, 3.9 * -(-len(panels) // 2) + 0.5), layout="constrained")
    axes: Any = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    for panel, (label, (value, cost)) in zip(axes, panels.items(), strict=False):
        _panel(panel, rows, value, cost)
        panel.set_xlabel(_COSTS[cost])
        panel.set_ylabel(label.strip())
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    handles = [
        Line2D([], [], linestyle="", marker="o", color="#0072b2", alpha=0.6),
        Line2D([], [], linestyle="", marker="s", color="#222222", markersize=9),
        Line2D([], [], color="#d55e00", linewidth=1.6),
        Line2D([], [], color="#009e73", linestyle=(0, (5, 2)), linewidth=1.8),
    ]
    names = ["subnet", "main network", "Pareto front by GMACs", "ensemble of all"]
    figure.legend(handles, names, frameon=False, fontsize=11, loc="outside lower center", ncols=4)
    return svg_of(figure, background="white")


def _panel(panel: Any, rows: Sequence[SubnetAnalysisRow], value: str, cost: str) -> None:
    subnets = [(getattr(row, cost), getattr(row, value)) for row in rows if row.kind == "subnet"]
    if subnets:
        panel.plot(*zip(*subnets, strict=True), "o", color="#0072b2", alpha=0.6, markersize=5, zorder=3)
    for row in rows:
        if row.kind == "main":
            panel.plot(getattr(row, cost), getattr(row, value), "s", color="#222222", markersize=9, zorder=4)
        elif row.kind == "ensemble":
            panel.axhline(getattr(row, value), color="#009e73", linestyle=(0, (5, 2)), linewidth=1.8, zorder=2)
    if (value, cost) == ("top1", "gmacs"):
        front = sorted((row.gmacs, row.top1) for row in rows if row.pareto)
        panel.plot(*zip(*front, strict=True), color="#d55e00", linewidth=1.6, zorder=2)
    panel.set_xlim(left=0)
    panel.grid(axis="y")


@matplotlib.rc_context(STYLE)
def depth_maps(rows: Sequence[SubnetAnalysisRow]) -> str:
    """Mean accuracy of the subnets that keep so many blocks of two stages, a map for each pair of stages."""
    from unloaf.analysis.subnets import stage_means

    found = stage_means(rows)
    values = [value for means in found.values() for value in means.values()]
    low, high = min(values), max(values)
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3.9 * columns + 0.6, 3.6 * lines), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False).flatten()
    image: Any = None
    for panel, ((a, b), means) in zip(axes, found.items(), strict=False):
        xs, ys = sorted({place[0] for place in means}), sorted({place[1] for place in means})
        if a == b:
            ys = ys[:1]
        cells = [[means.get((x, x if a == b else y), float("nan")) for x in xs] for y in ys]
        scale: Any = {"vmin": low, "vmax": max(high, low + 1e-9), "cmap": "viridis"}
        image = panel.imshow(cells, origin="lower", aspect="auto", **scale)
        if len(xs) * len(ys) <= 36:
            for j, line in enumerate(cells):
                for i, value in enumerate(line):
                    ink = "#fefefe" if value < (low + high) / 2 else "#010101"  # not the page's, which change
                    panel.text(i, j, f"{value:.0f}", ha="center", va="center", fontsize=10, color=ink)
        panel.set_xticks(*_ticks(xs))
        panel.set_yticks(*(_ticks(ys) if a != b else ([], [])))
        panel.set_xlabel(f"blocks of stage {a + 1}")
        panel.set_ylabel(f"blocks of stage {b + 1}" if a != b else "")
    for panel in axes[len(found) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=list(axes), label="mean top-1, %", shrink=0.9)
    return svg_of(figure, background="white")


def _ticks(values: Sequence[int]) -> tuple[list[int], list[str]]:
    step = -(-len(values) // 8)
    return list(range(0, len(values), step)), [str(value) for value in values[::step]]
