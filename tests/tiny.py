"""A run that takes a moment: three blocks with batch norm and dropout, 64 images of 8x8; and processes to spoil it."""

import io
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.data import Data
from unloaf.data.images import ImageSet
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.run import TrainResult, train

STEPS = 4  # 64 images, 16 to a step


class TinyBlock(nn.Module):
    """``x + f(x)``, four channels wide."""

    def __init__(self, *, norm: bool, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.dropout(torch.relu(self.norm(self.inner(x)))))


class TinyNetwork(nn.Module):
    """(N, 1, S, S) -> (N, 3). `on_forward` is called before every pass, with the network and its input."""

    def __init__(self, *, norm: bool = True, dropout: float = 0.1, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(TinyBlock(norm=norm, dropout=dropout) for _ in range(3)))
        self.head = nn.Linear(4, classes)
        self.on_forward: Callable[[TinyNetwork, Tensor], None] = lambda network, x: None

    def forward(self, x: Tensor) -> Tensor:
        self.on_forward(self, x)
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def network(**options: Any) -> TinyNetwork:
    """The same weights every time."""
    torch.manual_seed(1)
    return TinyNetwork(**options)


def _images(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    return ImageSet((noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def data(**changes: Any) -> Data:
    """64 images to train on, 24 to validate, 24 to test; three shades of noise."""
    values: dict[str, Any] = {
        "name": "tiny",
        "num_classes": 3,
        "class_names": ("dark", "grey", "bright"),
        "train": _images(64, 0),
        "val": _images(24, 1),
        "test": _images(24, 2),
        "mean": (120.0,),
        "std": (60.0,),
        "augment": "pad-crop",
        "pad": 1,
        "hflip": 0.5,
        "img_size": 8,
        "train_img_size": 8,
    }
    return Data(**values | changes)


def config(**settings: Any) -> Config:
    """Two epochs of four steps on the CPU."""
    usual: dict[str, Any] = {"device": "cpu", "epochs": 2, "batch_size": 16, "lr": 0.05, "log_interval": 1}
    return Config(**usual | settings)


def quiet() -> Console:
    """A console that nobody sees."""
    return Console(file=io.StringIO(), force_terminal=False)


def run(settings: Config, *, model: nn.Module | None = None, resume: str | None = None, **more: Any) -> TrainResult:
    """`train` on the tiny data."""
    return train(settings, console=quiet(), resume=resume, data=data(), model=model or network(), **more)


def stopped_after(step: int, settings: Config) -> Path:
    """The beginning of a run, which ends in the middle of the step after that one; its folder."""
    begun = network()
    passes = 0

    def stop(model: TinyNetwork, x: Tensor) -> None:
        nonlocal passes
        passes += model.training
        if passes > step:
            raise KeyboardInterrupt

    begun.on_forward = stop
    with pytest.raises(KeyboardInterrupt):
        run(settings, model=begun)
    return Path(settings.output) / str(settings.name)


def stopped_and_resumed(settings: Config, monkeypatch: pytest.MonkeyPatch, *, step: int = 3) -> tuple[TrainResult, ...]:
    """A run of any task, and another that Ctrl-C ends when that step begins and that is then resumed."""
    from unloaf.engine import loop

    whole, other = train(settings, console=quiet()), replace(settings, name=f"{settings.name}-stopped")
    made, train_step = 0, loop.train_step

    def stop(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made == step:
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(other, console=quiet())
    return whole, train(other, console=quiet(), resume="auto")


def ends_alike(one: TrainResult, other: TrainResult) -> bool:
    """Whether two runs end with the same weights and figures, to the bit."""
    first, second = (load_checkpoint(result.path / "last").weights["model"] for result in (one, other))
    return same(dict(first), dict(second)) and one.test == other.test


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: Any, right: Any) -> bool:
    """Whether two structures hold the same bits."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def fork(work: Callable[[], int | None], *, errors: Path | None = None) -> int:
    """Starts a process in which the libraries are loaded already; its exit code is what `work` returns, 0 for None.

    Importing torch anew would take seconds for each process.
    """
    if torch.cuda.is_available():
        pytest.skip("autograd's threads for a GPU do not survive a fork")
    if child := os.fork():
        return child
    code = 99
    try:
        code = work() or 0
    except BaseException:
        if errors is not None:
            errors.write_text(traceback.format_exc())
    finally:
        os._exit(code)
