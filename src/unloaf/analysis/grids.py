"""The grids of `unloaf ablate`: which settings are compared, as rows of changes to a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from unloaf.config import Config
from unloaf.config.files import read_mapping, with_entries
from unloaf.printable import printable
from unloaf.stages import Stage, inner_module
from unloaf.subnet import Subnet, branches
from unloaf.tasks.methods import sampler_of


@dataclass(frozen=True)
class GridRow:
    """One way to train.

    Attributes:
        label: what tables call it.
        config: its settings.
        series: rows of one series are joined by a line in the picture, over ``at``; empty where there are no lines.
        at: place on the horizontal axis.
    """

    label: str
    config: Config
    series: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        name: by which the command knows it.
        title: of its page.
        rows: in the order of the table.
        axis: of the picture, where rows are joined by lines.
        source: what the papers compare so.
        notes: on rows that are left out.
    """

    name: str
    title: str
    rows: tuple[GridRow, ...]
    axis: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Named:
    title: str
    source: str
    changes: Callable[[Config, Sequence[Stage], Sequence[str]], list[tuple[str, dict[str, Any]]]]
    axis: str = ""
    # From a row's configuration to its series and its place.
    place: Callable[[Config], tuple[str, float]] | None = field(default=None)


_RULES = ("raw", "stochastic", "ordered", "inter-stage", "exponential-decay")
_NUMBERS = (1, 2, 4, 6)
_PLAIN: dict[str, Any] = {"method": "common", "subnet_inputs": "auto"}
_ST: dict[str, Any] = {"method": "st", "sampler": "ordered", "num_subnets": 1, "subnet_loss": "kl",
                       "subnet_inputs": "same"}  # fmt: skip
_STPP: dict[str, Any] = {"method": "st++", "num_subnets": 6, "subnet_loss": "kl-", "sampler": "ordered",
                         "subnet_inputs": "same"}  # fmt: skip


def _sampling(base: Config, stages: Sequence[Stage], spaces: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    return [(rule, {**_ST, "sampler": rule}) for rule in _RULES]


def _losses(base: Config, stages: Sequence[Stage], spaces: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{loss.upper()}, {number} subnet{'s' if number > 1 else ''}",
         {**_ST, "subnet_loss": loss, "num_subnets": number})
        for loss in ("kl", "kl-") for number in _NUMBERS
    ]  # fmt: skip


def _inputs(base: Config, stages: Sequence[Stage], spaces: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    rows = [("same", {})]
    rows += [
        (f"smaller, from {low:g} of the side", {"subnet_inputs": "smaller", "min_ratio": low}) for low in (0.75, 0.43)
    ]
    rows += [
        (f"larger, to {high:g} of the side", {"subnet_inputs": "larger", "max_ratio": high}) for high in (1.25, 1.5)
    ]
    rows += [(name, {"subnet_inputs": name}) for name in ("crop", "flip", "jitter")]
    return [(label, {**_ST, **changes}) for label, changes in rows]


def _spaces(base: Config, stages: Sequence[Stage], spaces: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    found = [tuple(map(int, text.split(","))) for text in spaces] or spread_spaces(stages)
    return [(",".join(map(str, space)), {**_ST, "sampler": "inter-stage", "space": space}) for space in found]


def spread_spaces(stages: Sequence[Stage]) -> list[tuple[int, ...]]:
    """Numbers of depths that each stage may have: all, one less in each stage, and so on while a stage has two.

    >>> def stage(name, depth):
    ...     return Stage(name, tuple(f"{name}.{i}" for i in range(depth)), (False,) + (True,) * (depth - 1))
    >>> spread_spaces([stage("a", 3), stage("b", 4), stage("c", 6), stage("d", 3)])
    [(3, 4, 6, 3), (2, 3, 5, 2), (1, 2, 4, 1), (1, 1, 3, 1), (1, 1, 2, 1)]
    """
    counts = [len(stage.legal_depths) for stage in stages]
    fewer = (tuple(max(1, count - less) for count in counts) for less in range(max(counts, default=1)))
    return [space for space in fewer if max(space) > 1]


def _components(base: Config, stages: Sequence[Stage], spaces: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("common training", _PLAIN),
        ("ST", _ST),
        ("ST, smaller inputs", {**_ST, "subnet_inputs": "smaller"}),
        ("ST, KL- and 6 subnets", _STPP),
        ("ST, KL-, 6 subnets, smaller inputs", {**_STPP, "subnet_inputs": "smaller"}),
        ("ST++: these and inter-stage", {**_STPP, "subnet_inputs": "smaller", "sampler": "inter-stage"}),
    ]


def _epochs(base: Config, stages: Sequence[Stage], spaces: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    methods = {"common training": _PLAIN, "ST": _ST,
               "ST++": {**_STPP, "subnet_inputs": "auto", "sampler": "inter-stage"}}  # fmt: skip
    numbers = dict.fromkeys(max(1, round(base.epochs * share)) for share in (0.25, 0.5, 1))
    return [
        (f"{label}, {count} epochs", {**changes, **_shortened(base, count)})
        for label, changes in methods.items()
        for count in numbers
    ]


def _shortened(base: Config, epochs: int) -> dict[str, int]:
    warmup = round(base.warmup_epochs * epochs / base.epochs)
    return {"epochs": epochs, "warmup_epochs": min(warmup, epochs - 1)}


def _by_number(config: Config) -> tuple[str, float]:
    return config.subnet_loss.upper(), config.num_subnets_or_default


def _by_epochs(config: Config) -> tuple[str, float]:
    return {"common": "common training", "st": "ST", "st++": "ST++"}[config.method], config.epochs


_GRIDS: dict[str, _Named] = {
    "sampling": _Named("Sampling rules of ST", "Ye et al. 2022 (ST), figure 3", _sampling),
    "losses": _Named(
        "KL against KL- by the number of subnets", "Ye et al. 2023 (ST++), figure 5", _losses,
        "subnets in a step", _by_number,
    ),
    "inputs": _Named("What the subnets of ST see", "Ye et al. 2023 (ST++), table I", _inputs),
    "spaces": _Named("Spaces of inter-stage sampling", "Ye et al. 2023 (ST++), table II", _spaces),
    "components": _Named("Components of ST++", "Ye et al. 2023 (ST++), table III", _components),
    "epochs": _Named("Epochs", "Ye et al. 2023 (ST++), figure 9", _epochs, "epochs", _by_epochs),
}  # fmt: skip


def grid_names() -> list[str]:
    """The grids that have a name.

    >>> grid_names()
    ['sampling', 'losses', 'inputs', 'spaces', 'components', 'epochs']
    """
    return list(_GRIDS)


def named_grid(
    name: str, base: Config, stages: Sequence[Stage], *, spaces: Sequence[str] = (), raw: bool = True
) -> Grid:
    """A grid of the papers, for this network and these settings.

    Args:
        name: one of `grid_names`.
        base: settings of all rows, where a row does not change them.
        stages: of the network.
        spaces: of the grid of spaces, as in "1,2,4,1"; default: `spread_spaces`.
        raw: whether the network can run blocks without their skip connections, see `runs_raw`.

    Raises:
        ValueError: a row is not allowed; the message names it.
    """
    grid = _GRIDS[name]
    rows = []
    for label, changes in grid.changes(base, stages, spaces):
        config = with_entries(base, changes, source=f"row {label!r}")
        if config.sampler == "raw" and not raw:
            continue
        if config.method != "common":
            sampler_of(config, stages)  # a space that does not fit is better known before the first training
        series, at = ("", 0.0) if grid.place is None else grid.place(config)
        rows.append(GridRow(label, config, series, at))
    left_out = f"raw is left out: blocks of {base.model} cannot run without their skip connections"
    notes = (left_out,) if name == "sampling" and not raw else ()
    return Grid(name, grid.title, tuple(rows), grid.axis, grid.source, notes)


def runs_raw(model: nn.Module, stages: Sequence[Stage]) -> bool:
    """Whether each block that can be skipped can also run without its skip connection, as raw sampling asks.

    >>> from torchvision.models import resnet18
    >>> import torch, unloaf
    >>> model = resnet18()
    >>> runs_raw(model, unloaf.find_stages(model, torch.zeros(1, 3, 32, 32)))
    True
    """
    raw = Subnet(
        tuple((True,) * stage.depth for stage in stages),
        tuple(tuple(not skippable for skippable in stage.skippable) for stage in stages),
    )
    try:
        branches(inner_module(model), stages, raw)
    except ValueError:
        return False
    return True


def own_grid(path: Path, base: Config) -> Grid:
    """A grid in a YAML file: ``rows``, labels with the settings each changes, or ``product``, settings with values.

    Raises:
        ValueError: the file cannot be read, has another form, or a row is not allowed.
    """
    entries = read_mapping(path, what="grid", form="rows: {label: {lr: 0.1}}")
    if set(entries) not in ({"rows"}, {"product"}):
        raise ValueError(f"{path}: give either rows, labels with settings, or product, settings with lists of values")
    [(kind, content)] = entries.items()
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: {kind} is {content!r:.60}; give a mapping with at least one entry")
    changes = _rows(path, content) if kind == "rows" else _product(path, content)
    rows = [
        GridRow(printable(label), with_entries(base, dict(values), source=f"{path}, row {label!r:.60}"))
        for label, values in changes.items()
    ]
    return Grid(path.stem, printable(path.stem), tuple(rows))


def _rows(path: Path, content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    for label, values in content.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}, row {label!r:.60}: give settings, as in {{lr: 0.1}}, or {{}} for none")
    return {str(label): values for label, values in content.items()}


def _product(path: Path, content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    for name, values in content.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}, {name!r:.60}: give a list of values, as in [0.1, 0.2]")
    count = math.prod(len(values) for values in content.values())
    if count > 10_000:
        raise ValueError(f"{path}: the product has {count} rows; give fewer values")
    rows = ({str(n): v for n, v in zip(content, values, strict=True)} for values in product(*content.values()))
    return {", ".join(f"{name} {value}" for name, value in row.items()): row for row in rows}


def at_equal_cost(config: Config, flops: float) -> Config:
    """Common training with a row's settings for as many epochs as cost what the row costs, rounded up.

    Args:
        config: of the row.
        flops: of a step of the row, relative to common training.

    >>> at_equal_cost(Config(method="st", epochs=10), 1.33).epochs
    14
    """
    epochs = max(1, math.ceil(config.epochs * flops - 1e-9))
    warmup = min(config.warmup_epochs, epochs - 1)
    plain = {"subnet_inputs": "auto", "subnet_on_epoch": 1, "subnet_off_epoch": 0}
    return with_entries(
        config, {"method": "common", "epochs": epochs, "warmup_epochs": warmup, **plain}, source="common training"
    )
