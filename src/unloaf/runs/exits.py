"""Exits of a language model judged on a text: of a run, or of a folder with a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.engine.devices import usable_device
from unloaf.files.writing import read_text
from unloaf.language import DecodingRow, ExitRow, judge_exits, measure_decoding
from unloaf.language.exits import checked_depths
from unloaf.models.language import build_language_model, tokenizer_of
from unloaf.printable import printable
from unloaf.runs.opened import open_trained
from unloaf.stages import Stage, find_stages
from unloaf.subnet import Subnet

_LARGEST = 1 << 30  # bytes of a text
_MOST_DEPTHS = 8
_PAYS = 1.02  # over plain decoding; less is within what a measurement varies


@dataclass(frozen=True)
class ExitsJudgement:
    """What was found.

    Attributes:
        name: of the run or folder.
        text: the file.
        tokens: how many of its tokens were predicted.
        rows: one for each exit, the main network last.
        ways: decoding without a draft first; empty if it was not measured.
        advice: which exit to use.
        device: where it was measured.
        threads: of the CPU.
        notes: what a reader has to know of the run.
    """

    name: str
    text: str
    tokens: int
    rows: tuple[ExitRow, ...]
    ways: tuple[DecodingRow, ...]
    advice: str
    device: str
    threads: int
    notes: tuple[str, ...]

    def way(self, decoder: str, depth: int) -> DecodingRow | None:
        """What was measured of decoding with this exit."""
        return next((one for one in self.ways if (one.decoder, one.depth) == (decoder, depth)), None)


@dataclass(frozen=True)
class _Opened:
    model: nn.Module
    stages: Sequence[Stage]
    tokenizer: Any
    device: torch.device
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExitsSettings:
    """How exits are judged.

    Attributes:
        depths: which exits; default: all of up to 8, or 8 of them.
        seq_len: tokens of a sequence; each is predicted from those before it in its sequence.
        tokens: how many tokens of the text are read at most, from its beginning.
        prompts: how many of the sequences begin a text that is decoded.
        prompt_tokens: of each prompt.
        new_tokens: decoded for each.
        repeats: rounds that are timed; 0 decodes nothing.
        early_exit: time transformers' ``assistant_early_exit`` too.
        tokenizer: of a folder: "model", "byte", or "auto" for the model's own where there is one.
        checkpoint: of a run: "last" or "best".
        ema: of a run: the moving average of the weights.
        data_dir: of a run: where its texts are now.
        run_own_code: of a run: import and run the user's own functions that it names.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
    """

    depths: Sequence[int] = ()
    seq_len: int = 128
    tokens: int = 8192
    prompts: int = 4
    prompt_tokens: int = 16
    new_tokens: int = 64
    repeats: int = 3
    early_exit: bool = False
    tokenizer: str = "auto"
    checkpoint: str = "last"
    ema: bool = False
    data_dir: str | None = None
    run_own_code: bool = False
    device: str = "auto"


def judge_exits_of(source: Path, text: Path, settings: ExitsSettings) -> ExitsJudgement:
    """Perplexity, agreement and expected speed of each exit on a text, and how fast it decodes.

    Args:
        source: a run of task language, or a folder with a model of transformers.
        text: a file of text that neither was trained on.
        settings: see there.

    Raises:
        ValueError: no such folder or text, a text shorter than one sequence, or a model that cannot stop in the middle.
    """
    words = _read(text)
    opened = _open_run(source, settings) if (source / "args.yaml").is_file() else _open_folder(source, settings)
    rows = _sequences(opened, words, text, settings)
    main = sum(stage.depth for stage in opened.stages)
    chosen = checked_depths(settings.depths or _spread(main), main)
    batches = rows.split(max(1, 1024 // settings.seq_len))
    judged = judge_exits(opened.model, opened.stages, batches, chosen)
    ways = _decoded(opened, rows, chosen[:-1], settings) if settings.repeats else []
    return ExitsJudgement(
        name=source.name,
        text=text.name,
        tokens=rows.shape[0] * (settings.seq_len - 1),
        rows=tuple(judged),
        ways=tuple(ways),
        advice=advice(judged, ways),
        device=str(opened.device),
        threads=torch.get_num_threads(),
        notes=opened.notes,
    )


def _decoded(opened: _Opened, rows: Tensor, depths: Sequence[int], settings: ExitsSettings) -> list[DecodingRow]:
    """Beginnings of sequences from all over the text, continued without a draft and with each of these."""
    every = max(1, len(rows) // settings.prompts)
    return measure_decoding(
        opened.model,
        opened.stages,
        [row[None, : settings.prompt_tokens] for row in rows[::every][: settings.prompts]],
        [_ordered(opened.stages, depth) for depth in depths],
        max_new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        early_exit=settings.early_exit,
    )


def advice(rows: Sequence[ExitRow], ways: Sequence[DecodingRow]) -> str:
    """Which exit to draft with: the fastest that was measured, or that is expected to be.

    >>> main, small = ExitRow(8, 1.0, 2.7, 1.0, 1.0, 0, 1.0), ExitRow(2, 2.0, 7.4, 0.7, 0.6, 3, 1.4)
    >>> advice([small, main], [])
    'draft with 2 of 8 layers: 1.40 x plain decoding expected by layers, not measured'
    """
    main = rows[-1].depth
    timed = [way for way in ways if way.decoder == "unloaf" and way.speed is not None]
    if timed:
        best = max(timed, key=lambda way: way.speed or 0.0)
        speed, depth, how = best.speed or 0.0, best.depth, "measured"
    else:
        expected = max(rows[:-1], key=lambda row: row.speed)
        speed, depth, how = expected.speed, expected.depth, "expected by layers, not measured"
    if speed < _PAYS:
        return f"decode without a draft: the best exit, {depth} of {main} layers, gives {speed:.2f} x plain ({how})"
    return f"draft with {depth} of {main} layers: {speed:.2f} x plain decoding {how}"


def _read(text: Path) -> str:
    try:
        words = read_text(text, limit=_LARGEST)
    except (OSError, ValueError) as error:
        raise ValueError(f"text {printable(text)}: cannot be read ({error}); give a file of UTF-8") from error
    if not words.strip():
        raise ValueError(f"text {printable(text)}: it is empty")
    return words


def _open_run(source: Path, settings: ExitsSettings) -> _Opened:
    if settings.tokenizer != "auto":
        raise ValueError(f"tokenizer {settings.tokenizer}: a run has its own; leave --tokenizer out")
    names = ("checkpoint", "ema", "data_dir", "run_own_code", "device")
    run = open_trained(source, **{name: getattr(settings, name) for name in names})
    if run.config.task != "language":
        raise ValueError(f"{source}: exits are for language models; this run is of task {run.config.task}")
    data: Any = run.training.data
    return _Opened(run.network, run.training.stages, data.tokenizer, run.training.device, run.notes)


def _open_folder(source: Path, settings: ExitsSettings) -> _Opened:
    if not source.is_dir():
        raise ValueError(f"{printable(source)}: no such folder; give a run, or a model that save_pretrained wrote")
    name = f"hf/{source}"
    words = tokenizer_of(name, settings.tokenizer)
    model = build_language_model(name, words, seq_len=settings.seq_len, arguments={}, pretrained=True)
    place = usable_device(settings.device)
    model = model.eval().to(place)
    stages = find_stages(model, {"input_ids": torch.arange(16, device=place)[None] % words.size})
    return _Opened(model, stages, words, place)


def _sequences(opened: _Opened, words: str, text: Path, settings: ExitsSettings) -> Tensor:
    """(sequences, length): the beginning of the text, its last tokens left out that fill no sequence."""
    length, most = settings.seq_len, settings.tokens
    found = list(opened.tokenizer.encode(words[: most * 40]))[: max(most, length)]
    if len(found) < length:
        raise ValueError(
            f"text {printable(text)}: has {len(found)} tokens, less than one sequence of {length}; give a longer text, "
            "or a smaller --seq-len"
        )
    count = len(found) // length
    return torch.tensor(found[: count * length], device=opened.device).view(count, length)


def _spread(main: int) -> list[int]:
    """Up to eight depths below the main network's, evenly."""
    if main <= _MOST_DEPTHS + 1:
        return list(range(1, main))
    return sorted({max(1, round(main * part / (_MOST_DEPTHS + 1))) for part in range(1, _MOST_DEPTHS + 1)})


def _ordered(stages: Sequence[Stage], depth: int) -> Subnet:
    """The first blocks, over the stages in their order."""
    left, keep = depth, []
    for stage in stages:
        taken = min(left, stage.depth)
        keep.append((True,) * taken + (False,) * (stage.depth - taken))
        left -= taken
    return Subnet(tuple(keep))
