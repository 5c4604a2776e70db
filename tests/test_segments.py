"""An exit as a module of its own gives what the cascade gives there, from what earlier exits handed on."""

import pytest
import torch

import unloaf
from toy_networks import ToyNetwork


@pytest.mark.parametrize("depths", [[(3, 1), (3, 2), (3, 3)], [(1, 1), (3, 1), (3, 3)]], ids=str)
def test_segments_in_a_row_are_the_cascade(depths):
    torch.manual_seed(0)
    model = ToyNetwork(norm=True).double().eval()
    stages = unloaf.find_stages(model, torch.zeros(1, 4).double())
    anytime = unloaf.Anytime(model, stages, [unloaf.Subnet.from_depths(stages, one) for one in depths])
    anytime.recalibrate([torch.randn(32, 4).double()])
    x = torch.randn(5, 4).double()
    held = {"images": x}
    for index, expected in enumerate(anytime.all_exits(x)):
        segment = anytime.segment(index, torch.randn(2, 4).double())
        with torch.no_grad():
            logits, *made = segment(*(held[name] for name in segment.takes))
        held |= dict(zip(segment.makes, made, strict=True))
        assert torch.allclose(logits, expected, rtol=0, atol=1e-14)
        # Rows that leave in between change nothing for the others: the last three go on by themselves.
        if index:
            with torch.no_grad():
                some, *_ = segment(*(held[name][2:] for name in segment.takes))
            assert torch.allclose(some, expected[2:], rtol=0, atol=1e-14)


def test_a_segment_has_statistics_of_its_exit_and_leaves_the_network_alone():
    torch.manual_seed(0)
    model = ToyNetwork(norm=True).eval()
    stages = unloaf.find_stages(model, torch.zeros(1, 4))
    chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(1, 1), (3, 3)]]
    anytime = unloaf.Anytime(model, stages, chain)
    anytime.recalibrate([torch.randn(32, 4)])
    before = model.get_buffer("second.0.norm.running_mean").clone()
    segment = anytime.segment(1, torch.randn(2, 4))
    found = segment.model.get_buffer("second.0.norm.running_mean")
    assert torch.equal(found, anytime.statistics[chain[1]]["second.0.norm.running_mean"])
    assert torch.equal(model.get_buffer("second.0.norm.running_mean"), before)
    assert not torch.equal(found, before)
