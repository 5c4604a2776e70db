"""How an evaluation is printed, by `unloaf eval` and `unloaf subnets` alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unloaf.config.figures import FIGURES

if TYPE_CHECKING:
    from unloaf.runs.judge import RunJudgement


def main_lines(judgement: RunJudgement) -> list[str]:
    """The notes, the checkpoint and the main network, a line each."""
    average = ", moving average of the weights" if judgement.weights == "model_ema" else ""
    figures = FIGURES[judgement.task]
    size = f"{judgement.params:,} parameters, {judgement.gmacs:.4g} GMACs"
    lines = [
        *judgement.notes,
        f"{judgement.run}, {judgement.checkpoint} (after epoch {judgement.epoch}){average}: {size}",
        *(f"{split} {figures.text(result)}" for split, result in judgement.main.items()),
    ]
    main = judgement.judged[0] if judgement.judged else None
    if main is not None and main.running is not None:
        found = figures.text(main) if hasattr(main, figures.decisive) else figures.chief.text(figures.decide(main))
        lines.append(f"{judgement.split} {found}, with batch-norm statistics re-estimated as the subnets' are")
    return lines


def say_subnets(judgement: RunJudgement) -> None:
    """Prints the head above a table of subnets."""
    print(f"\nsubnets, on the {judgement.split} images:")
    if judgement.judged[0].running is not None:
        print("batch-norm statistics re-estimated; (running): the main network with those of its training")
