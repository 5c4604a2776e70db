"""Pictures of rows. Computes nothing; returns SVG text, writes no file."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from unloaf.printable import printable

if TYPE_CHECKING:
    from unloaf.analysis.comparison import MethodRun, SizeRow
    from unloaf.measure.step_time import Setup, StepTimeRow

# Okabe and Ito's palette, distinguishable with any colour vision; black for the baseline.
_COLOURS = ("#222222", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a", "#56b4e9")
_MARKERS = ("o", "v", "s", "D", "^", "P", "X", "*")
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: sharp at any size, small, and searchable
    "svg.hashsalt": "unloaf",  # the same rows give the same bytes
    "font.family": ["sans-serif"],
    "font.size": 13,
    "text.parse_math": False,  # a name may have dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": "#222222",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


@matplotlib.rc_context(STYLE)
def accuracy_over_size(
    sizes: Mapping[str, Sequence[SizeRow]], runs: Sequence[MethodRun], *, lowest: float = 0.0, legend: bool = True
) -> str:
    """Accuracy of subnets over the number of blocks they keep, as SVG.

    A line for each method joins the means; every subnet of the runs is a faint dot. The accuracy axis begins at
    `lowest` percent.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes: Any = figure.subplots()
    for place, (label, index) in enumerate(_indices(sizes).items()):
        shift = 0.07 * (place - len(sizes) / 2)
        dots = [(sum(r.depths) + shift, r.top1) for run in runs if run.label == label for r in run.subnets]
        axes.scatter(*zip(*dots, strict=True), s=11, color=_COLOURS[index], alpha=0.35, linewidths=0, zorder=2)
        blocks, means = zip(*((row.blocks, row.mean_top1) for row in sizes[label]), strict=True)
        axes.plot(blocks, means, **_marker(index) | {"markersize": 6.5}, linewidth=2.2, label=label, zorder=3)
    blocks = sorted({row.blocks for rows in sizes.values() for row in rows})
    margin = (100 - lowest) * 0.02
    axes.set_ylim(lowest - margin, 100 + margin)
    axes.set_xticks(blocks)
    axes.set_xlabel(f"residual blocks kept, of {blocks[-1]}")
    axes.set_ylabel("top-1 accuracy, % of test images")
    axes.grid(axis="y")
    if legend:
        axes.legend(loc="best", frameon=True, framealpha=0.92, edgecolor="none", borderpad=0.3)
    return svg_of(figure)


_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))


@matplotlib.rc_context(STYLE)
def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str, xlabel: str = "epoch") -> str:
    """A line through the (epoch, value) pairs of each run, as SVG; beyond the palette dashes tell them apart.

    A run without any keeps its colour for the other pictures.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    for index, points in enumerate(series.values()):
        colour, dashes = line_look(index)
        if points:
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) == 1 else None
            [line] = axes.plot(x, y, color=colour, linestyle=dashes, linewidth=2, marker=marker, zorder=3)
            line.set_in_layout(False)  # which it does not change, and which would look at every point
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    return svg_of(figure)


def line_look(index: int) -> tuple[str, Any]:
    """Colour and dashes of the line of that number."""
    return _COLOURS[index % len(_COLOURS)], _LINES[index // len(_COLOURS) % len(_LINES)]


def key(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Each run with a short piece of its line, as SVG: the legend of all `curves` of a page."""
    dashes = {0: "", 1: ' stroke-dasharray="7 3"', 2: ' stroke-dasharray="2.5 2.5"'}
    return [
        (
            label,
            '<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path d="M1 4h26" fill="none" stroke-width="3" '
            f'style="stroke: {line_look(index)[0]}"{dashes[index // len(_COLOURS) % len(_LINES)]}/></svg>',
        )
        for index, label in enumerate(labels)
    ]


def _indices(labels: Iterable[str]) -> dict[str, int]:
    """Which colour and marker each label has: that of its method; any other gets one that is left, 1 and 5."""
    from unloaf.methods.table import METHODS

    own = {method.label: _COLOURS.index(method.colour) for method in METHODS.values()}
    left = iter([index for index in range(len(_COLOURS)) if index not in own.values()])
    return {label: own[label] if label in own else next(left) for label in labels}


def _colour(name: str) -> str:
    """Of a method by its flag, or of a variant of it: st-inter-stage and their kind."""
    from unloaf.methods.table import METHODS

    flags = sorted(METHODS, key=len, reverse=True)  # st-star is no variant of st
    return next((METHODS[flag].colour for flag in flags if f"{name}-".startswith(f"{flag}-")), _COLOURS[5])


@matplotlib.rc_context(STYLE)
def step_time_bars(groups: Mapping[Setup, Sequence[StepTimeRow]]) -> str:
    """Measured time of a step beside its FLOPs limit and separate passes, a panel for each network and mode, as SVG."""
    columns = min(2, len(groups))
    counts = [len(rows) for rows in groups.values()]
    bars = [max(counts[start : start + columns]) for start in range(0, len(counts), columns)]
    figure = Figure(figsize=(5.9 * columns + 0.2, 0.36 * sum(bars) + 1.15 * len(bars) + 0.75))
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
    axes = figure.subplots(len(bars), columns, squeeze=False, height_ratios=bars).flatten()
    for place, (setup, rows) in enumerate(groups.items()):
        _bars(axes[place], rows)
        _bar_frame(axes[place], setup, rows, bars[place // columns])
    for panel in axes[len(groups) :]:
        panel.set_axis_off()
    measured = tuple(Patch(color=_colour(flag)) for flag in ("st", "st++", "gkt"))
    limit = Line2D([], [], color="black", linestyle="", marker="|", markersize=13, markeredgewidth=2.4)
    together: Any = {tuple: HandlerTuple(ndivide=None, pad=0)}
    title = "time of a step, relative to common training"
    place: Any = {"loc": "outside lower center", "ncols": 3, "columnspacing": 1.2, "frameon": False, "title": title}
    marks: list[Any] = [measured, limit, Patch(**_PALE)]
    figure.legend(marks, ["measured", "FLOPs limit", "separate passes"], handler_map=together, **place)
    return svg_of(figure, background="white")


_PALE: Any = {"facecolor": "#ececec", "edgecolor": "#c4c4c4", "linewidth": 0.8}


def _bars(axes: Any, rows: Sequence[StepTimeRow]) -> None:
    widest = _widest(rows)
    for place, row in enumerate(rows):
        if row.separate is not None:
            axes.barh(place, row.separate, height=0.76, zorder=1, **_PALE)
            end = max(row.separate, row.relative)
            axes.text(end + 0.015 * widest, place, f"{row.separate:.1f}", va="center", fontsize=10.5, color="#8a8a8a")
        axes.barh(place, row.relative, height=0.5, color=_colour(row.method), zorder=2)
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
    axes.grid(axis="x", color="#eeeeee")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


class CostPoint(NamedTuple):
    """A way to train, in `accuracy_over_cost`; accuracies are means in percent."""

    label: str  # of the method; points of one label are joined by a line
    cost: float  # of training, relative to common training
    main: float  # accuracy of the main network
    error: float  # standard error of that mean
    subnets: float  # accuracy of its subnets


@matplotlib.rc_context(STYLE)
def accuracy_over_cost(panels: Mapping[str, Sequence[CostPoint]], *, axis: str) -> str:
    """Accuracy of main networks, filled, and of their mean subnets, hollow, over the cost of training, as SVG.

    A panel for each title; at most two labels are not those of a method. The picture's description holds the points, as
    JSON.
    """
    looks = _indices(dict.fromkeys(point.label for points in panels.values() for point in points))
    figure = Figure(figsize=(5.2 * len(panels), 5.1))
    figure.set_layout_engine("constrained", wspace=0.06)
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, points) in zip(columns, panels.items(), strict=True):
        for label, index in looks.items():
            _series(axes, [point for point in points if point.label == label], index)
        axes.set_title(title, loc="left", fontsize=13, weight="bold", color="#222222")
        axes.set_xlabel("cost of training, relative to common training")
        axes.grid(axis="y")
        axes.margins(x=0.12)
    columns[0].set_ylabel(axis)
    handles = [Line2D([], [], linestyle="", **_marker(index)) for index in looks.values()]
    handles += [Line2D([], [], linestyle="", color="#777777", marker="o", fillstyle=f) for f in ("full", "none")]
    look: Any = {"frameon": False, "fontsize": 12, "columnspacing": 1.6, "handletextpad": 0.2}
    names = [*looks, "main network", "mean subnet"]
    figure.legend(handles, names, loc="outside lower center", ncols=-(-len(names) // 2), **look)
    figures = {title: [point._asdict() for point in points] for title, points in panels.items()}
    return svg_of(figure, background="white", about=json.dumps(figures))


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


def svg_of(figure: Figure, *, background: str | None = None, about: str | None = None) -> str:
    """As SVG. A file needs a background; without one the page shows through."""
    buffer = io.StringIO()
    look: Any = {"transparent": True} if background is None else {"facecolor": background}
    with warnings.catch_warnings():
        # Names may have letters that matplotlib's own fonts lack; whoever shows the file has others.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": about}, **look)
    text = buffer.getvalue()
    return _UNSEEN.sub(lambda letter: printable(letter[0]), text[text.index("<svg") :])


# In a name: what no reader shows, or what turns the direction of reading.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
