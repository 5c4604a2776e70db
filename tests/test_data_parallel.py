"""Two gloo ranks give the mean of two single processes' gradients, each rank with subnets of its own."""

import copy
import itertools
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import unloaf
from toy_networks import ToyNetwork
from unloaf.models.build import build_model

RANKS = 2
KINDS, MODES = ["st", "st++", "gkt", "st*"], ["lean", "one graph"]
# In float32 only the mean itself rounds: each rank computes its own gradient as it would alone.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
DTYPES = list(TOLERANCE)
SECONDS = 600
# Labels of the second rank: some, or all, of its examples have none.
UNLABELLED = {"some": [0, -100, 2, -100], "all": [-100] * 4}
LABELLED = [0, 1, 2, 0]


def build(kind, model, stages, rank):
    if kind == "gkt":
        return unloaf.GroupKnowledgeTraining(model, stages, groups=2, loops=2, seed=rank)
    sampler = unloaf.OrderedSampler()
    if kind == "st*":
        # A sum, since the mean over no label is no number.
        loss = lambda network, batch: F.cross_entropy(network(batch[0]), batch[1], reduction="sum") / 4  # noqa: E731
        return unloaf.GroundTruthTraining(model, stages, loss, sampler=sampler, num_subnets=2, seed=rank)
    if kind == "st":
        return unloaf.StimulativeTraining(model, stages, sampler=sampler, num_subnets=2, seed=rank)
    inputs = unloaf.SmallerInputs(sides=(8, 12, 16))
    return unloaf.stimulative_plus(model, stages, sampler=sampler, num_subnets=3, subnet_inputs=inputs, seed=rank)


@cache
def network(dtype):
    torch.manual_seed(0)
    model = build_model("cifar/resnet20", num_classes=3, in_chans=3, width=4).to(dtype)
    return model, unloaf.find_stages(model, torch.zeros(2, 3, 16, 16, dtype=dtype))


def network_and_batch(rank, dtype):
    model, stages = network(dtype)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return copy.deepcopy(model), stages, x


def labels_of(rank, unlabelled):
    return torch.tensor(UNLABELLED.get(unlabelled, LABELLED) if rank else LABELLED)


def step(method, x, y, mode):
    if mode == "lean":
        method.backward(x, y)
    else:
        method(x, y, lean=mode == "deferred").loss.backward()
    return torch.cat([p.grad.flatten() for p in method.model.parameters()])


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    grads = {}
    for kind, mode, dtype, bucket_view in itertools.product(KINDS, MODES, DTYPES, [False, True]):
        model, stages, x = network_and_batch(rank, dtype)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=bucket_view)
        method = build(kind, wrapped, stages, rank)
        grads[f"{kind}/{mode}/{dtype}/{bucket_view}"] = step(method, x, labels_of(rank, None), mode)
    for kind, mode, unlabelled in itertools.product(KINDS, MODES, UNLABELLED):
        model, stages, x = network_and_batch(rank, torch.float64)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        method = build(kind, wrapped, stages, rank)
        grads[f"{kind}/{mode}/{unlabelled}"] = step(method, x, labels_of(rank, unlabelled), mode)
    for kind, mode in itertools.product(KINDS, ["lean", "deferred"]):
        model, stages, x = network_and_batch(rank, torch.float32)
        y = labels_of(rank, None)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        method = build(kind, wrapped, stages, rank)
        grads[f"{kind}/{mode}"] = step(method, x, y, mode)
        wrapped.zero_grad()
        with wrapped.no_sync():  # two batches in a step of the optimizer
            step(method, x[:2], y[:2], mode)
        grads[f"{kind}/{mode}/accumulated"] = step(method, x[2:], y[2:], mode)
        grads[f"{kind}/{mode}/norm"] = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.1)
    torch.save(grads, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(work, args=(folder,), nprocs=RANKS, join=False)
        deadline = time.monotonic() + SECONDS
        try:
            while not processes.join(timeout=1):
                assert time.monotonic() < deadline, f"the ranks did not end within {SECONDS} s"
        finally:
            for process in processes.processes:
                process.kill()
        yield [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def alone(kind, mode, dtype, unlabelled=None):
    """The gradients of each rank's batch, computed by this process."""
    found = []
    for rank in range(RANKS):
        model, stages, x = network_and_batch(rank, dtype)
        found.append(step(build(kind, model, stages, rank), x, labels_of(rank, unlabelled), mode))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_mean_over_the_ranks(ranks, kind, mode, dtype):
    expected = alone(kind, mode, dtype).mean(0)
    for grads, bucket_view in itertools.product(ranks, [False, True]):
        error = grads[f"{kind}/{mode}/{dtype}/{bucket_view}"] - expected
        assert error.norm() < TOLERANCE[dtype] * expected.norm(), bucket_view


@pytest.mark.parametrize("unlabelled", UNLABELLED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_labels_takes_part_with_no_gradient(ranks, kind, mode, unlabelled):
    each = alone(kind, mode, torch.float64, unlabelled)
    if unlabelled == "all":
        assert not each[1].any()
    expected = each.mean(0)
    for grads in ranks:
        error = grads[f"{kind}/{mode}/{unlabelled}"] - expected
        assert error.norm() < TOLERANCE[torch.float64] * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_deferred_step_has_the_bits_of_a_lean_one(ranks, kind):
    for grads in ranks:
        assert torch.equal(grads[f"{kind}/deferred"], grads[f"{kind}/lean"])
        accumulated = grads[f"{kind}/lean/accumulated"]
        assert (grads[f"{kind}/deferred/accumulated"] - accumulated).norm() < 1e-6 * accumulated.norm()
        torch.testing.assert_close(grads[f"{kind}/deferred/norm"], grads[f"{kind}/lean/norm"])
    assert torch.equal(*(grads[f"{kind}/deferred/accumulated"] for grads in ranks))


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters=true to DistributedDataParallel")
@pytest.mark.filterwarnings("ignore:what torch.compile made of the model is not used")
@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_deferred_step_refuses_a_wrapper_that_looks_for_parameters_in_the_graph(options, compiled):
    torch.manual_seed(0)
    model, x, y = ToyNetwork(), torch.randn(2, 4), torch.tensor([0, 2])
    stages, wrapped = unloaf.find_stages(model, x), DistributedDataParallel(model, **options)
    method = unloaf.StimulativeTraining(torch.compile(wrapped, backend="eager") if compiled else wrapped, stages)
    with pytest.raises(ValueError, match=r"wrap the model without these options, or leave out lean=True"):
        method(x, y, lean=True)


# --- stochastic depth, whose skipped blocks have no gradient


@pytest.fixture(scope="module")
def _one_rank(tmp_path_factory):
    dist.init_process_group("gloo", f"file://{tmp_path_factory.mktemp('rank')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters=true to DistributedDataParallel")
@pytest.mark.parametrize(
    "options", [{}, {"static_graph": True}, {"static_graph": True, "find_unused_parameters": True}], ids=str
)
@pytest.mark.parametrize("compiled", [False, True])
def test_stochastic_depth_refuses_a_wrapper_that_waits_for_skipped_blocks(options, compiled):
    model = ToyNetwork()
    stages, wrapped = unloaf.find_stages(model, torch.randn(2, 4)), DistributedDataParallel(model, **options)
    message = "blocks that stochastic depth skips get no gradient; wrap the model with find_unused_parameters=True"
    with pytest.raises(ValueError, match=message):
        unloaf.StochasticDepth(torch.compile(wrapped, backend="eager") if compiled else wrapped, stages)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {}], ids=str)
def test_stochastic_depth_trains_in_a_wrapper_that_does_not(options):
    torch.manual_seed(0)
    model, x, y = ToyNetwork(), torch.randn(2, 4), torch.tensor([0, 2])
    stages = unloaf.find_stages(model, x)
    survival = 0.3 if options else 1.0  # where no block is skipped, any wrapper will do
    method = unloaf.StochasticDepth(DistributedDataParallel(model, **options), stages, final_survival=survival)
    depths = {method.backward(x, y).subnets[0].depths for _ in range(6)}
    assert len(depths) > 1 if options else depths == {(3, 3)}
