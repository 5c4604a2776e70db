"""`unloaf report`: histories of runs in, one web page out. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from unloaf.pages.page import runs_report
from unloaf.pages.plots import curves, key
from unloaf.runs.histories import RunHistory, differences, table_of

_PICTURES = {
    "Accuracy on the validation images": ("eval_top1", "top-1, %"),
    "Training loss": ("train_loss", "nats, all terms of the method"),
    "Learning rate": ("lr", "learning rate"),
    "Moving average of the weights": ("ema_top1", "top-1, %"),
    "Mean of the evaluated subnets": ("subnets_top1_mean", "top-1, %"),
    "Worst of the evaluated subnets": ("subnets_top1_min", "top-1, %"),
    "Main network, evaluated as its subnets are": ("main_top1_reestimated", "top-1, %"),
}
_CAPTION = (
    "Each line is a run. Accuracies are on the validation images. The training loss sums all terms of a method, so it "
    "cannot be compared between methods. Subnets are evaluated with re-estimated batch-norm statistics, "
    "the main network with its running ones, unless stated otherwise. The learning rate is that of "
    "the last step of an epoch."
)


def runs_page(histories: Sequence[RunHistory]) -> str:
    """The page, HTML; it needs no other file."""
    pictures = {}
    for head, (column, ylabel) in _PICTURES.items():
        series = {history.label: history.curve(column) for history in histories}
        if any(series.values()):
            pictures[head] = curves(series, ylabel=ylabel)
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
    """Command, hardware, versions and time in a line; what env.json lacks is left out."""
    env = history.environment
    versions, command = env.get("versions"), env.get("command")
    parts = [
        shlex.join(map(str, command)) if isinstance(command, list) else "",
        str(env.get("hardware", "")),
        f"{env['processes']} process(es)" if "processes" in env else "",
        f"python {env['python']}" if "python" in env else "",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        if isinstance(versions, dict)
        else "",
        str(env.get("started", "")),
    ]
    return "; ".join(filter(None, parts))
