"""A run that is killed and resumed is the run that was never killed, to the last bit."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from checkpoint_tools import as_format_1, outcome
from unloaf.config import Config, load_config
from unloaf.engine.checkpoint import load_checkpoint, save_checkpoint
from unloaf.runs.judge import judge_run
from unloaf.runs.opened import open_trained
from unloaf.tasks import classification

MATRIX = [
    (method, workers, opt) for method in ("st", "st++", "gkt") for workers in (0, 2) for opt in ("sgd", "adamw")
]  # fmt: skip


def settings(output: Path, method: str, workers: int, opt: str) -> Config:
    return tiny.config(
        method=method, workers=workers, opt=opt, output=str(output), name="run", lr=0.05 if opt == "sgd" else 0.01,
        model_ema=True, model_ema_decay=0.9, warmup_epochs=1, checkpoint_interval=1,
    )  # fmt: skip


def start(config: Config) -> int:
    def work() -> None:
        os.setsid()
        tiny.run(config, resume="auto")

    return tiny.fork(work, errors=Path(config.output) / "errors.txt")


def finish(config: Config) -> Path:
    """Trains to the end; the run folder."""
    _, status = os.waitpid(start(config), 0)
    errors = Path(config.output) / "errors.txt"
    assert os.waitstatus_to_exitcode(status) == 0, errors.read_text() if errors.exists() else status
    return Path(config.output) / "run"


@dataclass
class Kills:
    """How many processes were alive when they were killed, and how many of those were writing a checkpoint."""

    hit: int = 0
    in_save: int = 0

    def attempt(self, config: Config, seconds: float) -> bool:
        """Starts or resumes the run and kills it after so long; whether it had ended before."""
        run = Path(config.output) / "run"
        before = set(run.glob("checkpoints/.step-*"))
        child = start(config)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, (Path(config.output) / "errors.txt").read_text()
            return True
        self.hit += 1
        half_written = set(run.glob("checkpoints/.step-*")) - before
        complete = sorted(path.name for path in run.glob("checkpoints/step-*"))
        not_pointed_to = bool(complete) and complete[-1] != (run / "last").resolve().name
        self.in_save += bool(half_written) or not_pointed_to
        return False


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], float]]:
    """Outcome and seconds of a run of the matrix that nobody disturbed."""
    known: dict[tuple[str, int, str], tuple[dict[str, Any], float]] = {}

    def get(*case: Any) -> tuple[dict[str, Any], float]:
        if case not in known:
            if not known:  # children inherit what the first run imports
                tiny.run(replace(settings(tmp_path_factory.mktemp("warm"), "st", 0, "sgd"), epochs=2))
            config = settings(tmp_path_factory.mktemp("whole"), *case)
            begin = time.perf_counter()
            path = finish(config)
            known[case] = outcome(path), time.perf_counter() - begin
        return known[case]

    return get


def kill_and_compare(config: Config, kills: int, moments: random.Random, whole: dict[str, Any], seconds: float) -> str:
    made = Kills()
    while made.hit < kills:
        if made.attempt(config, moments.uniform(0, seconds)):
            assert tiny.same(outcome(Path(config.output) / "run"), whole)
            shutil.rmtree(Path(config.output) / "run")
    assert tiny.same(outcome(finish(config)), whole)
    return f"{made.hit} kills hit, {made.in_save} of them inside a save"


@pytest.mark.parametrize("kills", [pytest.param(None, id="few"), pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "workers", "opt"), MATRIX)
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, uninterrupted, method, workers, opt, kills):
    whole, seconds = uninterrupted(method, workers, opt)
    count = kills or (2 if workers else 3)  # 30 over the matrix
    moments = random.Random(f"{method} {workers} {opt}")
    print(kill_and_compare(settings(tmp_path, method, workers, opt), count, moments, whole, seconds))


@pytest.mark.parametrize(("method", "opt"), [("st", "sgd"), ("st++", "adamw"), ("gkt", "sgd")])
def test_number_of_workers_changes_no_bit(uninterrupted, method, opt):
    assert tiny.same(uninterrupted(method, 0, opt)[0], uninterrupted(method, 2, opt)[0])


@pytest.mark.parametrize("method", ["common", "stochastic-depth", "st", "st++", "gkt"])
def test_same_seed_gives_the_same_bits_whatever_is_drawn_elsewhere(tmp_path, method):
    config = tiny.config(method=method, output=str(tmp_path), epochs=1)
    paths = [tiny.run(replace(config, name=name)).path for name in ("a", "b")]
    assert tiny.same(*map(outcome, paths))


def test_another_seed_gives_other_weights(tmp_path):
    config = tiny.config(output=str(tmp_path), epochs=1)
    first, second = (tiny.run(replace(config, seed=seed, name=str(seed))).path for seed in (0, 1))
    assert not tiny.same(outcome(first)["weights"], outcome(second)["weights"])


def test_outcome_sees_one_changed_bit_of_the_optimizer(tmp_path):
    path = tiny.run(tiny.config(output=str(tmp_path), name="run", epochs=1)).path
    before, last = outcome(path), load_checkpoint(path / "last")
    momentum = last.state["optimizer"]["state"][0]["momentum_buffer"]
    momentum.view(-1)[0] += 1e-7
    save_checkpoint(path / "checkpoints", last.step, weights=last.weights, state=last.state)
    assert not tiny.same(outcome(path), before)


def test_killed_while_its_settings_were_written_it_starts_anew(tmp_path, monkeypatch):
    config = tiny.config(output=str(tmp_path), name="run", epochs=1)

    def killed(descriptor: int) -> None:  # args.yaml is half written by then, under another name
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(config)
    assert tiny.run(config, resume="auto").path == tmp_path / "run"


def die(link: Path, target: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("link", ["last", "model_best"])
def test_killed_before_a_link_was_set_it_is_set_when_resumed(tmp_path, monkeypatch, link):
    """The last checkpoint of the run, which is its best one too."""
    config = tiny.config(output=str(tmp_path), name="run", epochs=1)
    whole = outcome(tiny.run(replace(config, name="whole")).path)
    module = {"last": "checkpoint.store", "model_best": "checkpoint.saver"}[link]
    with monkeypatch.context() as patch:
        patch.setattr(f"unloaf.engine.{module}.point_to", die)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(config)
    assert tiny.same(outcome(tiny.run(config, resume="auto").path), whole)


def fault_in_a_pass(patch: pytest.MonkeyPatch) -> tiny.TinyNetwork:
    """A network that fails in the second of two batches of the third step, when the first has been trained on."""
    network, main_passes = tiny.network(), 0

    def fail(model: tiny.TinyNetwork, x: torch.Tensor) -> None:
        nonlocal main_passes
        main_passes += model.training
        if main_passes == 6:
            raise RuntimeError("out of memory")

    network.on_forward = fail
    return network


def fault_after_an_update(patch: pytest.MonkeyPatch) -> tiny.TinyNetwork:
    """Torch tells of a data worker's death in a signal handler, so anywhere; here, as the weights are just updated."""
    step, steps = torch.optim.SGD.step, []

    def fail(self: torch.optim.SGD, *args: Any, **options: Any) -> None:
        step(self, *args, **options)
        steps.append(0)
        if len(steps) == 3:
            raise RuntimeError("DataLoader worker is killed by signal: Killed")

    patch.setattr(torch.optim.SGD, "step", fail)
    return tiny.network()


@pytest.mark.parametrize("fault", [fault_in_a_pass, fault_after_an_update])
def test_fault_in_the_middle_of_a_step_leaves_a_checkpoint_of_the_step_before(tmp_path, monkeypatch, fault):
    config = tiny.config(
        output=str(tmp_path), name="run", batch_size=8, grad_accum_steps=2, method="st", checkpoint_interval=1
    )
    whole = outcome(tiny.run(replace(config, name="whole")).path)
    with monkeypatch.context() as patch:
        network = fault(patch)
        with pytest.raises(RuntimeError):
            tiny.run(config, model=network)
    assert tiny.same(outcome(tiny.run(config, resume="auto").path), whole)


def test_run_that_fell_back_from_a_damaged_checkpoint_saves_and_ends_as_ever(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run")
    whole = outcome(tiny.run(config).path)
    state = tmp_path / "run" / "checkpoints" / "step-00000008" / "state.json"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    path = tiny.run(replace(config, checkpoint_interval=1), resume="auto").path  # from step 4: 5, 6 and 7 are saved
    assert tiny.same(outcome(path), whole)


FIXTURE = Path(__file__).parent / "fixtures" / "run-v1"


def test_run_of_format_1_goes_on_to_the_same_bits(tmp_path):
    """Begun by unloaf at commit 88eb65c and killed after 6 of its 8 steps; see `fixtures/README.md`.

    Other processors may compute other last bits: its state read by torch and saved in today's format says which ones
    here, the end of the run that was not killed what they are to be near.
    """
    for name in ("old", "new"):
        shutil.copytree(FIXTURE / "run", tmp_path / name)
    [folder] = (tmp_path / "new" / "checkpoints").iterdir()
    weights = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "model_ema")}
    state = torch.load(folder / "state.pt", weights_only=True)
    metadata = json.loads((folder / "manifest.json").read_text())["metadata"]
    shutil.rmtree(folder)
    save_checkpoint(folder.parent, 6, weights=weights, state=state, metadata=metadata)
    outcomes = [outcome(tiny.run(load_config(tmp_path / name / "args.yaml"), resume=str(tmp_path / name)).path)
                for name in ("old", "new")]  # fmt: skip
    assert tiny.same(*outcomes)
    end = load_file(FIXTURE / "end.safetensors")
    assert outcomes[0]["step"] == 8
    for name, kept in outcomes[0]["weights"].items():
        for key, tensor in kept.items():
            torch.testing.assert_close(tensor, end[f"{name}.{key}"], rtol=1e-3, atol=1e-4)


def test_checkpoints_of_format_1_go_on_to_the_same_bits(tmp_path):
    config = settings(tmp_path, "gkt", 0, "adamw")
    whole = outcome(tiny.run(replace(config, name="whole")).path)
    path = tiny.stopped_after(16, config)
    for folder in (path / "checkpoints").iterdir():
        as_format_1(folder)
    assert load_checkpoint(path / "last").step == 6
    assert tiny.same(outcome(tiny.run(config, resume="auto").path), whole)


def finetuned(tmp_path: Path, **settings: Any) -> Config:
    """A run that begins with the weights of a file."""
    save_file(tiny.weights(tiny.network()), tmp_path / "start.safetensors")
    start = str(tmp_path / "start.safetensors")
    return tiny.config(output=str(tmp_path), name="run", initial_checkpoint=start, **settings)


@pytest.mark.parametrize("now", ["the same", "moved", "left out"])
def test_finetuned_run_goes_on_without_the_file_it_began_with(tmp_path, now):
    config = finetuned(tmp_path, checkpoint_interval=1)
    whole = outcome(tiny.run(replace(config, name="whole")).path)
    tiny.stopped_after(3, config)
    Path(config.initial_checkpoint).unlink()
    places = {"the same": config.initial_checkpoint, "moved": str(tmp_path / "elsewhere"), "left out": None}
    path = tiny.run(replace(config, initial_checkpoint=places[now]), resume="auto").path
    assert tiny.same(outcome(path), whole)


def test_begun_run_without_a_checkpoint_keeps_the_weights_it_was_to_start_from(tmp_path):
    config = finetuned(tmp_path)
    tiny.stopped_after(0, config)
    with pytest.raises(ValueError, match=r"was begun with initial_checkpoint .* \(now None\)"):
        tiny.run(replace(config, initial_checkpoint=None), resume="auto")


@pytest.mark.parametrize(("model", "again"), [("timm/resnet18", False), ("tv/resnet18", False), ("tv/vit_h_14", True)])
def test_published_weights_are_fetched_once(tmp_path, monkeypatch, model, again):
    """Again, to resume and to judge the run, only where the form of the network comes with them."""
    fetched = []

    def build(name: str, *, pretrained: bool, **settings: Any) -> torch.nn.Module:
        fetched.append(pretrained)
        return tiny.network()

    monkeypatch.setattr(classification, "build_model", build)
    config = tiny.config(output=str(tmp_path), name="run", epochs=1, model=model, pretrained=True)
    for _ in range(2):
        tiny.train(config, console=tiny.quiet(), resume="auto", data=tiny.data())
    monkeypatch.setattr(classification, "load_data", lambda config: tiny.data())
    judge_run(tmp_path / "run", device="cpu")
    open_trained(tmp_path / "run", device="cpu")
    assert fetched == [True, again, again, again]


def test_data_workers_of_a_killed_run_end_by_themselves(tmp_path):
    """And its folder is free at once, whether they have ended or not."""
    config = replace(settings(tmp_path, "st", 2, "sgd"), epochs=100_000)
    child = start(config)
    wait_for(lambda: (tmp_path / "run" / "summary.csv").exists())
    workers = [int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    again = start(config)
    position = load_checkpoint(tmp_path / "run" / "last").step
    wait_for(lambda: load_checkpoint(tmp_path / "run" / "last").step > position + 2)
    os.kill(again, signal.SIGKILL)
    os.waitpid(again, 0)
    assert len(workers) == 2
    wait_for(lambda: not any(_alive(pid) for pid in workers), seconds=90)


def wait_for(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
