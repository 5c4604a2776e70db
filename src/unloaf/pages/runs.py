"""`unloaf report`: histories of runs in, one web page out. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from unloaf.config.figures import FIGURES
from unloaf.pages.page import runs_report
from unloaf.pages.plots import curves, key
from unloaf.runs.histories import RunHistory, differences, table_of

# Columns of summary.csv; {} is the figure that decides in the task, worst is min or max.
_PICTURES = {
    "Validation": ("eval_{}", "{}"),
    "Training loss": ("train_loss", "nats, all terms of the method"),
    "Learning rate": ("lr", "learning rate"),
    "Moving average of the weights": ("ema_{}", "{}"),
    "Mean of the evaluated subnets": ("subnets_{}_mean", "{}"),
    "Worst of the evaluated subnets": ("subnets_{}_worst", "{}"),
    "Main network, evaluated as its subnets are": ("main_{}_reestimated", "{}"),
}
_CAPTION = (
    "Each line is a run, evaluated on the validation images. The training loss sums all terms of a method, so it "
    "cannot be compared between methods. Subnets are evaluated with re-estimated batch-norm statistics, "
    "the main network with its running ones, unless stated otherwise. The learning rate is that of "
    "the last step of an epoch."
)


def runs_page(histories: Sequence[RunHistory]) -> str:
    """The page, HTML; it needs no other file."""
    pictures, figures = {}, FIGURES[histories[0].config.task]
    label = f"{figures.chief.label}, %" if figures.unit == "%" else figures.chief.label
    for head, (column, ylabel) in _PICTURES.items():
        name = column.replace("worst", figures.worst_of).format(figures.decisive)
        series = {history.label: history.curve(name) for history in histories}
        if any(series.values()):
            pictures[head] = curves(series, ylabel=ylabel.format(label))
    return runs_report(
        title="Runs side by side" if len(histories) > 1 else f"Run {histories[0].label}",
        table=table_of(histories),
        legend=key([history.label for history in histories]),
        pictures=pictures,
        caption=_CAPTION,
        differences=differences(histories),
        facts={history.label: _facts(history) for history in histories},
    )


def _facts(history: RunHistory) -> str:
    """Command, hardware, versions, time, and the commands of resumes; what env.json lacks is left out."""
    env = history.environment
    versions, resumes = env.get("versions"), env.get("resumed")
    parts = [
        _command(env),
        str(env.get("hardware", "")),
        f"{env['processes']} process(es)" if "processes" in env else "",
        f"python {env['python']}" if "python" in env else "",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        if isinstance(versions, dict)
        else "",
        str(env.get("started", "")),
        *map(_resume, resumes if isinstance(resumes, list) else []),
    ]
    return "; ".join(filter(None, parts))


def _command(env: Mapping[str, Any]) -> str:
    words = env.get("command")
    return shlex.join(map(str, words)) if isinstance(words, list) else ""


def _resume(env: Any) -> str:
    """With which command the run went on, when, and on what other hardware."""
    if not isinstance(env, dict):
        return ""
    parts = [_command(env), str(env.get("hardware", "")), str(env.get("started", ""))]
    return f"resumed: {', '.join(filter(None, parts))}"
