"""`unloaf loafing`: subnets inside a network against the same architectures trained alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from unloaf.commands import studies
from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.config import Config
from unloaf.config.choices import Method
from unloaf.own_code import check_allowed, own_settings
from unloaf.streams import standard_error

if TYPE_CHECKING:
    from unloaf.analysis.loafing import LoafingRow

PROG = "unloaf loafing"
_TAKEN = {
    "--method": "give --methods, of which common comes first",
    "--name": "runs get names of their own; leave it out",
    "--depths": "give --subnets",
    "--task": "this is for classification; leave it out",
}


@dataclass(frozen=True, kw_only=True)
class Loafing:
    """Train a network by several methods, and subnets of it alone; show what a subnet loses inside the network.

    Without settings it takes network, data and settings of `unloaf demo`. Beside these options it takes the settings of
    `unloaf train`, such as --dataset, --data-dir, --model or --epochs. Runs are kept in OUTPUT/runs: what is finished
    is not trained again, and after a stop the same command goes on.
    """

    option_groups = (("methods", "what is compared"), ("config", "settings"), ("output", "output"))

    methods: tuple[Method, ...] = ("common", "st", "gkt")
    """Methods that train the network, common training first: it trains the subnets alone, too."""
    subnets: tuple[str, ...] = ()
    """Depths of the subnets, as in 1-1-1 2-2-2; default: a quarter, a half and three quarters of each stage."""
    seeds: int = 3
    """Repeat with this many seeds, --seed and those that follow; the table has mean and standard deviation."""
    split: Literal["val", "test"] = "test"
    """Images on which the networks are evaluated; where there are none, the others."""
    config: Annotated[str | None, tyro.conf.arg(aliases=["-c"], metavar="FILE")] = None
    """Take settings from a YAML file, such as the args.yaml of a run; the method's own defaults stay."""
    recipe: str | None = None
    """Take settings from a recipe; `unloaf recipes` lists them."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that --model or --dataset name as module:function."""
    output: str = "output/loafing"
    """Folder for loafing.html, .csv, .json and .svg, and for the runs."""
    json: bool = False
    """Print everything as JSON."""

    def __post_init__(self) -> None:
        if not self.methods or self.methods[0] != "common":
            raise ValueError(
                f"methods {' '.join(self.methods) or '(none)'}: give common first, it is what is compared with"
            )
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods {' '.join(self.methods)}: give each once")
        for text in self.subnets:
            if not re.fullmatch("[0-9]{1,4}([-,][0-9]{1,4})*", text):
                raise ValueError(f"subnets {text!r}: give a number for each stage, as in 3-3-5-3")
        check_least(self, seeds=1)


def configs_of(options: Loafing, words: list[str]) -> dict[str, Config]:
    """The settings of each method: those of the demo, or the given ones with the method in them."""
    from unloaf.analysis.loafing import digits_configs

    studies.check_settings(words, _TAKEN)
    base = studies.base_settings(words, config=options.config, name=options.recipe, prog=PROG, kind=Loafing)
    if base is None:
        found = digits_configs(options.methods)
        return {name: studies.with_settings(one, words, prog=PROG, kind=Loafing) for name, one in found.items()}
    if base.task != "classification":
        raise ValueError(f"task {base.task}: {_TAKEN['--task']}")
    return {name: _by_method(base, name) for name in options.methods}


def _by_method(base: Config, method: Any) -> Config:
    """With what the base sets of another method's subnets left out where this method refuses it."""
    kept = method in ("st", "st++", "st-star")
    return replace(base, method=method, subnet_inputs=base.subnet_inputs if kept else "auto", depths=None)


def run(words: list[str]) -> int:
    """Trains what is not there, prints the table, writes page, table and picture."""
    mine, others = studies.split_words(words, Loafing)
    options = parse(Loafing, mine, prog=PROG)
    folder = Path(options.output)
    studies.check_folder(folder, [f"loafing.{kind}" for kind in ("html", "csv", "json", "svg")])
    configs = configs_of(options, others)
    check_allowed(own_settings(configs["common"]), allowed=options.run_own_code)
    from unloaf.analysis.cells import Store
    from unloaf.analysis.loafing import loafing_cells, loafing_rows, loafing_table, subnets_to_compare
    from unloaf.pages.analysis_sections import Analysis

    subnets, main = subnets_to_compare(configs["common"], options.subnets)
    first = configs["common"].seed
    seeds = range(first, first + options.seeds)
    store = Store(
        folder, asked=subnets, split=options.split, run_own_code=options.run_own_code,
        console=Console(file=standard_error()),
    )  # fmt: skip
    judged = store.results(loafing_cells(configs, subnets, seeds))
    rows = loafing_rows(judged, subnets, main)
    facts = studies.facts_of(judged, seeds=seeds)
    notes = _notes(rows, judged[0].split)
    found = Analysis("loafing", rows, notes, facts, judged[0].data)
    studies.write_results(folder, "loafing", found, **_shown(rows, configs, facts, judged))
    studies.tell(
        rows, as_json=options.json, table=lambda: loafing_table(rows), notes=notes, page=folder / "loafing.html"
    )
    return 0


def _notes(rows: list[LoafingRow], split: str) -> list[str]:
    from unloaf.analysis.loafing import mean_gaps

    gaps = "; ".join(f"{method} {gap}" for method, gap in mean_gaps(rows).items())
    return [
        f"top-1 on the {split} images, batch-norm statistics re-estimated in all; gap: points that a subnet loses "
        "inside the network, and the main network against that of common training",
        f"mean gap of the subnets, points: {gaps}",
    ]


def _shown(rows: list[LoafingRow], configs: dict[str, Config], facts: dict[str, str], judged: Any) -> dict[str, str]:
    """Picture and page."""
    from unloaf.analysis.loafing import loafing_table, mean_gaps
    from unloaf.methods.table import METHODS
    from unloaf.pages.layout import Picture
    from unloaf.pages.studies import data_of, loafing_picture, study_page
    from unloaf.pages.words import ANALYSIS_WORDS, METHOD_MEANINGS

    gaps, model = mean_gaps(rows), configs["common"].model
    parts = [f"{gap} points after {method}" for method, gap in gaps.items()]
    count = len({row.depths for row in rows if not row.main})
    page = study_page(
        title=f"Loafing: subnets of {model}",
        lead=f"Inside {model}, {count} subnets lose against the same architectures trained alone, in the mean: "
        f"{', '.join(parts)}.",
        name="Accuracy of subnets, alone and inside the network",
        table=loafing_table(rows),
        picture=Picture(
            "Alone and inside",
            loafing_picture(rows, background=None),
            f"Accuracy of {count} subnets trained alone, and inside the network after {', '.join(gaps)}; mean gaps "
            f"are {', '.join(parts)}.",
            data_of(rows),
        ),
        caption=f"Top-1 accuracy on the {judged[0].split} images; means over {len({row.seed for row in rows})} "
        "seed(s), whiskers are standard deviations. A line joins an architecture trained alone (hollow) and the same "
        "one inside the network (filled).",
        explanation=[
            "Each subnet is trained twice: as a part of the network, whose method may or may not train it, and as a "
            "network of its own, by common training with the settings of common training. Where the second is better, "
            "the subnet loafs inside the network.",
            "All networks are evaluated alike, with batch-norm statistics re-estimated on training images: the gap is "
            "the accuracy alone minus the accuracy inside, at the same seed, in points. The line of the main network "
            "compares it with that of common training.",
            "The networks alone are trained for the same epochs, at their lower cost; they were not tuned one by one.",
        ],
        words={METHODS[name].label: METHOD_MEANINGS[name] for name in configs} | ANALYSIS_WORDS["loafing"],
        settings=studies.settings_that_differ({METHODS[name].label: config for name, config in configs.items()}),
        facts=facts,
    )
    return {"picture": loafing_picture(rows), "page": page}
