"""Cascade R-CNN by the definitions of Cai and Vasconcelos 2018, on boxes made by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

from unloaf.models.cascade_rcnn import STAGES, CascadeHeads, refined

OBJECT = [10.0, 10.0, 50.0, 50.0]
SIZE = (64, 80)


def heads(classes=3, channels=4):
    torch.manual_seed(0)
    found = CascadeHeads(channels, classes, least_score=0.0).double()
    for stage in found.stages:
        nn.init.normal_(stage.box_predictor.cls_score.weight, std=0.3)
        nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.3)
    return found


def features():
    """One level of stride 4 alone: boxes of a test are small, and the others are never looked at."""
    torch.manual_seed(1)
    return {str(at): torch.randn(1, 4, 16 // 2**at, 20 // 2**at, dtype=torch.float64) for at in range(4)}


def of_iou(value):
    """A box as high as the object, moved to the right until it has this IoU with it."""
    width = 40.0
    moved = width * (1 - value) / (1 + value)  # (w - m) / (w + m) = value
    return [10 + moved, 10, 50 + moved, 50]


def test_a_box_is_an_object_from_0_5_0_6_and_0_7_on():
    boxes = torch.tensor([of_iou(value) for value in (0.45, 0.55, 0.65, 0.75)])
    labels = [
        stage.assign_targets_to_proposals([boxes], [torch.tensor([OBJECT])], [torch.tensor([2])])[1][0].tolist()
        for stage in heads().stages
    ]
    assert labels == [[0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2]]


@pytest.mark.parametrize(("at", "centre", "side"), [(0, 10, 5), (1, 20, 10), (2, 30, 15)])
def test_corrections_are_scaled_by_the_weights_of_their_stage(at, centre, side):
    """From a box of 20 x 40 around (20, 30) to one of 40 x 40 around (30, 30)."""
    stage = heads().stages[at]
    [coded] = stage.box_coder.encode([torch.tensor([OBJECT])], [torch.tensor([[10.0, 10.0, 30.0, 50.0]])])
    assert coded[0].tolist() == pytest.approx([centre * 10 / 20, 0, side * math.log(2), 0], abs=1e-6)


def test_refined_boxes_are_moved_scaled_cut_at_the_edge_and_constants():
    stage = heads().stages[1]
    said = torch.tensor([[10.0, -5.0, 10 * math.log(2), 0.0], [0.0, 0.0, 0.0, 20.0]], dtype=torch.float64)
    given = [torch.tensor([[10.0, 10.0, 30.0, 50.0]]).double(), torch.tensor([[60.0, 20.0, 90.0, 40.0]]).double()]
    first, second = refined(stage, said.requires_grad_(), given, [SIZE, SIZE])
    # Centre (20, 30) + (0.5 * 20, -0.25 * 40), twice as wide; then as it was, e**2 times as high, and cut.
    assert first[0].tolist() == pytest.approx([10, 0, 50, 40])
    assert second[0].tolist() == pytest.approx([60, 0, 80, 64])
    assert [one.requires_grad for one in (first, second)] == [False, False]


def said_by(stage, boxes, level):
    """Logits and regression of one head, written out; boxes of less than 112 pixels are looked up at stride 4."""
    pooled = roi_align(level, [boxes], 7, spatial_scale=1 / 4, sampling_ratio=2).flatten(1)
    hidden = F.relu(F.linear(pooled, stage.box_head.fc6.weight, stage.box_head.fc6.bias))
    hidden = F.relu(F.linear(hidden, stage.box_head.fc7.weight, stage.box_head.fc7.bias))
    logits, codes = stage.box_predictor.cls_score, stage.box_predictor.bbox_pred
    return F.linear(hidden, logits.weight, logits.bias), F.linear(hidden, codes.weight, codes.bias)


def moved(boxes, codes, weights):
    """The boxes after a correction, inside the image."""
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    codes = codes / torch.tensor(weights, dtype=codes.dtype)
    centre, size = centre + codes[:, :2] * size, size * codes[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    most = torch.tensor([SIZE[1], SIZE[0]] * 2, dtype=boxes.dtype)
    return torch.minimum(torch.cat([centre - size / 2, centre + size / 2], 1).clamp(min=0), most)


def test_detections_are_the_last_boxes_with_the_mean_score_of_the_three_heads_for_them():
    """Section 4 and table 2: the classifiers of all stages on the boxes that the third one is given."""
    network, levels = heads().eval(), features()
    boxes = torch.tensor([OBJECT, [30.0, 5.0, 60.0, 40.0]], dtype=torch.float64)
    with torch.no_grad():
        [found], losses = network(levels, [boxes], [SIZE])
        for stage, how in list(zip(network.stages, STAGES, strict=True))[:2]:
            boxes = moved(boxes, said_by(stage, boxes, levels["0"])[1], how.weights)
        said = [said_by(stage, boxes, levels["0"]) for stage in network.stages]
        scores = torch.stack([logits.softmax(1) for logits, _ in said]).mean(0)
        last = moved(boxes, said[2][1], STAGES[2].weights)
    assert losses == {}
    pairs = {(round(float(scores[at, label]), 6), label): last[at] for at in (0, 1) for label in (1, 2)}
    assert len(found["boxes"]) >= 2  # of four; the rest overlaps too much
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        assert torch.allclose(box, pairs[round(float(score), 6), int(label)].to(box.dtype), atol=1e-4)


def test_losses_are_those_of_each_stage_on_the_boxes_that_the_one_before_refined():
    """With a sample of all boxes, so that nothing is drawn."""
    network, levels = heads().train(), features()
    for stage in network.stages:
        stage.fg_bg_sampler.batch_size_per_image, stage.fg_bg_sampler.positive_fraction = 1000, 1.0
    target = torch.tensor([OBJECT], dtype=torch.float64)
    boxes = torch.tensor([of_iou(0.55), of_iou(0.8), [0.0, 0.0, 20.0, 20.0]], dtype=torch.float64)
    found, losses = network(levels, [boxes], [SIZE], [{"boxes": target, "labels": torch.tensor([2])}])
    expected, positives = {}, []
    for at, (stage, how) in enumerate(zip(network.stages, STAGES, strict=True), start=1):
        boxes = torch.cat([boxes, target])
        overlap = boxes.new_tensor([float(iou(box, target[0])) for box in boxes])
        labels = torch.where(overlap >= how.iou, 2, 0)
        logits, codes = said_by(stage, boxes, levels["0"])
        size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
        offset = torch.cat([(torch.tensor([30.0, 30.0]) - centre) / size, (40 / size).log()], 1)
        apart = (codes - offset * torch.tensor(how.weights))[labels > 0].abs()
        smooth = torch.where(apart < 1 / 9, apart**2 * 9 / 2, apart - 1 / 18).sum() / len(boxes)
        counts = {1: 1.0, 2: 0.5, 3: 0.25}[at]
        expected[f"loss_class_{at}"] = counts * F.cross_entropy(logits, labels)
        expected[f"loss_box_{at}"] = counts * smooth
        positives.append(int((labels > 0).sum()))
        boxes = moved(boxes, codes, how.weights).detach()
    assert found == []
    assert positives[0] == 3
    ours, theirs = ({name: float(value.detach()) for name, value in terms.items()} for terms in (losses, expected))
    assert ours == pytest.approx(theirs, rel=1e-6)


def iou(a, b):
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    common = (high - low).clamp(min=0).prod()
    return common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common)


def test_images_without_proposals_have_no_detections():
    [found], _ = heads().eval()(features(), [torch.zeros(0, 4, dtype=torch.float64)], [SIZE])
    assert found["boxes"].shape == (0, 4)
