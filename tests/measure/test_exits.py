"""Thresholds against a search by hand, costs against what a cascade really computes."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import unloaf
from toy_networks import ToyNetwork
from unloaf.measure.chains import Candidate, chain_costs, judge_candidate, pick_chain, records_of
from unloaf.measure.exits import ExitRecords, Target, at_thresholds, exit_gmacs, pick_threshold, record_exits

# Four images, two exits of 1 and 4 GMACs; the first exit is right on those that it is sure of.
RECORDS = ExitRecords(
    torch.tensor([[0.9, 0.8, 0.6, 0.5], [0.0, 0.0, 0.0, 0.0]]),
    torch.tensor([[True, True, False, True], [True, True, True, False]]),
    (1.0, 4.0),
)


def toy(*, norm=True):
    torch.manual_seed(0)
    model = ToyNetwork(norm=norm).eval()
    return model, unloaf.find_stages(model, torch.zeros(1, 4))


def batches(count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 4, generator=generator), torch.arange(16) % 3) for _ in range(count)]


@pytest.mark.parametrize(
    ("threshold", "top1", "gmacs", "shares"),
    [
        (0.0, 75.0, 1.0, (1.0, 0.0)),
        (0.7, 75.0, 2.5, (0.5, 0.5)),
        (0.55, 50.0, 1.75, (0.75, 0.25)),
        (1.0, 75.0, 4.0, (0.0, 1.0)),
    ],
)
def test_a_threshold_by_hand(threshold, top1, gmacs, shares):
    [point] = at_thresholds(RECORDS, [threshold])
    assert (point.top1, point.gmacs, point.shares, point.images) == (top1, gmacs, shares, 4)


def test_the_cheapest_threshold_that_loses_no_more():
    # All leave at once: 75 %, as the last exit.
    assert pick_threshold(RECORDS, Target(max_drop=0)).gmacs == 1.0
    harder = ExitRecords(RECORDS.confidences, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(), RECORDS.gmacs)
    assert pick_threshold(harder, Target(max_drop=0)).shares == (0.5, 0.5)
    assert pick_threshold(harder, Target(max_drop=25)).shares == (0.75, 0.25)
    assert pick_threshold(harder, Target(min_top1=50)).shares == (1.0, 0.0)


def test_the_most_accurate_threshold_within_a_budget():
    harder = ExitRecords(RECORDS.confidences, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(), RECORDS.gmacs)
    assert pick_threshold(harder, Target(max_gmacs=2.0)).top1 == 75.0
    assert pick_threshold(harder, Target(max_gmacs=10)).gmacs == 2.5  # not 4: as accurate, cheaper


@pytest.mark.parametrize(
    ("target", "words"),
    [({"min_top1": 90}, "the best has 75.00 %"), ({"max_gmacs": 0.5}, "needs 1 GMACs at least; give more")],
    ids=str,
)
def test_what_no_threshold_reaches_is_said(target, words):
    with pytest.raises(ValueError, match=words):
        pick_threshold(RECORDS, Target(**target))


@pytest.mark.parametrize(
    "target", [{}, {"max_drop": 1, "max_gmacs": 1}, {"max_drop": -1}, {"min_top1": math.nan}, {"max_gmacs": math.inf}],
    ids=str,
)  # fmt: skip
def test_a_target_is_one_number_of_at_least_zero(target):
    with pytest.raises(ValueError, match="give"):
        Target(**target)


def test_a_threshold_set_on_records_gives_what_it_promised():
    model, stages = toy()
    chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(3, 1), (3, 3)]]
    anytime = unloaf.Anytime(model, stages, chain)
    anytime.recalibrate([batches(seed=2)[0][0]])
    point = unloaf.calibrate_anytime(anytime, batches(), max_drop=0.5)
    anytime.set_threshold(point.threshold)
    with FlopCounterMode(display=False) as counter:
        outputs = [(anytime(x), y) for x, y in batches()]
    exits = torch.cat([output.exits for output, _ in outputs])
    right = sum(int((output.logits.argmax(-1) == y).sum()) for output, y in outputs)
    assert point.shares == tuple((torch.bincount(exits, minlength=2) / 32).tolist())
    assert point.top1 == 100 * right / 32
    assert point.gmacs * 32 * 2e9 == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_costs_of_chains_are_those_that_the_cascade_counts():
    model, stages = toy()
    costs = chain_costs(model, stages, torch.zeros(1, 4))
    for depths in ([(3, 1), (3, 2), (3, 3)], [(1, 1), (1, 3), (3, 3)], [(1, 1), (2, 1), (2, 3)]):
        chain = [unloaf.Subnet.from_depths(stages, one) for one in depths]
        assert costs(chain) == exit_gmacs(unloaf.Anytime(model, stages, chain), torch.zeros(1, 4))


@pytest.mark.parametrize("confidence", ["max-probability", "entropy", "agreement"])
def test_subnets_by_themselves_say_what_the_exits_of_their_chain_say(confidence):
    model, stages = toy()
    chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(1, 1), (3, 1), (3, 3)]]
    calibration = [batches(seed=2)[0][0]]
    anytime = unloaf.Anytime(model, stages, chain, confidence=confidence)
    anytime.recalibrate(calibration)
    candidates = [
        judge_candidate(model, stages, subnet, batches(), calibration=calibration, confidence=confidence)
        for subnet in chain
    ]
    alone = records_of(candidates, chain_costs(model, stages, torch.zeros(1, 4)), confidence)
    together = record_exits(anytime, batches())
    assert torch.allclose(alone.confidences, together.confidences, atol=1e-6)
    assert torch.equal(alone.correct, together.correct)
    assert alone.gmacs == together.gmacs


def test_labels_of_images_that_cannot_be_read_do_not_count():
    model, stages = toy()
    chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(3, 1), (3, 3)]]
    [(x, y)] = batches(1)
    y[3] = -100
    assert record_exits(unloaf.Anytime(model, stages, chain), [(x, y)]).correct.shape == (2, 15)


def test_nothing_is_said_of_logits_that_are_not_finite():
    model, stages = toy()
    chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(3, 1), (3, 3)]]
    anytime = unloaf.Anytime(model, stages, chain)
    with torch.no_grad():
        model.head.bias[0] = math.inf
    with pytest.raises(ValueError, match=r"exit 0 \(3-1\) gives logits that are not finite"):
        unloaf.calibrate_anytime(anytime, batches(), max_drop=1)


def test_a_loader_without_images_is_refused():
    model, stages = toy()
    chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(3, 1), (3, 3)]]
    with pytest.raises(ValueError, match="yielded no image"):
        unloaf.calibrate_anytime(unloaf.Anytime(model, stages, chain), [], max_drop=1)


# --- the choice of a chain


def said(stages, depths, sure, right):
    sure = torch.tensor(sure)
    subnet = unloaf.Subnet.from_depths(stages, depths)
    predicted = torch.tensor(right).long()
    return Candidate(subnet, unloaf.anytime.Scores(predicted, sure, sure), torch.tensor(right).bool())


def costs_by_table(table):
    """Of a chain: each exit costs what the table says of its subnet, and nothing is shared."""

    def costs(chain):
        single = [table[str(subnet)] for subnet in chain]
        return tuple(sum(single[: i + 1]) for i in range(len(single)))

    return costs


def test_the_cheapest_chain_is_picked():
    _, stages = toy()
    costs = costs_by_table({"1-1": 1.0, "2-1": 2.0, "3-3": 10.0})
    main = said(stages, (3, 3), [0.9] * 4, [1, 1, 1, 1])
    # 1-1 is sure and right on two images: 0.5 x 1 + 0.5 x 11 = 6. 2-1 on three: 0.75 x 2 + 0.25 x 12 = 4.5.
    small = said(stages, (1, 1), [0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0])
    larger = said(stages, (2, 1), [0.9, 0.9, 0.9, 0.1], [1, 1, 1, 0])
    # Of two exits the second is better; with both: 2 x 1, 1 x 3, 1 x 13, a mean of 4.5, which saves nothing.
    picked = pick_chain([small, larger, main], costs, Target(max_drop=0), confidence="max-probability")
    assert list(map(str, picked)) == ["2-1", "3-3"]
    cheaper = costs_by_table({"1-1": 0.5, "2-1": 2.0, "3-3": 10.0})
    picked = pick_chain([small, larger, main], cheaper, Target(max_drop=0), confidence="max-probability")
    assert list(map(str, picked)) == ["1-1", "2-1", "3-3"]
    picked = pick_chain([small, larger, main], cheaper, Target(max_drop=0), confidence="max-probability", most=2)
    assert list(map(str, picked)) == ["2-1", "3-3"]


def test_within_a_budget_the_most_accurate_chain_is_picked():
    _, stages = toy()
    costs = costs_by_table({"1-1": 1.0, "2-1": 2.0, "3-3": 10.0})
    main = said(stages, (3, 3), [0.9] * 4, [1, 1, 1, 1])
    small = said(stages, (1, 1), [0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0])
    larger = said(stages, (2, 1), [0.9, 0.9, 0.9, 0.1], [1, 1, 0, 0])
    picked = pick_chain([small, larger, main], costs, Target(max_gmacs=6.0), confidence="max-probability")
    assert list(map(str, picked)) == ["1-1", "3-3"]


def test_a_chain_that_cannot_reach_the_target_is_refused():
    _, stages = toy()
    main, small = said(stages, (3, 3), [0.9] * 4, [1, 1, 0, 0]), said(stages, (1, 1), [0.9] * 4, [1, 0, 0, 0])
    with pytest.raises(ValueError, match=r"the best has 50.00 %"):
        pick_chain([main, small], costs_by_table({"1-1": 1.0, "3-3": 9.0}), Target(min_top1=99), confidence="entropy")
