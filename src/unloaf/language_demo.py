"""`unloaf demo --task language`: a small language model by common training and ST, its exits, and what they are for."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from unloaf.config import Config
from unloaf.data import Data
from unloaf.demo import facts_of, flops_limit, output_folder, shortened
from unloaf.display import show_progress
from unloaf.engine.loop import Training, one_thread, prepare, train_epoch
from unloaf.environment import environment
from unloaf.files.writing import write_whole
from unloaf.language import DecodingRow, measure_decoding
from unloaf.methods.table import METHODS
from unloaf.pages.layout import Picture
from unloaf.pages.page import language_report
from unloaf.pages.plots import curves, key
from unloaf.pages.words import METHOD_MEANINGS
from unloaf.recipes import language
from unloaf.stages import inner_module
from unloaf.subnet import Subnet

_RECIPES = (language.common, language.stimulative)
_DRAFTS = (1, 2, 4)  # layers
_EXITS = (1, 2, 4, 8)  # likewise; each costs a pass over the test texts
_PROMPTS, _PROMPT, _NEW = 3, 64, 48  # texts, and bytes of each that are given and written
_REPEATS = 3


@dataclass(frozen=True)
class LanguageRun:
    """One method: its exits and how fast they decode.

    Attributes:
        label: of the method.
        nats: per token of the test texts, by the number of layers.
        cost: measured time of a step over that of common training.
        flops: its least possible arithmetic over that of common training.
        decoding: plain, and by drafts.
    """

    label: str
    nats: dict[int, float]
    cost: float
    flops: float
    decoding: tuple[DecodingRow, ...]


def run_language_demo(
    *, output: str | Path, epochs: int | None = None, console: Console
) -> tuple[list[LanguageRun], Path]:
    """Trains, evaluates all exits on the test texts, decodes; writes report.html, results.json and results.csv.

    Returns:
        what was found, and the page.

    Raises:
        ValueError: the folder cannot be written.
    """
    configs = {METHODS[config.method].label: config for config in (shortened(recipe(), epochs) for recipe in _RECIPES)}
    folder = output_folder(Path(output))
    with one_thread():
        trainings = {label: prepare(config) for label, config in configs.items()}
        data = next(iter(trainings.values())).data
        facts = facts_of(environment(), data, seeds=1)
        seconds = _train(trainings, console)
        runs = _judge(trainings, seconds, console)
    _write_results(folder, configs, runs, facts)
    write_whole(folder / "report.html", _report(configs, runs, data, facts))
    return runs, folder / "report.html"


def _train(trainings: Mapping[str, Training], console: Console) -> dict[str, list[float]]:
    """An epoch of each in turn, so that other load slows all alike; seconds of a step, epoch by epoch."""
    seconds: dict[str, list[float]] = {label: [] for label in trainings}
    total = sum(training.config.epochs * training.steps_per_epoch for training in trainings.values())
    with show_progress(console, total=total, label="training, step", lines=True) as show:
        while not all(training.finished for training in trainings.values()):
            for label, training in trainings.items():
                row = train_epoch(training, on_step=lambda step, label=label: show.advance(f"{label}: {step.loss:.2f}"))
                seconds[label].append(row.seconds / row.steps)
                judged = "" if row.eval is None else f", {row.eval.main.loss:.3f} nats per byte of the validation texts"
                show.line(f"{label}, epoch {row.epoch}{judged}")
    return seconds


def _judge(
    trainings: Mapping[str, Training], seconds: Mapping[str, Sequence[float]], console: Console
) -> list[LanguageRun]:
    base, runs = next(iter(seconds.values())), []
    with show_progress(console, total=len(trainings), label="exits and decoding", lines=True) as show:
        for label, training in trainings.items():
            show.line(f"{label}: judging exits, and decoding with them")
            run = LanguageRun(
                label=label,
                nats=_exits(training),
                cost=statistics.median(own / common for own, common in zip(seconds[label], base, strict=True)),
                flops=flops_limit(training),
                decoding=_decode(training),
            )
            runs.append(run)
            show.advance(label)
    return runs


def _exits(training: Training) -> dict[int, float]:
    rows = training.task.evaluate_subnets(
        training.model,
        training.stages,
        training.eval_batches("test"),
        training.data,
        subnets=_subnets(training, (len(training.stages[0].blocks), *_EXITS)),
        calibration=training.calibration_batches(),
    )
    return dict(sorted((sum(row.depths), float(row.loss or 0.0)) for row in rows))


def _subnets(training: Training, depths: Sequence[int]) -> list[Subnet]:
    """Ordered subnets of so many layers, as far as there are as many."""
    layers = len(training.stages[0].blocks)
    return [Subnet.from_depths(training.stages, (depth,)) for depth in depths if depth <= layers]


def _decode(training: Training) -> tuple[DecodingRow, ...]:
    model, stages = inner_module(training.model), training.stages
    drafts = _subnets(training, [depth for depth in _DRAFTS if depth < len(stages[0].blocks)])
    model.eval()
    prompts = _prompts(training)
    return tuple(measure_decoding(model, stages, prompts, drafts, max_new_tokens=_NEW, repeats=_REPEATS))


def _prompts(training: Training) -> list[Tensor]:
    """Beginnings of sequences from all over the test texts."""
    inputs = training.data.test.inputs  # type: ignore[attr-defined]
    places = torch.linspace(0, len(inputs) - 2, _PROMPTS).long()
    return [inputs[place, :_PROMPT].long()[None] for place in places]


_Cells = tuple[list[str], list[list[str]]]


def exit_cells(runs: Sequence[LanguageRun]) -> _Cells:
    """Nats per byte and perplexity by depth, a line for each.

    >>> exit_cells([LanguageRun("ST", {1: 0.0}, 1.0, 1.0, ())])[1]
    [['1', '0.000', '1.00']]
    """
    heads = ["layers", *(f"{run.label}\n{name}" for run in runs for name in ("nats per byte", "perplexity"))]
    lines = []
    for depth in runs[0].nats:
        values = [text for run in runs for text in _nats_and_perplexity(run.nats[depth])]
        lines.append([str(depth), *values])
    return heads, lines


def _nats_and_perplexity(nats: float) -> tuple[str, str]:
    return f"{nats:.3f}", f"{torch.tensor(nats, dtype=torch.float64).exp().item():.2f}"


def decoding_cells(runs: Sequence[LanguageRun]) -> _Cells:
    """How fast each network writes, plainly and with each exit as draft."""
    heads = ["method", "decoding", "taken", "layer calls", "tokens/s", "speed"]
    lines = [
        [run.label, _way(row), _number(row.acceptance), _number(row.layer_calls), *_speed(row)]
        for run in runs
        for row in run.decoding
        if not row.note
    ]
    return heads, lines


def _way(row: DecodingRow) -> str:
    return "plain" if row.depth is None else f"{row.decoder}, exit {row.depth}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _speed(row: DecodingRow) -> tuple[str, str]:
    rate = "–" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
    return rate, "–" if row.speed is None else f"{row.speed:.2f}x"


def tables(runs: Sequence[LanguageRun]) -> list[Table]:
    """Both for the terminal."""
    made = []
    for heads, lines in (exit_cells(runs), decoding_cells(runs)):
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for index, head in enumerate(heads):
            table.add_column(head, justify="right" if index else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        made.append(table)
    return made


def _report(configs: Mapping[str, Config], runs: Sequence[LanguageRun], data: Data, facts: Mapping[str, str]) -> str:
    series = {run.label: [(float(depth), nats) for depth, nats in run.nats.items()] for run in runs}
    return language_report(
        title="Early exits of a language model",
        lead=_lead(runs),
        tables={"Perplexity by depth": exit_cells(runs), "Decoding": decoding_cells(runs)},
        legend=key([run.label for run in runs]),
        picture=_picture(series),
        caption=f"The main network has {max(runs[0].nats)} layers; an exit is the network without the last ones.",
        explanation=_explanation(runs),
        words={METHODS[config.method].label: METHOD_MEANINGS[config.method] for config in configs.values()},
        settings={label: _settings(config) for label, config in configs.items()},
        facts={**facts, "tokens": next(note for note in data.notes if note.startswith("tokens"))},
    )


def _picture(series: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    ends = "; ".join(f"{name} from {line[0][1]:.2f} to {line[-1][1]:.2f}" for name, line in series.items())
    return Picture(
        "Nats per byte of the test texts",
        curves(series, ylabel="nats per byte", xlabel="layers"),
        f"Nats per byte over the number of layers, a line for each method: {ends}.",
        (["method", "layers", "nats per byte"], [[label, *point] for label, line in series.items() for point in line]),
    )


def _lead(runs: Sequence[LanguageRun]) -> str:
    common, other = runs
    first, last = min(common.nats), max(common.nats)
    best = [max((row.speed or 0.0 for row in run.decoding if row.decoder == "unloaf"), default=0.0) for run in runs]
    return (
        f"After {common.label} the exit behind layer {first} has {common.nats[first]:.2f} nats per byte, after "
        f"{other.label} {other.nats[first]:.2f}; the main networks have {common.nats[last]:.3f} and "
        f"{other.nats[last]:.3f}. With its best exit as draft the first writes {best[0]:.2f} times as fast as without, "
        f"the second {best[1]:.2f} times. One seed, on a machine that may be doing other things."
    )


def _explanation(runs: Sequence[LanguageRun]) -> list[str]:
    costs = "; ".join(f"{run.label} {run.cost:.2f}, at least {run.flops:.2f} by its arithmetic" for run in runs)
    return [
        "Both methods train the same network, from the same weights, on the same bytes: the help pages that come with "
        "Python, some of which are held out. An exit is an ordered subnet: the first layers, the final norm and the "
        "head, none of them trained further.",
        "In self-speculative decoding an exit writes a few tokens, which the other layers then verify at once: the "
        "text is that of the main network. Layer calls are those per token over the number of layers, taken is the "
        "share of drafted tokens that the main network takes. transformers' assistant_early_exit runs drafted layers "
        "again.",
        f"Time of a step over common training, the median over epochs that were trained in turn: {costs}.",
        "Network, steps and number of subnets are the second of three that ST was tried with, on validation texts; the "
        "learning rate is a usual one and was not tuned.",
    ]


def _settings(config: Config) -> dict[str, str]:
    return {
        "model": f"{config.model}, {', '.join(config.model_kwargs)}",
        "epochs": str(config.epochs),
        "batch": f"{config.batch_size} sequences of {config.seq_len} bytes",
        "optimizer": f"{config.opt}, learning rate {config.lr:g}, weight decay {config.weight_decay:g}",
        "subnets per step": str(config.num_subnets_or_default),
    }


def _write_results(
    folder: Path, configs: Mapping[str, Config], runs: Sequence[LanguageRun], facts: Mapping[str, str]
) -> None:
    text = io.StringIO(newline="")
    lines = [(run.label, depth, nats) for run in runs for depth, nats in run.nats.items()]
    csv.writer(text, lineterminator="\n").writerows([("method", "layers", "test_nats_per_token"), *lines])
    write_whole(folder / "results.csv", text.getvalue())
    results: dict[str, Any] = {
        "facts": facts,
        "configs": {label: asdict(config) for label, config in configs.items()},
        "runs": [asdict(run) | {"decoding": [row._asdict() for row in run.decoding]} for run in runs],
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
