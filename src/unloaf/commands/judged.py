"""How an evaluation is printed, by `unloaf eval` and `unloaf subnets` alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unloaf.evaluation import Accuracy, SubnetRow
    from unloaf.runs.judge import RunJudgement


def main_lines(judgement: RunJudgement) -> list[str]:
    """The notes, the checkpoint and the main network, a line each."""
    average = ", moving average of the weights" if judgement.weights == "model_ema" else ""
    size = f"{judgement.params:,} parameters, {judgement.gmacs:.4g} GMACs"
    lines = [
        *judgement.notes,
        f"{judgement.run}, {judgement.checkpoint} (after epoch {judgement.epoch}){average}: {size}",
        *(f"{split} {_accuracy(result)}" for split, result in judgement.main.items()),
    ]
    main = judgement.judged[0] if judgement.judged else None
    if main is not None and main.running is not None:
        lines.append(
            f"{judgement.split} {_accuracy(main)}, with batch-norm statistics re-estimated as the subnets' are"
        )
    return lines


def _accuracy(found: Accuracy | SubnetRow) -> str:
    return f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}"


def say_subnets(judgement: RunJudgement) -> None:
    """Prints the head above a table of subnets."""
    print(f"\nsubnets, on the {judgement.split} images:")
    if judgement.judged[0].running is not None:
        print("batch-norm statistics re-estimated; (running): the main network with those of its training")
