"""Rows of an analysis as a section of a page, and the files that bring them there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from unloaf.files.writing import read_text
from unloaf.pages.layout import Cells, Figure, Picture, Section, Table, Words
from unloaf.pages.page import facts_table
from unloaf.pages.words import ANALYSIS_PICTURES, ANALYSIS_WORDS

_MOST_BYTES = 1 << 28


class Analysis(NamedTuple):
    """What is found by a command, ready to be shown.

    Attributes:
        name: of the command.
        rows: dataclasses.
        notes: how they are read, a line each.
        facts: command, hardware and versions.
        data: name of the data set and its number of classes, where they are known.
        options: what its picture and its table need beside the rows.
    """

    name: str
    rows: Sequence[Any]
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = {}
    data: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}


class Kind(NamedTuple):
    """How the rows of an analysis are shown.

    Attributes:
        title: heading of its section.
        row: their class.
        table: heads and cells of rows, likewise.
        picture: from rows, and the options of the analysis as keywords, to SVG.
        leave_out: fields that have no place in a CSV file.
        columns: numbers of columns of the table, beside the first, that hold words.
        more: further pictures of the same rows, by their headings.
    """

    title: str
    row: type
    table: Callable[..., tuple[list[str], list[list[str]]]]
    picture: Callable[..., str]
    leave_out: Sequence[str] = ()
    columns: Sequence[int] = ()
    more: Mapping[str, Callable[[Sequence[Any]], str]] = {}


def kinds() -> dict[str, Kind]:
    """All that a page can show, by the name of the command."""
    from unloaf.analysis.ablation import AblationRow, ablation_table
    from unloaf.analysis.bound import BoundRow, bound_table
    from unloaf.analysis.damage import DamageRow, damage_table
    from unloaf.analysis.loafing import LoafingRow, loafing_table
    from unloaf.analysis.logits import LogitsRow, logits_table
    from unloaf.analysis.receptive_field import ReceptiveField, field_table
    from unloaf.analysis.subnets import SubnetAnalysisRow, subnet_analysis_table
    from unloaf.pages.analyses import damage_picture, field_picture, logits_picture
    from unloaf.pages.studies import ablation_picture, bound_picture, loafing_picture
    from unloaf.pages.subnets import depth_maps, subnet_analysis_picture

    return {
        "damage": Kind("Blocks deleted at test time", DamageRow, damage_table, damage_picture),
        "logits": Kind("Size of the logits", LogitsRow, logits_table, logits_picture, columns=(1, 2)),
        "receptive-field": Kind(
            "Effective receptive fields", ReceptiveField, field_table, field_picture, ("contributions",), (1, 2)
        ),
        "subnets": Kind(
            "All subnets",
            SubnetAnalysisRow,
            subnet_analysis_table,
            subnet_analysis_picture,
            columns=(1,),
            more={"Mean accuracy by the depths of two stages": depth_maps},
        ),
        "loafing": Kind("Loafing", LoafingRow, loafing_table, loafing_picture),
        "ablate": Kind("Settings compared", AblationRow, ablation_table, ablation_picture),
        "bound": Kind("Cross-entropies of subnets and their bound", BoundRow, bound_table, bound_picture, columns=(1,)),
    }


def section_of(analysis: Analysis) -> Section:
    """Its picture, its table and how they are read."""
    kind, about = kinds()[analysis.name], ANALYSIS_PICTURES[analysis.name]
    heads, lines = kind.table(analysis.rows, **analysis.options)
    picture = Picture(
        heading=kind.title,
        svg=kind.picture(analysis.rows, **analysis.options),
        alt=f"{about} The table below has the numbers.",
        data=cells_of(analysis),
        broad=True,
    )
    others = [
        Picture(heading, draw(analysis.rows), f"{heading}. The table below has the numbers.", None, broad=True)
        for heading, draw in kind.more.items()
    ]
    facts = [facts_table(analysis.facts, name=f"Command, hardware and versions of {analysis.name}")]
    return Section(
        kind.title,
        [
            Figure([picture, *others], about),
            Table(kind.title, heads, lines, words=kind.columns),
            *(f"{note[:1].upper()}{note[1:]}." for note in analysis.notes),
            Words(ANALYSIS_WORDS[analysis.name]),
            *(facts if analysis.facts else []),
        ],
    )


def cells_of(analysis: Analysis) -> Cells:
    """Its rows as the lines of a CSV file."""
    left = kinds()[analysis.name].leave_out
    records = [{name: v for name, v in asdict(row).items() if name not in left} for row in analysis.rows]
    return list(records[0]) if records else [], [[_flat(value) for value in record.values()] for record in records]


def _flat(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def text_of(analysis: Analysis) -> str:
    """The file of an analysis, JSON, from which `read_analysis` makes it again."""
    return json.dumps(record_of(analysis), indent=1) + "\n"


def record_of(analysis: Analysis) -> dict[str, Any]:
    """The same as plain values."""
    found = {"analysis": analysis.name, "notes": list(analysis.notes), "facts": dict(analysis.facts)}
    found |= {"data": dict(analysis.data), "options": dict(analysis.options)}
    return found | {"rows": [asdict(row) for row in analysis.rows]}


def read_analysis(path: Path) -> Analysis:
    """Reads what a command wrote with --output FILE.json.

    Raises:
        ValueError: it cannot be read or is something else.
    """
    try:
        found = json.loads(read_text(path, limit=_MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the analysis {path}: {error}") from error
    known = kinds()
    name = found.get("analysis") if isinstance(found, dict) else None
    if name not in known:
        raise ValueError(
            f"{path} is no analysis that a page can show; give files that {', '.join(known)} wrote with --output "
            "FILE.json"
        )
    try:
        rows = [_value(known[name].row, row) for row in found["rows"]]
        notes = [str(note) for note in found["notes"]]
        facts, data, options = ({str(n): v for n, v in found[part].items()} for part in ("facts", "data", "options"))
        analysis = Analysis(name, rows, notes, {n: str(v) for n, v in facts.items()}, data, options)
        known[name].table(rows, **options)
        if not rows:
            raise ValueError("it has no rows")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no whole file of unloaf {name} ({error}); write it again with --output") from error
    return analysis


def _value(hint: Any, value: Any) -> Any:
    """A value of JSON as the type of a field; lists are tuples, and keys of a mapping numbers, where a row has them so.

    Raises:
        TypeError: it is of another type.
    """
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: _value(hints[f.name], value[f.name]) for f in fields(hint)})  # type: ignore[operator]
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"a list is expected, not {value!r:.40}")
        first, *others = get_args(hint)
        kinds = [first] * len(value) if others == [...] else [first, *others]
        return tuple(_value(kind, part) for kind, part in zip(kinds, value, strict=True))
    if get_origin(hint) is dict:
        kind, of = get_args(hint)
        return {kind(key): _value(of, part) for key, part in value.items()}
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TypeError(f"{' or '.join(get_args(hint))} is expected, not {value!r:.40}")
        return value
    allowed = get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    if any(is_dataclass(kind) for kind in allowed):
        return _value(next(kind for kind in allowed if is_dataclass(kind)), value)
    if float in allowed and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, tuple(kind for kind in allowed if isinstance(kind, type))):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise TypeError(f"{names} is expected, not {value!r:.40}")
    return value


def check_alike(analysis: Analysis, path: str, dataset: Any, classes: Any, run: str) -> None:
    """Raises ValueError where an analysis is of other data than the runs beside it."""
    for name, mine, theirs in (
        ("data set", dataset, analysis.data.get("dataset")),
        ("classes", classes, analysis.data.get("num_classes")),
    ):
        if None not in (mine, theirs) and mine != theirs:
            raise ValueError(f"{run} has {name} {mine}, {path} {theirs}; give analyses of the same data")
