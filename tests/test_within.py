"""Stages of a part of a model: `find_stages(model, example, within=...)`."""

import re

import pytest
import torch
from torch import nn

import unloaf
from toy_networks import Block, stage


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.neck = nn.ModuleDict({"layer1": stage(4, 6, 3)}), nn.Linear(6, 6)

    def forward(self, x):
        return {"map": self.neck(self.body["layer1"](x))}


class Detector(nn.Module):
    """Takes a list of examples and returns a list of mappings, as detectors do; its head has residual blocks too."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Features(), stage(6, 5, 2)

    def forward(self, examples):
        boxes = self.head(self.backbone(torch.stack(examples))["map"])
        return [{"boxes": row, "count": 1} for row in boxes]


def find(**options):
    return unloaf.find_stages(Detector(), [torch.randn(4), torch.randn(4)], **options)


def test_a_part_has_its_own_stages_by_paths_of_the_whole_model():
    [found] = find(within="backbone")
    assert found.name == "backbone.body.layer1"
    assert found.blocks == ("backbone.body.layer1.0", "backbone.body.layer1.1", "backbone.body.layer1.2")
    assert found.skippable == (False, True, True)
    assert find(within="backbone.body") == (found,)
    assert [s.name for s in find()] == ["backbone.body.layer1", "head"]


def test_stages_of_a_part_run_the_whole_model():
    model, x = Detector().eval(), [torch.randn(4), torch.randn(4)]
    stages = unloaf.find_stages(model, x, within="backbone.body")
    with unloaf.active_subnet(model, stages, unloaf.Subnet.from_depths(stages, (1,))):
        found = model(x)
    first = model.backbone.body["layer1"][0](torch.stack(x))
    expected = model.head(model.backbone.neck(first))
    assert torch.equal(torch.stack([row["boxes"] for row in found]), expected)


@pytest.mark.parametrize(
    ("within", "message"),
    [
        ("body", "within is 'body', which is not a module of Detector; give .* such as 'backbone.body'$"),
        ("backbon.body", "such as 'backbone.body'"),
        ("zzz", "such as 'backbone', 'head'$"),
        (3, "within is 3, which is not a module"),
    ],
)
def test_a_part_that_does_not_exist_is_answered_with_the_nearest(within, message):
    with pytest.raises(ValueError, match=message):
        find(within=within)


def test_a_part_without_residual_blocks_is_named():
    with pytest.raises(unloaf.NoResidualBlocksError, match=r"backbone\.neck of Detector has no residual blocks"):
        find(within="backbone.neck")


def test_a_part_and_blocks_exclude_each_other():
    blocks = [["backbone.body.layer1.0", "backbone.body.layer1.1"]]
    with pytest.raises(ValueError, match=re.escape("within is 'head' and blocks are given")):
        find(within="head", blocks=blocks)


class Leaving(Block):
    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class Reading(Detector):
    """The head reads what a block of the backbone has left on itself: passes cannot share calls."""

    def __init__(self):
        super().__init__()
        self.backbone.body["layer1"] = nn.Sequential(Leaving(4, 6), Leaving(6, 6), Leaving(6, 6))

    def forward(self, examples):
        last = self.backbone.body["layer1"][2]
        last.seen = None
        self.backbone(torch.stack(examples))
        return [{"boxes": row} for row in self.head(last.seen)]


def test_what_blocks_leave_behind_is_found_in_nested_outputs():
    model, x = Reading(), [torch.randn(4), torch.randn(4)]
    with pytest.warns(UserWarning, match="Reading hands on more than its modules return"):
        stages = unloaf.find_stages(model, x, within="backbone")
    assert not any(s.replayable for s in stages)
