"""Positions whose label is the criterion's ignore_index count in no loss term: as if they were not in the batch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.reference import separate_passes as twin
from torch import nn

import unloaf
from test_method_batches import dense, raw
from test_methods_bad_input import CALLS, METHODS, WITH_SUBNETS, every_call, every_method, pinned, refuses

TOLERANCE = 1e-10  # of the global norm, in float64; sums over fewer positions are rounded differently
GKT = {"groups": 3, "loops": 2, "ema": 0.3}


class Focal:
    """A loss of one's own that leaves out a label."""

    def __init__(self, ignore_index):
        self.ignore_index = ignore_index

    def __call__(self, logits, y):
        counted = y != self.ignore_index
        log_p = torch.log_softmax(logits[counted], -1).gather(-1, y[counted][:, None])
        return -((1 - log_p.exp()) ** 2 * log_p).mean()


class Around(nn.Module):
    """Another, around one of torch's."""

    def __init__(self, ignore_index):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(ignore_index=ignore_index)

    def forward(self, logits, y):
        return self.loss(logits.flatten(0, -2), y.flatten())


def own(logits, y, ignore_index=7):
    """Another, whose label is the default of an argument."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=ignore_index)


CRITERIA = {
    "default": (None, -100),
    "255": (nn.CrossEntropyLoss(ignore_index=255), 255),
    "function": (F.cross_entropy, -100),
    "bound": (partial(F.cross_entropy, ignore_index=9), 9),
    "argument": (own, 7),
    "attribute": (Focal(5), 5),
    "around": (Around(6), 6),
}


def padded_batch(ignored, positions=5, padding=4):
    """Positions that count, as examples of their own, and the same with others around them."""
    model, stages, _, _ = dense()
    x, y = torch.randn(2, positions, 4).double(), torch.randint(3, (2, positions))
    junk = torch.cat([x, 5 * torch.randn(2, padding, 4).double()], 1)
    order = torch.randperm(positions + padding)
    labels = F.pad(y, (0, padding), value=ignored)
    return model, stages, (x.flatten(0, 1), y.flatten()), (junk[:, order], labels[:, order])


def expected_gradients(name, model, stages, x, y, criterion, subnets):
    """Separate passes over the positions that count."""
    loss = F.cross_entropy if criterion is None or name == "st++" else criterion
    if name == "common":
        return twin.gradients(model, loss(model(x), y))
    if name == "stochastic depth":
        grads = twin.gradients(model, loss(twin.logits_of_subnet(model, stages, subnets[0], x), y))
        return {key: torch.zeros(()) if grad is None else grad for key, grad in grads.items()}
    main = model(x)
    terms = [twin.gradients(model, loss(main, y))]
    students = [twin.logits_of_subnet(model, stages, subnet, x) for subnet in subnets]
    knowledge = {0: main.detach()}
    for index, student in enumerate(students):
        loop, group = divmod(index, GKT["groups"]) if name == "gkt" else (0, 0)
        terms.append(twin.gradients(model, twin.kl(student, knowledge[group])))
        z, before = student.detach(), knowledge.get(group + 1)
        knowledge[group + 1] = z if loop == 0 else GKT["ema"] * before + (1 - GKT["ema"]) * z
    return twin.total(terms)


def step(method, mode, x, y, **options):
    method.model.zero_grad()
    out = CALLS[mode](method, x, y, **options)
    if mode == "forward":
        out.loss.backward()
    return out


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mode", CALLS)
@pytest.mark.parametrize("name", ["common", "stochastic depth", "st", "gkt"])
def test_gradients_are_those_of_the_positions_that_count(name, mode, criterion):
    loss, ignored = CRITERIA[criterion]
    model, stages, (x, y), padded = padded_batch(ignored)
    options = GKT if name == "gkt" else {}
    method = METHODS[name](model, stages, criterion=loss, readout=lambda output: output, **options)
    subnets = pinned(name, stages)
    step(method, mode, *padded, subnets=subnets)
    assert twin.distance(model, expected_gradients(name, model, stages, x, y, loss, subnets)) < TOLERANCE


@pytest.mark.parametrize("mode", CALLS)
def test_gradients_of_st_plus_are_those_of_the_positions_that_count(mode):
    model, stages, (x, y), padded = padded_batch(-100)
    subnets = pinned("st", stages)
    step(METHODS["st++"](model, stages, amplitude=2.0, num_subnets=3), mode, *padded, subnets=subnets)
    view = partial(twin.normalised, amplitude=2.0)
    assert twin.distance(model, twin.stimulative(model, stages, subnets, x, y, view=view, weight=1 / 3)) < TOLERANCE


@pytest.mark.parametrize("mode", CALLS)
def test_examples_without_a_label(mode):
    model, stages, (x, y), _ = padded_batch(-100)
    method, subnets = unloaf.StimulativeTraining(model, stages), pinned("st", stages)
    step(method, mode, x, torch.where(torch.arange(10) % 3 == 0, -100, y), subnets=subnets)
    seen = torch.arange(10) % 3 != 0
    assert twin.distance(model, twin.stimulative(model, stages, subnets, x[seen], y[seen])) < TOLERANCE


@pytest.mark.parametrize("mode", CALLS)
def test_subnets_on_a_part_of_the_batch(mode):
    model, stages, (x, y), _ = padded_batch(-100)
    labels = torch.where(torch.arange(10) % 3 == 0, -100, y)
    method, subnets = unloaf.StimulativeTraining(model, stages, subnet_batch_fraction=0.5), pinned("st", stages)
    step(method, mode, x, labels, subnets=subnets)
    order = [1, 2, 4, 5, 7, 8]  # four of them are among the first five examples
    some = {"examples": 3}
    assert order[:3] == [i for i in range(5) if labels[i] != -100]
    assert twin.distance(model, twin.stimulative(model, stages, subnets, x[order], y[order], **some)) < TOLERANCE


def test_an_example_without_a_label_counts_at_no_position():
    # One label for a text, and logits for each of its tokens.
    model, stages, _, (x, _) = padded_batch(-100)
    subnets = pinned("st", stages)

    def criterion(logits, y):
        return F.cross_entropy(logits.mean(1), y)

    method = unloaf.StimulativeTraining(model, stages, criterion=criterion, readout=lambda output: output)
    step(method, "backward", x, torch.tensor([2, -100]), subnets=subnets)
    main = model(x[:1])
    terms = [twin.gradients(model, criterion(main, torch.tensor([2])))]
    terms += [
        twin.gradients(model, twin.kl(twin.logits_of_subnet(model, stages, s, x[:1]), main.detach())) for s in subnets
    ]
    assert twin.distance(model, twin.total(terms)) < TOLERANCE


# --- distances of one's own


def squared(student, teacher):
    return (student - teacher).square().mean()


def squared_where(student, teacher, counted):
    return (student - teacher).square()[counted].mean()


@pytest.mark.parametrize("mode", CALLS)
@pytest.mark.parametrize("shape", ["examples", "positions"])
def test_a_distance_of_ones_own_is_taken_over_what_counts(mode, shape):
    model, stages, (x, y), padded = padded_batch(-100)
    if shape == "examples":
        padded = padded[0].flatten(0, 1), padded[1].flatten()
    subnets = pinned("st", stages)
    distance = squared if shape == "examples" else squared_where
    step(unloaf.StimulativeTraining(model, stages, subnet_loss=distance), mode, *padded, subnets=subnets)
    main = model(x)
    terms = [twin.gradients(model, F.cross_entropy(main, y))]
    students = [twin.logits_of_subnet(model, stages, subnet, x) for subnet in subnets]
    terms += [twin.gradients(model, (student - main.detach()).square().mean()) for student in students]
    assert twin.distance(model, twin.total(terms)) < TOLERANCE


@every_call
def test_a_distance_that_cannot_be_told_what_counts_is_refused(call):
    model, stages, _, padded = padded_batch(-100)
    model(padded[0]).sum().backward()
    method = unloaf.StimulativeTraining(model, stages, subnet_loss=lambda s, t: unloaf.kl_loss(s[:, :-1], t[:, :-1]))
    message = r"some of the \(2, 9\) labels are -100 and do not count.*a third argument, counted.*counted=counted"
    assert refuses(method, message, lambda: call(method, *padded))


def test_such_a_distance_sees_all_positions_where_all_count():
    model, stages, _, _ = padded_batch(-100)
    shapes = []
    method = unloaf.StimulativeTraining(
        model, stages, subnet_loss=lambda s, t: shapes.append(s.shape) or unloaf.kl_loss(s, t)
    )
    method.backward(torch.randn(2, 5, 4).double(), torch.zeros(2, 5).long())
    assert shapes == [(2, 5, 3)]


# --- nothing to learn


@pytest.mark.parametrize("criterion", [None, Focal(-100), F.cross_entropy], ids=["default", "own", "function"])
@pytest.mark.parametrize("mode", CALLS)
@every_method
def test_a_batch_without_a_label_trains_nothing(name, mode, criterion):
    model, stages, _, (x, y) = padded_batch(-100)
    options = {} if criterion is None else {"criterion": criterion, "readout": lambda output: output}
    out = step(METHODS[name](model, stages, **options), mode, x, torch.full_like(y, -100), subnets=pinned(name, stages))
    assert [float(term) for term in out.terms.values()] == [0.0] * len(out.terms)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("distance", [squared, squared_where])
def test_a_batch_without_a_label_trains_nothing_by_a_distance_of_ones_own(distance):
    model, stages, _, (x, y) = padded_batch(-100)
    x, y = x.flatten(0, 1), torch.full_like(y, -100).flatten()
    step(unloaf.StimulativeTraining(model, stages, subnet_loss=distance), "backward", x, y)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_labels_of_bytes_cannot_be_minus_100():
    # 156 is what -100 becomes in a byte.
    model, stages, _, _ = padded_batch(-100)
    wide = nn.Sequential(*model.first, *model.second, nn.Linear(5, 200)).double()
    stages = unloaf.find_stages(wide, torch.randn(2, 4).double())
    y = torch.tensor([156, 3], dtype=torch.uint8)
    out = unloaf.StimulativeTraining(wide, stages).backward(torch.randn(2, 4).double(), y, subnets=pinned("st", stages))
    assert float(out.terms["subnet2"]) > 0


@pytest.mark.parametrize("name", WITH_SUBNETS)
def test_under_autocast_too(name):
    model, stages, (x, y), (junk, labels) = padded_batch(-100)
    model.float()
    method = METHODS[name](model, stages, **raw(name))
    terms = []
    for inputs, targets in ((x, y), (junk, labels)):
        with torch.autocast("cpu", torch.bfloat16):
            out = method.backward(inputs.float(), targets, subnets=pinned(name, stages))
        terms.append(torch.stack(list(out.terms.values())))
    torch.testing.assert_close(terms[1], terms[0], rtol=0.02, atol=1e-3)  # eight bits
