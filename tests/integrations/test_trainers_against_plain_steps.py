"""The same weights as plain lean steps, in each trainer, on one process and on two gloo ranks, in float64."""

import os
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from loops import TRAINERS, batches, build, in_lightning, lightning_trainer, plain, sgd, weights
from torch.utils.data import DataLoader

from unloaf.integrations.lightning import MethodModule
from unloaf.integrations.steps import restore
from unloaf.stages import inner_module

RANKS = 2
SECONDS = 300
TOLERANCE = 1e-12  # float64: sums in another order

pytestmark = pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")


@pytest.mark.parametrize("kind", ["st", "gkt"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_weights_and_draws_are_those_of_plain_steps(trainer, kind, tmp_path):
    expected, method = build(kind), build(kind)
    start = weights(method.model)
    plain([expected])
    TRAINERS[trainer](method, tmp_path)
    moved, found = weights(expected.model), weights(inner_module(method.model))
    assert (moved - start).norm() > 0.01 * start.norm()
    assert (found - moved).norm() <= TOLERANCE * moved.norm()
    assert method.state_dict() == expected.state_dict()


def ddp(**options):
    return DDPStrategy(cluster_environment=LightningEnvironment(), **options)


class Manual(MethodModule):
    def __init__(self, method):
        super().__init__(method, optimizer=sgd)
        self.automatic_optimization = False


def fit_manually(folder):
    loader = DataLoader(batches(), batch_size=None)
    lightning_trainer(folder, devices=RANKS, strategy=ddp(), accumulate_grad_batches=1).fit(Manual(build("st")), loader)


def refusal_of(run):
    try:
        run()
    except ValueError as error:
        return str(error)


def work(rank, folder):
    """A process of two; its libraries are those of the parent, from which it was forked."""
    warnings.simplefilter("ignore")
    # As torchrun sets them; the group, which begins with a file, needs no address.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "localhost"}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_PORT": "0"}
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = {}
    for name, trainer in TRAINERS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        method, options = build("st", seed=rank), {}
        if trainer is in_lightning:
            options = {"strategy": ddp()}
        trainer(method, folder, rank, RANKS, **options)
        found[name] = weights(inner_module(method.model))
    skipping = {"transformers": {}, "lightning": {"strategy": ddp(find_unused_parameters=True)}}
    for name, options in skipping.items():
        method = build("stochastic depth", seed=rank)
        TRAINERS[name](method, folder, rank, RANKS, **options)
        found[f"{name}, stochastic depth"] = weights(inner_module(method.model))
    found["manual"] = refusal_of(lambda: fit_manually(folder))
    method = build("st", seed=rank)
    restore(method, {"seed": 0, "step": 7})
    found["restored"] = method.state_dict()
    found["other seed"] = refusal_of(lambda: restore(build("st", seed=5 + rank), {"seed": 0, "step": 7}))
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    if torch.cuda.is_available():
        pytest.skip("autograd's threads for a GPU do not survive a fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(work, args=(folder,), nprocs=RANKS, join=False, start_method="fork")
        deadline = time.monotonic() + SECONDS
        try:
            while not processes.join(timeout=1):
                assert time.monotonic() < deadline, f"the ranks did not end within {SECONDS} s"
        finally:
            for process in processes.processes:
                process.kill()
        yield [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


@cache
def expected(kind):
    first, second = build(kind), build(kind, seed=1)
    second.model = first.model
    plain([first, second])
    return weights(first.model)


@pytest.mark.parametrize("trainer", [*TRAINERS, "transformers, stochastic depth", "lightning, stochastic depth"])
def test_two_ranks_that_draw_by_seeds_of_their_own_have_the_weights_of_plain_steps(ranks, trainer):
    plainly = expected(trainer.partition(", ")[2] or "st")
    for found in ranks:
        assert (found[trainer] - plainly).norm() <= TOLERANCE * plainly.norm()
    assert torch.equal(*(found[trainer] for found in ranks))


def test_manual_optimisation_on_two_ranks_is_refused_before_the_first_step(ranks):
    for found in ranks:
        assert "manual optimisation in 2 processes" in found["manual"]
        assert "leave automatic_optimization = True" in found["manual"]


def test_resumed_ranks_keep_seeds_of_their_own(ranks):
    assert [found["restored"] for found in ranks] == [{"seed": 0, "step": 7}, {"seed": 1, "step": 7}]


def test_a_first_rank_with_another_seed_than_the_checkpoint_is_refused(ranks):
    assert "the method has seed 5, the checkpoint 0; build it with that seed" in ranks[0]["other seed"]
