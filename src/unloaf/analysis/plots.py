"""Pictures of rows. Computes nothing; returns SVG text, writes no file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from unloaf.analysis.comparison import MethodRun, SizeRow

# Okabe and Ito's palette, told apart by readers with any colour vision; black for the baseline.
_COLOURS = ("#222222", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a")
_MARKERS = ("o", "v", "s", "D", "^", "P", "X")
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: sharp at any size, small, and searchable
    "svg.hashsalt": "unloaf",  # the same rows give the same bytes
    "font.family": ["sans-serif"],
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def accuracy_over_size(
    sizes: Mapping[str, Sequence[SizeRow]],
    runs: Sequence[MethodRun],
    *,
    lowest: float = 0.0,
    legend: bool = True,
) -> str:
    """Accuracy of subnets over the number of blocks they keep, one line per method, as SVG.

    Args:
        sizes: per method, the means that the lines join.
        runs: every subnet becomes a faint dot.
        lowest: where the accuracy axis begins, in percent.
        legend: name the methods.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.subplots()
        for index, (label, rows) in enumerate(sizes.items()):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            _dots(
                axes, [run for run in runs if run.label == label], colour=colour, shift=0.07 * (index - len(sizes) / 2)
            )
            blocks, means = [row.blocks for row in rows], [row.mean_top1 for row in rows]
            axes.plot(blocks, means, color=colour, marker=marker, markersize=6.5, linewidth=2.2, label=label, zorder=3)
        _frame(axes, sizes, lowest=lowest)
        if legend:
            axes.legend(loc="lower right", frameon=True, framealpha=0.92, edgecolor="none", borderpad=0.3)
        return _svg(figure)


def _dots(axes: Any, runs: Sequence[MethodRun], *, colour: str, shift: float) -> None:
    points = [(sum(row.depths) + shift, row.top1) for run in runs for row in run.subnets]
    axes.scatter(*zip(*points, strict=True), s=11, color=colour, alpha=0.35, linewidths=0, zorder=2)


def _frame(axes: Any, sizes: Mapping[str, Sequence[SizeRow]], *, lowest: float) -> None:
    blocks = sorted({row.blocks for rows in sizes.values() for row in rows})
    margin = (100 - lowest) * 0.02
    axes.set_ylim(lowest - margin, 100 + margin)
    axes.set_xticks(blocks)
    axes.set_xlabel(f"residual blocks kept, of {blocks[-1]}")
    axes.set_ylabel("top-1 accuracy, % of test images")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)


_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str, log: bool = False) -> str:
    """A line over epochs for each run, as SVG; runs beyond the palette are told apart by their dashes.

    Args:
        series: run to its (epoch, value) pairs; a run without any keeps its colour for the other pictures.
        ylabel: what the value is, with its unit.
        log: a logarithmic axis, where all values are above 0.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.subplots()
        for index, points in enumerate(series.values()):
            colour, dashes = _look(index)
            if points:
                x, y = zip(*points, strict=True)
                marker = "o" if len(points) == 1 else None
                axes.plot(x, y, color=colour, linestyle=dashes, linewidth=2, marker=marker, zorder=3)
        if log:
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=3)
        return _svg(figure)


def _look(index: int) -> tuple[str, Any]:
    return _COLOURS[index % len(_COLOURS)], _LINES[index // len(_COLOURS) % len(_LINES)]


def key(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Each run with a short piece of its line, as SVG: the legend of all `curves` of a page."""
    dashes = {0: "", 1: ' stroke-dasharray="7 3"', 2: ' stroke-dasharray="2.5 2.5"'}
    return [
        (
            label,
            '<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path d="M1 4h26" fill="none" stroke-width="3" '
            f'stroke="{_look(index)[0]}"{dashes[index // len(_COLOURS) % len(_LINES)]}/></svg>',
        )
        for index, label in enumerate(labels)
    ]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
