"""Pictures of runs: curves over epochs and over measured training time. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Drawing

from unloaf.analysis.equal_cost import curve_over_seconds
from unloaf.config.figures import Figures
from unloaf.pages.layout import Cells, Picture
from unloaf.pages.plots import STYLE, curves, line_look, svg_of
from unloaf.runs.histories import RunHistory

# Columns of summary.csv; {} is the figure that decides in the task, worst is min or max.
_EPOCHS = {
    "Validation": ("eval_{}", "{}"),
    "Moving average of the weights": ("ema_{}", "{}"),
    "Mean of the evaluated subnets": ("subnets_{}_mean", "{}"),
    "Worst of the evaluated subnets": ("subnets_{}_worst", "{}"),
    "Main network, evaluated as its subnets are": ("main_{}_reestimated", "{}"),
    "Training loss": ("train_loss", "nats, all terms of the method"),
    "Learning rate": ("lr", "learning rate"),
}
_COSTS = {
    "Validation over training time": "eval_{}",
    "Mean of the evaluated subnets over training time": "subnets_{}_mean",
}
_MOST_PANELS = 12

Curves = Mapping[str, Sequence[tuple[float, float]]]


def epoch_pictures(histories: Sequence[RunHistory], figures: Figures) -> list[Picture]:
    """What summary.csv has, over epochs."""
    found = []
    for head, (column, ylabel) in _EPOCHS.items():
        name = column.replace("worst", figures.worst_of).format(figures.decisive)
        series = {history.label: history.curve(name) for history in histories}
        if any(series.values()):
            found.append(_curves(head, series, ylabel.format(_label(figures)), "epoch"))
    return found


def cost_pictures(histories: Sequence[RunHistory], figures: Figures) -> list[Picture]:
    """The same over measured training time."""
    found = []
    for head, column in _COSTS.items():
        name = column.format(figures.decisive)
        each = {history.label: curve_over_seconds(history, name) for history in histories}
        longest = max((points[-1][0] for points in each.values() if points), default=0.0)
        unit, size = ("h", 3600.0) if longest > 2 * 3600 else ("min", 60.0) if longest > 120 else ("s", 1.0)
        series = {label: [(seconds / size, value) for seconds, value in points] for label, points in each.items()}
        if any(series.values()):
            found.append(_curves(head, series, _label(figures), f"training time, {unit}"))
    return found


def term_pictures(histories: Sequence[RunHistory]) -> list[Picture]:
    """The loss of the main network and that of its subnets, where steps were logged."""
    heads = {"main": "Loss of the main network", "subnets": "Loss of the subnets, weighted sum"}
    found = []
    for term, head in heads.items():
        series = {
            history.label: [(float(epoch), terms[term]) for epoch, terms in history.terms.items() if term in terms]
            for history in histories
        }
        if any(series.values()):
            found.append(_curves(head, series, "nats", "epoch"))
    return found


def _label(figures: Figures) -> str:
    return f"{figures.chief.label}, %" if figures.unit == "%" else figures.chief.label


def _curves(head: str, series: Curves, ylabel: str, xlabel: str) -> Picture:
    return Picture(
        heading=head,
        svg=curves(series, ylabel=ylabel, xlabel=xlabel),
        alt=f"{head}: {ylabel} over {xlabel}, a line for each of {_count(series)}. {_ends(series)}",
        data=_data(series, ylabel, xlabel),
    )


def _count(series: Curves) -> str:
    number = sum(1 for points in series.values() if points)
    return "1 run" if number == 1 else f"{number} runs"


def _ends(series: Curves) -> str:
    ends = {label: points[-1][1] for label, points in series.items() if points}
    low, high = min(ends, key=lambda label: ends[label]), max(ends, key=lambda label: ends[label])
    if low == high:
        return f"It ends at {ends[low]:.4g}."
    return f"The last values are from {ends[low]:.4g} ({low}) to {ends[high]:.4g} ({high})."


def _data(series: Curves, ylabel: str, xlabel: str) -> Cells:
    """A column for each run where they share their epochs; a line for each value otherwise."""
    if xlabel != "epoch":
        return ["run", xlabel, ylabel], [[label, *point] for label, points in series.items() for point in points]
    columns = [dict(points) for points in series.values()]
    places = sorted({x for column in columns for x in column})
    return [xlabel, *series], [[int(x), *(column.get(x) for column in columns)] for x in places]


def subnet_pictures(histories: Sequence[RunHistory], figures: Figures) -> tuple[list[Picture], str]:
    """How good each subnet is in the end, and how all came along, a picture for each run; which runs are left out."""
    shown = {n: history for n, history in enumerate(histories) if history.subnets}
    if not shown:
        return [], ""
    first = dict(list(shown.items())[:_MOST_PANELS])
    bounds = [value for history in first.values() for found in history.subnets for value in (found.worst, found.best)]
    bounds += [value for history in first.values() for _, value in history.curve(f"eval_{figures.decisive}")]
    limits = min(bounds), max(bounds)
    panels = [_panel(n, history, figures, limits) for n, history in first.items()]
    left = len(shown) - len(first)
    return [_by_size(histories, figures), *panels], f" {left} more runs have no picture of their own." if left else ""


def _by_size(histories: Sequence[RunHistory], figures: Figures) -> Picture:
    sizes, label = _sizes(histories), _label(figures)
    last = [[history.label, name, value] for history in histories for name, value in history.last_subnets.items()]
    return Picture(
        heading="Subnets by the blocks they keep",
        svg=curves(sizes, ylabel=label, xlabel="blocks kept"),
        alt=f"{label} after the last evaluation over the number of blocks that a subnet keeps, the mean of those of "
        f"a size, a line for each of {_count(sizes)}. {_ends(sizes)}",
        data=(["run", "subnet", label], last),
    )


def _panel(number: int, history: RunHistory, figures: Figures, limits: tuple[float, float]) -> Picture:
    last, label = history.subnets[-1], _label(figures)
    main = dict(history.curve(f"eval_{figures.decisive}"))
    return Picture(
        heading=history.label,
        svg=_range(number, history, figures, limits),
        alt=f"{label} of {history.label} over epochs: its main network as a line, the range of its subnets as an area, "
        f"their mean as a dashed line. At the end the subnets have {last.worst:.4g} at worst, {last.mean:.4g} on "
        f"average, {last.best:.4g} at best.",
        data=(
            ["epoch", "main network", "worst", "mean", "best"],
            [[found.epoch, main.get(found.epoch), *found[1:]] for found in history.subnets],
        ),
    )


def _sizes(histories: Sequence[RunHistory]) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for history in histories:
        sizes: dict[int, list[float]] = {}
        for name, value in history.last_subnets.items():
            if (blocks := _blocks(name)) is not None:
                sizes.setdefault(blocks, []).append(value)
        found[history.label] = [(float(size), statistics.fmean(values)) for size, values in sorted(sizes.items())]
    return found


def _blocks(name: str) -> int | None:
    """Blocks that an ordered subnet keeps."""
    parts = name.split("-")
    return sum(map(int, parts)) if all(part.isdecimal() for part in parts) else None


@matplotlib.rc_context(STYLE)
def _range(number: int, history: RunHistory, figures: Figures, limits: tuple[float, float]) -> str:
    """In the colour of the run's line in the other pictures; all have the same values at their sides."""
    figure = Drawing(figsize=(6.4, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    colour, _ = line_look(number)
    epochs, worst, mean, best = zip(*history.subnets, strict=True)
    axes.fill_between(epochs, worst, best, color=colour, alpha=0.25, linewidth=0)
    axes.plot(epochs, mean, color=colour, linestyle=(0, (4, 2)), linewidth=1.6)
    main = history.curve(f"eval_{figures.decisive}")
    if main:
        axes.plot(*zip(*main, strict=True), color=colour, linewidth=2, marker="o" if len(main) == 1 else None)
    margin = (limits[1] - limits[0]) * 0.03 or 1.0
    axes.set_ylim(limits[0] - margin, limits[1] + margin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel(_label(figures))
    axes.grid(axis="y")
    return svg_of(figure)
