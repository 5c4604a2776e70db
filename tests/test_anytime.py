"""The confidence cascade: each exit's own logits, and each block once for an image, as hooks of inner layers count."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import unloaf
from toy_networks import ToyNetwork
from unloaf.anytime import Anytime, scores
from unloaf.stages import call_model

DEPTHS = [(3, 1), (3, 2), (3, 3)]


def toy(*, seed=0, **options):
    torch.manual_seed(seed)
    model = ToyNetwork(**options).double().eval()
    return model, unloaf.find_stages(model, torch.zeros(1, 4).double())


def chain_of(stages, depths=DEPTHS):
    return [unloaf.Subnet.from_depths(stages, one) for one in depths]


def images(count=12, seed=1):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).double()


def sure_of_some(anytime, x, exit=0):
    """A threshold at which about half of the images leave at this exit."""
    return float(anytime.all_exits(x)[exit].softmax(-1).amax(-1).median())


def own_logits(model, stages, subnet, x, calibration=None):
    """A subnet by itself: a copy whose statistics recalibrate_bn estimates, where there is something to estimate on."""
    alone = copy.deepcopy(model)
    with torch.no_grad(), unloaf.active_subnet(alone, stages, subnet):
        if calibration is not None:
            unloaf.recalibrate_bn(alone, calibration)
        return alone(x)


def counted(model):
    """How many images go through each of the linear layers, by their hooks."""
    rows = Counter()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, path=path: rows.update({path: len(args[0])}))
    return rows


# --- what an image gets


@pytest.mark.parametrize("depths", [DEPTHS, [(1, 1), (3, 3)], [(1, 2), (2, 2), (2, 3), (3, 3)]], ids=str)
def test_logits_are_those_of_the_subnet_that_answered(depths):
    model, stages = toy()
    chain, x = chain_of(stages, depths), images()
    anytime = Anytime(model, stages, chain)
    anytime.set_threshold(sure_of_some(anytime, x))
    logits, exits = anytime(x)
    assert len(set(exits.tolist())) > 1
    for row, index in enumerate(exits.tolist()):
        assert (logits[row] - own_logits(model, stages, chain[index], x)[row]).abs().max() < 1e-14


def test_an_image_leaves_at_the_first_exit_that_is_sure():
    model, stages = toy()
    chain, x = chain_of(stages), images()
    anytime = Anytime(model, stages, chain)
    probabilities = [own_logits(model, stages, subnet, x).softmax(-1).amax(-1) for subnet in chain]
    low = float(probabilities[0].median())
    high = float(probabilities[1][probabilities[0] < low].median())
    anytime.set_threshold((low, high))
    expected = [0 if a >= low else 1 if b >= high else 2 for a, b, _ in zip(*probabilities, strict=True)]
    assert anytime(x).exits.tolist() == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize(("threshold", "exit"), [(0.0, 0), (1.0, 2)])
def test_all_leave_at_the_first_or_the_last_exit(threshold, exit):
    model, stages = toy()
    assert Anytime(model, stages, chain_of(stages), threshold)(images()).exits.tolist() == [exit] * 12


def test_one_image_gets_what_it_gets_in_a_batch():
    model, stages = toy()
    x = images()
    anytime = Anytime(model, stages, chain_of(stages))
    anytime.set_threshold(sure_of_some(anytime, x))
    together, alone = anytime(x), [anytime(x[i : i + 1]) for i in range(len(x))]
    assert [int(one.exits) for one in alone] == together.exits.tolist()
    assert torch.allclose(torch.cat([one.logits for one in alone]), together.logits, rtol=0, atol=1e-14)


def test_entropy_is_relative_to_that_of_equal_probabilities():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).double()
    by_hand = 1 - (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(3)
    assert scores(probabilities.log(), "entropy").sure.tolist() == pytest.approx([by_hand, 0.0], abs=1e-7)


def test_agreement_is_of_two_exits_and_takes_the_less_sure_one():
    first = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]).log()
    second = torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.1, 0.9]]).log()
    before = scores(first, "agreement")
    assert before.confidence(None, "agreement").tolist() == [-1, -1, -1]
    found = scores(second, "agreement").confidence(before, "agreement")
    assert found.tolist() == pytest.approx([0.7, -1, 0.8])


def test_agreement_never_answers_at_the_first_exit():
    model, stages = toy()
    exits = Anytime(model, stages, chain_of(stages), 0.0, confidence="agreement")(images()).exits
    chain = chain_of(stages)
    first, second = (own_logits(model, stages, subnet, images()).argmax(-1) for subnet in chain[:2])
    assert exits.tolist() == [1 if same else 2 for same in (first == second).tolist()]


# --- nothing twice


def test_no_block_runs_twice_for_an_image_in_an_ordered_chain_of_the_last_stage():
    model, stages = toy()
    x = images()
    anytime = Anytime(model, stages, chain_of(stages))
    anytime.set_threshold(sure_of_some(anytime, x))
    rows = counted(model)
    exits = anytime(x).exits
    on_from = [int((exits >= index).sum()) for index in range(3)]
    for path in [f"first.{block}.{layer}" for block in range(3) for layer in ("inner", "outer")]:
        assert rows[path] == 12
    # Exit 1 adds block 1 of the second stage, exit 2 block 2; each has a pass of the head.
    assert [rows[f"second.{block}.inner"] for block in range(3)] == on_from
    assert rows["head"] == sum(on_from)


def test_behind_the_first_skipped_block_other_activations_are_computed():
    model, stages = toy()
    anytime = Anytime(model, stages, chain_of(stages, [(1, 1), (3, 3)]), threshold=1.0)
    rows = counted(model)
    anytime(images())
    assert rows["first.0.inner"] == 12
    assert rows["second.0.inner"] == 24  # once on what first.0 gave, once on what first.2 gave


def test_hooks_of_a_block_see_each_image_once():
    model, stages = toy()
    seen = []
    model.first[1].register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    model.second[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    Anytime(model, stages, chain_of(stages), threshold=1.0)(images())
    assert [len(one) for one in seen] == [12, 12]
    assert all(bool(one.isfinite().all()) for one in seen)


def test_flops_of_a_cascade_are_those_of_the_shares_that_leave():
    model, stages = toy()
    x = images()
    anytime = Anytime(model, stages, chain_of(stages))
    anytime.set_threshold(sure_of_some(anytime, x))
    with FlopCounterMode(display=False) as counter:
        exits = anytime(x).exits
    # By hand: two products of width x width for each block, but the first of a stage, and the head.
    first, second, head = 4 * 6 + 6 * 6 + 2 * (2 * 36), [5 * 6 + 25, 2 * 25, 2 * 25], 5 * 3
    cumulative = [first + sum(second[: i + 1]) + (i + 1) * head for i in range(3)]
    assert counter.get_total_flops() == 2 * sum(cumulative[i] for i in exits.tolist())


# --- batch-norm statistics


def test_every_exit_has_statistics_of_its_own():
    model, stages = toy(norm=True)
    x, calibration = images(), [images(64, seed=2), images(64, seed=3)]
    chain = chain_of(stages, [(1, 1), (3, 1), (3, 3)])
    anytime = Anytime(model, stages, chain)
    anytime.recalibrate(calibration)
    for logits, subnet in zip(anytime.all_exits(x), chain, strict=True):
        assert (logits - own_logits(model, stages, subnet, x, calibration)).abs().max() < 1e-14
        assert (logits - own_logits(model, stages, subnet, x)).abs().max() > 1e-3


def test_what_exits_share_has_one_set_of_statistics():
    model, stages = toy(norm=True)
    anytime = Anytime(model, stages, chain_of(stages))
    anytime.recalibrate([images(64)])
    small, _, main = (anytime.statistics[subnet] for subnet in anytime.subnets)
    assert all(main[name] is tensor for name, tensor in small.items())
    rows = counted(model)
    anytime.set_threshold(1.0)
    anytime(images())
    assert rows["first.2.inner"] == 12


def test_exits_share_statistics_though_batches_change_from_one_to_the_next():
    class Shuffled:
        """Other images each time, as a loader that shuffles or augments gives them."""

        seed = 0

        def __iter__(self):
            self.seed += 1
            return iter([images(64, seed=self.seed)])

    model, stages = toy(norm=True)
    anytime = Anytime(model, stages, chain_of(stages), threshold=1.0)
    anytime.recalibrate(Shuffled())
    rows = counted(model)
    anytime(images())
    assert [rows[f"second.{block}.inner"] for block in range(3)] == [12, 12, 12]


def test_other_statistics_in_a_shared_block_end_the_sharing_there():
    model, stages = toy(norm=True)
    chain = chain_of(stages)
    anytime = Anytime(model, stages, chain)
    anytime.recalibrate([images(64)])
    changed = {subnet: {n: t.clone() for n, t in held.items()} for subnet, held in anytime.statistics.items()}
    changed[chain[-1]]["first.1.norm.running_mean"] += 1
    other = Anytime(model, stages, chain, threshold=1.0, statistics=changed)
    rows = counted(model)
    logits = other(images()).logits
    assert [rows[f"first.{block}.inner"] for block in range(3)] == [12, 24, 24]
    alone = copy.deepcopy(model)
    for name, tensor in changed[chain[-1]].items():
        alone.get_buffer(name).copy_(tensor)
    assert (logits - alone(images())).abs().max() < 1e-14


def test_recalibrating_leaves_the_network_s_own_statistics():
    model, stages = toy(norm=True)
    before = copy.deepcopy(model.state_dict())
    Anytime(model, stages, chain_of(stages)).recalibrate(iter([images(64)]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- a module


def test_it_evaluates_and_leaves_modes_as_they_were():
    model, stages = toy(norm=True, dropout=0.5)
    expected = Anytime(model, stages, chain_of(stages), 1.0)(images()).logits
    model.train()
    model.first.eval()
    anytime = Anytime(model, stages, chain_of(stages), 1.0)
    before = {path: module.training for path, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    assert torch.equal(anytime(images()).logits, expected)
    assert {path: module.training for path, module in model.named_modules()} == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not anytime(images()).logits.requires_grad


def test_a_copy_has_weights_and_statistics_of_its_own():
    model, stages = toy(norm=True)
    anytime = Anytime(model, stages, chain_of(stages), 0.5)
    anytime.recalibrate([images(64)])
    expected = anytime(images())
    other = copy.deepcopy(anytime)
    with torch.no_grad():
        for tensor in [*model.parameters(), *anytime.statistics[anytime.subnets[0]].values()]:
            tensor.zero_()
    assert torch.equal(other(images()).logits, expected.logits)


def test_statistics_move_with_the_network():
    model, stages = toy(norm=True)
    anytime = Anytime(model, stages, chain_of(stages))
    anytime.recalibrate([images(64)])
    moved = copy.deepcopy(anytime).float()
    assert {t.dtype for held in moved.statistics.values() for t in held.values()} == {torch.float32}
    both = zip(moved.all_exits(images().float()), anytime.all_exits(images()), strict=True)
    assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in both)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off(context):
    model, stages = toy()
    expected = Anytime(model, stages, chain_of(stages), 0.6)(images())
    with context():
        found = Anytime(model, stages, chain_of(stages), 0.6)(images())
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.exits, expected.exits)


# --- models that do more than call their modules in a row


class Overwriting(ToyNetwork):
    """Writes into what its modules return, and into its input."""

    def forward(self, x):
        x.mul_(2)
        hidden = self.first(x)
        table = self.table(x)
        hidden = self.act(self.stem(hidden)) + table[0]
        return self.head(self.second(hidden)) + hidden.mean()  # one value of all images, as no network should

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.table = Table()


class Table(nn.Module):
    """Rows that are no images, however many there are."""

    def forward(self, x):
        return torch.arange(18, dtype=x.dtype).view(3, 6)


def test_a_network_that_mixes_images_is_refused():
    torch.manual_seed(0)
    model = Overwriting().double().eval()
    stages = unloaf.find_stages(model, torch.zeros(1, 4).double())
    with pytest.raises(ValueError, match="does not give the logits of subnet"):
        Anytime(model, stages, chain_of(stages))


def test_overwritten_outputs_tables_and_long_ways_are_given_back_right():
    class Apart(Overwriting):
        def forward(self, x):
            x.mul_(2)
            hidden = self.first(x)
            table = self.table(x)
            before = self.stem(hidden)
            late = before[:, :3] * 1
            hidden = self.act(before) + table[0]
            return self.head(self.second(hidden)) + late + x[:, :3]

    torch.manual_seed(0)
    model = Apart().double().eval()
    stages = unloaf.find_stages(model, torch.zeros(1, 4).double())
    chain = chain_of(stages)
    anytime = Anytime(model, stages, chain, threshold=1.0)
    anytime.set_threshold(sure_of_some(anytime, images(3)))
    given = images(3)
    logits, exits = anytime(given)
    assert len(set(exits.tolist())) > 1
    for row, index in enumerate(exits.tolist()):
        assert (logits[row] - own_logits(model, stages, chain[index], images(3))[row]).abs().max() < 1e-13


def test_stages_made_by_hand_are_tried_on_the_first_batch():
    model, stages = toy()
    bare = [unloaf.Stage(stage.name, stage.blocks, stage.skippable) for stage in stages]
    found = Anytime(model, bare, chain_of(stages), 0.6)(images())
    assert torch.equal(found.logits, Anytime(model, stages, chain_of(stages), 0.6)(images()).logits)


# --- bad input


@pytest.mark.parametrize(
    ("depths", "words"),
    [
        ([(3, 3)], "subnets names 1; give at least two"),
        ([], "subnets names 0"),
        ([(1, 2), (2, 1), (3, 3)], "subnet 1-2 is no part of 2-1"),
        ([(3, 3), (1, 1)], "subnet 3-3 is no part of 1-1"),
        ([(1, 1), (1, 1), (3, 3)], "subnets names 1-1 twice"),
    ],
    ids=str,
)
def test_subnets_that_are_no_chain_are_refused(depths, words):
    model, stages = toy()
    with pytest.raises(ValueError, match=words):
        Anytime(model, stages, chain_of(stages, depths))


def test_a_subnet_of_other_stages_is_refused():
    model, stages = toy()
    _, others = toy(depths=(2, 2))
    with pytest.raises(ValueError, match="blocks per stage"):
        Anytime(model, stages, [unloaf.Subnet.full(others), unloaf.Subnet.full(stages)])


@pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan, "0.5", None, True, (0.5,), (0.5, 0.5, 0.5), (0.5, 2.0)])
def test_a_threshold_out_of_range_is_refused(threshold):
    model, stages = toy()
    with pytest.raises(ValueError, match="threshold"):
        Anytime(model, stages, chain_of(stages), threshold)


def test_an_unknown_confidence_is_refused():
    model, stages = toy()
    with pytest.raises(ValueError, match="give max-probability, entropy, agreement"):
        Anytime(model, stages, chain_of(stages), confidence="margin")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(0, 4).double(), "no image; give at least one"),
        ({"x": torch.zeros(1, 4)}, "x is dict; give a tensor"),
        (torch.zeros(2, 4), "x is torch.float32, the model torch.float64"),
        (torch.zeros(2, 4, device="meta").double(), "the batch is on meta, the model on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_that_it_cannot_take_are_refused(x, words):
    model, stages = toy()
    with pytest.raises(ValueError, match=words):
        Anytime(model, stages, chain_of(stages))(x)


@pytest.mark.parametrize(
    "output", [lambda y: y[:, None], lambda y: y[:1], lambda y: y[:, :1], lambda y: y.argmax(-1), lambda y: (y, y)]
)
def test_outputs_that_are_no_logits_are_refused(output):
    class Other(ToyNetwork):
        def forward(self, x):
            return output(super().forward(x))

    model = Other().eval()
    stages = unloaf.find_stages(ToyNetwork(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="logits"):
        Anytime(model, stages, chain_of(stages))(torch.zeros(3, 4))


def test_a_readout_finds_the_logits():
    class Pair(ToyNetwork):
        def forward(self, x):
            return {"out": super().forward(x), "aux": x}

    torch.manual_seed(0)
    model = Pair().eval()
    stages = unloaf.find_stages(ToyNetwork(), torch.zeros(1, 4))
    anytime = Anytime(model, stages, chain_of(stages), 1.0, readout=lambda output: output["out"])
    x = images().float()
    assert torch.allclose(anytime(x).logits, call_model(model, x)["out"])


def test_a_model_whose_modules_hand_on_more_than_they_return_is_refused():
    model, stages = toy()
    marked = [unloaf.Stage(s.name, s.blocks, s.skippable, input_shape=s.input_shape, replayable=False) for s in stages]
    with pytest.raises(ValueError, match="hands on more than its modules return"):
        Anytime(model, marked, chain_of(stages))


def test_an_image_without_finite_logits_goes_on_to_the_last_exit():
    model, stages = toy()
    x = images()
    x[4] = math.nan
    logits, exits = Anytime(model, stages, chain_of(stages), 0.0)(x)
    assert exits.tolist() == [0, 0, 0, 0, 2, *[0] * 7]
    assert bool(logits[4].isnan().all())


def test_statistics_of_another_network_are_refused():
    model, stages = toy(norm=True)
    chain = chain_of(stages)
    with pytest.raises(ValueError, match="are not those of this network's norms"):
        Anytime(model, stages, chain, statistics={chain[0]: {"first.0.norm.running_mean": torch.zeros(6)}})
    with pytest.raises(ValueError, match="statistics of subnet 1-1, which is none of"):
        Anytime(model, stages, chain, statistics={unloaf.Subnet.from_depths(stages, (1, 1)): {}})


def test_no_batch_to_recalibrate_on_is_refused_and_changes_nothing():
    model, stages = toy(norm=True)
    anytime = Anytime(model, stages, chain_of(stages))
    anytime.recalibrate([images(64)])
    before = anytime.statistics
    with pytest.raises(ValueError, match="no batch was given"):
        anytime.recalibrate([])
    assert all(anytime.statistics[s][name] is t for s, held in before.items() for name, t in held.items())
