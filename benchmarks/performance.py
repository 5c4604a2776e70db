"""The tables and pictures of docs/performance.md, from the records in docs/results.

    python benchmarks/performance.py

Reads step-time-*.json (what `unloaf bench step --output` writes as step_time.json) and gpu-checks.json (what
`benchmarks/gpu.sh --summary` writes as checks.json); writes the text between the markers, and a picture for each kind
of device. Nothing is measured.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from unloaf.measure.step_time import Setup, StepTimeRow, by_setup
from unloaf.pages.plots import step_time_bars

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results"
HEAD = "| method | time | lowest to highest | FLOPs limit | time / limit | separate passes | memory |"
NOT_MEASURED = "No CUDA device has run these slices yet; every figure of the table above is open."


class Record(NamedTuple):
    """A file that a run of `unloaf bench step` left behind."""

    name: str
    rows: list[StepTimeRow]
    environment: Mapping[str, Any]
    notes: Sequence[str]
    settings: Mapping[str, Any]


def records() -> list[Record]:
    """All step times on record, by file name."""
    return [read(path) for path in sorted(RESULTS.glob("step-time-*.json"))]


def read(path: Path) -> Record:
    """A record, also of the first form, whose rows did not say what they were measured on."""
    document = json.loads(path.read_text(encoding="utf-8"))
    settings = document["settings"]
    names = {"network": "model", "device": "device", "rounds": "repeats"} | dict.fromkeys(("input_size", "batch_size"))
    old = {name: settings.get(of or name) for name, of in names.items()}
    rows = [_row(entry if "network" in entry else old | entry) for entry in document["rows"]]
    return Record(path.name, rows, document["environment"], document.get("notes", []), settings)


def _row(entry: Mapping[str, Any]) -> StepTimeRow:
    of_setup = {field.name for field in fields(Setup)}
    setup = Setup(**{name: value for name, value in entry.items() if name in of_setup})
    figures = {name: value for name, value in entry.items() if name not in of_setup}
    figures["spread"] = tuple(figures["spread"])
    return StepTimeRow(**figures, setup=setup)


def tables(found: Sequence[Record]) -> str:
    """A table for each network and mode of each record, with what measured it."""
    return "\n\n".join(part for record in found for part in _parts(record))


def _parts(record: Record) -> Iterator[str]:
    for setup, rows in by_setup(record.rows).items():
        lines = [HEAD, "|---" * 7 + "|", *map(_line, rows)]
        yield f"**{setup.title}**\n\n" + "\n".join(lines) + f"\n\n{_source(record, rows)}"


def _line(row: StepTimeRow) -> str:
    separate = "" if row.separate is None else f"{row.separate:.2f}"
    low, high = row.spread
    cells = [row.method, f"{row.relative:.2f}", f"{low:.2f} to {high:.2f}", f"{row.limit:.2f}", f"{row.over_limit:.2f}"]
    return "| " + " | ".join([*cells, separate, f"{row.relative_memory:.2f}"]) + " |"


def _source(record: Record, rows: Sequence[StepTimeRow]) -> str:
    where, common = record.environment, next(row for row in rows if row.method == "common")
    step = f"A step of common training takes {1000 * common.seconds:.3g} ms; {common.rounds} rounds."
    threads = f", {where['threads']} threads" if common.setup.device == "cpu" else ""
    on = f"{where['hardware']}{threads}, torch {where['versions']['torch']}, {where['started'][:10]}"
    told = textwrap.fill(f"{step} {on} ([record](results/{record.name})):", width=120, break_on_hyphens=False)
    words = ["--img-size" if word == "--input-size" else word for word in where["command"][1:]]  # as it is called now
    return f"{told}\n\n```sh\n{shlex.join(['unloaf', *words])}\n```"


def picture(found: Sequence[Record]) -> str:
    """The fullest record of each network and mode, as SVG."""
    fullest: dict[Setup, list[StepTimeRow]] = {}
    for record in found:
        for setup, rows in by_setup(record.rows).items():
            fullest[setup] = max(fullest.get(setup, []), rows, key=len)
    return step_time_bars(dict(sorted(fullest.items(), key=lambda item: -len(item[1]))))


def checks() -> str:
    """What was to be reached on CUDA, and what was."""
    path = RESULTS / "gpu-checks.json"
    if not path.is_file():
        return NOT_MEASURED
    document = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"Measured on {document['hardware']}.", "", "| what | measured | bar | holds |", "|---|---|---|---|"]
    for check in document["checks"]:
        lines.append(
            f"| {check['what']} | {check['measured']} | {check['bar']} | {'yes' if check['holds'] else 'no'} |"
        )
    return "\n".join(lines)


def page(text: str, found: Sequence[Record]) -> str:
    """The page with what stands between its markers written anew."""
    of = {kind: [record for record in found if record.rows[0].setup.device == kind] for kind in ("cpu", "cuda")}
    parts = {"cpu": tables(of["cpu"]), "cuda": checks()}
    if of["cuda"]:
        picture_of_cuda = "![Time of a step of each method, on CUDA](results/step-time-cuda.svg)"
        parts["cuda"] += f"\n\n{picture_of_cuda}\n\n{tables(of['cuda'])}"
    for name, part in parts.items():
        text = re.sub(
            rf"(?s)(<!-- {name} -->\n).*(\n<!-- end of {name} -->)",
            lambda match, part=part: f"{match[1]}\n{part}\n{match[2]}",
            text,
        )
    return text


def main() -> None:
    """Writes the page and its pictures."""
    found = records()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for kind in ("cpu", "cuda"):
        mine = [record for record in found if record.rows[0].setup.device == kind]
        if mine:
            (RESULTS / f"step-time-{kind}.svg").write_text(picture(mine) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
