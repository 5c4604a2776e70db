"""Laws of the samplers against probabilities written down by hand, and what holds for every draw."""

from collections import Counter
from fractions import Fraction
from itertools import product

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toy_networks import ToyNetwork
from unloaf import (
    ExponentialDecaySampler,
    InterStageSampler,
    OrderedSampler,
    RawSampler,
    Stage,
    StochasticDepth,
    StochasticSampler,
    Subnet,
    enumerate_subnets,
    find_stages,
)
from unloaf.sampling import draw_generator, sample_chains
from unloaf.subnet import check_subnet


def stage(name, depth, *, headed=False):
    return Stage(
        name, tuple(f"{name}.{i}" for i in range(depth)), (not headed, *(True,) * (depth - 1)), (True,) * depth
    )


HEADED, FREE = stage("headed", 3, headed=True), stage("free", 2)
STAGES = (HEADED, FREE)
DRAWS = 3000


def bits(*stages):
    return tuple(tuple(letter == "1" for letter in text) for text in stages)


def law(*stages):
    """Joint probabilities of stages that are independent of each other, each given as {flags: weight}."""
    joint = {}
    for choice in product(*(weights.items() for weights in stages)):
        joint[bits(*(flags for flags, _ in choice))] = [weight for _, weight in choice]
    totals = [sum(weights.values()) for weights in stages]
    return {
        keep: float(torch.tensor([w / t for w, t in zip(weights, totals, strict=True)], dtype=torch.float64).prod())
        for keep, weights in joint.items()
    }


def p_value(counts, probabilities):
    """Of Pearson's chi-square test. An outcome that the law does not know makes it zero."""
    if set(counts) - set(probabilities):
        return 0.0
    if len(probabilities) == 1:
        return 1.0
    total = sum(counts.values())
    statistic = sum((counts[k] - total * p) ** 2 / (total * p) for k, p in probabilities.items())
    freedom = len(probabilities) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))


def draws(sampler, stages=STAGES, parent=None):
    return [sampler.sample(stages, draw_generator(0, step, 0), parent) for step in range(DRAWS)]


DEPTHS_3 = {"100": 1, "110": 1, "111": 1}
DEPTHS_2 = {"10": 1, "11": 1}
LAWS = {
    "ordered": (OrderedSampler(), None, law(DEPTHS_3, DEPTHS_2)),
    "ordered, minimum": (OrderedSampler(min_depths=(2, 1)), None, law({"110": 1, "111": 1}, DEPTHS_2)),
    "ordered in a parent": (OrderedSampler(), bits("110", "10"), law({"100": 1, "110": 1}, {"10": 1})),
    "ordered in a parent with holes": (OrderedSampler(), bits("101", "01"), law({"100": 1, "101": 1}, {"01": 1})),
    "inter-stage": (InterStageSampler(), None, law({"110": 1, "111": 1}, {"11": 1})),
    "inter-stage, explicit": (InterStageSampler(((1, 3), (2,))), None, law({"100": 1, "111": 1}, {"11": 1})),
    "inter-stage, parent below": (InterStageSampler(), bits("100", "11"), law({"100": 1}, {"11": 1})),
    # base ** dropped: 1/4, 1/2, 1 and 1/2, 1
    "decay": (ExponentialDecaySampler(), None, law({"100": 1, "110": 2, "111": 4}, {"10": 1, "11": 2})),
    "decay 1/4": (ExponentialDecaySampler(0.25), None, law({"100": 1, "110": 4, "111": 16}, {"10": 1, "11": 4})),
    "decay 1": (ExponentialDecaySampler(1.0), None, law(DEPTHS_3, DEPTHS_2)),
    # inherited: d is the parent's depth
    "decay in a parent": (ExponentialDecaySampler(), bits("110", "11"), law({"100": 1, "110": 2}, {"10": 1, "11": 2})),
    "decay, minimum": (ExponentialDecaySampler(min_depths=(2, 2)), None, law({"110": 1, "111": 2}, {"11": 1})),
    # all subsets alike, but for the empty stage
    "stochastic": (
        StochasticSampler(),
        None,
        law({"100": 1, "110": 1, "101": 1, "111": 1}, {"10": 1, "01": 1, "11": 1}),
    ),
    # odds 1 : 3 for each block; of 16, 9 leave the second stage empty and are drawn again
    "stochastic 1/4": (
        StochasticSampler(0.25),
        None,
        law({"100": 9, "110": 3, "101": 3, "111": 1}, {"10": 3, "01": 3, "11": 1}),
    ),
    "stochastic in a parent": (StochasticSampler(), bits("101", "01"), law({"100": 1, "101": 1}, {"01": 1})),
    # 1 - l/5 (1 - 0.5) for the blocks l = 1..5: 0.9 (unskippable), 0.8, 0.7; 0.6, 0.5
    "linear decay": (
        StochasticSampler(final_survival=0.5),
        None,
        law({"100": 6, "110": 24, "101": 14, "111": 56}, {"10": 3, "01": 2, "11": 3}),
    ),
}


@pytest.mark.parametrize("case", LAWS)
def test_law_of_a_sampler(case):
    sampler, parent, expected = LAWS[case]
    drawn = draws(sampler, parent=None if parent is None else Subnet(parent))
    assert p_value(Counter(subnet.keep for subnet in drawn), expected) > 1e-4


def test_law_of_the_raw_sampler():
    # Each block of the free stage whole, branch alone or skipped, one in three; both skipped is drawn again.
    modes = {"whole": (True, True), "branch": (True, False), "skipped": (False, True)}
    pairs = [pair for pair in product(modes, modes) if pair != ("skipped", "skipped")]
    expected = {tuple(modes[mode] for mode in pair): Fraction(1, 8) for pair in pairs}
    counts = Counter(tuple(zip(s.keep[0], s.shortcut[0], strict=True)) for s in draws(RawSampler(), [FREE]))
    assert p_value(counts, {k: float(p) for k, p in expected.items()}) > 1e-4


def test_law_of_the_raw_sampler_inside_a_branch_alone():
    # A block that runs as its branch alone has one path: a subnet of it cannot add the skip connection again.
    parent = Subnet(bits("11"), bits("01"))
    counts = Counter((subnet.keep[0], subnet.shortcut[0]) for subnet in draws(RawSampler(), [FREE], parent))
    second = [(True, True), (True, False), (False, True)]
    assert p_value(counts, {((True, keep), (False, cut)): 1 / 3 for keep, cut in second}) > 1e-4


def test_the_raw_sampler_runs_unskippable_blocks_whole():
    drawn = draws(RawSampler())
    assert all(subnet.keep[0][0] and subnet.shortcut[0][0] for subnet in drawn)


SPACES = {
    "ResNet-50": ((3, 4, 6, 3), True, ((3,), (3, 4), (3, 4, 5, 6), (3,))),  # methods.md, item 4 of ST++
    "Swin-T": ((2, 2, 6, 2), False, ((2,), (2,), (2, 3, 4, 5, 6), (2,))),
    "PVT": ((3, 4, 6, 3), False, ((3,), (3, 4), (3, 4, 5, 6), (3,))),
    "ViT": ((12,), False, ((6, 7, 8, 9, 10, 11, 12),)),
    "ResNet-18": ((2, 2, 2, 2), True, ((1, 2),) * 4),
    "ResNet-56": ((9, 9, 9), True, ((5, 6, 7, 8, 9),) * 3),
}


def stages_of(depths, headed):
    return tuple(stage(f"s{i}", depth, headed=headed) for i, depth in enumerate(depths))


@pytest.mark.parametrize("name", SPACES)
def test_default_space_of_the_inter_stage_rule(name):
    depths, headed, expected = SPACES[name]
    assert InterStageSampler().space(stages_of(depths, headed)) == expected


@pytest.mark.parametrize("name", ["ResNet-50", "Swin-T"])
def test_law_of_the_inter_stage_rule(name):
    depths, headed, space = SPACES[name]
    stages = stages_of(depths, headed)
    counts = Counter(subnet.depths for subnet in draws(InterStageSampler(), stages))
    outcomes = list(product(*space))
    assert p_value(counts, dict.fromkeys(outcomes, 1 / len(outcomes))) > 1e-4


def test_enumeration_lists_the_space_once_the_main_network_first():
    listed = enumerate_subnets(stages_of((3, 4, 6, 3), True), InterStageSampler())
    assert [subnet.depths for subnet in listed] == [(3, b, c, 3) for b in (4, 3) for c in (6, 5, 4, 3)]


# --- the tests of laws can fail


def test_the_chi_square_test_notices_a_wrong_law():
    counts = Counter(subnet.keep for subnet in draws(OrderedSampler()))
    assert p_value(counts, law({"100": 4, "110": 5, "111": 4}, DEPTHS_2)) < 1e-4


# --- arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExponentialDecaySampler(0.0), "base is 0.0"),
        (lambda: ExponentialDecaySampler(1.5), "base is 1.5"),
        (lambda: ExponentialDecaySampler(float("nan")), "base is nan"),
        (lambda: StochasticSampler(0.0), "survival is 0.0"),
        (lambda: StochasticSampler(1.1), "survival is 1.1"),
        (lambda: StochasticSampler(final_survival=-0.5), "final_survival is -0.5"),
        (lambda: OrderedSampler((1,)).space(STAGES), r"1 depths \(1,\) for 2 stages \(headed, free\)"),
        (lambda: OrderedSampler((0, 1)).space(STAGES), r"'headed' keeps 0 of 3.*\(1, 2, 3\)"),
        (lambda: OrderedSampler((3, 3)).space(STAGES), r"'free' keeps 3 of 2.*\(1, 2\)"),
        (lambda: InterStageSampler(((1,),)).space(STAGES), "names depths for 1 stages.*headed, free"),
        (lambda: InterStageSampler(((1,), ())).space(STAGES), "one non-empty tuple for each"),
        (lambda: InterStageSampler(((1, 4), (1,))).space(STAGES), r"keeps 4 of 3.*\(1, 2, 3\)"),
        (lambda: InterStageSampler(((0, 3), (1,))).space(STAGES), r"keeps 0 of 3.*\(1, 2, 3\)"),
    ],
)
def test_arguments_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_explicit_space_with_an_impossible_depth_inside_is_refused():
    odd = Stage("odd", tuple("abc"), (True, True, True))
    with pytest.raises(ValueError, match="'odd'"):
        InterStageSampler(((1, 2.5, 3),)).space([odd])


# --- every draw

samplers = st.one_of(
    st.just(OrderedSampler()),
    st.just(InterStageSampler()),
    st.just(RawSampler()),
    st.builds(ExponentialDecaySampler, st.floats(0.01, 1)),
    st.builds(StochasticSampler, st.floats(0.1, 1)),
    st.builds(lambda final: StochasticSampler(final_survival=final), st.floats(0.1, 1)),
)
some_stages = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4).map(
    lambda flags: tuple(
        Stage(f"s{i}", tuple(f"s{i}.{j}" for j in range(len(f))), tuple(f)) for i, f in enumerate(flags)
    )
)
numbers = st.integers(0, 2**40)


@given(samplers, some_stages, numbers)
def test_every_draw_is_a_subnet_of_the_stages(sampler, stages, seed):
    check_subnet(stages, sampler.sample(stages, draw_generator(seed, 0, 0)))


@given(samplers, samplers, some_stages, numbers)
def test_every_draw_lies_inside_its_parent(first, second, stages, seed):
    parent = first.sample(stages, draw_generator(seed, 0, 0))
    drawn = second.sample(stages, draw_generator(seed, 0, 1), parent)
    check_subnet(stages, drawn)
    assert drawn <= parent


@given(samplers, some_stages, numbers, numbers, numbers)
def test_a_draw_depends_on_seed_step_and_index_alone(sampler, stages, seed, step, index):
    torch.manual_seed(1)
    drawn = sampler.sample(stages, draw_generator(seed, step, index))
    torch.manual_seed(2)
    assert sampler.sample(stages, draw_generator(seed, step, index)) == drawn


@given(samplers, some_stages)
def test_a_draw_leaves_the_global_generator_alone(sampler, stages):
    before = torch.random.get_rng_state()
    sampler.sample(stages, draw_generator(0, 0, 0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "step", "index"])
def test_another_seed_step_or_index_is_another_draw(other):
    one, another = (int(torch.randint(2**62, (1,), generator=draw_generator(*key))) for key in ((0, 0, 0), other))
    assert one != another


def test_another_purpose_is_another_draw():
    generators = draw_generator(0, 0, 0), draw_generator(0, 0, 0, purpose="side")
    one, another = (int(torch.randint(2**62, (1,), generator=generator)) for generator in generators)
    assert one != another


def test_neighbouring_steps_are_independent():
    depths = [subnet.depths[0] for subnet in draws(OrderedSampler(), [HEADED])]
    pairs = Counter(zip(depths[::2], depths[1::2], strict=True))
    assert p_value(pairs, dict.fromkeys(product((1, 2, 3), repeat=2), 1 / 9)) > 1e-4


# --- chains


class Recording:
    def __init__(self):
        self.parents = []

    def sample(self, stages, generator, parent=None):
        self.parents.append(parent)
        return ExponentialDecaySampler().sample(stages, generator, parent)


def test_chains_restart_from_the_main_network():
    recording = Recording()
    a, b, _, d, e, _ = sample_chains(recording, [stage("s", 12)], groups=3, chains=2, seed=0, step=0)
    assert recording.parents == [None, a, b, None, d, e]


@settings(max_examples=50)
@given(samplers, some_stages, numbers)
def test_each_subnet_of_a_chain_lies_inside_the_one_before(sampler, stages, seed):
    one, two, three = sample_chains(sampler, stages, groups=3, chains=1, seed=seed, step=0)
    assert three <= two <= one <= Subnet.full(stages)


def test_law_of_the_second_subnet_of_a_chain():
    # From depth d, depth k has probability 2**k / (2**1 + ... + 2**d): 3 -> 1, 2, 3 with 1/7, 2/7, 4/7.
    second = Counter(
        sample_chains(ExponentialDecaySampler(), [HEADED], groups=2, chains=1, seed=0, step=step)[1].depths[0]
        for step in range(DRAWS)
    )
    expected = {
        1: Fraction(1, 7) + Fraction(2, 7) * Fraction(1, 3) + Fraction(4, 7) * Fraction(1, 7),
        2: Fraction(2, 7) * Fraction(2, 3) + Fraction(4, 7) * Fraction(2, 7),
        3: Fraction(4, 7) * Fraction(4, 7),
    }
    assert p_value(second, {k: float(p) for k, p in expected.items()}) > 1e-4


@pytest.mark.parametrize("seed", [None, 2.0, "2"])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match="give a whole number"):
        draw_generator(seed, 0, 0)
    with pytest.raises(ValueError, match="give a whole number"):
        StochasticDepth(*_toy(), seed=seed)


def test_a_seed_of_numpy_is_that_number():
    method = StochasticDepth(*_toy(), seed=numpy.int64(2))
    assert method.draw(4) == StochasticDepth(*_toy(), seed=2).draw(4)
    assert type(method.state_dict()["seed"]) is int


def _toy():
    model = ToyNetwork()
    return model, find_stages(model, torch.zeros(2, 4))
