"""`unloaf ablate`: a grid of settings, trained with several seeds, beside common training of the same cost."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from unloaf.commands import studies
from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.config import Config
from unloaf.own_code import check_allowed, own_settings
from unloaf.recipes import recipe
from unloaf.streams import standard_error

if TYPE_CHECKING:
    from unloaf.analysis.ablation import AblationRow
    from unloaf.analysis.grids import Grid

PROG = "unloaf ablate"
NAMES = ("sampling", "losses", "inputs", "spaces", "components", "epochs")
_TAKEN = {
    "--name": "runs get names of their own; leave it out",
    "--task": "this is for classification; leave it out",
}


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Train each row of a grid with several seeds: what a setting does, beside common training of the same cost.

    Without settings it takes network, data and settings of `unloaf demo`. Beside these options it takes the settings of
    `unloaf train`, such as --dataset, --data-dir, --model or --epochs; they hold for all rows, where a row does not
    change them. Runs are kept in OUTPUT/runs: what is finished is not trained again, and after a stop the same command
    goes on.
    """

    option_groups = (("space", "what is compared"), ("config", "settings"), ("output", "output"))

    grid: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|FILE")] = ""
    """sampling, losses, inputs, spaces, components, epochs, or a YAML file with rows of your own."""
    space: Annotated[tuple[str, ...], tyro.conf.arg(metavar="1,2,4,1 ...")] = ()
    """spaces: how many depths of each stage inter-stage sampling draws, its largest ones; default: all, and fewer and
    fewer."""
    subnets: int = 8
    """Subnets that are evaluated beside each main network."""
    seeds: int = 3
    """Repeat with this many seeds, --seed and those that follow; the table has mean and standard deviation."""
    split: Literal["val", "test"] = "val"
    """Images on which the networks are evaluated; where there are none, the others."""
    equal_cost: bool = True
    """Train common training for as many epochs as cost what a row costs, too."""
    config: Annotated[str | None, tyro.conf.arg(aliases=["-c"], metavar="FILE")] = None
    """Take settings from a YAML file, such as the args.yaml of a run."""
    recipe: str | None = None
    """Take settings from a recipe; `unloaf recipes` lists them."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that --model or --dataset name as module:function."""
    output: str = "output/ablate"
    """Folder for NAME.html, .csv, .json and .svg, and for the runs; grids in one folder share them."""
    json: bool = False
    """Print everything as JSON."""

    def __post_init__(self) -> None:
        if self.grid not in NAMES and Path(self.grid).suffix not in (".yaml", ".yml"):
            raise ValueError(f"ablate {self.grid!r}: give {', '.join(NAMES)}, or a file that ends in .yaml")
        for text in self.space:
            if not re.fullmatch("[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", text):
                raise ValueError(f"space {text!r}: give a number of depths for each stage, as in 1,2,4,1")
        if self.space and self.grid != "spaces":
            raise ValueError(f"--space belongs to `unloaf ablate spaces`, not to {self.grid}; leave it out")
        if len(set(self.space)) < len(self.space):
            raise ValueError(f"space {' '.join(self.space)}: give each once")
        check_least(self, subnets=1, seeds=1)


def base_of(options: Ablate, words: list[str]) -> Config:
    """The settings of all rows: those of the demo's ST, or the given ones."""
    studies.check_settings(words, _TAKEN)
    base = studies.base_settings(words, config=options.config, name=options.recipe, prog=PROG, kind=Ablate)
    if base is None:
        # What digits need of ST++, without effect elsewhere: see `unloaf.recipes.digits`.
        found = replace(recipe("digits_st"), eps=1.0, min_ratio=0.75)
        return studies.with_settings(found, words, prog=PROG, kind=Ablate)
    if base.task != "classification":
        raise ValueError(f"task {base.task}: {_TAKEN['--task']}")
    return base


def run(words: list[str]) -> int:
    """Trains what is not there, prints the table, writes page, table and picture."""
    mine, others = studies.split_words(words, Ablate)
    options = parse(Ablate, mine, prog=PROG)
    folder, stem = Path(options.output), Path(options.grid).stem
    studies.check_folder(folder, [f"{stem}.{kind}" for kind in ("html", "csv", "json", "svg")])
    base = base_of(options, others)
    check_allowed(own_settings(base), allowed=options.run_own_code)
    from unloaf.analysis.ablation import ablation_rows, ablation_table
    from unloaf.analysis.cells import Store
    from unloaf.analysis.grids import own_grid
    from unloaf.pages.analysis_sections import Analysis

    named = options.grid in NAMES
    grid = own_grid(Path(options.grid), base) if not named else None
    grid = grid or _named(options, base)
    seeds = range(base.seed, base.seed + options.seeds)
    store = Store(
        folder, asked=options.subnets, split=options.split, run_own_code=options.run_own_code,
        console=Console(file=standard_error()),
    )  # fmt: skip
    rows, judged = ablation_rows(grid, store, seeds, equal_cost=options.equal_cost)
    facts = studies.facts_of(judged, seeds=seeds)
    notes = _notes(grid, judged[0].split)
    shown = _shown(grid, rows, facts, notes)
    found = Analysis("ablate", rows, notes, facts, judged[0].data, {"axis": grid.axis})
    studies.write_results(folder, stem, found, **shown)
    page = folder / f"{stem}.html"
    studies.tell(rows, as_json=options.json, table=lambda: ablation_table(rows), notes=notes, page=page)
    return 0


def _named(options: Ablate, base: Config) -> Grid:
    from unloaf.analysis.grids import named_grid, runs_raw
    from unloaf.analysis.loafing import untrained

    found = untrained(base)
    if not found.stages:
        raise ValueError(f"model {base.model} has no residual blocks that could be skipped, so it has no subnets")
    return named_grid(options.grid, base, found.stages, spaces=options.space, raw=runs_raw(found.model, found.stages))


def _notes(grid: Grid, split: str) -> list[str]:
    first = grid.rows[0].config
    return [
        f"top-1 on the {split} images, mean and standard deviation over seeds; main network as trained, subnets with "
        "re-estimated batch-norm statistics",
        f"cost: FLOPs of the training relative to common training of {first.epochs} epochs, each block that can be "
        "shared counted once",
        *grid.notes,
    ]


def _shown(grid: Grid, rows: list[AblationRow], facts: dict[str, str], notes: list[str]) -> dict[str, str]:
    """Picture and page."""
    from unloaf.analysis.ablation import ablation_table
    from unloaf.pages.layout import Picture
    from unloaf.pages.studies import ablation_picture, data_of, study_page
    from unloaf.pages.words import ANALYSIS_WORDS

    source = f" The comparison is that of {grid.source}, on this network and these images." if grid.source else ""
    page = study_page(
        title=grid.title,
        lead=f"{len(grid.rows)} ways to train {grid.rows[0].config.model}, {len({row.seed for row in rows})} seed(s) "
        f"each, beside common training of the same cost.{source}",
        name="Accuracy and cost of each row",
        table=ablation_table(rows),
        picture=Picture(
            "Main network and mean subnet",
            ablation_picture(rows, axis=grid.axis, background=None),
            f"Accuracy of main networks and of their mean subnets for {', '.join(row.label for row in grid.rows)}; the "
            "numbers are in the table.",
            data_of(rows),
        ),
        caption="Top-1 accuracy, means over seeds, whiskers are standard deviations. Filled: main network; hollow: "
        "mean subnet; a bar, or a cross: the main network of common training that costs the same.",
        explanation=[
            *(f"{note[0].upper()}{note[1:]}." for note in notes),
            "Common training at this cost has the row's settings, but for the method, and as many epochs as cost what "
            "the row costs, rounded up. Measured times have overhead that FLOPs have not; they are in the CSV file.",
            "Settings that a row does not name are the same in all rows; none was tuned for a single row.",
        ],
        words=ANALYSIS_WORDS["ablate"],
        settings=studies.settings_that_differ({row.label: row.config for row in grid.rows}),
        facts=facts,
    )
    return {"picture": ablation_picture(rows, axis=grid.axis), "page": page}
