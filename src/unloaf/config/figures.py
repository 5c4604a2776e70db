"""The figures by which each task is evaluated: columns of summary.csv, and what lines and tables call them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple


class Figure(NamedTuple):
    """A figure of an evaluation.

    Attributes:
        name: the attribute of the evaluation that has it, and its column in summary.csv, after "eval_".
        label: what lines and tables call it.
        form: how its value is written.
    """

    name: str
    label: str
    form: str

    def text(self, value: float) -> str:
        """Label and value.

        >>> Figure("top1", "top-1", "{:.2f} %").text(93.214)
        'top-1 93.21 %'
        """
        return f"{self.label} {self.form.format(value)}"


class Figures(NamedTuple):
    """The figures of a task.

    Attributes:
        columns: all of them, in the order of summary.csv.
        decisive: the name of the one that tells which checkpoint is the best, and how good a subnet is.
        brief: the names of those in the line of an epoch.
        lower_is_better: of the decisive one.
    """

    columns: tuple[Figure, ...]
    decisive: str
    brief: tuple[str, ...]
    lower_is_better: bool = False

    @property
    def chief(self) -> Figure:
        """The figure that decides."""
        return next(figure for figure in self.columns if figure.name == self.decisive)

    @property
    def of_rows(self) -> Literal["top1", "metric", "loss"]:
        """Where the row of a subnet has that figure."""
        return self.decisive if self.decisive in ("top1", "loss") else "metric"  # type: ignore[return-value]

    @property
    def unit(self) -> str:
        """Of that figure, in tables; its label where it has none."""
        return "%" if self.chief.form.endswith("%") else "nats" if self.lower_is_better else self.chief.label

    @property
    def head(self) -> str:
        """Of a column with that figure: its label, and the unit where the label does not say it."""
        return f"{self.chief.label} %" if self.unit == "%" else self.chief.label

    def cell(self, value: float) -> str:
        """That figure in such a column.

        >>> FIGURES["classification"].cell(93.214), FIGURES["language"].cell(1.71649)
        ('93.21', '1.7165')
        """
        return self.chief.form.format(value).removesuffix(" %")

    def score(self, value: float) -> float:
        """The value of that figure so that higher is better.

        >>> FIGURES["language"].score(1.5), FIGURES["semantic"].score(61.5)
        (-1.5, 61.5)
        """
        return -value if self.lower_is_better else value

    @property
    def worst_of(self) -> Literal["min", "max"]:
        """Which of several values is the worst."""
        return "max" if self.lower_is_better else "min"

    def worst(self, values: Iterable[float]) -> float:
        """The worst of several values of that figure.

        >>> FIGURES["classification"].worst([90.0, 80.0]), FIGURES["language"].worst([1.5, 2.5])
        (80.0, 2.5)
        """
        return max(values) if self.lower_is_better else min(values)

    def decide(self, found: Any) -> Any:
        """The value of that figure, of an evaluation or of the row of a subnet, which has it as `metric`."""
        return getattr(found, self.decisive if hasattr(found, self.decisive) else self.of_rows)

    def text(self, values: Any) -> str:
        """All figures of an evaluation in a line, the loss last.

        >>> from unloaf.evaluation import Accuracy
        >>> FIGURES["classification"].text(Accuracy(loss=0.21, top1=93.2, top5=99.8))
        'top-1 93.20 %, top-5 99.80 %, loss 0.2100'
        """
        ordered = sorted(self.columns, key=lambda figure: figure.name == "loss")
        return ", ".join(figure.text(getattr(values, figure.name)) for figure in ordered)


# By the flag of `unloaf train --task`.
FIGURES: dict[str, Figures] = {
    "classification": Figures(
        (
            Figure("loss", "loss", "{:.4f}"),
            Figure("top1", "top-1", "{:.2f} %"),
            Figure("top5", "top-5", "{:.2f} %"),
        ),
        decisive="top1",
        brief=("loss", "top1"),
    ),
    "multilabel": Figures(
        (
            Figure("loss", "loss", "{:.4f}"),
            Figure("map", "mAP", "{:.2f} %"),
        ),
        decisive="map",
        brief=("loss", "map"),
    ),
    "regression": Figures(
        (
            Figure("loss", "loss", "{:.4f}"),
            Figure("mae", "MAE", "{:.4g}"),
            Figure("r2", "R2", "{:.4f}"),
        ),
        decisive="r2",
        brief=("loss", "mae", "r2"),
    ),
    "masked": Figures(
        (
            Figure("loss", "loss", "{:.4f}"),
            Figure("explained", "explained variance", "{:.2f} %"),
        ),
        decisive="explained",
        brief=("loss", "explained"),
    ),
    "detection": Figures(
        (
            Figure("map", "mAP", "{:.2f} %"),
            Figure("map50", "AP50", "{:.2f} %"),
            Figure("map75", "AP75", "{:.2f} %"),
        ),
        decisive="map",
        brief=("map",),
    ),
    "instance": Figures(
        (
            Figure("mask_map", "mask mAP", "{:.2f} %"),
            Figure("mask_map50", "mask AP50", "{:.2f} %"),
            Figure("mask_map75", "mask AP75", "{:.2f} %"),
            Figure("box_map", "box mAP", "{:.2f} %"),
        ),
        decisive="mask_map",
        brief=("mask_map", "box_map"),
    ),
    "semantic": Figures(
        (
            Figure("loss", "loss", "{:.4f}"),
            Figure("miou", "mIoU", "{:.2f} %"),
            Figure("macc", "mAcc", "{:.2f} %"),
            Figure("pixel", "pixel accuracy", "{:.2f} %"),
        ),
        decisive="miou",
        brief=("loss", "miou"),
    ),
    "language": Figures(
        (
            Figure("loss", "nats per token", "{:.4f}"),
            Figure("perplexity", "perplexity", "{:.3f}"),
        ),
        decisive="loss",
        brief=("loss", "perplexity"),
        lower_is_better=True,
    ),
    "pose": Figures(
        (
            Figure("loss", "loss", "{:.6f}"),
            Figure("ap", "AP", "{:.2f} %"),
            Figure("ap50", "AP50", "{:.2f} %"),
            Figure("ap75", "AP75", "{:.2f} %"),
            Figure("ar", "AR", "{:.2f} %"),
            Figure("pck20", "PCK@0.2", "{:.2f} %"),
            Figure("pck50", "PCK@0.5", "{:.2f} %"),
        ),
        decisive="ap",
        brief=("loss", "ap", "pck20"),
    ),
    "panoptic": Figures(
        tuple(
            Figure(f"{name}{part}", f"{name.upper()}{said}", "{:.2f} %")
            for part, said in (("", ""), ("_things", " of things"), ("_stuff", " of stuff"))
            for name in ("pq", "sq", "rq")
        ),
        decisive="pq",
        brief=("pq", "pq_things", "pq_stuff"),
    ),
}
