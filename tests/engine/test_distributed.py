"""A run on two gloo ranks: weights, statistics, figures and checkpoints against one process and against hand values.

The ranks are started once and do all jobs in turn; each test looks at the outcome of one job.
"""

import copy
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import unloaf
from unloaf.batchnorm import tracking_norms
from unloaf.config import Config
from unloaf.data import Data
from unloaf.data.images import ImageSet
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.checkpoint.capture import capture
from unloaf.engine.loop import prepare, train_epoch, train_step
from unloaf.engine.run import train
from unloaf.errors import StoppedError
from unloaf.stages import inner_module

RANKS, SECONDS = 2, 600
METHODS = ["st", "st++", "gkt"]
# 5 steps per epoch of 16 images, 5 images left over.
CONFIG = Config(model="small", method="st", epochs=2, batch_size=8, global_batch_size=16, lr=0.05, num_subnets=2,
                min_ratio=0.75, amplitude=3.0, eps=1e-2, recalibrate=32, device="cpu")  # fmt: skip


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm that normalises with its running statistics also while the network trains."""

    def train(self, mode=True):
        return super().train(False)


NORMS = {"group": lambda width: nn.GroupNorm(2, width), "batch": nn.BatchNorm2d, "frozen": FrozenNorm}


class Block(nn.Module):
    def __init__(self, width_in, width, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=width // width_in, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return x + y if x.shape == y.shape else y


class Small(nn.Module):
    """Two stages of three blocks. Sends its own process a SIGTERM when it is called for the ``stop_at``-th time.

    Calls are counted in training, or with ``stop_in`` False in evaluation, but for those that look for blocks.
    """

    def __init__(self, norm="group", dtype=torch.float32, stop_at=None, stop_in=True):
        super().__init__()
        torch.manual_seed(0)
        norm = NORMS[norm]
        self.calls, self.stop_at, self.stop_in = 0, stop_at, stop_in
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.first = nn.Sequential(*(Block(4, 4, norm) for _ in range(3)))
        self.second = nn.Sequential(Block(4, 8, norm), *(Block(8, 8, norm) for _ in range(2)))
        self.head = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        self.calls += self.training == self.stop_in and len(x) > 2
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = self.stem(x.to(self.stem.weight.dtype))
        return self.head(self.second(self.first(x)).mean((2, 3)))


def images(count, *, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 128, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(noise + 60 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels)


def data():
    """85 images to train on, none to validate with, 37 to test: 19 for one rank, 18 for the other."""
    return Data(name="noise", num_classes=3, class_names=("a", "b", "c"), train=images(85, seed=0),
                val=images(0, seed=1), test=images(37, seed=2), mean=(127.0,), std=(60.0,), augment="pad-crop", pad=1,
                hflip=0.5, img_size=8, train_img_size=8)  # fmt: skip


def flat(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def statistics(training):
    norms = tracking_norms(inner_module(training.model))
    return flat(buffer for norm in norms for buffer in norm.buffers(recurse=False))


def fitted(config, **network):
    """A whole run: the gradients of each step, and the weights and statistics at the end."""
    training = prepare(config, data=data(), model=Small(**network))
    grads, losses = [], []
    parameters = list(inner_module(training.model).parameters())

    def note(*_):
        grads.append(flat(p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters))

    hook = training.optimizer.optimizer.register_step_pre_hook(note)
    while not training.finished:
        train_epoch(training, on_step=lambda row: losses.append(row.loss))
    hook.remove()
    return {
        "grads": torch.stack(grads),
        "weights": flat(parameters),
        "statistics": statistics(training) if tracking_norms(inner_module(training.model)) else None,
        "losses": losses,
    }


def relative(value, expected):
    return ((value - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# What the two ranks do. Each job returns what its tests look at, from both ranks.

TRAININGS = {
    **{f"{method}, exact": (method, "frozen", torch.float64) for method in [*METHODS, "stochastic-depth"]},
    **{f"{method}, float32": (method, "group", torch.float32) for method in ["st++", "gkt"]},
    **{f"{method}, batch norm": (method, "batch", torch.float32) for method in METHODS},
}


def run_training(name):
    method, norm, dtype = TRAININGS[name]
    return fitted(replace(CONFIG, method=method, final_survival=0.3), norm=norm, dtype=dtype)


def policy(dist_bn):
    """Statistics of 1 and 2, and of 1 and 3: those that are judged, saved and kept."""
    training = prepare(replace(CONFIG, dist_bn=dist_bn), data=data(), model=Small("batch"))
    rank = training.accelerator.process_index
    norms = tracking_norms(inner_module(training.model))
    for norm in norms:
        norm.running_mean.fill_(1.0 + rank)
        norm.running_var.fill_(1.0 + 2 * rank)
        norm.num_batches_tracked.fill_(5)
    seen = []
    norm = norms[0]
    hook = norm.register_forward_hook(lambda *_: seen.append((norm.running_mean[0].item(), norm.running_var[0].item())))
    training.evaluate("test")
    hook.remove()
    weights, _ = capture(training)
    saved = weights["model"]
    names = [name.removesuffix("running_mean") for name in saved if name.endswith("running_mean")]
    return {
        "judged": seen,
        "saved": [(saved[f"{name}running_mean"][0].item(), saved[f"{name}running_var"][0].item()) for name in names],
        "own": [(norm.running_mean[0].item(), norm.running_var[0].item()) for norm in norms],
    }


def judged(rank, world):
    training = prepare(CONFIG, data=data(), model=Small("batch"))
    for norm in tracking_norms(inner_module(training.model)):
        # The mean over two ranks is 0.25 and 1.5 where one process has these at once.
        norm.running_mean.fill_(0.5 * rank if world > 1 else 0.25)
        norm.running_var.fill_(1.0 + rank if world > 1 else 1.5)
    chosen = [unloaf.Subnet.from_depths(training.stages, depths) for depths in [(3, 2), (1, 3), (2, 1)]]
    result = training.evaluate("test", subnets=chosen)
    rows = [result.main, *result.subnets]
    return [(row.top1, row.top5, row.loss) for row in rows]


def sharded(method):
    """The weights of the run with shared weights whose copied weights are in TRAININGS; the first process has them."""
    training = prepare(replace(CONFIG, method=method, fsdp=True), data=data(), model=Small("batch"))
    while not training.finished:
        train_epoch(training)
    weights, _ = capture(training)
    names = [name for name, _ in Small("batch").named_parameters()]
    return {"weights": flat(weights["model"][name] for name in names) if weights["model"] else None}


def captured(fsdp):
    """Whether a checkpoint that is still being written changes with the training that continues."""
    training = prepare(replace(CONFIG, opt="adamw", lr=1e-3, fsdp=fsdp), data=data(), model=Small("batch"))
    train_epoch(training)
    weights, state = capture(training)
    parts = {"weights": weights, "optimizer": state["optimizer"]}
    before = copy.deepcopy(parts)
    train_epoch(training)
    return {name: same(parts[name], before[name]) for name in parts}


def counted(method):
    """How often and how many bytes of gradients are exchanged in each step, two batches to a step."""
    config = replace(CONFIG, method=method, num_subnets=6, global_batch_size=32, epochs=1)
    training = prepare(config, data=data(), model=Small())
    sent = []

    def hook(group, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = dist.all_reduce(bucket.buffer().div_(RANKS), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    training.model.register_comm_hook(None, hook)
    per_step = []

    def note(row):
        per_step.append(list(sent))
        sent.clear()

    train_epoch(training, on_step=note)
    return {"sent": per_step, "bytes": sum(p.numel() * p.element_size() for p in training.model.parameters())}


def stop_code(config, images, model):
    """The exit code of a run that a signal ends; None if it comes to its end."""
    try:
        train(config, console=Console(file=io.StringIO()), data=images, model=model)
    except StoppedError as error:
        return error.code
    return None


def stopped_and_resumed(rank, folder, config, **network):
    """A run that is not interrupted, and one that rank 1 interrupts and that continues afterwards."""
    console = Console(file=io.StringIO())
    config = replace(config, output=str(folder))
    train(replace(config, name="whole"), console=console, data=data(), model=Small(**network))
    stop_at = 7 if rank == 1 else None
    code = stop_code(replace(config, name="parts"), data(), Small(stop_at=stop_at, **network))
    if rank == 0:
        shutil.copytree(folder / "parts", folder / "stopped", symlinks=True)
    dist.barrier()
    train(replace(config, name="parts"), resume="auto", console=console, data=data(), model=Small(**network))
    return {"code": code}


def stopped_in_validation(rank, folder):
    """How many of 25 batches of the first validation are judged if rank 1 is interrupted in the third."""
    console = Console(file=io.StringIO())
    config = replace(CONFIG, method="common", output=str(folder), epochs=2)
    validated = replace(data(), val=images(400, seed=1))
    train(replace(config, name="whole"), console=console, data=validated, model=Small("batch"))
    model = Small("batch", stop_at=3 if rank == 1 else None, stop_in=False)
    code = stop_code(replace(config, name="parts"), validated, model)
    dist.barrier()  # the first rank has written it
    step = load_checkpoint(folder / "parts" / "last").step
    dist.barrier()
    train(replace(config, name="parts"), resume="auto", console=console, data=validated, model=Small("batch"))
    return {"code": code, "judged": model.calls if rank == 1 else None, "step": step}


def refused(config, **other):
    """What is said to a run on other images, or with other settings, than that of the other rank."""
    try:
        prepare(config, data=replace(data(), **other), model=Small())
    except ValueError as error:
        return {"told": str(error)}
    return {"told": ""}


def listening(process):
    """Addresses and ports on which a process waits for others."""
    return [(c.laddr.ip, c.laddr.port) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]


def work(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    folder = Path(folder)
    jobs = {
        **{name: lambda name=name: run_training(name) for name in TRAININGS},
        "listening": lambda: {"addresses": listening(psutil.Process()), "store": port},
        **{f"policy {rule}": lambda rule=rule: policy(rule) for rule in ("reduce", "broadcast")},
        "judged": lambda: judged(rank, RANKS),
        **{f"counted {method}": lambda method=method: counted(method) for method in ["common", *METHODS]},
        "resumed": lambda: stopped_and_resumed(rank, folder / "ddp", replace(CONFIG, method="st++"), norm="batch"),
        "on one": lambda: stopped_and_resumed(rank, folder / "one", replace(CONFIG, method="common")),
        "stopped in validation": lambda: stopped_in_validation(rank, folder / "validation"),
        **{f"fsdp {method}": lambda method=method: sharded(method) for method in METHODS},
        **{f"captured {fsdp}": lambda fsdp=fsdp: captured(fsdp) for fsdp in (False, True)},
        "other settings": lambda: refused(replace(CONFIG, lr=CONFIG.lr * (1 + rank))),
        "other images": lambda: refused(CONFIG, test=images(37 + rank, seed=2)),
        "other place": lambda: refused(replace(CONFIG, data_dir=f"machine{rank}", output=f"machine{rank}")),
        "fsdp resumed": lambda: stopped_and_resumed(rank, folder / "fsdp", replace(CONFIG, fsdp=True), norm="batch"),
    }
    for name, job in jobs.items():
        torch.save(job(), folder / f"{name} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = mp.spawn(work, args=(str(folder), port), nprocs=RANKS, join=False)
    deadline, fault = time.monotonic() + SECONDS, None
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, f"the ranks did not end within {SECONDS} s"
    except Exception as error:  # the jobs that were done before are looked at all the same
        fault = error
    finally:
        for process in processes.processes:
            process.kill()

    def of(name):
        files = [folder / f"{name} {rank}.pt" for rank in range(RANKS)]
        if fault is not None and not all(file.exists() for file in files):
            raise fault
        return [torch.load(file, weights_only=True) for file in files]

    of.folder = folder
    return of


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_each_step_are_those_of_one_process(outcome, method):
    alone = fitted(replace(CONFIG, method=method, batch_size=16), norm="frozen", dtype=torch.float64)
    assert alone["grads"].shape[0] == 10
    for result in outcome(f"{method}, exact"):
        assert relative(result["grads"], alone["grads"]) < 1e-6
        assert relative(result["weights"], alone["weights"]) < 1e-6


@pytest.mark.parametrize("method", ["st++", "gkt"])
def test_weights_in_float32_are_those_of_one_process(outcome, method):
    alone = fitted(replace(CONFIG, method=method, batch_size=16), norm="group")
    for result in outcome(f"{method}, float32"):
        assert relative(result["weights"], alone["weights"]) < 1e-5
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def test_stochastic_depth_trains_where_skipped_blocks_have_no_gradient(outcome):
    config = replace(CONFIG, method="stochastic-depth", final_survival=0.3, batch_size=16)
    alone = fitted(config, norm="frozen", dtype=torch.float64)
    for result in outcome("stochastic-depth, exact"):
        assert relative(result["weights"], alone["weights"]) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_ranks_hold_the_same_weights_and_statistics_of_their_own(outcome, method):
    one, two = outcome(f"{method}, batch norm")
    assert torch.equal(one["weights"], two["weights"])
    assert not torch.equal(one["statistics"], two["statistics"])


@pytest.mark.parametrize(("rule", "expected"), [("reduce", (1.5, 2.0)), ("broadcast", (1.0, 1.0))])
def test_statistics_that_are_judged_and_saved(outcome, rule, expected):
    for rank, result in enumerate(outcome(f"policy {rule}")):
        assert result["judged"]
        assert set(result["judged"]) == set(result["saved"]) == {expected}
        assert set(result["own"]) == {(1.0 + rank, 1.0 + 2 * rank)}


def test_an_odd_number_of_images_is_judged_as_by_one_process(outcome):
    alone = judged(0, 1)
    for rows in outcome("judged"):
        assert [row[:2] for row in rows] == [row[:2] for row in alone]
        assert [row[2] for row in rows] == pytest.approx([row[2] for row in alone], rel=1e-6)


@pytest.mark.parametrize("method", ["common", *METHODS])
def test_gradients_are_exchanged_once_a_step(outcome, method):
    for result in outcome(f"counted {method}"):
        assert result["sent"] == [[result["bytes"]]] * 2


@pytest.mark.parametrize("fsdp", [False, True], ids=["copied", "sharded"])
def test_a_checkpoint_does_not_change_while_training_goes_on(outcome, fsdp):
    for result in outcome(f"captured {fsdp}"):
        assert result == {"weights": True, "optimizer": True}


def last(run):
    checkpoint = load_checkpoint(run / "last")
    return checkpoint.weights["model"], checkpoint.state


@pytest.mark.parametrize(("job", "kind"), [("resumed", "ddp"), ("fsdp resumed", "fsdp")])
def test_two_ranks_resume_bit_for_bit(outcome, job, kind):
    assert [result["code"] for result in outcome(job)] == [143, 143]
    assert 0 < load_checkpoint(outcome.folder / kind / "stopped" / "last").step < 10
    weights, state = last(outcome.folder / kind / "whole")
    again, state_again = last(outcome.folder / kind / "parts")
    assert same(weights, again)
    assert len(state["statistics"]) == RANKS
    for part in ("optimizer", "statistics", "method"):
        assert same(state[part], state_again[part]), part
    log = (outcome.folder / kind / "parts" / "log.txt").read_text()
    assert "resumed at step" in log
    assert "not bit for bit" not in log


def test_two_ranks_stop_in_the_middle_of_a_validation(outcome):
    first, second = outcome("stopped in validation")
    assert (first["code"], second["code"], first["step"]) == (143, 143, 5)
    assert second["judged"] == 9  # they ask each other before the tenth of 25
    runs = [outcome.folder / "validation" / name for name in ("whole", "parts")]
    assert same(*(last(run)[0] for run in runs))
    tables = [[line.split(",") for line in (run / "summary.csv").read_text().splitlines()] for run in runs]
    assert [row[:1] + row[2:] for row in tables[0]] == [row[:1] + row[2:] for row in tables[1]]  # all but the time


def test_one_process_goes_on_from_two_and_says_so(outcome, tmp_path):
    assert outcome("on one")[0]["code"] == 143
    shutil.copytree(outcome.folder / "one" / "stopped", tmp_path / "stopped", symlinks=True)
    # Of the global batch of 16 one process takes two batches of 8: the same images in every step.
    config = replace(CONFIG, method="common", output=str(tmp_path), name="stopped")
    train(config, console=Console(file=io.StringIO()), resume="auto", data=data(), model=Small())
    log = (tmp_path / "stopped" / "log.txt").read_text()
    assert "not bit for bit the uninterrupted run: processes is 1, was 2" in log
    assert "global batch 16 = 8 x 1 x 2" in log
    weights, _ = last(outcome.folder / "one" / "whole")
    again, state = last(tmp_path / "stopped")
    assert state["position"]["updates"] == 10
    assert relative(flat(again.values()), flat(weights.values())) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_sharded_weights_are_those_of_copied_ones(outcome, method):
    copied, sharded = outcome(f"{method}, batch norm")[0], outcome(f"fsdp {method}")[0]
    assert relative(sharded["weights"], copied["weights"]) < 1e-6


@pytest.mark.parametrize(
    ("job", "told"),
    [("other settings", "lr 0.05 (there 0.1)"), ("other images", "test images 37 (there 38)"), ("other place", "")],
)
def test_ranks_that_were_started_otherwise_are_refused_and_do_not_wait(outcome, job, told):
    messages = [rank["told"] for rank in outcome(job)]
    start = "process 0 was started with other settings or images than process 1: "
    assert messages == [f"{start}{told}; start all with the same command line on the same images" if told else ""] * 2


def test_a_sharded_run_does_not_go_on_in_one_process(outcome, tmp_path):
    outcome("fsdp resumed")
    run = tmp_path / "stopped"
    shutil.copytree(outcome.folder / "fsdp" / "stopped", run, symlinks=True)
    config = replace(CONFIG, fsdp=True, output=str(tmp_path), name="stopped")
    options = {"console": Console(file=io.StringIO()), "resume": "auto", "data": data()}
    with pytest.raises(ValueError, match="fsdp: one process has no other to share the weights with"):
        train(config, model=Small("batch"), **options)
    with pytest.raises(ValueError, match="was begun with fsdp True"):
        train(replace(config, fsdp=False), model=Small("batch"), **options)


def test_accumulated_batches_add_up_to_one_large_batch():
    together = fitted(replace(CONFIG, method="common", batch_size=16), dtype=torch.float64)
    in_parts = fitted(replace(CONFIG, method="common", batch_size=8), dtype=torch.float64)
    assert relative(in_parts["grads"], together["grads"]) < 1e-6


def test_each_accumulated_batch_draws_subnets_of_its_own():
    training = prepare(replace(CONFIG, num_subnets=1), data=data(), model=Small(dtype=torch.float64))
    step = next(training.batches.epoch(1))
    method = training.method
    expected = 0
    for index, batch in enumerate(step):
        model = Small(dtype=torch.float64)
        twin = unloaf.StimulativeTraining(model, unloaf.find_stages(model, batch.x))
        twin.backward(*batch, [method.draw(len(batch.x), step=index)[0].subnet], loss_scale=0.5)
        expected = expected + flat(p.grad for p in model.parameters())
    grads = []
    training.optimizer.optimizer.register_step_pre_hook(
        lambda *_: grads.append(flat(p.grad for p in training.model.parameters()))
    )
    train_step(training, step)
    assert relative(grads[0], expected) < 1e-12
    assert method.step == 2


def test_ranks_exchange_gradients_on_the_loopback_interface_when_told_to(outcome):
    first, second = outcome("listening")
    # torch's store, in the first process, waits on all interfaces whatever MASTER_ADDR says: see docs/scaling.md.
    assert {ip for ip, at in first["addresses"] if at != first["store"]} == {"127.0.0.1"}
    assert {ip for ip, _ in second["addresses"]} == {"127.0.0.1"}


def test_a_run_of_one_process_opens_no_port(tmp_path):
    opened = []

    class Watched(Small):
        def forward(self, x):
            me = psutil.Process()
            opened.extend(address for process in [me, *me.children()] for address in listening(process))
            return super().forward(x)

    config = replace(CONFIG, epochs=1, workers=1, output=str(tmp_path), name="run")
    train(config, console=Console(file=io.StringIO()), data=data(), model=Watched())
    assert opened == []


@pytest.fixture
def torchrun(tmp_path):
    """Starts two ranks of one and the same run; whatever is left of them is gone at the end."""
    started = []

    def start():
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "unloaf", "train"]
        words += ["--epochs", "10", "--output", ".", "--name", "run", "--resume", "auto"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "output.txt").open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *words], cwd=tmp_path, env=environment, stdout=output, stderr=output
            )
        started.append(psutil.Process(process.pid))
        return process

    yield start
    for parent in started:
        if parent.is_running():
            for process in [*parent.children(recursive=True), parent]:
                process.kill()


def wait_for(text, file):
    deadline = time.monotonic() + SECONDS
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, f"{text!r} did not appear in {file.name} within {SECONDS} s"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_next_start_finishes(torchrun, tmp_path):
    log = tmp_path / "run" / "log.txt"
    launcher = torchrun()
    wait_for("epoch 2/10", log)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == RANKS
    ranks[1].kill()
    start = time.monotonic()
    assert launcher.wait(timeout=60) != 0
    _, alive = psutil.wait_procs(ranks, timeout=max(0, start + 60 - time.monotonic()))
    assert not alive
    print(f"everything was gone {time.monotonic() - start:.2f} s after the kill")
    assert "test top-1" not in log.read_text()
    assert torchrun().wait(timeout=SECONDS) == 0
    assert "resumed at step" in log.read_text()
    assert "test top-1" in log.read_text()


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_with_a_checkpoint_of_the_last_step(torchrun, tmp_path):
    log = tmp_path / "run" / "log.txt"
    launcher = torchrun()
    wait_for("epoch 2/10", log)
    launcher.terminate()
    assert launcher.wait(timeout=120) != 0
    [line] = [line for line in log.read_text().splitlines() if "stopped by SIGTERM" in line]
    assert f"after step {load_checkpoint(tmp_path / 'run' / 'last').step};" in line
