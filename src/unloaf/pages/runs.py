"""`unloaf report`: histories of runs in, one web page out. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from unloaf.analysis.comparison import Spread
from unloaf.analysis.equal_cost import EqualCostRow, by_seed, equal_cost_rows
from unloaf.config import Config
from unloaf.config.figures import FIGURES, Figures
from unloaf.pages.layout import Figure, Note, Section, Table, Words, page
from unloaf.pages.page import facts_table
from unloaf.pages.plots import key
from unloaf.pages.run_pictures import cost_pictures, epoch_pictures, subnet_pictures, term_pictures
from unloaf.pages.words import method_words, run_words
from unloaf.runs.histories import RunHistory, cautions, differences, table_of

_EPOCHS = (
    "Each line is a run, evaluated on the validation images. The training loss sums all terms of a method, so it "
    "cannot be compared between methods. Subnets are evaluated with re-estimated batch-norm statistics, "
    "the main network with its running ones, unless stated otherwise. The learning rate is that of "
    "the last step of an epoch."
)
_COSTS = (
    "Training time is measured, validation not included; it compares methods where the runs had machines of one kind "
    "to themselves."
)
_TERMS = (
    "Means over the steps that were logged in an epoch. The loss of the main network is that on the labels, whatever "
    "the method adds to it, and can be compared between methods; that of the subnets is the sum of their terms."
)
_SUBNETS = (
    "A picture of one run has its main network as a line, with the batch-norm statistics of its training, the range of "
    "its evaluated subnets as an area, and their mean as a dashed line, with re-estimated statistics."
)


def runs_page(histories: Sequence[RunHistory], analyses: Sequence[Section] = ()) -> str:
    """The page, HTML; it needs no other file. Sections of analyses come after those of the runs."""
    figures = FIGURES[histories[0].config.task]
    legend = key([history.label for history in histories])
    title = "Runs side by side" if len(histories) > 1 else f"Run {histories[0].label}"
    subnets, left_out = subnet_pictures(histories, figures)
    return page(
        title,
        "",
        [
            _runs(histories, figures),
            Section("Over epochs", _figure(epoch_pictures(histories, figures), _EPOCHS, legend)),
            Section("Over measured training time", _figure(cost_pictures(histories, figures), _COSTS, legend)),
            Section("At equal cost", _equal_cost(histories, figures)),
            Section("Subnets", _figure(subnets, _SUBNETS + left_out, legend)),
            Section("Loss terms", _figure(term_pictures(histories), _TERMS, legend)),
            *analyses,
            *_about(histories),
        ],
    )


def analysis_page(analysis: Section, histories: Sequence[RunHistory]) -> str:
    """The page of an analysis: what it found, and what the runs are that it looked at."""
    figures = FIGURES[histories[0].config.task]
    cost = Section("At equal cost", _equal_cost(histories, figures))
    return page(
        analysis.heading, "", [analysis._replace(heading="Found"), _runs(histories, figures), cost, *_about(histories)]
    )


def _runs(histories: Sequence[RunHistory], figures: Figures) -> Section:
    heads, lines = table_of(histories)
    runs = Table("The runs", heads, lines, "results runs", words=range(1, 1 + heads.index("epochs")))
    notes = [Note(f"{line}.") for line in cautions(histories)]
    return Section("Runs", [*notes, runs, *_over_seeds(histories, figures)])


def _about(histories: Sequence[RunHistory]) -> list[Section]:
    """What words, settings and data are."""
    methods = method_words([history.config.method for history in histories])
    return [
        Section("What the words mean", [Words(methods | run_words(table_of(histories)[0]))]),
        Section("Settings", _settings(histories)),
        Section("Data", [Table("Data of each run", *_data(histories), "settings")]),
        Section("Where they ran", [facts_table({h.label: _facts(h) for h in histories})]),
    ]


def _figure(pictures: Any, caption: str, legend: Sequence[tuple[str, str]]) -> list[Figure]:
    return [Figure(pictures, caption, legend)] if pictures else []


def _over_seeds(histories: Sequence[RunHistory], figures: Figures) -> list[str | Table]:
    groups = by_seed(histories)
    if all(len(group) == 1 for group in groups):
        return []
    chief = figures.decisive
    columns = {
        f"last val\n{figures.head}": lambda run: run.last(f"eval_{chief}"),
        f"test\n{figures.head}": lambda run: run.result.get(f"test_{chief}"),
        f"mean subnet\n{figures.head}": lambda run: run.last(f"subnets_{chief}_mean"),
        f"worst subnet\n{figures.head}": lambda run: run.last(f"subnets_{chief}_{figures.worst_of}"),
    }
    lines = []
    for group in groups:
        # A run that is not at its end would pull the mean where it does not belong.
        ended = [run for run in group if run.state == "finished"] or group
        cells = [_spread([read(run) for run in ended], figures) for read in columns.values()]
        seeds = ", ".join(str(run.config.seed) for run in ended)
        lines.append([f"{group[0].config.method} ({group[0].label})", group[0].config.model, seeds, *cells])
    shown = [n for n in range(3, 3 + len(columns)) if any(line[n] != "–" for line in lines)]
    table = [[*line[:3], *(line[n] for n in shown)] for line in lines]
    heads = ["method (first run)", "model", "seeds", *(list(columns)[n - 3] for n in shown)]
    said = "Over seeds: mean and standard deviation of finished runs that differ in nothing else."
    return [said, Table("Over seeds", heads, table, words=(1, 2))]


def _spread(values: Sequence[float | None], figures: Figures) -> str:
    there = [value for value in values if value is not None]
    if len(there) < len(values) or not there:
        return "–"
    return Spread.of(there).text(digits=len(figures.cell(0.0).partition(".")[2]))


def _equal_cost(histories: Sequence[RunHistory], figures: Figures) -> list[str | Note | Table]:
    """Whenever methods are compared."""
    if len({history.config.method for history in histories}) < 2:
        return []
    rows, notes = equal_cost_rows(histories)
    if not rows:
        return [Note(f"{note}.") for note in notes]
    said = (
        f"Every run after the training time of the cheapest finished one, {min(row.seconds for row in rows):.0f} s: "
        "its last validation until then, in the middle of a schedule that may be made for more epochs. For the best "
        "that a method reaches at this cost it is trained for as many epochs as the cost allows."
    )
    return [said, *(Note(f"{note}.") for note in notes), _cost_table(rows, figures)]


def _cost_table(rows: Sequence[EqualCostRow], figures: Figures) -> Table:
    head = figures.head
    heads = ["run", "method", "seed", f"at equal cost\nval {head}", "after\nepoch", f"whole run\nval {head}",
             "training\ntime, s", "relative"]  # fmt: skip
    lines = [
        [row.run, row.method, str(row.seed), figures.cell(row.value), str(row.epoch), figures.cell(row.whole),
         f"{row.seconds:.1f}", f"{row.relative:.2f} ×"]
        for row in rows
    ]  # fmt: skip
    return Table("Runs at equal cost", heads, lines, words=(1,))


def _settings(histories: Sequence[RunHistory]) -> list[str | Table]:
    different, values, usual = differences(histories), asdict(histories[0].config), asdict(Config())
    shared = [
        f"{name} {_text(value)}"
        for name, value in values.items()
        if name not in different and name not in ("name", "output") and value != usual[name]
    ]
    who = "All runs" if len(histories) > 1 else "The run"
    parts: list[str | Table] = [f"{who}: {'; '.join(shared) or 'nothing'}; every other setting at its default."]
    if different:
        heads = ["setting", *(history.label for history in histories)]
        lines = [[name, *cells] for name, cells in different.items()]
        parts += ["Settings that differ:", Table("Settings that differ", heads, lines, "settings")]
    elif len(histories) > 1:
        parts.append("Settings that differ: none.")
    return parts


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _data(histories: Sequence[RunHistory]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for history in histories:
        splits = history.data.get("splits")
        counts = [
            str(part.get("images", "–")) if isinstance(part, dict) else "–"
            for part in ((splits if isinstance(splits, dict) else {}).get(name) for name in ("train", "val", "test"))
        ]
        classes = str(history.data.get("num_classes", "–"))
        dataset = str(history.data.get("dataset", history.config.dataset))
        lines.append([history.label, dataset, classes, *counts, str(history.config.seed)])
    return ["run", "data set", "classes", "to train", "to validate", "to test", "seed"], lines


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
        f"revision {env['revision']}" if env.get("revision") else "",
        str(env.get("started", "")),
        *map(_resume, resumes if isinstance(resumes, list) else []),
    ]
    return "; ".join(filter(None, parts)) or "not known: env.json is missing or damaged"


def _command(env: Mapping[str, Any]) -> str:
    words = env.get("command")
    return shlex.join(map(str, words)) if isinstance(words, list) else ""


def _resume(env: Any) -> str:
    """With which command the run went on, when, and on what other hardware."""
    if not isinstance(env, dict):
        return ""
    parts = [_command(env), str(env.get("hardware", "")), str(env.get("started", ""))]
    return f"resumed: {', '.join(filter(None, parts))}"
