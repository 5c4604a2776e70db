"""`unloaf exits`: which exit of a language model drafts best."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from unloaf.commands.options import check_least
from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.config.checks import check_device
from unloaf.files.writing import check_writable
from unloaf.streams import say, standard_error

if TYPE_CHECKING:
    from unloaf.runs.exits import ExitsJudgement


@dataclass(frozen=True, kw_only=True)
class Exits:
    """Judge the exits of a language model on a text: how good each is, how fast it drafts, and which to use."""

    option_groups = (
        ("text", "text"),
        ("depths", "exits"),
        ("prompts", "time"),
        ("tokenizer", "of a folder"),
        ("checkpoint", "of a run"),
        ("device", "device and output"),
    )

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|FOLDER")]
    """Folder of a run of task language, or of a model that save_pretrained wrote."""
    text: str | None = None
    """File of text that neither was trained on, UTF-8."""
    seq_len: int = 128
    """Tokens of a sequence; each is predicted from those before it in its sequence."""
    tokens: int = 8192
    """Tokens of the text that are read at most, from its beginning."""
    depths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Layers before an exit, one number or several; default: all up to 8, or 8 of them."""
    prompts: int = 4
    """Sequences whose first 16 tokens begin a text that is decoded."""
    new_tokens: int = 64
    """Tokens that are decoded for each."""
    repeats: int = 3
    """Rounds over all ways to decode that are timed; medians count; 0 decodes nothing."""
    early_exit: bool = False
    """Time assistant_early_exit of transformers beside it."""
    tokenizer: Literal["auto", "byte", "model"] = "auto"
    """The model's own, one token for each byte, or the model's own where there is one (auto)."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest checkpoint that is not damaged, or the one with the lowest validation loss."""
    ema: bool = False
    """Judge the moving average of the weights."""
    data_dir: str | None = None
    """Folder or file of its texts; default: as in the run."""
    run_own_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import and run the functions of yours that made the run's network or texts."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    json: bool = False
    """Print everything as JSON."""
    output: str | None = None
    """Write the table to this CSV file too; its folder is made."""

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("exits: give a text that the model was not trained on, --text FILE")
        check_device(self.device)
        check_least(self, seq_len=17, tokens=17, prompts=1, new_tokens=2, repeats=0)
        if any(depth < 1 for depth in self.depths):
            raise ValueError(f"depths {self.depths}: give numbers of at least 1")
        if self.early_exit and not self.repeats:
            raise ValueError("early_exit is timed, and repeats 0 times nothing; leave one of the two out")


def run(words: list[str]) -> int:
    """Prints the table, writes it to a file if asked to."""
    options = parse(Exits, words, prog="unloaf exits")
    from unloaf.measure.costs import write_csv
    from unloaf.runs.exits import ExitsSettings, judge_exits_of

    if options.output is not None:
        check_writable(Path(options.output))
    names = ("depths", "seq_len", "tokens", "prompts", "new_tokens", "repeats", "early_exit", "tokenizer")
    names += ("checkpoint", "ema", "data_dir", "run_own_code", "device")
    given = {name: getattr(options, name) for name in names}
    judgement = judge_exits_of(Path(options.source), Path(options.text), ExitsSettings(**given))
    if options.json:
        print(json.dumps(asdict(judgement) | _as_records(judgement), indent=2))
    else:
        _show(judgement)
    if options.output is not None:
        write_csv([_record(judgement, row) for row in judgement.rows], Path(options.output))
        line = f"table: {options.output}"
        _ = standard_error().write(f"{line}\n") if options.json else say(line)
    return 0


def _as_records(judgement: ExitsJudgement) -> dict[str, Any]:
    ways = [way._asdict() for way in judgement.ways]
    return {"rows": [row._asdict() for row in judgement.rows], "ways": ways}


def _record(judgement: ExitsJudgement, row: Any) -> dict[str, Any]:
    """A line of the file."""
    main = row.depth == judgement.rows[-1].depth
    record: dict[str, Any] = row._asdict() | {"expected_speed": row.speed}
    del record["speed"]
    ways = {"": _own(judgement, row.depth, main=main), "transformers_": judgement.way("transformers", row.depth)}
    for name, way in ways.items():
        if way is None:
            continue
        for field in ("acceptance", "layer_calls", "layer_tokens", "tokens_per_second", "speed", "same"):
            record[f"{name}{field}"] = getattr(way, field)
    return record


def _own(judgement: ExitsJudgement, depth: int, *, main: bool) -> Any:
    if main:
        return judgement.ways[0] if judgement.ways else None
    return judgement.way("unloaf", depth)


_MEASURED = ("acceptance %", "layer calls", "tokens/s", "speed")


def _show(judgement: ExitsJudgement) -> None:
    say(f"{judgement.name}: {judgement.tokens:,} tokens of {judgement.text}")
    for note in judgement.notes:
        say(note)
    theirs = any(way.decoder == "transformers" for way in judgement.ways)
    heads = ["depth", "nats", "perplexity", "agreement %", "expected speed"]
    heads += list(_MEASURED) if judgement.ways else []
    heads += ["transformers speed"] if theirs else []
    show(heads, [_cells(judgement, row, theirs=theirs) for row in judgement.rows])
    print("agreement: the exit's most probable next token is the main network's")
    print("expected speed: over plain decoding where time goes by layers, at the best fixed length of drafts")
    if judgement.ways:
        print("acceptance: of drafted tokens; layer calls: per new token, over the main network's layers")
        print(f"speed: tokens/s over plain decoding, medians, on {judgement.device}, {judgement.threads} thread(s)")
        for way in {way.note: way for way in judgement.ways if way.note}.values():
            say(f"depth {way.depth}: {way.note}")
    say(f"advice: {judgement.advice}")


def _cells(judgement: ExitsJudgement, row: Any, *, theirs: bool) -> list[str]:
    main = row.depth == judgement.rows[-1].depth
    cells = [
        str(row.depth),
        f"{row.nats:.3f}",
        f"{row.perplexity:.2f}",
        f"{100 * row.agreement:.1f}",
        f"{row.speed:.2f}",
    ]
    if not judgement.ways:
        return cells
    way = _own(judgement, row.depth, main=main)
    share = "-" if way.acceptance is None else f"{100 * way.acceptance:.1f}"
    cells += [share, f"{way.layer_calls:.2f}", f"{way.tokens_per_second:.1f}", f"{way.speed:.2f}"]
    other = judgement.way("transformers", row.depth)
    if theirs:
        cells.append("-" if other is None or other.speed is None else f"{other.speed:.2f}")
    return cells
