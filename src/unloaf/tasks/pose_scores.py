"""How well joints are found: COCO's average precision over object keypoint similarity (OKS), and PCK."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from unloaf.data.people.images import Marked, Person

# How exactly COCO's annotators agree on a joint, as a share of the root of the person's area, by its name without side.
_SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107,
    "knee": 0.087, "ankle": 0.089,
}  # fmt: skip
OTHER_SIGMA = 0.079  # of joints that COCO has not, such as neck and top of the head: a shoulder's
_TORSOS = (("left_shoulder", "right_hip"), ("right_shoulder", "left_hip"))
SHARES = (0.2, 0.5)  # of the torso


class Answer(NamedTuple):
    """A person, who else is in the image, and where a network says that the person's joints are.

    Attributes:
        person: as annotated.
        others: who is in the same image and is no target.
        points: x and y in pixels of the image, float64 (K, 2).
        score: how sure the network is; of the predictions of all images the surest are counted first.
    """

    person: Person
    others: Marked
    points: Tensor
    score: float


@dataclass(frozen=True)
class Similarity:
    """COCO's figures of keypoints, in percent, over OKS thresholds 0.50, 0.55 ... 0.95.

    Attributes:
        ap: average precision.
        ap50: at 0.50.
        ap75: at 0.75.
        ar: average recall.
    """

    ap: float
    ap50: float
    ap75: float
    ar: float


def sigmas_of(names: Sequence[str]) -> list[float]:
    """The standard deviation of each joint in OKS: COCO's, 0.079 for joints that it has not.

    >>> sigmas_of(["left_hip", "neck"])
    [0.107, 0.079]
    """
    return [_SIGMAS.get(_without_side(name), OTHER_SIGMA) for name in names]


def unknown_to_coco(names: Sequence[str]) -> list[str]:
    """The joints whose sigma is not COCO's.

    >>> unknown_to_coco(["left_hip", "neck"])
    ['neck']
    """
    return [name for name in names if _without_side(name) not in _SIGMAS]


def _without_side(name: str) -> str:
    return name.removeprefix("left_").removeprefix("right_")


def similarity(answers: Iterable[Answer], names: Sequence[str]) -> Similarity:
    """The figures of one answer for each person; people who are no targets are there too, and blame nobody.

    >>> import torch
    >>> joints = torch.tensor([[10.0, 10, 2], [20, 30, 1]]).double()
    >>> nobody = Marked(*(torch.zeros(0, *shape) for shape in ((), (), (4,), (), (2, 3), ())))
    >>> person = Person(0, 0, torch.tensor([0.0, 0, 40, 40]), 1600.0, joints)
    >>> similarity([Answer(person, nobody, joints[:, :2], 1.0)], ["left_hip", "right_hip"])
    Similarity(ap=100.0, ap50=100.0, ap75=100.0, ar=100.0)
    """
    from faster_coco_eval import COCO, COCOeval_faster

    ordered = sorted(answers, key=lambda answer: answer.person.number)
    truths, guesses, seen = [], [], set[int]()
    for answer in ordered:
        person = answer.person
        truths.append(_entry(person.image, person.box, person.area, person.joints, crowd=False))
        if person.image not in seen:
            others = answer.others
            truths += [
                _entry(person.image, box, float(area), joints, crowd=bool(crowd))
                for box, area, joints, crowd in zip(
                    others.boxes, others.areas, others.joints, others.crowd, strict=True
                )
            ]
        seen.add(person.image)
        guesses.append(
            {
                "image_id": person.image,
                "category_id": 1,
                "keypoints": [number for x, y in answer.points.tolist() for number in (x, y, 1)],
                "score": answer.score,
            }
        )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(
            {
                "images": [{"id": image} for image in sorted(seen)],
                "categories": [{"id": 1, "name": "person"}],
                "annotations": [one | {"id": at} for at, one in enumerate(truths, start=1)],
            }
        )
        judge = COCOeval_faster(
            truth, truth.loadRes(guesses), "keypoints", kpt_oks_sigmas=sigmas_of(names), print_function=_say_nothing
        )
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    ap, ap50, ap75, _, _, ar = (100 * float(value) for value in judge.stats[:6])
    return Similarity(ap, ap50, ap75, ar)


def _say_nothing(*_: Any) -> None:
    pass


def _entry(image: int, box: Tensor, area: float, joints: Tensor, *, crowd: bool) -> dict[str, Any]:
    left, top, right, bottom = box.tolist()
    return {
        "image_id": image,
        "category_id": 1,
        "bbox": [left, top, right - left, bottom - top],
        "area": area,
        "iscrowd": int(crowd),
        "keypoints": joints.flatten().tolist(),
        "num_keypoints": int((joints[:, 2] > 0).sum()),
    }


def lengths_of(people: Sequence[Person], names: Sequence[str]) -> np.ndarray:
    """By what a distance is divided in PCK, in pixels, for each person; NaN for one of whom it is not known.

    The torso, from the left shoulder to the right hip, or from the right shoulder to the left hip where one of those is
    not marked. Where the set has no such joints, the longer side of the box.

    >>> import torch
    >>> joints = torch.tensor([[10.0, 10, 2], [13, 14, 1]]).double()
    >>> person = Person(0, 0, torch.tensor([0.0, 0, 40, 20]), 800.0, joints)
    >>> lengths_of([person], ["left_shoulder", "right_hip"]), lengths_of([person], ["a", "b"])
    (array([5.]), array([40.]))
    """
    known = [tuple(map(list(names).index, pair)) for pair in _TORSOS if set(pair) <= set(names)]
    return np.array([_torso(person, known) if known else _side(person) for person in people])


def _torso(person: Person, pairs: Sequence[tuple[int, ...]]) -> float:
    for one, other in pairs:
        ends = person.joints[[one, other]]
        if bool((ends[:, 2] > 0).all()):
            return float((ends[0, :2] - ends[1, :2]).norm())
    return float("nan")


def _side(person: Person) -> float:
    left, top, right, bottom = person.box.tolist()
    return max(right - left, bottom - top)


def correct_shares(answers: Iterable[Answer], names: Sequence[str]) -> tuple[float, ...]:
    """PCK: the share of marked joints found within 0.2 and within 0.5 of the torso, in percent.

    Over the joints of all people whose torso is known; NaN where it is of nobody. See `lengths_of`.
    """
    known = list(answers)
    lengths = lengths_of([answer.person for answer in known], names)
    near, total = np.zeros(len(SHARES)), 0
    for answer, length in zip(known, lengths, strict=True):
        joints = answer.person.joints.numpy()
        marked = joints[:, 2] > 0
        if np.isnan(length):
            continue
        distance = np.linalg.norm(answer.points.numpy() - joints[:, :2], axis=1)[marked]
        near += [(distance <= share * length).sum() for share in SHARES]
        total += int(marked.sum())
    return tuple((100 * near / total).tolist()) if total else (float("nan"),) * len(SHARES)
