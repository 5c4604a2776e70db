"""Loss and accuracy of a network, by hand, and which subnets are judged."""

import copy
import math
from collections import UserDict

import pytest
import torch
from torch import nn

import unloaf
from toy_networks import Block, ToyNetwork
from unloaf import Stage
from unloaf.evaluation import accuracy, choose_subnets
from unloaf.inputs import to_device

# Six classes. Targets: the highest logit, the lowest of six, the second highest.
SCORES = torch.tensor([[3.0, 2, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
LABELS = torch.tensor([0, 0, 1])


def cross_entropy(scores: list[float], label: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[label]


MEAN_LOSS = sum(map(cross_entropy, SCORES.tolist(), LABELS.tolist())) / 3


def test_top1_top5_and_loss_by_hand():
    result = accuracy(nn.Identity(), [(SCORES[:2], LABELS[:2]), (SCORES[2:], LABELS[2:])])
    assert (result.top1, result.top5) == pytest.approx((100 / 3, 200 / 3))
    assert result.loss == pytest.approx(MEAN_LOSS, rel=1e-6)  # float32


def test_every_example_counts_the_same_in_batches_of_different_sizes():
    whole = accuracy(nn.Identity(), [(SCORES, LABELS)])
    split = accuracy(nn.Identity(), [(SCORES[:2], LABELS[:2]), (SCORES[2:], LABELS[2:])])
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (split.top1, split.top5) == (whole.top1, whole.top5)


def test_targets_of_minus_100_are_not_counted():
    scores = torch.cat([SCORES, torch.tensor([[9.0, 0, 0, 0, 0, 0]])])
    result = accuracy(nn.Identity(), [(scores, torch.cat([LABELS, torch.tensor([-100])]))])
    assert result == accuracy(nn.Identity(), [(SCORES, LABELS)])


def test_up_to_five_classes_are_all_among_the_first_five():
    assert accuracy(nn.Identity(), [(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]))]).top5 == 100


def test_each_position_of_a_sequence_is_an_example():
    scores = SCORES.view(1, 3, 6)
    assert accuracy(nn.Identity(), [(scores, LABELS.view(1, 3))]) == accuracy(nn.Identity(), [(SCORES, LABELS)])


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_put_back(mode):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)).train(mode)
    model[0].train(not mode)
    accuracy(model, [(SCORES, LABELS)])
    assert [module.training for module in model.modules()] == [mode, not mode, mode]


def test_the_network_is_judged_in_evaluation_mode():
    assert accuracy(nn.Dropout(0.99), [(SCORES, LABELS)]) == accuracy(nn.Identity(), [(SCORES, LABELS)])


def test_batch_norm_statistics_stay():
    model = nn.BatchNorm1d(6)
    accuracy(model, [(SCORES, LABELS)])
    assert model.running_mean is not None
    assert model.running_mean.eq(0).all()


def test_sums_are_added_over_processes_before_they_are_divided():
    # Another process has one example with loss 2, right at once.
    other = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    result = accuracy(nn.Identity(), [(SCORES, LABELS)], reduce=lambda sums: sums + other)
    assert (result.top1, result.top5) == pytest.approx((50, 75))
    assert result.loss == pytest.approx((3 * MEAN_LOSS + 2) / 4, rel=1e-6)


def test_autocast_around_it_does_not_matter():
    torch.manual_seed(0)
    model = nn.Linear(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = accuracy(model, [(SCORES, LABELS)])
    assert inside == accuracy(model, [(SCORES, LABELS)])


@pytest.mark.parametrize("loader", [[], [(SCORES, torch.full((3,), -100))]])
def test_no_example_is_an_error(loader):
    with pytest.raises(ValueError, match="no example to evaluate on; give at least one batch"):
        accuracy(nn.Identity(), loader)


class Keyed(nn.Module):
    """Takes its inputs by name, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, scores, scale):
        return self.norm(scores) * scale


KEYED = {"dict": dict, "UserDict": UserDict}


@pytest.mark.parametrize("kind", KEYED.values(), ids=KEYED)
def test_mappings_are_judged_as_keyword_arguments(kind):
    model = Keyed()
    plain = nn.Sequential(model.norm)
    assert accuracy(model, [(kind(scores=SCORES, scale=1.0), LABELS)]) == accuracy(plain, [(SCORES, LABELS)])


@pytest.mark.parametrize("kind", KEYED.values(), ids=KEYED)
def test_tensors_of_a_mapping_are_moved_to_the_models_device(kind):
    moved = to_device(kind(scores=SCORES, scale=1.0), torch.device("meta"))
    assert (moved["scores"].device.type, moved["scale"]) == ("meta", 1.0)


class Named(ToyNetwork):
    def forward(self, pixels):
        return super().forward(pixels)


@pytest.mark.parametrize("kind", KEYED.values(), ids=KEYED)
def test_rows_of_subnets_are_the_same_for_mappings(kind):
    torch.manual_seed(0)
    plain, named = ToyNetwork(norm=True), Named(norm=True)
    named.load_state_dict(plain.state_dict())
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    stages = unloaf.find_stages(plain, x)
    expected = unloaf.evaluate_subnets(plain, stages, [(x, y)], calibration=[x])
    data = [(kind(pixels=x), y)]
    assert unloaf.evaluate_subnets(named, stages, data, calibration=[kind(pixels=x)]) == expected
    assert unloaf.evaluate_subnets(named, stages, data, calibration=data) == expected


def after_a_short_run():
    """A network whose running statistics lag behind its weights, with data."""
    torch.manual_seed(0)
    model, x, y = ToyNetwork(norm=True), torch.randn(32, 4), torch.randint(3, (32,))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.fill_(2.0)
            module.running_var.fill_(9.0)
    return model, unloaf.find_stages(model, x), x, y


def by_hand(model, x, y, *, refit=False):
    """Loss and accuracy of an ordinary network by torch alone, its statistics those of the one batch or its own."""
    model = copy.deepcopy(model).eval()
    if refit:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.train().momentum = 1.0
        model(x)
    with torch.no_grad():
        logits = model.eval()(x)
    return nn.functional.cross_entropy(logits, y).item(), 100 * (logits.argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("first", [True, False], ids=["main network first", "main network last"])
def test_the_main_network_is_judged_as_its_subnets_are_and_as_it_stands(first):
    model, stages, x, y = after_a_short_run()
    full, small = unloaf.Subnet.full(stages), unloaf.Subnet.from_depths(stages, (2, 1))
    given = [full, small] if first else [small, full]
    rows = unloaf.evaluate_subnets(model, stages, [(x, y)], subnets=given, calibration=[x])
    assert [row.subnet for row in rows] == given
    main, other = rows if first else reversed(rows)
    assert (main.loss, main.top1) == pytest.approx(by_hand(model, x, y, refit=True), rel=1e-5)
    assert (main.running.loss, main.running.top1) == pytest.approx(by_hand(model, x, y), rel=1e-5)
    assert abs(main.loss - main.running.loss) > 0.01
    exported = unloaf.export_subnet(model, stages, small)
    assert (other.loss, other.top1) == pytest.approx(by_hand(exported, x, y, refit=True), rel=1e-5)
    assert (main.statistics, other.statistics, other.running) == ("re-estimated", "re-estimated", None)


def test_without_calibration_all_are_judged_with_the_running_statistics():
    model, stages, x, y = after_a_short_run()
    rows = unloaf.evaluate_subnets(model, stages, [(x, y)], subnets=3)
    assert (rows[0].loss, rows[0].top1) == pytest.approx(by_hand(model, x, y), rel=1e-5)
    assert {(row.statistics, row.running) for row in rows} == {("running", None)}


def test_a_network_without_statistics_is_judged_once():
    model, x, y = ToyNetwork(), torch.randn(8, 4), torch.randint(3, (8,))
    rows = unloaf.evaluate_subnets(model, unloaf.find_stages(model, x), [(x, y)], subnets=2, calibration=[x])
    assert {(row.statistics, row.running) for row in rows} == {(None, None)}


def test_each_row_is_told_as_soon_as_it_is_known():
    model, stages, x, y = after_a_short_run()
    seen = []

    class Loader:
        def __iter__(self):
            seen.append("pass")
            return iter([(x, y)])

    rows = unloaf.evaluate_subnets(model, stages, Loader(), subnets=3, on_row=seen.append)
    assert seen == ["pass", rows[0], "pass", rows[1], "pass", rows[2]]


def test_subnets_given_as_text_are_refused():
    model = ToyNetwork()
    stages = unloaf.find_stages(model, torch.randn(2, 4))
    with pytest.raises(
        ValueError, match=r"'3' is of type str; give a Subnet, e\.g\. Subnet\.from_depths\(stages, \(3, 3\)\)"
    ):
        unloaf.evaluate_subnets(model, stages, [(torch.randn(2, 4), torch.tensor([0, 1]))], subnets=["3"])


def stages_of(*depths):
    """Stages of so many blocks, of which all but the first can be skipped."""
    return tuple(
        Stage(f"layer{i}", tuple(f"layer{i}.{j}" for j in range(n)), (False,) + (True,) * (n - 1))
        for i, n in enumerate(depths)
    )


# The eight subnets of docs/results/cifar100-cpu-trials.json, and what was drawn of 4,096 when the records were made.
@pytest.mark.parametrize(
    ("depths", "seed", "drawn"),
    [
        ((3, 3, 3), 0, ["3-2-2", "3-1-3", "2-1-3", "1-3-2", "1-2-3", "1-2-1", "1-1-3", "1-1-2"]),
        ((16, 16, 16), 3, ["13-3-16", "12-15-13", "7-3-3", "4-6-16"]),
    ],
)
def test_drawn_subnets_are_those_of_the_published_records(depths, seed, drawn):
    chosen = choose_subnets(stages_of(*depths), 1 + len(drawn), seed=seed)
    assert [str(subnet) for subnet in chosen] == ["-".join(map(str, depths)), *drawn]


def test_few_of_very_many_subnets_are_drawn_without_listing_all(monkeypatch):
    monkeypatch.setattr("unloaf.evaluation.enumerate_subnets", lambda stages: pytest.fail("all were listed"))
    stages = stages_of(*[10] * 6)
    one, again, other = (choose_subnets(stages, 5, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one[0].depths == other[0].depths == (10,) * 6
    assert len(set(one)) == 5
    assert not set(one[1:]) & set(other[1:])  # of a million


def test_most_of_very_many_subnets_are_drawn_too():
    chosen = choose_subnets(stages_of(17, 17, 17), 4913 - 1)
    assert (str(chosen[0]), len(set(chosen))) == ("17-17-17", 4912)


# --- what cannot be judged by accuracy, or not as it is


@pytest.mark.parametrize("spoiled", [SCORES * math.nan, SCORES.clone().index_fill_(1, torch.tensor([5]), math.nan)])
def test_nan_is_no_prediction(spoiled):
    result = accuracy(nn.Identity(), [(SCORES, LABELS), (spoiled, LABELS)])
    assert all(map(math.isnan, (result.loss, result.top1, result.top5)))


def test_nan_where_nothing_is_judged_does_not_matter():
    scores = torch.cat([SCORES, torch.full((1, 6), math.nan)])
    labels = torch.cat([LABELS, torch.tensor([-100])])
    assert accuracy(nn.Identity(), [(scores, labels)]) == accuracy(nn.Identity(), [(SCORES, LABELS)])


def test_another_label_may_stand_for_what_is_not_judged():
    scores, labels = torch.cat([SCORES, SCORES[:1]]), torch.cat([LABELS, torch.tensor([255])])
    found = accuracy(nn.Identity(), [(scores, labels)], ignore_index=255)
    assert found == accuracy(nn.Identity(), [(SCORES, LABELS)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype):
    assert accuracy(nn.Identity(), [(SCORES, LABELS.to(dtype))]) == accuracy(nn.Identity(), [(SCORES, LABELS)])


def test_a_readout_says_where_the_classes_are():
    images = SCORES.view(1, 3, 1, 6).movedim(-1, 1)  # classes second
    labels = LABELS.view(1, 3, 1)
    found = accuracy(nn.Identity(), [(images, labels)], readout=lambda output: output.movedim(1, -1))
    assert found == accuracy(nn.Identity(), [(SCORES, LABELS)])


BATCHES = {
    "classes second": ((torch.zeros(2, 6, 3, 4), torch.zeros(2, 3, 4).long()), r"readout=.*movedim\(1, -1\)"),
    "other rows": ((SCORES, LABELS[:2]), r"y has shape \(2,\), the logits \(3, 6\); .*one label for each row"),
    "shares": (
        (SCORES, SCORES.softmax(-1)),
        r"float32; accuracy needs class indices \(.* y\.argmax\(-1\)\), or give",
    ),
    "one output": ((SCORES[:, :1], LABELS), "at least 2 classes, or give a metric"),
    "a list": ((SCORES, [0, 0, 1]), "y is list; accuracy needs a tensor of class indices, or give a metric"),
    "a mapping": (
        {"image": SCORES, "label": LABELS},
        r"is dict with the keys image, label; .*\[\(batch\['image'\], batch\['label'\]\) for batch in loader\]",
    ),
    "a tensor of two rows": (SCORES[:2], "is Tensor; evaluation takes pairs"),
    "three parts": (
        (SCORES, LABELS, LABELS),
        r"is 3 parts; evaluation takes pairs .*\[\(batch\[0\], batch\[1\]\)",
    ),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_batches_that_cannot_be_judged(batch):
    given, message = BATCHES[batch]
    with pytest.raises(ValueError, match=message):
        accuracy(nn.Identity(), [given])


def toy_rows(loader, **options):
    torch.manual_seed(0)
    model = ToyNetwork()
    return unloaf.evaluate_subnets(model, unloaf.find_stages(model, torch.randn(2, 4)), loader, **options)


def test_a_generator_serves_all_subnets():
    batches = [(torch.randn(3, 4), torch.tensor([0, 1, 2])), (torch.randn(5, 4), torch.zeros(5).long())]
    assert toy_rows((batch for batch in batches), subnets=3) == toy_rows(batches, subnets=3)


@pytest.mark.parametrize("mean", [True, False], ids=["means of batches", "numbers of examples"])
def test_a_metric_is_averaged_over_the_examples(mean):
    def absolute(output, y):
        error = (output - y).abs().mean(-1)
        return error.mean() if mean else error

    batches = [(torch.randn(size, 4), torch.randn(size, 3)) for size in (5, 2)]
    rows = toy_rows(batches, subnets=3, metric=absolute)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    torch.manual_seed(0)
    model = ToyNetwork()
    stages = unloaf.find_stages(model, x)
    for row in rows:
        with torch.no_grad(), unloaf.active_subnet(model, stages, row.subnet):
            expected = float((model(x) - y).abs().mean())
        assert row.metric == pytest.approx(expected, rel=1e-6)
        assert all(map(math.isnan, (row.top1, row.top5, row.loss)))


def test_a_metric_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"metric returned shape \(3, 3\) for 3 examples; give one number, or 3"):
        toy_rows([(torch.randn(3, 4), torch.randn(3, 3))], subnets=1, metric=lambda output, y: output - y)


class Keeps(Block):
    """Stores a feature in every pass, with its graph."""

    def __init__(self, kind):
        super().__init__(4, 4)
        self.kind = kind

    def forward(self, x):
        kept = super().forward(x)
        self.last = self.kind(kept)
        return kept


@pytest.mark.parametrize("kind", [lambda t: t, lambda t: [t], lambda t: {"t": t}], ids=["itself", "list", "dict"])
def test_a_kept_graph_is_named_where_the_model_cannot_be_copied(kind):
    model, x = nn.Sequential(Keeps(kind), Keeps(kind), nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.randn(6, 4)
    stages = unloaf.find_stages(model, x)
    unloaf.StimulativeTraining(model, stages).backward(x, torch.zeros(6).long())
    data = [(x, torch.zeros(6).long())]
    message = r"module '0' \(Keeps\) keeps a tensor .* with its graph, 'last'.*detach it"
    with pytest.raises(ValueError, match=message):
        unloaf.evaluate_subnets(model, stages, data, subnets=2, calibration=[x])
    with pytest.raises(ValueError, match=message):
        unloaf.export_subnet(model, stages, unloaf.Subnet.full(stages))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_scripted_models_are_refused(whole):
    part = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    model = part if whole else nn.Sequential(nn.Linear(6, 6), part)
    name = "the model" if whole else "module '1'"
    with pytest.raises(ValueError, match=f"{name} was compiled by torch.jit.*give the model as it was before"):
        unloaf.find_stages(model, torch.zeros(2, 6))
