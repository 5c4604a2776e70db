"""Cascades of runs as tables and records: judgements in, text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unloaf.runs.anytime import AnytimeJudgement, NetworkRow

_KINDS = {
    "main": "main network",
    "main, re-estimated": "main, re-estimated",
    "chosen subnet": "best subnet alone",
    "subnet": "exit alone",
    "cascade": "Anytime",
}


def network_table(judgements: Sequence[AnytimeJudgement]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: of each run the main network, subnets that run alone, and the cascade."""
    sizes = list(judgements[0].rows[0].images_per_second)
    heads = ["network", "depths", "top-1 %", "mean GMACs", "of main", *(f"images/s, batch of {size}" for size in sizes)]
    many, lines = len(judgements) > 1, []
    for judgement in judgements:
        whole = judgement.rows[0].gmacs
        for row in judgement.rows:
            name = f"{judgement.run.name}: {_KINDS[row.kind]}" if many else _KINDS[row.kind]
            depths = ", ".join(judgement.chain) if row.kind == "cascade" else row.name
            cells = [f"{row.top1:.2f}", f"{row.gmacs:.4g}", f"{100 * row.gmacs / whole:.1f} %"]
            lines.append([name, depths, *cells, *(f"{row.images_per_second[size]:,.0f}" for size in sizes)])
    return heads, lines


def curve_table(judgements: Sequence[AnytimeJudgement]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: accuracy over mean GMACs at thresholds that nobody chose, and where images left."""
    many, lines = len(judgements) > 1, []
    heads = [*(["run"] if many else []), "threshold", "top-1 %", "mean GMACs", "of main", "left at each exit, %"]
    for judgement in judgements:
        for point in judgement.curve:
            left = " ".join(f"{100 * share:.1f}" for share in point.shares)
            share = f"{100 * point.gmacs / judgement.rows[0].gmacs:.1f} %"
            cells = [f"{point.threshold:g}", f"{point.top1:.2f}", f"{point.gmacs:.4g}", share, left]
            lines.append([*([judgement.run.name] if many else []), *cells])
    return heads, lines


def said_of(judgement: AnytimeJudgement) -> list[str]:
    """The notes, what was judged, and for what the threshold was set, a line each."""
    average = ", moving average of the weights" if judgement.weights == "model_ema" else ""
    costs = ", ".join(
        f"{subnet} ({cost:.4g})" for subnet, cost in zip(judgement.chain, judgement.exit_gmacs, strict=True)
    )
    lines = [
        *judgement.notes,
        f"{judgement.run}, {judgement.label}, {judgement.checkpoint} (after epoch {judgement.epoch}){average}",
        f"exits (GMACs of an image that leaves there): {costs}; by {judgement.confidence}",
    ]
    val, test = judgement.val, judgement.test
    if val is None:
        lines.append(f"{judgement.target}, judged on {test.images:,} {judgement.judged_on} images")
    else:
        lines.append(
            f"threshold {val.threshold:.4g}, set on {val.images:,} val images for {judgement.target} (there: top-1 "
            f"{val.top1:.2f} %, {val.gmacs:.4g} GMACs), judged on {test.images:,} {judgement.judged_on} images"
        )
    return lines


def csv_records(judgements: Sequence[AnytimeJudgement]) -> list[dict[str, Any]]:
    """A flat record for each network and for each point of the curves; all have the same columns."""
    records = []
    for judgement in judgements:
        shared = {"run": judgement.run.name, "method": judgement.label, "confidence": judgement.confidence}
        shared |= {
            "exits": " ".join(judgement.chain),
            "judged_on": judgement.judged_on,
            "images": judgement.test.images,
        }
        sizes = judgement.rows[0].images_per_second
        for row in judgement.rows:
            cascade = row.kind == "cascade"
            threshold = judgement.test.threshold if cascade else None
            shares = " ".join(f"{share:.6g}" for share in judgement.test.shares) if cascade else ""
            records.append(shared | _record(row, threshold, shares, row.images_per_second))
        for point in judgement.curve:
            shares = " ".join(f"{share:.6g}" for share in point.shares)
            empty = dict.fromkeys(sizes)
            records.append(
                shared
                | {"network": "curve", "depths": "", "threshold": point.threshold, "top1": point.top1}
                | {"gmacs": point.gmacs, "shares": shares}
                | _speeds(empty)
            )
    return records


def _record(row: NetworkRow, threshold: float | None, shares: str, speeds: dict[int, float]) -> dict[str, Any]:
    depths = "" if row.kind == "cascade" else row.name
    fields = {"network": row.kind, "depths": depths, "threshold": threshold, "top1": row.top1, "gmacs": row.gmacs}
    return fields | {"shares": shares} | _speeds(speeds)


def _speeds(speeds: dict[int, Any]) -> dict[str, Any]:
    return {f"b{size}_images_per_second": value for size, value in speeds.items()}


def json_records(judgements: Sequence[AnytimeJudgement]) -> list[dict[str, Any]]:
    """All that was found, as JSON holds it; of a run its name alone."""
    return [dataclasses.asdict(judgement) | {"run": judgement.run.name} for judgement in judgements]
