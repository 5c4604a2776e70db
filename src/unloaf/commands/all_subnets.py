"""`unloaf subnets RUN --all`: what all subnets of a trained classifier are good for."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from unloaf.commands.analyses import analysis_of, bar, give, opened_runs
from unloaf.printable import printable
from unloaf.streams import standard_error


def run_all(options: Any) -> int:
    """Prints the table, writes files if asked to."""
    from unloaf.analysis.subnets import subnet_analysis, subnet_analysis_table, unknown_images
    from unloaf.display import show_progress
    from unloaf.pages.subnets import subnet_analysis_picture

    [opened] = opened_runs(options)
    opened.check_classifier("subnets --all")
    against = None
    if options.against is not None:
        against = unknown_images(opened, options.against, options.against_dir)
    total = prod(len(stage.legal_depths) for stage in opened.training.stages)
    with show_progress(bar(), total=total, label="subnets", lines=True) as display:
        rows = subnet_analysis(
            opened, split=options.split, against=against, timed=options.repeats > 0, repeats=options.repeats,
            on_row=display.advance,
        )  # fmt: skip
    notes = _notes(options, rows)
    if against is not None and against.bad_images:
        line = f"{len(against.bad_images)} images of {options.against} cannot be read and were left out"
        standard_error().write(f"{printable(line)}\n")
    give(
        options,
        rows,
        notes=notes,
        table=subnet_analysis_table,
        picture=partial(subnet_analysis_picture, rows),
        analysis=analysis_of("subnets", rows, notes, [opened]),
    )
    return 0


def _notes(options: Any, rows: Any) -> list[str]:
    main, *_, ensemble = rows
    subnets = [row for row in rows if row.kind == "subnet"]
    notes = [
        "batch-norm statistics of subnets re-estimated, the main network has those of its training; * no other is as "
        "accurate for as few GMACs, and better in one of the two",
        f"ensemble of all {len(rows) - 1} networks, the mean of their probabilities: {ensemble.top1 - main.top1:+.2f} "
        f"points over the main network, at {ensemble.gmacs / main.gmacs:.1f} times its GMACs",
    ]
    if options.against is not None:
        best = f", a subnet alone at best {max(row.unknown for row in subnets):.1f}" if subnets else ""
        notes.append(
            f"images of {options.against} told from those of the run, area under the ROC curve (50 says nothing): by "
            f"the main network's highest probability {main.unknown:.1f} %{best}, by the ensemble's "
            f"{ensemble.unknown:.1f}, by how much the networks disagree {ensemble.disagreement:.1f}"
        )
    return notes
