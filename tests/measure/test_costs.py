"""What subnets cost, and which one is picked."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ptflops import get_model_complexity_info
from timm import create_model
from timm.layers import set_fused_attn
from torch.nn import functional

import unloaf
from toy_networks import ToyNetwork
from unloaf.measure import costs
from unloaf.measure.costs import Timing, gmacs, measure_in_sight, time_subnets, write_csv
from unloaf.measure.flops import counting_flops
from unloaf.measure.pareto import pareto_front
from unloaf.measure.records import cost_records
from unloaf.models.build import build_model


def by_ptflops(model, side):
    # Its "aten" backend counts the operations that run, as torch's counter does; it also counts products of elements
    # (layer scale, gates), and misses attention that is fused. (Its other backend goes by modules: it adds norms,
    # activations and biases, and misses the linear layers of timm, which are a class of their own.)
    unfused = copy.deepcopy(model)
    for module in unfused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    macs, _ = get_model_complexity_info(
        unfused, (3, side, side), as_strings=False, print_per_layer_stat=False, backend="aten"
    )
    return macs / 1e9


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("timm/resnet18", 64),
        ("timm/resnet50", 64),
        ("timm/resnetv2_50", 64),
        ("timm/resnext50_32x4d", 64),
        ("timm/seresnet50", 64),
        ("timm/regnety_002", 64),
        ("timm/efficientnet_b0", 64),
        ("timm/mobilenetv3_small_100", 64),
        ("tv/resnet34", 64),
        ("timm/vit_tiny_patch16_224", 224),
    ],
)
def test_gmacs_agree_with_ptflops_within_half_a_percent(name, side):
    model = build_model(name, num_classes=1000).eval()
    assert gmacs(model, torch.zeros(1, 3, side, side)) == pytest.approx(by_ptflops(model, side), rel=0.005)


def test_gmacs_of_a_convnext_leave_its_layer_scale_out():
    model = build_model("timm/convnext_atto", num_classes=1000).eval()
    ours, theirs = gmacs(model, torch.zeros(1, 3, 64, 64)), by_ptflops(model, 64)
    assert ours < theirs == pytest.approx(ours, rel=0.01)


def test_resnet50_at_224_has_its_4_09_gmacs():
    model = build_model("tv/resnet50", num_classes=1000).to("meta")
    assert round(gmacs(model, torch.zeros(1, 3, 224, 224, device="meta")), 2) == 4.09  # torchvision's table


def test_attention_is_counted_fused_or_not():
    counted = []
    for fused in (True, False):
        set_fused_attn(fused)
        model = create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        counted.append(gmacs(model, torch.zeros(1, 3, 224, 224)))
    set_fused_attn(True)
    assert counted[0] == counted[1]


def test_attention_whose_heads_share_keys_is_counted_forward_and_backward():
    query, shared = (torch.zeros(1, heads, 50, 16, requires_grad=True) for heads in (4, 2))
    product = 4 * 2 * 50 * 16 * 50  # of four heads, two operations each
    with counting_flops() as counter:
        out = functional.scaled_dot_product_attention(query, shared, shared, enable_gqa=True)
    assert counter.get_total_flops() == 2 * product
    with counting_flops() as counter:
        out.sum().backward()
    assert counter.get_total_flops() in (4 * product, 5 * product)  # fused, the scores are computed again


@pytest.fixture(scope="module")
def network():
    model = build_model("cifar/resnet20", num_classes=10, width=4)
    x = torch.zeros(1, 3, 32, 32)
    return model, unloaf.find_stages(model, x), x


def test_costs_are_those_of_the_exported_subnet(network):
    model, stages, x = network
    subnet = unloaf.Subnet.from_depths(stages, (2, 1, 3))
    [row] = unloaf.measure_subnets(model, stages, x, [unloaf.SubnetRow(subnet)])
    small = unloaf.export_subnet(model, stages, subnet)
    params = sum(p.numel() for p in small.parameters())
    assert row == unloaf.SubnetRow(subnet, params=params, gmacs=gmacs(small, x))


def test_rows_that_were_judged_are_measured_and_picked_from_as_they_are(network):
    model, stages, x = network
    rows = unloaf.evaluate_subnets(model, stages, [(torch.randn(4, 3, 32, 32), torch.arange(4))], subnets=3)
    best = unloaf.pick_subnet(rows)
    assert best.top1 == max(row.top1 for row in rows)
    measured = unloaf.measure_subnets(model, stages, x, rows, latency=True, repeats=1)
    assert [replace(row, gmacs=None, latency_ms=None) for row in measured] == rows
    assert [row.gmacs for row in measured] == [gmacs(unloaf.export_subnet(model, stages, r.subnet), x) for r in rows]
    assert min(row.latency_ms for row in measured) > 0
    cheapest = min(measured, key=lambda row: row.gmacs)
    assert unloaf.pick_subnet(measured, max_gmacs=cheapest.gmacs) == cheapest


class OfImages(ToyNetwork):
    """Takes a list of images, as detectors do."""

    seen: list[int]

    def forward(self, images):
        self.seen = [*self.__dict__.get("seen", []), len(images)]
        return super().forward(torch.stack([image.mean(-1).flatten() for image in images]))


def test_costs_are_of_one_image_where_a_batch_is_a_list_of_them():
    model, images = OfImages(), [torch.randn(1, 4, 5), torch.randn(1, 4, 7), torch.randn(1, 4, 9)]
    stages = unloaf.find_stages(model, images)
    rows = [unloaf.SubnetRow(unloaf.Subnet.full(stages))]
    macs = 4 * 6 + 6 * 6 + 4 * 6 * 6 + 6 * 5 + 5 * 5 + 4 * 5 * 5 + 5 * 3  # of the linear layers
    assert unloaf.measure_subnets(model, stages, images, rows)[0].gmacs == pytest.approx(macs / 1e9)
    model.seen = []
    unloaf.measure_subnets(model, stages, images, rows, latency=True, batch_size=4, repeats=1)
    assert set(model.seen) == {1, 4}


def test_measured_rows_are_complete_and_leave_the_model_as_it_was(network):
    model, stages, x = network
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.conv1.eval()
    subnets = unloaf.enumerate_subnets(stages)[:3]
    rows = [unloaf.SubnetRow(subnet) for subnet in subnets]
    rows, times = measure_in_sight(model, stages, x, rows, timed=(2, 1), repeats=4, console=None)
    assert [row.subnet for row in rows] == subnets
    for row, timings in zip(rows, times, strict=True):
        assert [timing.batch_size for timing in timings] == [2, 1]
        assert row.latency_ms == timings[1].median_ms  # of the smallest batch
        for timing in timings:
            assert 0 < timing.median_ms <= timing.p95_ms
            assert (timing.repeats, timing.device, timing.threads) == (4, "cpu", torch.get_num_threads())
    assert (model.training, model.conv1.training, model.layer1.training) == (True, False, True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_subnets_take_turns(network, monkeypatch):
    """In each round each subnet has its turn, in orders that differ."""
    model, stages, x = network
    order = []
    monkeypatch.setattr(costs, "milliseconds", lambda work, device: float(len(order)))

    subnets = unloaf.enumerate_subnets(stages)[:4]
    monkeypatch.setattr(costs, "active_subnet", lambda *args: order.append(args[2]) or unloaf.active_subnet(*args))
    time_subnets(model, stages, x, subnets, batch_sizes=[1], repeats=5)
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 3 + 5  # three that warm up
    assert all(sorted(map(str, r)) == sorted(map(str, subnets)) for r in rounds)
    assert any(a != b for a, b in pairwise(rounds))


def test_median_and_p95_by_hand():
    timing = costs._timing(4, [float(n) for n in range(20, 0, -1)], "cpu")
    assert (timing.median_ms, timing.p95_ms) == (10.5, 19.0)  # 95 % of 20 are 19
    assert timing.images_per_second == pytest.approx(4 / 0.0105)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subnets": []}, "no subnet to measure"),
        ({"batch_sizes": ()}, "batch_sizes is \\(\\)"),
        ({"batch_sizes": (0,)}, "at least 1"),
        ({"repeats": 0}, "repeats is 0; give at least 1"),
        ({"subnets": [unloaf.Subnet(((True,),))]}, "stages"),
    ],
)
def test_bad_measurements_are_refused(network, change, message):
    model, stages, x = network
    given_ = {"subnets": [unloaf.Subnet.full(stages)]} | change
    with pytest.raises(ValueError, match=message):
        time_subnets(model, stages, x, given_.pop("subnets"), **given_)


def depths(text):
    """A subnet of stages of three blocks."""
    return unloaf.Subnet(tuple(tuple(i < int(depth) for i in range(3)) for depth in text.split("-")))


def row(text, params=None, gmacs=None, latency_ms=None, **accuracy):
    return unloaf.SubnetRow(depths(text), params=params, gmacs=gmacs, latency_ms=latency_ms, **accuracy)


ROWS = [
    row("3-3", 900, 0.9, 5.0, top1=92.0),
    row("2-3", 700, 0.7, 3.0, top1=91.0),
    row("3-2", 600, 0.8, 2.0, top1=91.0),
    row("1-1", 300, 0.3, 1.0, top1=80.0),
]


@pytest.mark.parametrize(
    ("limits", "picked"),
    [
        ({}, "3-3"),
        ({"max_gmacs": 0.8}, "3-2"),  # as accurate as 2-3, and faster
        ({"max_gmacs": 0.7}, "2-3"),  # a limit may be reached
        ({"max_latency": 2.9}, "3-2"),
        ({"max_params": 650, "max_gmacs": 0.7}, "1-1"),
        ({"min_top1": 90}, "3-2"),
        ({"min_top1": 91, "max_gmacs": 0.75}, "2-3"),
        ({"min_top1": 92}, "3-3"),
    ],
)
def test_picked_subnet_by_hand(limits, picked):
    assert str(unloaf.pick_subnet(ROWS, **limits).subnet) == picked


@pytest.mark.parametrize(
    ("rows", "limits", "message"),
    [
        (ROWS, {"max_gmacs": 0.2}, "at most 0.2 GMACs; the nearest: 1-1 \\(top-1 80.00 %, 0.3 GMACs\\); 2-3 "),
        (ROWS, {"max_latency": 0.5}, "at most latency 0.5 ms; the nearest: 1-1 \\(top-1 80.00 %, latency 1 ms\\); 3-2"),
        (ROWS, {"min_top1": 93}, "top-1 of at least 93 %; the nearest: 3-3 \\(top-1 92.00 %, latency 5 ms\\)"),
        (ROWS, {"min_top1": 92, "max_params": 700}, "at least 92 % with at most 700 parameters; the nearest: 2-3"),
        ([], {}, "no rows"),
        ([row("3", 1, 1.0)], {}, "subnet 3 has no accuracy"),
        ([row("3", 1, 1.0, top1=math.nan)], {}, "accuracy of all subnets is NaN"),
        (
            [row("3", 1, 1.0, top1=3.0)],
            {"max_latency": 1.0},
            "was not timed; .*measure_subnets\\(model, .*latency=True",
        ),
        (
            [row("3", 1, top1=3.0)],
            {"max_gmacs": 1.0},
            "subnet 3 has no GMACs; .*unloaf.measure_subnets\\(model, ",
        ),
    ],
)
def test_no_subnet_fits(rows, limits, message):
    with pytest.raises(ValueError, match=message):
        unloaf.pick_subnet(rows, **limits)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.sampled_from(["gmacs", "params"]))
def test_pareto_front_is_what_no_other_beats(figures, cost):
    rows = [
        unloaf.SubnetRow(unloaf.Subnet(((True,) * (i + 1),)), params=price, gmacs=float(price), top1=float(top1))
        for i, (price, top1) in enumerate(figures)
    ]

    def beats(one, other):
        no_worse = getattr(one, cost) <= getattr(other, cost) and one.top1 >= other.top1
        return no_worse and (getattr(one, cost) < getattr(other, cost) or one.top1 > other.top1)

    front = pareto_front(rows, cost=cost)
    assert sorted(row.subnet.depths for row in front) == sorted(
        row.subnet.depths for row in rows if not any(beats(other, row) for other in rows)
    )
    assert all(getattr(a, cost) <= getattr(b, cost) for a, b in pairwise(front))


@pytest.mark.parametrize("position", range(4))
def test_a_subnet_that_predicts_nothing_is_neither_picked_nor_in_front(position):
    rows = [*ROWS[:position], row("1-2", 1, 0.01, top1=math.nan), *ROWS[position:]]
    assert pareto_front(rows) == pareto_front(ROWS)
    assert unloaf.pick_subnet(rows) == unloaf.pick_subnet(ROWS)
    assert unloaf.pick_subnet(rows, min_top1=0) == unloaf.pick_subnet(ROWS, min_top1=0)


def test_front_by_latency_differs_from_that_by_gmacs():
    assert [str(row.subnet) for row in pareto_front(ROWS)] == ["1-1", "2-3", "3-3"]
    assert [str(row.subnet) for row in pareto_front(ROWS, cost="latency_ms")] == ["1-1", "3-2", "3-3"]


def test_file_has_a_column_for_each_figure(tmp_path):
    timings = [Timing(32, 45.0, 45.0, 3, "cpu", 1), Timing(1, 5.0, 5.0, 3, "cpu", 1)]
    write_csv(cost_records(ROWS[:1], [timings]), tmp_path / "costs.csv")
    assert (tmp_path / "costs.csv").read_text() == (
        "subnet,top1,params,gmacs,b32_median_ms,b32_p95_ms,b32_images_per_second,"
        "b1_median_ms,b1_p95_ms,b1_images_per_second,repeats,device,threads\n"
        f"3-3,92.0,900,0.9,45.0,45.0,{32000 / 45.0},5.0,5.0,200.0,3,cpu,1\n"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "costs.csv"]


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*costs\.csv: .*; give another --output"):
        write_csv(cost_records(ROWS), tmp_path / "taken" / "costs.csv")


def test_file_is_written_into_a_new_folder(tmp_path):
    write_csv(cost_records([row("1", 1, 0.5)]), tmp_path / "new" / "folder" / "costs.csv")
    assert (tmp_path / "new" / "folder" / "costs.csv").read_text() == "subnet,params,gmacs\n1,1,0.5\n"


def test_columns_that_no_row_has_are_left_out():
    assert list(cost_records([row("1", 1, 0.5)])[0]) == ["subnet", "params", "gmacs"]
