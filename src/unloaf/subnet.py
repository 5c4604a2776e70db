"""A subnet is a value; `active_subnet` runs a model as that subnet and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unloaf.stages import Form, Stage, inner_module, result_of, stand_in

BlockMode = Literal["block", "branch"]


@dataclass(frozen=True)
class Subnet:
    """Which blocks of each stage are kept.

    Attributes:
        keep: per stage, per block: is it run? The main network keeps all.
        shortcut: per stage, per block: is its skip connection kept? None (all of them) except for raw subnets, in which
            a kept block may run as its residual branch alone.

    ``a <= b`` means that every path of a is a path of b.

    >>> from unloaf import Stage, Subnet
    >>> stages = (Stage("layer1", ("a", "b", "c"), (False, True, True)), Stage("layer2", ("d", "e"), (False, True)))
    >>> Subnet.full(stages).depths
    (3, 2)
    >>> small = Subnet.from_depths(stages, (2, 1))
    >>> str(small), small.keep, small <= Subnet.full(stages)
    ('2-1', ((True, True, False), (True, False)), True)
    >>> str(Subnet(((True, False, True), (True, True))))
    '2:101-2'
    """

    keep: tuple[tuple[bool, ...], ...]
    shortcut: tuple[tuple[bool, ...], ...] | None = None

    @classmethod
    def full(cls, stages: Sequence[Stage]) -> Subnet:
        """The main network."""
        return cls(tuple((True,) * stage.depth for stage in stages))

    @classmethod
    def from_depths(cls, stages: Sequence[Stage], depths: Sequence[int]) -> Subnet:
        """The ordered subnet that keeps the first ``depths[i]`` blocks of stage i.

        Raises:
            ValueError: not one depth per stage, or a depth that a stage cannot have.
        """
        if not isinstance(depths, Iterable):
            whole = tuple(stage.depth for stage in stages)
            raise ValueError(f"depths is {depths!r}; give one depth for each stage, the main network's are {whole}")
        depths = tuple(depths)
        if len(depths) != len(stages):
            names = ", ".join(stage.name for stage in stages)
            raise ValueError(f"got {len(depths)} depths {depths} for {len(stages)} stages ({names}); give one each")
        for stage, depth in zip(stages, depths, strict=True):
            if depth not in stage.legal_depths:
                raise ValueError(f"{_reason(stage, depth)}; give a depth out of {stage.legal_depths}")
        return cls(tuple(tuple(i < k for i in range(s.depth)) for s, k in zip(stages, depths, strict=True)))

    @property
    def depths(self) -> tuple[int, ...]:
        """Kept blocks per stage."""
        return tuple(sum(stage) for stage in self.keep)

    def modes(self, stages: Sequence[Stage]) -> dict[str, BlockMode]:
        """The kept blocks in the order of execution, and whether each runs whole or as its residual branch alone."""
        shortcut = self.shortcut or self.keep
        return {
            path: "block" if with_shortcut else "branch"
            for stage, keep, shortcuts in zip(stages, self.keep, shortcut, strict=True)
            for path, kept, with_shortcut in zip(stage.blocks, keep, shortcuts, strict=True)
            if kept
        }

    def __le__(self, other: Subnet) -> bool:
        """Whether every path of this subnet is a path of the other; never for subnets of different stages."""
        if [len(k) for k in self.keep] != [len(k) for k in other.keep]:
            return False
        kept = all(not a or b for a, b in zip(_flat(self.keep), _flat(other.keep), strict=True))
        mine, others = (_flat(s.shortcut or ((True,) * len(k) for k in s.keep)) for s in (self, other))
        return kept and all(not a or b for a, b in zip(mine, others, strict=True))

    def __str__(self) -> str:
        shortcut = self.shortcut or ((),) * len(self.keep)
        return "-".join(_stage_text(keep, cut) for keep, cut in zip(self.keep, shortcut, strict=True))


def _flat(stages: Any) -> list[bool]:
    return [flag for stage in stages for flag in stage]


def _stage_text(keep: Sequence[bool], shortcut: Sequence[bool]) -> str:
    """``3`` where the first three blocks are kept, ``2:101`` otherwise; ``b`` marks a residual branch alone."""
    depth = sum(keep)
    if all(shortcut) and not any(keep[depth:]):
        return str(depth)
    marks = ["b" if k and i < len(shortcut) and not shortcut[i] else str(int(k)) for i, k in enumerate(keep)]
    return f"{depth}:{''.join(marks)}"


def _reason(stage: Stage, depth: int) -> str:
    given = f"stage {stage.name!r} keeps {depth} of {stage.depth} blocks"
    if not isinstance(depth, int) or not 1 <= depth <= stage.depth:
        return f"{given}, but a depth counts all blocks kept and at least one stays"
    held = next(b for b, s in zip(stage.blocks[depth:], stage.skippable[depth:], strict=True) if not s)
    return f"{given}, but block {held!r} changes shape and cannot be skipped"


def check_subnet(stages: Sequence[Stage], subnet: Subnet) -> None:
    """Raise ValueError unless the subnet is one of these stages."""
    legal = tuple(stage.depth for stage in stages)
    if not isinstance(subnet, Subnet):
        given = f"subnet {subnet!r} is of type {type(subnet).__name__}"
        raise ValueError(f"{given}; give a Subnet, e.g. Subnet.from_depths(stages, {legal})")
    shape = tuple(len(k) for k in subnet.keep)
    if shape != legal or (subnet.shortcut is not None and tuple(map(len, subnet.shortcut)) != legal):
        raise ValueError(
            f"subnet {subnet} has {shape} blocks per stage, the model's stages have {legal}; is it another model's?"
        )
    for stage, keep in zip(stages, subnet.keep, strict=True):
        for path, kept, skippable in zip(stage.blocks, keep, stage.skippable, strict=True):
            if not kept and not skippable:
                raise ValueError(
                    f"subnet {subnet} skips block {path!r}, which changes shape and cannot be skipped; keep it"
                )
        if not any(keep):
            raise ValueError(f"subnet {subnet} keeps no block of stage {stage.name!r}; keep one at least")


def check_stages(model: nn.Module, stages: Sequence[Stage]) -> dict[str, nn.Module]:
    """The blocks of the stages by path; ValueError if the model lacks one."""
    inner = inner_module(model)
    blocks: dict[str, nn.Module] = {}
    for stage in stages:
        for path in stage.blocks:
            try:
                blocks[path] = inner.get_submodule(path)
            except AttributeError:
                raise ValueError(
                    f"{type(inner).__name__} has no block {path!r} of stage {stage.name!r}; "
                    "use the stages that find_stages returned for this model"
                ) from None
    return blocks


def replaces_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as one that stands in for a module's forward, so that nested use is noticed."""
    function.__dict__["unloaf_replaces_forward"] = True
    return function


def foreign_forward(path: str, forward: Any, caller: str) -> ValueError:
    """The error of `caller` for a block whose ``forward`` something else has replaced."""
    return ValueError(
        f"the forward of block {path!r} was replaced by a {type(forward).__name__}; "
        f"take it off (hooks of accelerate: remove_hook_from_module) and call {caller} again"
    )


def check_whole(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if one of the modules is shadowed, that is if the model already runs as a subnet."""
    for module in modules:
        if hasattr(getattr(module.__dict__.get("forward"), "__func__", None), "unloaf_replaces_forward"):
            raise ValueError(
                f"a {type(module).__name__} block of this model already runs inside active_subnet or a training step; "
                "leave that first, subnets do not nest"
            )


@contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Shadow ``forward`` on the instances; class, state_dict keys and hooks stay, and all is undone on exit.

    The replacements are bound as methods, not closed over a module: a deepcopy (for a weight average, say) made in the
    meantime gets its own.

    Raises:
        ValueError: one of the modules is shadowed already (nested use).
    """
    check_whole(replacements)
    before = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, function in replacements.items():
            module.__dict__["forward"] = MethodType(function, module)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def skip(form: Form | None) -> Callable[..., Any]:
    """Stand-in for the forward of a skipped block: returns its input, in the form of its output."""

    @replaces_forward
    def input_of(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stand_in(form, args, kwargs)

    return input_of


@replaces_forward
def residual_branch(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for the forward of a block without its skip connection, for additive blocks: ``block(x) - x``."""
    output = type(block).forward(block, *args, **kwargs)
    stream, result = stand_in(None, args, kwargs), result_of(output)
    assert result is not None
    branch = result - stream
    return branch if output is result else type(output)(branch if item is result else item for item in output)


@replaces_forward
def activated_branch(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The same where an activation follows the sum (ResNet): the shortcut inside the block is zeroed for the call."""
    name = _shortcut_attribute(block)
    assert name is not None  # checked by branch_of
    before = block.__dict__.get(name, _ABSENT)
    block.__dict__[name] = torch.zeros_like
    try:
        return type(block).forward(block, *args, **kwargs)
    finally:
        if before is _ABSENT:
            del block.__dict__[name]
        else:
            block.__dict__[name] = before


_ABSENT = object()


def _shortcut_attribute(block: nn.Module) -> str | None:
    """Where timm, torchvision (``downsample``) and transformers (``shortcut``) keep what is on the skip connection."""
    for name in ("downsample", "shortcut"):
        if block.__dict__.get(name, _ABSENT) is None or isinstance(block._modules.get(name), nn.Identity):
            return name
    return None


def branch_of(path: str, block: nn.Module, *, additive: bool) -> Callable[..., Any]:
    """The function that runs the block without its skip connection.

    Raises:
        ValueError: it is not known where the block adds its input.
    """
    if additive:
        return residual_branch
    if _shortcut_attribute(block) is None:
        raise ValueError(
            f"block {path!r} ({type(block).__name__}) cannot run without its skip connection: it is neither x + f(x) "
            "nor a ResNet block of timm, torchvision or transformers; use StochasticSampler instead of RawSampler"
        )
    return activated_branch


def branches(model: nn.Module, stages: Sequence[Stage], subnet: Subnet) -> dict[str, Callable[..., Any]]:
    """For each block that the subnet runs without its skip connection: the function that does so."""
    modes = subnet.modes(stages)
    if subnet.shortcut is None:
        return {}
    return {
        path: branch_of(path, model.get_submodule(path), additive=bool(stage.additive) and stage.additive[i])
        for stage in stages
        for i, path in enumerate(stage.blocks)
        if modes.get(path) == "branch"
    }


@contextmanager
def active_subnet(model: nn.Module, stages: Sequence[Stage], subnet: Subnet) -> Iterator[None]:
    """Run the model as one of its subnets for the time of a ``with`` block.

    Skipped blocks return their input, in a tuple where they return tuples. Class, parameters, state_dict keys and hooks
    of the model stay as they are, and the model is whole again on exit, exceptions included.

    Raises:
        ValueError: the subnet is not one of these stages, or the model already runs as a subnet.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18().eval(), torch.randn(1, 3, 64, 64)
    >>> stages = unloaf.find_stages(model, x)
    >>> with unloaf.active_subnet(model, stages, unloaf.Subnet.from_depths(stages, (2, 1, 1, 2))):
    ...     logits = model(x)
    >>> logits.shape
    torch.Size([1, 1000])
    """
    inner = inner_module(model)
    check_subnet(stages, subnet)
    modules = check_stages(inner, stages)
    modes = subnet.modes(stages)
    replacements: dict[str, Callable[..., Any]] = {
        path: skip(stage.form(path)) for stage in stages for path in stage.blocks if path not in modes
    }
    replacements |= branches(inner, stages, subnet)
    check_whole(modules.values())  # all blocks: kept ones are not replaced, but may be shadowed from outside
    with replaced_forwards({modules[path]: function for path, function in replacements.items()}):
        yield
