"""Pictures of rows. Computes nothing; returns SVG text, writes no file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

if TYPE_CHECKING:
    from unloaf.analysis.comparison import MethodRun, SizeRow
    from unloaf.measure.step_time import Setup, StepTimeRow

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


# Of pictures inside a page: what its style sheet sets for light and dark; elsewhere the light colour holds.
_THEME = {"#222222": "--ink", "#444444": "--soft", "#e4e4e4": "--grid", "#ffffff": "--card", "#0072b2": "--blue"}


def themed(text: str) -> str:
    """The colours of a picture by the names that the page gives them.

    >>> themed("stroke: #222222")
    'stroke: var(--ink, #222222)'
    """
    for colour, name in _THEME.items():
        text = text.replace(colour, f"var({name}, {colour})")
    return text


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
            axes.legend(loc="best", frameon=True, framealpha=0.92, edgecolor="none", borderpad=0.3)
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


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str) -> str:
    """A line over epochs for each run, as SVG; runs beyond the palette are told apart by their dashes.

    Args:
        series: run to its (epoch, value) pairs; a run without any keeps its colour for the other pictures.
        ylabel: what the value is, with its unit.
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
            f'style="stroke: {themed(_look(index)[0])}"{dashes[index // len(_COLOURS) % len(_LINES)]}/></svg>',
        )
        for index, label in enumerate(labels)
    ]


_SAME_COLOUR = {
    "common": 0,
    "stochastic-depth": 6,
    "st": 2,
    "st-inter-stage": 2,
    "st++": 3,
    "st++-one-side": 3,
    "gkt": 4,
}


def step_time_bars(groups: Mapping[Setup, Sequence[StepTimeRow]], *, columns: int = 2) -> str:
    """Measured time of a step beside its FLOPs limit and separate passes, a panel for each network and mode, as SVG.

    Args:
        groups: the rows of each setup; common training, to which all times are relative, needs no bar.
        columns: panels beside each other.
    """
    with matplotlib.rc_context(_STYLE):
        columns = min(columns, len(groups))
        counts = [len(rows) for rows in groups.values()]
        bars = [max(counts[start : start + columns]) for start in range(0, len(counts), columns)]
        figure = Figure(figsize=(5.9 * columns + 0.2, 0.36 * sum(bars) + 1.15 * len(bars) + 0.75))
        figure.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(bars), columns, squeeze=False, height_ratios=bars).flatten()
        for place, (setup, rows) in enumerate(groups.items()):
            _bars(axes[place], rows)
            _bar_frame(axes[place], setup, rows, bars[place // columns])
        for panel in axes[len(groups) :]:
            panel.set_axis_off()
        handles, labels = _key_of_bars()
        together: Any = {tuple: HandlerTuple(ndivide=None, pad=0)}
        title = "time of a step, relative to common training"
        place: Any = {"loc": "outside lower center", "ncols": 3, "columnspacing": 1.2, "frameon": False, "title": title}
        figure.legend(handles, labels, handler_map=together, **place)
        return _svg(figure, background="white")


_PALE: Any = {"facecolor": "#ececec", "edgecolor": "#c4c4c4", "linewidth": 0.8}


def _bars(axes: Any, rows: Sequence[StepTimeRow]) -> None:
    widest = _widest(rows)
    for place, row in enumerate(rows):
        if row.separate is not None:
            axes.barh(place, row.separate, height=0.76, zorder=1, **_PALE)
            end = max(row.separate, row.relative)
            axes.text(end + 0.015 * widest, place, f"{row.separate:.1f}", va="center", fontsize=10.5, color="#8a8a8a")
        axes.barh(place, row.relative, height=0.5, color=_COLOURS[_SAME_COLOUR.get(row.method, 5)], zorder=2)
        axes.plot([row.limit] * 2, [place - 0.38, place + 0.38], color="black", linewidth=2.4, zorder=4)
        if min(row.relative, row.limit) > 0.2 * widest:
            look: Any = {"x": 0.02 * widest, "color": "white"}
        else:
            look = {"x": max(row.relative, row.limit) + 0.02 * widest, "color": "#222222"}
        axes.text(
            y=place, s=f"{row.relative:.2f}", va="center_baseline", fontsize=11.5, weight="bold", zorder=5, **look
        )


def _widest(rows: Sequence[StepTimeRow]) -> float:
    return max(max(row.relative, row.separate or 0, row.limit) for row in rows)


def _bar_frame(axes: Any, setup: Setup, rows: Sequence[StepTimeRow], bars: int) -> None:
    network, _, mode = setup.title.partition(", ")
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(bars - 0.5, -0.6)
    axes.set_xlim(0, 1.13 * _widest(rows))
    axes.set_title(f"{network}\n", loc="left", fontsize=13, weight="bold", color="#222222", parse_math=False)
    axes.annotate(
        mode.replace(", ", " · "), (0, 1), (0, 6), textcoords="offset points", xycoords="axes fraction", fontsize=10,
        color="#555555",
    )  # fmt: skip
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=3)


def _key_of_bars() -> tuple[list[Any], list[str]]:
    measured = tuple(Patch(color=_COLOURS[index]) for index in (2, 3, 4))
    limit = Line2D([], [], color="black", linestyle="", marker="|", markersize=13, markeredgewidth=2.4)
    return [measured, limit, Patch(**_PALE)], ["measured", "FLOPs limit", "separate passes"]


class CostPoint(NamedTuple):
    """A way to train, in `accuracy_over_cost`; accuracies in percent.

    Attributes:
        label: of the method; points of one label are joined by a line.
        cost: of training, relative to common training.
        main: mean accuracy of the main network.
        error: standard error of that mean.
        subnets: mean accuracy of its subnets.
    """

    label: str
    cost: float
    main: float
    error: float
    subnets: float


# The colours that the methods have in other pictures; any other label gets one that is left.
_COLOUR_OF = {"common training": 0, "stochastic depth": 6, "ST": 2, "ST++": 3, "GKT": 4}


def accuracy_over_cost(panels: Mapping[str, Sequence[CostPoint]], *, axis: str) -> str:
    """Accuracy of main networks, filled, and of their mean subnets, hollow, over the cost of training, as SVG.

    The picture's description holds the points, as JSON.

    Args:
        panels: points by title; at most two labels beside the methods' own.
        axis: what the accuracies are, with their unit.
    """
    labels = dict.fromkeys(point.label for points in panels.values() for point in points)
    left = iter((1, 5))
    looks = {label: _COLOUR_OF[label] if label in _COLOUR_OF else next(left) for label in labels}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 5.1))
        figure.set_layout_engine("constrained", wspace=0.06)
        FigureCanvasSVG(figure)
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, points) in zip(columns, panels.items(), strict=True):
            for label, index in looks.items():
                _series(axes, [point for point in points if point.label == label], index)
            axes.set_title(title, loc="left", fontsize=13, weight="bold", color="#222222")
            axes.set_xlabel("cost of training, relative to common training")
            axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=3)
            axes.margins(x=0.12)
        columns[0].set_ylabel(axis)
        handles = [Line2D([], [], linestyle="", **_marker(index)) for index in looks.values()]
        handles += [Line2D([], [], linestyle="", color="#777777", marker="o", fillstyle=f) for f in ("full", "none")]
        look: Any = {"frameon": False, "fontsize": 12, "columnspacing": 1.6, "handletextpad": 0.2}
        names = [*looks, "main network", "mean subnet"]
        figure.legend(handles, names, loc="outside lower center", ncols=-(-len(names) // 2), **look)
        figures = {title: [point._asdict() for point in points] for title, points in panels.items()}
        return _svg(figure, background="white", about=json.dumps(figures))


def _series(axes: Any, points: Sequence[CostPoint], index: int) -> None:
    ordered = sorted(points, key=lambda point: point.cost)
    costs, look = [point.cost for point in ordered], _marker(index) | {"linewidth": 1.6}
    dots: Any = (0, (1.5, 1.5))
    # Hollow ones lie on top with a pale rim, filled ones have such an edge: where two meet, both are seen.
    rim: Any = [withStroke(linewidth=3.4, foreground="white")]
    tops = [point.subnets for point in ordered]
    axes.plot(costs, tops, color=look["color"], linestyle=dots, linewidth=1.6, zorder=2)
    axes.plot(
        costs, tops, **look | {"linestyle": ""}, fillstyle="none", markeredgewidth=1.5, path_effects=rim, zorder=5
    )
    mains, errors = [point.main for point in ordered], [point.error for point in ordered]
    filled: Any = look | {"markersize": 9.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.errorbar(costs, mains, errors, zorder=3, capsize=3, **filled)


def _marker(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index], "marker": _MARKERS[index], "markersize": 8}


def _svg(figure: Figure, *, background: str | None = None, about: str | None = None) -> str:
    """Without a background the page shows through and its theme decides the colours; a file of its own needs one."""
    buffer = io.StringIO()
    look: Any = {"transparent": True} if background is None else {"facecolor": background}
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": about}, **look)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return text if background else themed(text)
