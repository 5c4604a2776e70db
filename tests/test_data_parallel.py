"""Two gloo ranks give the mean of two single processes' gradients, each rank with subnets of its own."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import unloaf
from unloaf.engine.models import build_model

RANKS = 2


def build(kind, model, stages, rank):
    if kind == "gkt":
        return unloaf.GroupKnowledgeTraining(model, stages, groups=2, loops=2, seed=rank)
    sampler, inputs = unloaf.OrderedSampler(), unloaf.SmallerInputs(sides=(8, 12, 16))
    return unloaf.stimulative_plus(model, stages, sampler=sampler, num_subnets=3, subnet_inputs=inputs, seed=rank)


def network_and_batch(rank):
    torch.manual_seed(0)
    model = build_model("cifar/resnet20", num_classes=3, in_chans=3, width=4).double()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    return model, unloaf.find_stages(model, x), x, torch.tensor([0, 1, 2, 0])


def step(method, x, y, mode):
    if mode == "lean":
        method.backward(x, y)
    else:
        method(x, y).loss.backward()
    return torch.cat([p.grad.flatten() for p in method.model.parameters()])


def work(rank, folder, bucket_view):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    grads = {}
    for kind in ("st++", "gkt"):
        for mode in ("lean", "one graph"):
            model, stages, x, y = network_and_batch(rank)
            wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=bucket_view)
            grads[kind, mode] = step(build(kind, wrapped, stages, rank), x, y, mode)
    torch.save({f"{kind}/{mode}": g for (kind, mode), g in grads.items()}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[False, True], ids=["buckets", "bucket views"])
def ranks(request):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(folder, request.param), nprocs=RANKS)
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("kind", ["st++", "gkt"])
@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_gradients_are_the_mean_over_the_ranks(ranks, kind, mode):
    alone = []
    for rank in range(RANKS):
        model, stages, x, y = network_and_batch(rank)
        alone.append(step(build(kind, model, stages, rank), x, y, mode))
    expected = torch.stack(alone).mean(0)
    for grads in ranks:
        assert (grads[f"{kind}/{mode}"] - expected).norm() < 1e-12 * expected.norm()
