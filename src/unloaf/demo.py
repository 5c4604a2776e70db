"""`unloaf demo`: one small network, trained by every method, and what became of its subnets."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unloaf.analysis.comparison import MethodRow, MethodRun, Spread, method_rows, size_rows
from unloaf.config import Config
from unloaf.data import Data, EvalBatches, load_data
from unloaf.display import show_progress
from unloaf.engine.loop import Training, one_thread, prepare, train_epoch
from unloaf.environment import environment
from unloaf.evaluation import SubnetRow, evaluate_subnets
from unloaf.files.writing import check_writable, disk_full, write_whole
from unloaf.measure.flops import method_flops
from unloaf.methods.table import METHODS
from unloaf.pages.layout import Picture
from unloaf.pages.page import comparison_report
from unloaf.pages.plots import accuracy_over_size
from unloaf.pages.words import METHOD_MEANINGS
from unloaf.recipes import digits

_RECIPES = (digits.common, digits.stochastic_depth, digits.stimulative, digits.stimulative_plus, digits.group_knowledge)
_BASELINE = METHODS["common"].label
_COUNTED_STEPS = 200  # the mean over draws is known to about 1 % by then
_FILES = ("report.html", "results.csv", "results.json")
_JUDGE_BATCH = 450  # images; few passes for each of the many subnets


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: the lines of its table and the page it wrote."""

    rows: tuple[MethodRow, ...]
    report: Path


def run_demo(*, output: str | Path, seeds: int = 1, epochs: int | None = None, console: Console) -> DemoResult:
    """Trains, evaluates all ordered subnets on the test images, writes report.html, results.json and results.csv.

    Raises:
        ValueError: an argument is out of range or the folder cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds {seeds}: give at least 1")
    found = [shortened(recipe(), epochs) for recipe in _RECIPES]
    configs = {METHODS[config.method].label: config for config in found}
    folder = output_folder(Path(output))
    data = load_data(configs[_BASELINE])
    runs: list[MethodRun] = []
    with one_thread():
        facts = facts_of(environment(), data, seeds=seeds)
        for seed in range(seeds):
            seeded = {label: replace(config, seed=seed) for label, config in configs.items()}
            runs += compare(seeded, data=data, split="test", console=console)
    rows = method_rows(runs)
    _write_results(folder, configs, runs, facts)
    write_whole(folder / "report.html", _report(configs, runs, rows, data=data, facts=facts))
    return DemoResult(tuple(rows), folder / "report.html")


def shortened(config: Config, epochs: int | None) -> Config:
    """The configuration with so many epochs; with its own where that is None."""
    if epochs is None:
        return config
    return replace(config, epochs=epochs, warmup_epochs=max(0, min(config.warmup_epochs, epochs - 1)))


def output_folder(path: Path) -> Path:
    """Made now: a folder that cannot be written is better known before the training than after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # an older report stays until there is a new one
    except OSError as error:
        full = disk_full(error, path, 0)
        raise full or ValueError(f"cannot write to {path}: {error.strerror}; give another --output") from error
    for name in _FILES:
        check_writable(path / name)
    return path


def compare(configs: Mapping[str, Config], *, data: Data, split: str, console: Console) -> list[MethodRun]:
    """Trains all configurations, an epoch of each in turn, and evaluates all their ordered subnets.

    In turn, so that other load on the machine slows all of them alike: the measured costs
    are the median over the epochs of the ratio to the baseline's epoch. The runs share nothing
    but the images; each is the run that `unloaf train` makes of its configuration.
    """
    trainings = {label: prepare(config, data=data) for label, config in configs.items()}
    seconds: dict[str, list[float]] = {label: [] for label in configs}
    tops: dict[str, list[float]] = {label: [] for label in configs}
    seed = configs[_BASELINE].seed
    with show_progress(console, total=sum(config.epochs for config in configs.values()), label=f"seed {seed}") as show:
        for epoch in range(1, max(config.epochs for config in configs.values()) + 1):
            for label, training in trainings.items():
                if not training.finished:
                    row = train_epoch(training)
                    seconds[label].append(row.seconds / row.steps)
                    tops[label].append(row.eval.main.top1 if row.eval else math.nan)
                    show.advance(f"{label}, epoch {epoch}")
    costs = {
        label: statistics.median(own / base for own, base in zip(found, seconds[_BASELINE], strict=False))
        for label, found in seconds.items()
    }
    return [
        MethodRun(
            label=label,
            seed=seed,
            subnets=judge(training, split=split),
            cost=costs[label],
            flops=flops_limit(training),
            curve=_over_cost(tops[label], costs[label] / configs[_BASELINE].epochs),
        )
        for label, training in trainings.items()
    ]


def _over_cost(tops: Sequence[float], cost: float) -> tuple[tuple[float, float], ...]:
    """Accuracies after each epoch over the cost of all until then; nothing where there are no validation images."""
    return tuple((cost * epoch, top) for epoch, top in enumerate(tops, 1) if not math.isnan(top))


def flops_limit(training: Training) -> float:
    """The arithmetic of what the first steps drew, no block computed twice, relative to common training."""
    x = next(iter(training.calibration_batches())).x
    steps = min(_COUNTED_STEPS, training.config.epochs * training.steps_per_epoch)
    flops = method_flops(training.method, x, range(steps))
    return flops.shared / flops.common


def judge(training: Training, *, split: str) -> tuple[SubnetRow, ...]:
    """Accuracy of all ordered subnets with re-estimated batch-norm statistics, of the main network with both."""
    data = training.data
    images, calibration = (
        EvalBatches(part, data, training.config, device=training.device, batch_size=_JUDGE_BATCH)
        for part in (getattr(data, split), data.train)
    )
    return tuple(evaluate_subnets(training.model, training.stages, images, calibration=calibration))


def table(rows: Sequence[MethodRow]) -> Table:
    """The result for the terminal: accuracies in percent, costs relative to common training."""
    both = any(row.main_reestimated for row in rows)
    result = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 0) if both else (0, 1))
    mains = ("main, as\nit stands", "main, re-\nestimated") if both else ("main\ntop-1 %",)
    heads = ("method", *mains, "mean subnet\ntop-1 %", "worst subnet\ntop-1 %", "cost of\na step", "FLOPs\nlimit")
    for index, head in enumerate(heads):
        result.add_column(head, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        mains = (row.main_top1, row.main_reestimated or "–") if both else (row.main_top1,)
        tops = map(str, (*mains, row.mean_top1, row.worst_top1))
        # Without their spread, which is on the page: the table must fit into 80 columns.
        result.add_row(row.label, *tops, f"{row.cost.mean:.2f}x", f"{row.flops.mean:.2f}x")
    return result


def _report(
    configs: Mapping[str, Config],
    runs: Sequence[MethodRun],
    rows: Sequence[MethodRow],
    *,
    data: Data,
    facts: Mapping[str, str],
) -> str:
    sizes = size_rows(runs)
    lowest = min(line.lowest_top1 for lines in sizes.values() for line in lines)
    upper = statistics.median(lines[0].mean_top1 for lines in sizes.values())
    dots = [[run.label, run.seed, str(row.subnet), sum(row.depths), row.top1] for run in runs for row in run.subnets]
    alt = "Accuracy over the number of blocks that a subnet keeps, a line for each method. " + "; ".join(
        f"{label} from {lines[0].mean_top1:.1f} % at {lines[0].blocks} blocks to {lines[-1].mean_top1:.1f} %"
        for label, lines in sizes.items()
    )
    return comparison_report(
        title="Subnets of a network",
        lead=_lead(rows, images=len(data.test)),
        rows=rows,
        pictures=[
            Picture(
                "All subnets",
                accuracy_over_size(sizes, runs, lowest=_round_down(lowest)),
                alt,
                (["method", "seed", "subnet", "blocks", "test top-1, %"], dots),
            ),
            Picture(
                "The upper part, enlarged",
                accuracy_over_size(sizes, runs, lowest=_round_down(upper), legend=False),
                f"The same from {_round_down(upper):.0f} % on.",
                None,
            ),
        ],
        caption=(
            f"Accuracy on {len(data.test)} test images. A dot is one subnet at one seed; a line joins the means of the "
            "subnets that keep equally many blocks. The right end is the main network itself, evaluated as they are."
        ),
        explanation=_explanation(len(runs[0].proper_subnets)),
        words={METHODS[config.method].label: METHOD_MEANINGS[config.method] for config in configs.values()},
        settings={label: _settings(config) for label, config in configs.items()},
        facts=facts,
    )


def _round_down(top1: float) -> float:
    return min(90.0, 10 * (top1 // 10))


def _lead(rows: Sequence[MethodRow], *, images: int) -> str:
    common, *others = rows
    best = max(others, key=lambda row: row.mean_top1.mean)
    return (
        f"A residual network contains smaller networks that share its weights. After {common.label} the mean subnet "
        f"reaches {common.mean_top1} % and the worst one {common.worst_top1} %; after {best.label} they reach "
        f"{best.mean_top1} % and {best.worst_top1} %. The main networks reach {common.main_top1} % and "
        f"{best.main_top1} %: {_what_it_says(common.main_top1, best.main_top1, images)}"
    )


def _what_it_says(common: Spread, best: Spread, images: int) -> str:
    """Whether two main networks differ by more than chance explains: two standard errors, of the seeds or images."""
    if common.sd is None or best.sd is None:
        share = (common.mean + best.mean) / 200
        error = 100 * math.sqrt(2 * share * (1 - share) / images)
        judges, more = f"one seed and {images} test images", "; more seeds (--seeds 3) say more."
    else:
        error = math.sqrt(common.sd**2 / common.n + best.sd**2 / best.n)
        judges, more = f"{common.n} seeds", "."
    apart = abs(best.mean - common.mean) > 2 * error
    verdict = "a significant difference by" if apart else "no significant difference by"
    return f"{verdict} {judges} (two standard errors are {2 * error:.1f} points){more}"


def _explanation(subnets: int) -> list[str]:
    return [
        f"Every method trains the same network, from the same weights, on the same images. Then all {subnets} ordered "
        "subnets are cut out of it, none of them trained further: a subnet keeps the first blocks of each stage. Their "
        "batch-norm statistics are re-estimated on the training images. The main network is evaluated both ways: with "
        "the running statistics of its training, and with re-estimated ones, comparable with its subnets. Where a line "
        "falls to the left, the subnets loaf: they depend on the blocks that were removed.",
        "The measured cost is the time of a training step relative to common training, the median over epochs that "
        "were trained in turn. The FLOPs limit is the arithmetic of the very same steps when no block is computed "
        "twice: what is between the two is overhead.",
        "The settings were chosen on the validation images, with the same budget for each method, but for eps and the "
        "weights of ST++ and GKT, which took further trials, also on validation images. All trials, and what a second "
        "look at the test images means for the baseline, are in unloaf.recipes.digits. With ±, numbers are mean "
        "and standard deviation over seeds.",
    ]


def _settings(config: Config) -> dict[str, str]:
    """What a reader needs to know of a configuration; the whole of it is in results.json."""
    shown = {
        "model": f"{config.model}, width {config.width}",
        "epochs": str(config.epochs),
        "batch size": str(config.batch_size),
        "optimizer": f"{config.opt}, momentum {config.momentum}",
        "learning rate": f"{config.lr:g}, {config.sched}",
        "warm-up, epochs": str(config.warmup_epochs),
        "weight decay": f"{config.weight_decay:g}",
    }
    if config.method == "stochastic-depth":
        shown["final survival"] = str(config.final_survival)
    if config.num_subnets_or_default:
        shown |= _subnet_settings(config)
    return shown


def _subnet_settings(config: Config) -> dict[str, str]:
    shown = {
        "subnets per step": str(config.num_subnets_or_default),
        "sampling": config.sampler_or_default,
        "subnet loss": config.subnet_loss_or_default,
        "weight of a subnet": f"{config.subnet_weight_or_default:g}",
    }
    if config.method == "st++":
        shown |= {"KL- eps": f"{config.eps:g}", "smallest input": f"{config.min_ratio:g} of the side"}
    if config.method == "gkt":
        shown |= {"groups x loops": f"{config.groups} x {config.loops}", "group ema": str(config.group_ema)}
    return shown


def facts_of(environment: Mapping[str, Any], data: Data, *, seeds: int) -> dict[str, str]:
    """Where and on what a demo ran, for its page."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return {
        "command": shlex.join(environment["command"]),
        data.unit: f"{data.name}: {len(data.train)} to train, {len(data.val)} to validate, {len(data.test)} to test",
        "seeds": ", ".join(map(str, range(seeds))),
        "hardware": f"{environment['hardware']}, {environment['threads']} thread(s) used",
        "versions": f"{versions}, python {environment['python']}",
        **({"revision": str(environment["revision"])} if environment.get("revision") else {}),
        "date": environment["started"],
    }


def _write_results(
    folder: Path, configs: Mapping[str, Config], runs: Sequence[MethodRun], facts: Mapping[str, str]
) -> None:
    heads = ("method", "seed", "subnet", "params", "test_top1", "test_loss", "cost", "flops_limit", "statistics",
             "running_test_top1", "running_test_loss")  # fmt: skip
    lines = [
        (run.label, run.seed, row.subnet, row.params, row.top1, row.loss, run.cost, run.flops, row.statistics)
        + ((None, None) if row.running is None else (row.running.top1, row.running.loss))
        for run in runs
        for row in run.subnets
    ]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([heads, *lines])
    write_whole(folder / "results.csv", text.getvalue())
    results = {
        "facts": facts,
        "configs": {label: asdict(config) for label, config in configs.items()},
        "rows": [dict(zip(heads, [*line[:2], str(line[2]), *line[3:]], strict=True)) for line in lines],
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
