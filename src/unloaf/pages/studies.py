"""Pictures and pages of runs that were trained for a question. Computes nothing but means; returns text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib import figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from unloaf.analysis.ablation import column
from unloaf.analysis.loafing import spread_of
from unloaf.methods.table import METHODS
from unloaf.pages.analyses import run_label
from unloaf.pages.layout import Cells, Figure, Picture, Section, Table, Words, page
from unloaf.pages.page import facts_table, settings_parts
from unloaf.pages.plots import STYLE, line_look, svg_of
from unloaf.printable import printable

if TYPE_CHECKING:
    from unloaf.analysis.ablation import AblationRow
    from unloaf.analysis.bound import BoundRow
    from unloaf.analysis.loafing import LoafingRow

_LEGEND: Any = {"frameon": False, "fontsize": 11, "loc": "outside lower center"}


@matplotlib.rc_context(STYLE)
def loafing_picture(rows: Sequence[LoafingRow], *, background: str | None = "white") -> str:
    """Accuracy alone, hollow, and inside a network, filled, joined by the gap, as SVG; means over seeds.

    A group for each subnet, in it a line for each method; the main network is left out.
    """
    shown = [row for row in rows if not row.main]
    methods, subnets = (list(dict.fromkeys(getattr(row, name) for row in shown)) for name in ("method", "depths"))
    known = {method.label: method.colour for method in METHODS.values()}
    colours = {method: known.get(method, _GREY) for method in methods}
    picture = figure.Figure(figsize=(6.6, 1.6 + len(subnets) * (0.34 * len(methods) + 0.3)), layout="constrained")
    axes: Any = picture.subplots()
    ticks, place = [], 0.0
    for subnet in subnets:
        ticks.append(place + (len(methods) - 1) / 2)
        for method in methods:
            found = [row for row in shown if (row.method, row.depths) == (method, subnet)]
            inside, alone, gap = (spread_of(found, name) for name in ("inside", "alone", "gap"))
            if inside is not None and alone is not None and gap is not None:
                colour = colours[method]
                axes.plot([inside.mean, alone.mean], [place, place], color=colour, linewidth=2.2, zorder=2)
                axes.errorbar(
                    inside.mean, place, xerr=inside.sd, fmt="o", markersize=8, color=colour, capsize=3, zorder=3
                )
                hollow = {"fmt": "o", "markersize": 8, "markerfacecolor": "#ffffff", "capsize": 3, "zorder": 4}
                axes.errorbar(alone.mean, place, xerr=alone.sd, color=colour, **hollow)
                left = min(inside.mean - (inside.sd or 0), alone.mean - (alone.sd or 0))
                axes.annotate(
                    f"{gap.mean:.1f}", (left, place), (-9, 0), textcoords="offset points", ha="right", va="center",
                    fontsize=11, color="#222222",
                )  # fmt: skip
            place += 1
        place += 0.9
    axes.set_yticks(ticks, [_cut(subnet) for subnet in subnets])
    axes.set_ylim(place - 1.2, -0.8)
    axes.margins(x=0.14)
    axes.set_ylabel("depths of the subnet")
    axes.set_xlabel("top-1 accuracy, %; numbers: points lost inside the network")
    axes.grid(axis="x")
    marks: list[Any] = [Line2D([], [], color=colours[method], linewidth=3) for method in methods]
    marks += [
        Line2D([], [], color="#777777", marker="o", linestyle="", markersize=8, fillstyle=f) for f in ("none", "full")
    ]
    names = [*map(_cut, methods), "trained alone", "inside the network"]
    picture.legend(marks, names, ncols=min(3, len(names)), **_LEGEND)
    return svg_of(picture, background=background)


@matplotlib.rc_context(STYLE)
def ablation_picture(rows: Sequence[AblationRow], *, axis: str = "", background: str | None = "white") -> str:
    """Accuracy of main networks, filled, and of their mean subnets, hollow, as SVG; means over seeds.

    Rows with an axis are lines over it, others stand below each other.
    """
    if axis and any(row.series for row in rows):
        return svg_of(_over_axis(rows, axis), background=background)
    return svg_of(_below_each_other(rows), background=background)


_GREY, _BAR = "#777777", "#222222"


def _below_each_other(rows: Sequence[AblationRow]) -> figure.Figure:
    labels = list(dict.fromkeys(row.label for row in rows))
    picture = figure.Figure(figsize=(7.0, 1.5 + 0.42 * len(labels)), layout="constrained")
    axes: Any = picture.subplots()
    for place, label in enumerate(labels):
        mine = [row for row in rows if row.label == label]
        _mark(axes, column(mine, "main"), place - 0.08, fill=True)
        _mark(axes, column(mine, "mean_subnet"), place + 0.08, fill=False)
        if column(mine, "main") is None:
            axes.annotate("diverged", (0.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=11)
        base = column(mine, "common_at_cost")
        if base is not None:
            axes.plot([base.mean] * 2, [place - 0.34, place + 0.34], color=_BAR, linewidth=2.4, zorder=2)
    axes.set_yticks(range(len(labels)), [_cut(label) for label in labels], parse_math=False, fontsize=11.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("top-1 accuracy, %")
    axes.grid(axis="x")
    marks: list[Any] = [
        Line2D([], [], color="#0072b2", marker="o", linestyle="", markersize=8),
        Line2D([], [], color="#0072b2", marker="o", linestyle="", markersize=8, fillstyle="none"),
        Line2D([], [], color=_BAR, marker="|", linestyle="", markersize=13, markeredgewidth=2.4),
    ]
    names = ["main network", "mean subnet", "common training at this cost"]
    picture.legend(marks, names, ncols=2, **_LEGEND)
    return picture


def _mark(axes: Any, spread: Any, place: float, *, fill: bool) -> None:
    if spread is not None:
        look = {} if fill else {"markerfacecolor": "#ffffff"}
        axes.errorbar(
            spread.mean, place, xerr=spread.sd, fmt="o", markersize=8, color="#0072b2", capsize=3, zorder=3, **look
        )


def _over_axis(rows: Sequence[AblationRow], axis: str) -> figure.Figure:
    picture = figure.Figure(figsize=(6.6, 4.8), layout="constrained")
    axes: Any = picture.subplots()
    series = list(dict.fromkeys(row.series for row in rows))
    for index, one in enumerate(series):
        colour, _ = line_look(_SERIES[index % len(_SERIES)])
        mine = [row for row in rows if row.series == one]
        for name, look in (("main", {"linestyle": "-"}), ("mean_subnet", {"linestyle": ":", "mfc": "#ffffff"})):
            points = [(at, column([r for r in mine if r.at == at], name)) for at in sorted({r.at for r in mine})]
            known = [(at, spread) for at, spread in points if spread is not None]
            if known:
                places, spreads = zip(*known, strict=True)
                errors = None if spreads[0].sd is None else [spread.sd or 0 for spread in spreads]
                axes.errorbar(
                    places, [s.mean for s in spreads], yerr=errors, marker="o", markersize=7, color=colour, capsize=3,
                    linewidth=2, **look,
                )  # fmt: skip
        places = sorted({row.at for row in mine})
        bases = [
            (at, base.mean) for at in places if (base := column([r for r in mine if r.at == at], "common_at_cost"))
        ]
        if bases:
            axes.plot(*zip(*bases, strict=True), color=colour, linestyle="", marker="x", markersize=8, mew=2)
    axes.set_xticks(sorted({row.at for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(axis)
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid(axis="y")
    marks: list[Any] = [
        Line2D([], [], color=line_look(_SERIES[i % len(_SERIES)])[0], linewidth=3) for i in range(len(series))
    ]
    marks += [
        Line2D([], [], color=_GREY, marker="o"),
        Line2D([], [], color=_GREY, marker="o", linestyle=":", mfc="#ffffff"),
    ]
    marks.append(Line2D([], [], color=_GREY, marker="x", linestyle="", mew=2))
    names = [*map(_cut, series), "main network", "mean subnet", "common training at this cost"]
    picture.legend(marks, names, ncols=3, **_LEGEND)
    return picture


_SERIES = (2, 3, 4, 1, 5, 6)  # of the palette: not the baseline's black


def _cut(label: str) -> str:
    """A name that fits beside a picture; one that begins with "_" would have no place in a legend."""
    text = printable(label)
    text = f" {text}" if text.startswith("_") else text
    return text if len(text) <= 36 else f"{text[:33]}..."


def study_page(
    *,
    title: str,
    lead: str,
    name: str,
    table: Cells,
    picture: Picture,
    caption: str,
    explanation: Sequence[str],
    words: Mapping[str, str],
    settings: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, str],
) -> str:
    """The page of a study, HTML: table and picture, how to read them, settings, where it was run.

    Words are names of methods and columns with what they mean; settings by names of rows, then names to values.
    """
    heads, lines = table
    return page(
        title,
        lead,
        [
            Section("Results", [Table(name, heads, lines), Figure([picture], caption)]),
            Section("How to read this", [*explanation, Words(words)]),
            Section("Settings", settings_parts(settings)),
            Section("Where it was measured", [facts_table(facts)]),
        ],
    )


def data_of(rows: Sequence[Any]) -> Cells:
    """What is behind a picture: the fields of its rows as heads, and their values."""
    records = [asdict(row) for row in rows]
    return list(records[0]), [["" if value is None else value for value in record.values()] for record in records]


@matplotlib.rc_context(STYLE)
def bound_picture(rows: Sequence[BoundRow], *, background: str | None = "white") -> str:
    """Distance of cross-entropies, a line, and the bound on it, dashes, over the epochs, as SVG; medians over images.

    Means over subnets; the axis is logarithmic. Means over images are in the table: a few images on which the main
    network is wrong, and the bound says nothing, decide them.
    """
    picture = figure.Figure(figsize=(6.6, 4.8), layout="constrained")
    axes: Any = picture.subplots()
    runs = list(dict.fromkeys((row.run, row.method) for row in rows))
    marks: list[Any] = []
    for index, (run, _) in enumerate(runs):
        colour, _ = line_look(index)
        mine = [row for row in rows if row.run == run]
        epochs = sorted({row.epoch for row in mine})
        for name, look in (("gap_median", {"linestyle": "-"}), ("bound_median", {"linestyle": (0, (4, 2))})):
            values = [_mean(getattr(row, name) for row in mine if row.epoch == epoch) for epoch in epochs]
            axes.plot(epochs, values, marker="o", markersize=4, linewidth=2, color=colour, **look)
        marks.append(Line2D([], [], color=colour, linewidth=3))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes formulas, which STYLE shows as they are
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats, median over images")
    axes.grid(axis="y")
    marks += [Line2D([], [], color=_GREY), Line2D([], [], color=_GREY, linestyle=(0, (4, 2)))]
    names = [_cut(run_label(*pair)) for pair in runs]
    picture.legend(marks, [*names, "gap", "bound"], ncols=2, **_LEGEND)
    return svg_of(picture, background=background)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
