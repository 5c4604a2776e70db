"""ATSS by the definitions of Zhang et al. 2020, on boxes made by hand and against a slow twin."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unloaf.models.atss import ATSS, STRIDES, assigned, centerness


def grid(height, width, strides=STRIDES):
    """Anchors of 8 strides at each place of each level, and how many each level has."""
    anchors, levels = [], []
    for stride in strides:
        rows, columns = -(-height // stride), -(-width // stride)
        for y in range(rows):
            for x in range(columns):
                half = 4.0 * stride
                anchors.append([x * stride - half, y * stride - half, x * stride + half, y * stride + half])
        levels.append(rows * columns)
    return torch.tensor(anchors), levels


def overlap(a, b):
    across, down = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(0.0, across) * max(0.0, down)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def slowly(anchors, levels, boxes, count):
    """Algorithm 1, line by line."""
    owner = [(-1, -1.0)] * len(anchors)
    for at, box in enumerate(boxes):
        candidates, start = [], 0
        for level in levels:
            x, y = middle(box)
            members = range(start, start + level)
            candidates += sorted(
                members, key=lambda i: (middle(anchors[i])[0] - x) ** 2 + (middle(anchors[i])[1] - y) ** 2
            )[:count]
            start += level
        values = [overlap(anchors[i], box) for i in candidates]
        threshold = statistics.mean(values) + statistics.stdev(values)
        for i, value in zip(candidates, values, strict=True):
            x, y = middle(anchors[i])
            if value >= threshold and box[0] < x < box[2] and box[1] < y < box[3] and value > owner[i][1]:
                owner[i] = (at, value)
    return [number for number, _ in owner]


def test_positive_anchors_are_those_of_the_papers_algorithm():
    """Boxes at odd places, so that no two anchors are equally far; some overlap, some are beyond the edge."""
    anchors, levels = grid(160, 224)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(12, 2, generator=generator) * 150
    size = torch.rand(12, 2, generator=generator) * 120 + 6
    boxes = torch.cat([corner, corner + size], 1)
    expected = slowly(anchors.tolist(), levels, boxes.tolist(), 9)
    assert sum(number >= 0 for number in expected) > 12
    assert assigned(anchors, levels, boxes).tolist() == expected


def test_one_object_by_hand():
    """Four candidates of two levels; IoU 0.25, 1, 0.25 and 0.25: mean 0.4375, sample deviation 0.375."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [6, 0, 16, 10], [12, 0, 22, 10], [1, -5, 21, 15], [99, 99, 119, 119]])
    box = torch.tensor([[6.0, 0, 16, 10]])
    assert assigned(anchors, [3, 2], box, candidates=3).tolist() == [-1, 0, -1, -1, -1]


def test_the_deviation_is_that_of_a_sample():
    """IoU 1, 19/21, 0 and 0: 0.476 + 0.551 is above 1; with N in place of N - 1 it would be 0.954."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0.5, 0, 10.5, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    assert assigned(anchors, [4], anchors[:1]).tolist() == [-1, -1, -1, -1]


def test_an_anchor_whose_centre_is_outside_is_none():
    """The only anchor with any overlap, the highest of all, has its centre at (20, 4)."""
    anchors = torch.tensor([[0.0, 0, 40, 8], [100, 0, 140, 8], [200, 0, 240, 8]])
    assert assigned(anchors, [3], torch.tensor([[2.0, 0, 19, 8]])).tolist() == [-1, -1, -1]
    assert assigned(anchors, [3], torch.tensor([[2.0, 0, 21, 8]])).tolist() == [0, -1, -1]


def test_an_anchor_of_two_objects_is_of_the_one_that_it_overlaps_more():
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [70, 50, 80, 60]])
    boxes = torch.tensor([[0.0, 0, 12, 12], [0, 0, 11, 10]])
    assert assigned(anchors, [3], boxes).tolist() == [1, -1, -1]
    assert assigned(anchors, [3], boxes.flip(0)).tolist() == [0, -1, -1]


def test_without_objects_all_anchors_are_background():
    anchors, levels = grid(32, 32)
    assert set(assigned(anchors, levels, torch.zeros(0, 4)).tolist()) == {-1}


class Pyramid(nn.Module):
    """Five levels of random features."""

    out_channels = 64

    def forward(self, x):
        size = [-(-side // 8) for side in x.shape[-2:]]
        torch.manual_seed(3)
        return {
            str(at): torch.randn(len(x), 64, *(-(-side // 2**at) for side in size), dtype=x.dtype) for at in range(5)
        }


def network():
    torch.manual_seed(0)
    found = ATSS(Pyramid(), 3, min_size=64, max_size=96, _skip_resize=True).double()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.05)
    return found


def test_losses_are_the_papers():
    """Focal loss by the number of positives, GIoU weighted by centerness times 2, and the centerness' entropy."""
    model, image = network().train(), torch.rand(2, 3, 64, 96, dtype=torch.float64)
    boxes = torch.tensor([[3.0, 5, 41, 60], [50, 11, 71, 30]], dtype=torch.float64)
    targets = [
        {"boxes": boxes, "labels": torch.tensor([2, 1])},
        {"boxes": boxes[:0], "labels": torch.tensor([]).long()},
    ]
    losses = model(list(image), targets)

    anchors, levels = grid(64, 96)
    outputs = model.head(list(model.backbone(image).values()))
    owner = torch.tensor(slowly(anchors.tolist(), levels, boxes.tolist(), 9))
    positive = (owner >= 0).nonzero()[:, 0].tolist()
    focal = giou = entropy = summed = 0.0
    for image_at in (0, 1):
        for i in range(len(anchors)):
            for label in range(3):
                truth = image_at == 0 and owner[i] >= 0 and int(targets[0]["labels"][owner[i]]) == label
                p = outputs["cls_logits"][image_at, i, label].sigmoid()
                p, alpha = (p, 0.25) if truth else (1 - p, 0.75)
                focal = focal - alpha * (1 - p) ** 2 * p.log()
    for i in positive:
        anchor, box = anchors[i].double(), boxes[owner[i]]
        (x, y), (w, h) = middle(anchor), (anchor[2] - anchor[0], anchor[3] - anchor[1])
        code = outputs["bbox_regression"][0, i] / torch.tensor([10.0, 10, 5, 5])
        cx, cy, width, height = x + code[0] * w, y + code[1] * h, w * code[2].exp(), h * code[3].exp()
        guess = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
        hull = (max(guess[2], box[2]) - min(guess[0], box[0])) * (max(guess[3], box[3]) - min(guess[1], box[1]))
        value = overlap(guess, box)
        union = (width * height + (box[2] - box[0]) * (box[3] - box[1])) / (1 + value)
        left, right, top, bottom = x - box[0], box[2] - x, y - box[1], box[3] - y
        weight = (min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)) ** 0.5
        giou = giou + weight * (1 - (value - (hull - union) / hull))
        summed = summed + weight
        entropy = entropy + F.binary_cross_entropy_with_logits(outputs["bbox_ctrness"][0, i, 0], weight)
    assert len(positive) > 2
    expected = [focal / len(positive), 2 * giou / summed, entropy / len(positive)]
    found = [losses[name] for name in ("classification", "bbox_regression", "bbox_ctrness")]
    assert [float(one.detach()) for one in found] == pytest.approx([float(one.detach()) for one in expected], rel=1e-5)


def test_a_detection_is_its_anchor_corrected_with_the_root_of_class_and_centerness():
    model, image = network().eval(), torch.rand(1, 3, 64, 96, dtype=torch.float64)
    model.score_thresh, model.nms_thresh = 0.0, 1.0
    with torch.no_grad():
        [found] = model(list(image))
        outputs = model.head(list(model.backbone(image).values()))
    scores = (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid())[0].sqrt()
    assert float(found["scores"][0]) == pytest.approx(float(scores.max()))
    i, label = divmod(int(scores.argmax()), 3)
    anchor = grid(64, 96)[0][i].double()
    code = outputs["bbox_regression"][0, i] / torch.tensor([10.0, 10, 5, 5])
    side = anchor[2:] - anchor[:2]
    centre, size = (anchor[:2] + anchor[2:]) / 2 + code[:2] * side, side * code[2:].exp()
    box = torch.cat([centre - size / 2, centre + size / 2]).clamp(min=0)
    assert int(found["labels"][0]) == label
    assert torch.allclose(
        found["boxes"][0], torch.minimum(box, torch.tensor([96.0, 64, 96, 64])).to(found["boxes"].dtype)
    )


def test_centerness_is_1_in_the_middle_and_0_at_the_edge():
    box = torch.tensor([[0.0, 0.0, 20.0, 10.0]]).repeat(3, 1)
    anchors = torch.tensor([[8.0, 3, 12, 7], [3, 3, 7, 7], [-2, 3, 2, 7]])
    assert centerness(anchors, box).tolist() == pytest.approx([1, (5 / 15) ** 0.5, 0])
