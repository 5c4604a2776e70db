"""A subnet as an ordinary, smaller module: a copy of the model without the blocks that the subnet skips."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.stages import Stage, call_model, copy_of, evaluating, inner_module
from unloaf.subnet import Subnet, active_subnet, check_stages, check_subnet, check_whole

_CHECK_SEED = 0xC0FFEE
_STAGE_TEXT = re.compile(r"(\d+)(?::([01]+))?")
# Where the configurations of transformers keep the number of blocks, for models with one run of them.
_DEPTH_NAMES = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")


def export_subnet(model: nn.Module, stages: Sequence[Stage], subnet: Subnet, *, example: Any = None) -> nn.Module:
    """A copy of the model without the blocks that the subnet skips: an ordinary module, equal in eval mode bit for bit.

    Blocks are deleted from their ``nn.Sequential`` or ``nn.ModuleList``; where a block is an attribute of its parent,
    where the container holds other modules too, or where the model does not run right without it, an ``nn.Identity``
    takes its place. The keys of an ordered subnet are then some of the model's. The copy is compared with
    `active_subnet` on an example. It keeps the batch-norm statistics the model has, which are the main network's: call
    `recalibrate_bn` on the copy. Models of transformers get an edited copy of their configuration, so that
    ``save_pretrained`` and ``from_pretrained`` give the small model again.

    Args:
        model: left as it is; a DistributedDataParallel or torch.compile wrapper is looked through.
        stages: from `find_stages`.
        subnet: ordered or not; without raw branches.
        example: an input, as for `find_stages`; default: noise of the shape that the stages were found on.

    Returns:
        the copy, on the model's device and in its mode; of it no part belongs to unloaf.

    Raises:
        ValueError: a subnet of other stages, a raw subnet, a model inside `active_subnet`, an example that the model
            cannot take, outputs that cannot be compared, or a block that cannot be taken out; the message names it.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18().eval(), torch.randn(1, 3, 64, 64)
    >>> stages = unloaf.find_stages(model, x)
    >>> subnet = unloaf.Subnet.from_depths(stages, (2, 1, 1, 2))
    >>> small = unloaf.export_subnet(model, stages, subnet)
    >>> with unloaf.active_subnet(model, stages, subnet):
    ...     torch.equal(model(x), small(x))
    True
    >>> sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    1476096
    """
    inner = inner_module(model)
    check_subnet(stages, subnet)
    if subnet.shortcut is not None and subnet.shortcut != subnet.keep:
        raise ValueError(
            f"subnet {subnet} runs blocks without their skip connection and is no network of whole blocks; "
            "export a subnet that keeps or skips each block"
        )
    check_whole(check_stages(inner, stages).values())
    whole = _eager_copy(inner, stages)
    inputs = _inputs(whole, stages, example)
    kept = subnet.modes(stages)
    skipped = [path for stage in stages for path in stage.blocks if path not in kept]
    with active_subnet(whole, stages, subnet), _lone_inputs(whole, skipped) as lone:
        expected = _outputs(whole, inputs)
    if not expected:  # any copy would be equal
        with evaluating(whole):
            kind = type(call_model(whole, inputs)).__name__
        raise ValueError(
            f"{type(inner).__name__} returned a {kind} without a tensor, so that a copy cannot be compared with it; "
            "let forward return the logits, or an object with .logits"
        )
    small = _first_equal(whole, stages, skipped, inputs, expected, lone)
    _check_configuration(small, inputs, expected)
    return small


def parse_subnet(stages: Sequence[Stage], text: str) -> Subnet:
    """The subnet that a text names: depths, ``"3,3,5,3"``, or what ``str(subnet)`` gives, ``"3-2:1011-5-3"``.

    Raises:
        ValueError: the text names no subnet of these stages.

    >>> stages = (unloaf.Stage("a", ("a.0", "a.1", "a.2"), (False, True, True)),)
    >>> parse_subnet(stages, "2") == unloaf.Subnet.from_depths(stages, (2,)), parse_subnet(stages, "2:101").keep
    (True, ((True, False, True),))
    """
    parts = [_STAGE_TEXT.fullmatch(part.strip()) for part in re.split("[-,]", text)]
    full = str(Subnet.full(stages))
    if any(part is None for part in parts):
        raise ValueError(f"subnet {text!r}: give one depth per stage, such as {full}, or 2:101 for chosen blocks")
    found = [part for part in parts if part is not None]
    if not any(part[2] for part in found):
        return Subnet.from_depths(stages, [int(part[1]) for part in found])
    keep = []
    for i, part in enumerate(found):
        depth = stages[i].depth if i < len(stages) else 0
        marks = part[2] or "1" * int(part[1]) + "0" * (depth - int(part[1]))
        if marks.count("1") != int(part[1]):
            raise ValueError(f"subnet {text!r}: {part[0]} marks {marks.count('1')} blocks as kept, not {part[1]}")
        keep.append(tuple(mark == "1" for mark in marks))
    subnet = Subnet(tuple(keep))
    check_subnet(stages, subnet)
    return subnet


def _eager_copy(model: nn.Module, stages: Sequence[Stage]) -> nn.Module:
    """A deep copy, its blocks as they were before `compile_blocks` (compiled ones round otherwise) or checkpointing."""
    copied = copy_of(model)
    for block in check_stages(copied, stages).values():
        function = getattr(block.__dict__.get("forward"), "__func__", None)
        if hasattr(function, "unloaf_compiles") or hasattr(function, "unloaf_recomputes"):
            del block.__dict__["forward"]
    return copied


def _inputs(model: nn.Module, stages: Sequence[Stage], example: Any) -> Any:
    """The example, or two examples of noise of the shape on which the stages were found."""
    if example is not None:
        return example
    shape = next((stage.input_shape for stage in stages if stage.input_shape is not None), None)
    if shape is None:
        raise ValueError(
            f"the stages do not say what {type(model).__name__} takes, and the copy is compared on an example; "
            "give export_subnet(..., example=...)"
        )
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(_CHECK_SEED)).to(weight)
    reasons = []
    for inputs in (noise, torch.zeros(2, *shape, dtype=torch.long, device=weight.device)):  # images, or tokens
        try:
            _outputs(model, inputs)
            return inputs
        except Exception as error:
            reasons.append(str(error))
    raise ValueError(
        f"{type(model).__name__} cannot run on noise of shape (2, {', '.join(map(str, shape))}): {reasons[0]}; "
        "give an input it takes as example="
    )


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(model):
        output = call_model(model, inputs)
    # Into objects only where nothing else is: those beside the logits, such as a cache of transformers, may tell of
    # blocks that the copy lacks.
    return list(tensors_in(output)) or list(tensors_in(output, into=[]))


def tensors_in(output: Any, into: list[Any] | None = None) -> Iterator[Tensor]:
    """The tensors in containers; with a list, which notes the objects seen, those in attributes of objects as well."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value, into)
    elif isinstance(output, (nn.Module, type)):  # an output may know its model, whose weights are no outputs
        return
    elif into is not None and hasattr(output, "__dict__") and not any(output is seen for seen in into):
        into.append(output)
        yield from tensors_in(vars(output), into)


def same_outputs(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal; on accelerators, whose kernels may add in another order, up to rounding."""

    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.device.type != "cpu" and a.is_floating_point():
            return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        return bool(((a == b) | (a.isnan() & b.isnan())).all())

    return len(ours) == len(theirs) and all(map(same, ours, theirs))


@contextmanager
def _lone_inputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, bool]]:
    """Notes which of the blocks are given one tensor alone and asked for one: those an nn.Identity can stand for."""
    lone: dict[str, bool] = {}
    handles = []
    for path in paths:

        def record(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            lone[path] = len(args) == 1 and not kwargs and isinstance(output, Tensor)

        handles.append(model.get_submodule(path).register_forward_hook(record, with_kwargs=True))
    try:
        yield lone
    finally:
        for handle in handles:
            handle.remove()


def _attempts(model: nn.Module, stages: Sequence[Stage], skipped: Sequence[str]) -> list[list[str]]:
    """From which containers to delete, best first: those that hold blocks of one stage alone, so that keys stay."""
    holders = list(dict.fromkeys(path.rpartition(".")[0] for path in skipped))
    holders = [p for p in holders if isinstance(model.get_submodule(p), (nn.Sequential, nn.ModuleList))]

    def is_pure(holder: str) -> bool:
        children = {f"{holder}.{name}".lstrip(".") for name, _ in model.get_submodule(holder).named_children()}
        return any(children <= set(stage.blocks) for stage in stages)

    pure = [holder for holder in holders if is_pure(holder)]
    attempts = [pure, holders, *([p for p in holders if p != held] for held in holders), []]
    return [attempt for i, attempt in enumerate(attempts) if attempt not in attempts[:i]]


def _first_equal(
    whole: nn.Module,
    stages: Sequence[Stage],
    skipped: Sequence[str],
    inputs: Any,
    expected: list[Tensor],
    lone: Mapping[str, bool],
) -> nn.Module:
    """The copy with as many blocks deleted as it runs right without, the others replaced by nn.Identity."""
    reason = "its output differs"
    for deleting in _attempts(whole, stages, skipped):
        small = copy_of(whole)
        _take_out(small, skipped, deleting)
        try:
            if same_outputs(_outputs(small, inputs), expected):
                return small
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    if not skipped or not same_outputs(_outputs(whole, inputs), _outputs(whole, inputs)):
        raise ValueError(
            f"{type(whole).__name__} gives other outputs for the same input in eval mode, so that a copy cannot be "
            f"compared with it ({reason}); switch its randomness off in eval mode"
        )
    held = next((path for path in skipped if not lone.get(path)), skipped[0])
    kind = type(whole.get_submodule(held)).__name__
    why = "" if lone.get(held) else ": it takes or returns more than one tensor, so nn.Identity cannot stand for it"
    raise ValueError(
        f"{type(whole).__name__} does not run as this subnet without block {held!r} ({kind}){why} ({reason}); "
        "export a subnet that keeps it, or use the model inside active_subnet"
    )


def _take_out(model: nn.Module, skipped: Sequence[str], deleting: Sequence[str]) -> None:
    """Deletes the skipped blocks of these holders, and puts nn.Identity in the place of the others."""
    before = _depths(model, {type(model.get_submodule(path)) for path in skipped})
    positions: dict[str, list[int]] = {}
    for holder in deleting:
        parent = model.get_submodule(holder)
        gone = {path.rpartition(".")[2] for path in skipped if path.rpartition(".")[0] == holder}
        positions[holder] = [i for i, name in enumerate(parent._modules) if name not in gone]
        _delete(parent, gone)
    for path in skipped:
        holder, _, name = path.rpartition(".")
        if holder not in deleting:
            parent = model.get_submodule(holder)
            parent._modules[name] = nn.Identity().train(model.get_submodule(path).training)
    for holder, kept in positions.items():
        _renumber(model.get_submodule(holder), kept)
    _edit_configurations(model, before, {path: len(model.get_submodule(path)) for path in before}, positions)  # type: ignore[arg-type]


def _delete(parent: nn.Module, names: set[str]) -> None:
    """Numbered children are renumbered, named ones keep their names (unlike in nn.Sequential's own ``del``)."""
    numbered = list(parent._modules) == [str(i) for i in range(len(parent._modules))]
    kept = [(name, module) for name, module in parent._modules.items() if name not in names]
    parent._modules.clear()
    parent._modules.update((str(i) if numbered else name, module) for i, (name, module) in enumerate(kept))


def _renumber(parent: nn.Module, kept: Sequence[int]) -> None:
    """Attention layers of transformers know their own number, under which they keep keys and values."""
    for new, (old, block) in enumerate(zip(kept, parent.children(), strict=True)):
        for module in block.modules():
            if module.__dict__.get("layer_idx") == old:
                module.__dict__["layer_idx"] = new


def _depths(model: nn.Module, kinds: set[type[nn.Module]]) -> dict[str, int]:
    """How many blocks each container of blocks of these classes alone holds, stages of a single block included."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) and {type(m) for m in module} <= kinds
    }


def block_counts(model: nn.Module, kinds: set[type[nn.Module]]) -> list[int]:
    """Number of blocks in each container that holds blocks of these classes alone, in the order of the modules.

    >>> from torchvision.models.resnet import BasicBlock, resnet18
    >>> block_counts(resnet18(), {BasicBlock})
    [2, 2, 2, 2]
    """
    return list(_depths(model, kinds).values())


def without_stand_ins(model: nn.Module, kinds: set[type[nn.Module]]) -> nn.Module:
    """A copy without the nn.Identity that stand for skipped blocks in containers of such blocks: renumbered."""
    copied = copy_of(model)
    for module in copied.modules():
        types = {type(child) for child in module.children()}
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and types & kinds and types - kinds == {nn.Identity}:
            _delete(module, {name for name, child in module.named_children() if type(child) is nn.Identity})
    return copied


def _edit_configurations(
    model: nn.Module, before: Mapping[str, int], after: Mapping[str, int], positions: Mapping[str, Sequence[int]]
) -> None:
    """Lets the configurations of a transformers model, copies already, say the new depths."""
    if not before or not hasattr(model, "save_pretrained"):
        return
    configurations = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    old, new = list(before.values()), list(after.values())
    for config in configurations.values():
        depths = getattr(config, "depths", None)
        if isinstance(depths, (list, tuple)) and list(depths) == old:
            config.depths = type(depths)(new)
        elif len(old) == 1:
            _edit_flat(config, old[0], new[0], next(iter(positions.values()), range(old[0])))


def _edit_flat(config: Any, old: int, new: int, kept: Sequence[int]) -> None:
    # The list first: transformers compares its length with the number of layers.
    for name, value in vars(config).copy().items():
        if name.endswith("layer_types") and isinstance(value, (list, tuple)) and len(value) == old:
            setattr(config, name, type(value)(value[i] for i in kept))
    name = next((name for name in _DEPTH_NAMES if getattr(config, name, None) == old), None)
    if name is not None:
        setattr(config, name, new)
    if len(getattr(config, "stage_names", None) or ()) == old + 1 and hasattr(config, "_out_indices"):
        config.stage_names = config.stage_names[
            : new + 1
        ]  # of a backbone: "stem", "stage1", ...; the last is its output
        config._out_features, config._out_indices = config.stage_names[-1:], [new]


def _check_configuration(small: nn.Module, inputs: Any, expected: list[Tensor]) -> None:
    """Warns if transformers would not rebuild this model from its configuration, and so reload something else."""
    config = getattr(small, "config", None)
    if config is None or not hasattr(small, "save_pretrained"):
        return
    try:
        with torch.random.fork_rng():
            reread = type(config).from_dict(config.to_dict())
            reread._attn_implementation = config._attn_implementation
            rebuilt = type(small)(reread)
        rebuilt.load_state_dict(small.state_dict())
        weight = next(small.parameters())
        if same_outputs(_outputs(rebuilt.to(weight.device, weight.dtype), inputs), expected):
            return
        reason = "the output differs"
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
    warnings.warn(
        f"the configuration of {type(small).__name__} cannot describe this subnet ({reason}): the module is right, but "
        "from_pretrained would not reload what save_pretrained writes; save its state_dict instead",
        stacklevel=3,
    )
