"""What passes may share beside the outputs of modules: stored features, inputs with a graph, containers, weights."""

import collections
import contextlib
import dataclasses
import functools

import pytest
import torch
from tests.reference import separate_passes as twin
from torch import nn

import unloaf
from test_passes import Chain, InPlaceHead


@pytest.fixture
def chain():
    model = Chain().double()
    x, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    return model, unloaf.find_stages(model, x), x, y


# --- losses that read, or change, more than their logits


def stored_feature(model, path):
    """What the latest pass left behind: the output of a module, kept by a hook."""
    seen = {}
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.update(feature=output))
    return seen


def gradients_by(method, mode, x, y, subnets):
    method.model.zero_grad()
    out = method.backward(x, y, subnets=subnets) if mode == "lean" else method(x, y, subnets=subnets)
    if mode == "one graph":
        out.loss.backward()
    return out


NESTED = [(2, 3), (2, 2), (2, 1), (1, 3)]


@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_a_criterion_that_reads_a_stored_feature_finds_that_of_the_main_pass(chain, mode):
    model, stages, x, y = chain
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in NESTED]
    seen = stored_feature(model, "second")
    method = unloaf.StimulativeTraining(
        model,
        stages,
        criterion=lambda z, t: nn.functional.cross_entropy(z, t) + seen["feature"].square().mean(),
    )
    gradients_by(method, mode, x, y, subnets)
    main = model(x)
    loss = nn.functional.cross_entropy(main, y) + seen["feature"].square().mean()
    terms = [twin.gradients(model, loss)]
    students = [twin.logits_of_subnet(model, stages, subnet, x) for subnet in subnets]
    terms += [twin.gradients(model, twin.kl(student, main.detach())) for student in students]
    assert twin.distance(model, twin.total(terms)) < 1e-12


@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_a_subnet_loss_that_reads_a_stored_feature_finds_that_of_its_own_pass(chain, mode):
    model, stages, x, y = chain
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in NESTED]
    seen = stored_feature(model, "head")

    def distance(student, teacher):
        return unloaf.kl_loss(student, teacher) + seen["feature"].square().mean()

    gradients_by(unloaf.StimulativeTraining(model, stages, subnet_loss=distance), mode, x, y, subnets)
    main = model(x)
    terms = [twin.gradients(model, nn.functional.cross_entropy(main, y))]
    for subnet in subnets:
        student = twin.logits_of_subnet(model, stages, subnet, x)
        terms.append(twin.gradients(model, twin.kl(student, main.detach()) + student.square().mean()))
    assert twin.distance(model, twin.total(terms)) < 1e-12


def halved(z):
    return z.div_(2)


@pytest.mark.parametrize("mode", ["lean", "one graph"])
@pytest.mark.parametrize("where", ["criterion", "subnet_loss", "both"])
def test_losses_that_work_in_place_change_no_other_term(chain, mode, where):
    model, stages, x, y = chain
    full = unloaf.Subnet.full(stages)
    subnets = [full, *(unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 2), (2, 2), (1, 3)])]
    options = {}
    first = second = 1.0
    if where != "subnet_loss":
        first, options["criterion"] = 2.0, lambda z, t: nn.functional.cross_entropy(halved(z), t)
    if where != "criterion":
        second = 2.0
        options["subnet_loss"] = lambda student, teacher: unloaf.kl_loss(halved(student), halved(teacher))
    out = gradients_by(unloaf.StimulativeTraining(model, stages, **options), mode, x, y, subnets)
    main = model(x)
    terms = [twin.gradients(model, nn.functional.cross_entropy(main / first, y))]
    for subnet in subnets:
        student = twin.logits_of_subnet(model, stages, subnet, x)
        terms.append(twin.gradients(model, twin.kl(student / second, main.detach() / second)))
    assert twin.distance(model, twin.total(terms)) < 1e-12
    torch.testing.assert_close(out.logits, main.detach())


def test_targets_that_the_criterion_changes_in_place_count_as_they_were_given(chain):
    model, stages, x, _ = chain
    subnets = [unloaf.Subnet.from_depths(stages, (1, 2))]

    def criterion(z, t):
        t[t == 9] = -100
        return nn.functional.cross_entropy(z, t)

    criterion.ignore_index = 9
    y = torch.tensor([0, 9, 2, 9])
    unloaf.StimulativeTraining(model, stages, criterion=criterion).backward(x, y, subnets=subnets)
    expected = twin.stimulative(model, stages, subnets, x[[0, 2]], torch.tensor([0, 2]))
    assert twin.distance(model, expected) < 1e-12


# --- outputs in containers, inputs with a graph, and graphs that passes share unseen


class Recurrent(Chain):
    """A stem that returns (output, (h, c)), all of which the head reads."""

    def __init__(self, kind=tuple):
        super().__init__()
        self.rnn, self.skip, self.kind = nn.LSTM(5, 5, batch_first=True), nn.Linear(5, 3), kind

    def forward(self, x):
        out, (h, c) = self.rnn(x[:, None])
        logits = super().forward(out[:, 0] + c[0])
        return logits + self.skip(h[0])


class Wrapping(nn.Module):
    """A layer that returns its output, and that of a second one, deep in containers."""

    def __init__(self, how):
        super().__init__()
        self.f, self.g, self.how = nn.Linear(5, 4), nn.Linear(5, 4), how

    def forward(self, x):
        return self.how(torch.tanh(self.f(x)), torch.tanh(self.g(x)))


Pair = collections.namedtuple("Pair", "one two")


@dataclasses.dataclass
class Opaque:
    one: torch.Tensor
    two: torch.Tensor


HOW = {
    "list in dict": (lambda a, b: {"x": [a, {"y": b}], "n": None}, lambda out: (out["x"][0], out["x"][1]["y"])),
    "named tuple": (lambda a, b: (a, Pair(1.0, b)), lambda out: (out[0], out[1].two)),
    "ordered": (lambda a, b: collections.OrderedDict(a=a, b=b), lambda out: (out["a"], out["b"])),
    "twice the same": (lambda a, b: (a, [a, b]), lambda out: (out[1][0], out[1][1])),
    "an object": (lambda a, b: (a, Opaque(a, b)), lambda out: (out[1].one, out[1].two)),
}


class Nested(Chain):
    def __init__(self, how):
        super().__init__()
        made, self.read = HOW[how]
        self.wrapping, self.skip = Wrapping(made), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.read(self.wrapping(x))
        return self.head(self.second(self.between(self.first(a)))) + self.skip(b)


@pytest.mark.parametrize("build", [Recurrent, *(functools.partial(Nested, how) for how in HOW)], ids=["LSTM", *HOW])
@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_outputs_in_nested_containers(build, mode):
    torch.manual_seed(0)
    model, x, y = build().double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    stages = unloaf.find_stages(model, x)
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in NESTED]
    gradients_by(unloaf.StimulativeTraining(model, stages), mode, x, y, subnets)
    assert twin.distance(model, twin.stimulative(model, stages, subnets, x, y)) < 1e-12


def test_nested_outputs_are_computed_once():
    model = Nested("list in dict").double()
    calls = []
    model.wrapping.f.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(4, 5).double()
    stages = unloaf.find_stages(model, x)
    calls.clear()
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in NESTED]
    unloaf.StimulativeTraining(model, stages).backward(x, torch.zeros(4).long(), subnets=subnets)
    assert calls == [1]


class ReadsInput(Chain):
    """The head reads the input again."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(5, 3)

    def forward(self, x):
        return super().forward(x) + self.skip(torch.sin(x))


@pytest.mark.parametrize("kind", [Chain, ReadsInput, InPlaceHead])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_inputs_that_need_a_gradient(kind, fraction, leaf, mode):
    torch.manual_seed(0)
    model, front = kind().double(), nn.Linear(5, 5).double()
    pixels, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    stages = unloaf.find_stages(model, pixels)
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in NESTED]

    def images():
        return pixels.clone().requires_grad_() if leaf else torch.tanh(front(pixels))

    x = images()
    method = unloaf.StimulativeTraining(model, stages, subnet_batch_fraction=fraction)
    gradients_by(method, mode, x, y, subnets)
    again = images()
    main = model(again)
    loss = nn.functional.cross_entropy(main, y)
    examples = round(4 * fraction)
    for subnet in subnets:
        student = twin.logits_of_subnet(model, stages, subnet, again[:examples])
        loss = loss + twin.kl(student, main.detach()[:examples])
    watched = [*model.parameters(), *([again] if leaf else front.parameters())]
    expected = torch.autograd.grad(loss, watched)
    found = [p.grad for p in (*model.parameters(), *([x] if leaf else front.parameters()))]
    assert torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm() < 1e-12


@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_images_that_need_a_gradient_on_smaller_sides(mode):
    torch.manual_seed(0)

    class Images(Chain):
        def forward(self, x):
            return super().forward(x.mean((-2, -1)))

    model, pixels = Images().double(), torch.randn(3, 5, 8, 8).double()
    stages = unloaf.find_stages(model, pixels)
    method = unloaf.StimulativeTraining(model, stages, subnet_inputs=unloaf.SmallerInputs(sides=(4, 6)), num_subnets=4)
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in NESTED]
    sides = [request.side for request in method.draw(len(pixels), pixels.shape[-1])]
    x, y = pixels.clone().requires_grad_(), torch.tensor([0, 1, 2])
    gradients_by(method, mode, x, y, subnets)
    again = pixels.clone().requires_grad_()
    main = model(again)
    loss = nn.functional.cross_entropy(main, y)
    for subnet, side in zip(subnets, sides, strict=True):
        small = nn.functional.interpolate(again, size=(side, side), mode="bilinear")
        loss = loss + twin.kl(twin.logits_of_subnet(model, stages, subnet, small), main.detach())
    (expected,) = torch.autograd.grad(loss, [again])
    assert (x.grad - expected).norm() < 1e-12 * expected.norm()


class KeepsFeature(Chain):
    """The head reads a feature that the first block of the stage before left on the model."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(4, 3)
        self.first[0].f.register_forward_hook(lambda module, args, output: self.__dict__.update(kept=output))

    def forward(self, x):
        return super().forward(x) + self.skip(torch.sin(self.__dict__["kept"]))


class Cached(Chain):
    """A weight that a parametrization computes once for all passes."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.head)


@pytest.mark.parametrize("kind", [KeepsFeature, Cached])
def test_graphs_that_passes_share_unseen_are_told_apart_from_broken_ones(kind):
    torch.manual_seed(0)
    model, x, y = kind().double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    stages = unloaf.find_stages(model, x)
    subnets = [unloaf.Subnet.from_depths(stages, (2, 3))]
    model(x).square().sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    method = unloaf.StimulativeTraining(model, stages)
    sharing = nn.utils.parametrize.cached if kind is Cached else contextlib.nullcontext
    message = r"graph of another pass.*use method\(x, y\)\.loss\.backward\(\)"
    with sharing(), pytest.raises(ValueError, match=message):
        method.backward(x, y, subnets=subnets)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    model.zero_grad()
    with sharing():
        method(x, y, subnets=subnets).loss.backward()
    if kind is Cached:
        # The twin's passes compute the weight again, to the same numbers.
        assert twin.distance(model, twin.stimulative(model, stages, subnets, x, y)) < 1e-12


class Alias(Chain):
    """The head's weight once more, by a reference that is none of the module's parameters."""

    def __init__(self):
        super().__init__()
        self.references = [self.head.weight]

    def forward(self, x):
        logits = super().forward(x)
        return logits + torch.sin(logits) @ self.references[0][:, :3]


@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_a_parameter_read_past_its_module(mode):
    torch.manual_seed(0)
    model, x, y = Alias().double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    stages = unloaf.find_stages(model, x)
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in NESTED]
    method = unloaf.StimulativeTraining(model, stages)
    for _ in range(2):  # gradients add to those there are
        out = method.backward(x, y, subnets) if mode == "lean" else method(x, y, subnets)
        if mode == "one graph":
            out.loss.backward()
    expected = {name: 2 * grad for name, grad in twin.stimulative(model, stages, subnets, x, y).items()}
    assert twin.distance(model, expected) < 1e-12
