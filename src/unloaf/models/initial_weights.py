"""Weights that a training begins with: fitted to the model as timm does, and what was taken is said."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from unloaf.data.consistency import some
from unloaf.errors import in_one_line
from unloaf.files.tensors import load_strictly
from unloaf.models.weight_files import read_tensors

_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # of torchvision's GoogLeNet and Inception, which are built without
_POSITIONS = ("pos_embed", "pos_embedding", "position_embeddings")


def load_initial_weights(model: nn.Module, path: Path, *, partial: bool = False) -> tuple[str, ...]:
    """Starts a model from saved weights: of this architecture, but for the classifier's classes.

    Words that wrappers put before the names are taken off. Tables of positions are resampled and the first
    convolution is changed to other channels where the model needs it, as timm does with published weights. With
    ``partial`` what fits is taken, also where more than the head is missing. The path is that of `read_tensors`.

    Returns:
        what was taken, changed and left, for the log: the first line says how many tensors.

    Raises:
        ValueError: nothing there fits the model, or more than the classifier differs and ``partial`` is not asked for.
        CheckpointError: a checkpoint or an exported folder is damaged.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(nn.Linear(3, 2).state_dict(), f"{folder}/model.safetensors")
    ...     load_initial_weights(nn.Linear(3, 2), Path(folder))[0].partition(": ")[2]
    'loaded 2 of 2 tensors'
    """
    own = model.state_dict()
    try:
        file, tensors, nests = read_tensors(path)
        given = _unwrapped(tensors, own, file, inside=getattr(model, "base_model_prefix", None))
    except ValueError as error:
        raise ValueError(f"initial_checkpoint {error}") from error
    given, notes = _fitted(model, own, given)
    notes += [f"its {' of its '.join(reversed(nests))} was taken"] if nests else []
    taken = {name: value for name, value in given.items() if name in own and _fits(own[name], value)}
    place = f"initial_checkpoint {file}"
    if not any(own[name].ndim > 1 for name in taken):
        raise ValueError(f"{place}: none of its {len(tensors)} tensors fits this model")
    left = _left(own, given, taken)
    differs = [name for name in left if not _is_in(name, _head(model))]
    unused = [name for name, value in given.items() if name not in own and value.is_floating_point()]
    foreign = [name for name in unused if not name.startswith(_AUXILIARY) and not _is_in(name, _head(model))]
    if (differs or foreign) and not partial:
        raise ValueError(f"{place}: {_difference(own, given, taken, differs, foreign)}")
    try:
        load_strictly(model, {**own, **taken})
    except RuntimeError as error:
        raise ValueError(f"{place}: {in_one_line(error)}") from error
    loaded = f"{place}: loaded {_count(own, taken)} of {_count(own, own)} tensors"
    lines = [loaded, *notes]
    lines += [f"stay as they are drawn: {_some(_described(own, given, left))}"] if left else []
    lines += [f"not used: {_some(unused)}"] if unused else []
    return tuple(lines)


def _fits(own: Tensor, value: Tensor) -> bool:
    """Whether it can take the place: quantised integers are no weights."""
    return own.shape == value.shape and own.is_floating_point() == value.is_floating_point()


def _left(own: Mapping[str, Tensor], given: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> list[str]:
    """Weights of the model that keep their values; counters and indices are no weights, tied ones have one value."""
    reached = {own[name].data_ptr() for name in taken}
    return [
        name
        for name, value in own.items()
        if name not in taken and value.is_floating_point() and value.numel() and value.data_ptr() not in reached
    ]


def _count(own: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return sum(own[name].is_floating_point() for name in names)


def _difference(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    differs: list[str],
    foreign: list[str],
) -> str:
    """Why these weights are not those of the model."""
    missing = [name for name in differs if name not in given]
    shaped = [name for name in differs if name in given]
    parts = [f"missing there: {_some(missing)}"] if missing else []
    parts += [f"of another shape: {_some(_described(own, given, shaped))}"] if shaped else []
    parts += [f"only there: {_some(foreign)}"] if foreign else []
    return (
        f"fits {_count(own, taken)} of the model's {_count(own, own)} tensors, and more than the classifier differs "
        f"({'; '.join(parts)}); give weights of this architecture, or --partial-weights to leave the rest random"
    )


def _described(own: Mapping[str, Tensor], given: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """The names, with both shapes where there are two."""
    return [
        f"{name} ({_shape(given[name])} there, {_shape(own[name])} here)" if name in given else name for name in names
    ]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _some(names: list[str]) -> str:
    return some([f"{name:.120}" for name in names], limit=4)


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _head(model: nn.Module) -> tuple[str, ...]:
    """The modules that give the classes: those that timm or transformers names, else the last linear layer."""
    named = _of_timm(model, "classifier")
    if named:
        return named
    named = tuple(name for name, _ in model.named_children() if "classifier" in name and hasattr(model, "config"))
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, module in model.named_modules() if name and isinstance(module, kind)]
        if found:
            return (*named, found[-1])
    return named


def _of_timm(model: nn.Module, key: str) -> tuple[str, ...]:
    """What timm says of its own model: the name of a module, or several."""
    found = (getattr(model, "pretrained_cfg", None) or {}).get(key)
    return () if not found else (found,) if isinstance(found, str) else tuple(found)


def _fitted(
    model: nn.Module, own: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, changed where the model needs it and timm would change published weights; and what was changed."""
    given, head = dict(before), _head(model)
    if all(name in given and given[name].shape == own[name].shape for name in own if not _is_in(name, head)):
        return given, []
    given = _filtered_by_timm(model, given)
    for name, value in list(given.items()):
        if name in own and value.shape != own[name].shape:
            changed = _resampled(name, value, own[name]) if name.endswith(_POSITIONS) else None
            given[name] = value if changed is None else changed
    notes = [
        f"resampled {name} from {_shape(before[name])} to {_shape(value)}"
        for name, value in given.items()
        if name in before and value.shape != before[name].shape and value.shape == getattr(own.get(name), "shape", None)
    ]
    for name in _stem(model):
        weight = f"{name}.weight"
        changed = _adapted(model.get_submodule(name), given.get(weight))
        if changed is not None:
            notes.append(f"adapted {weight} from {given[weight].shape[1]} to {changed.shape[1]} channels")
            given[weight] = changed
    return given, notes


def _unwrapped(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], file: Path, *, inside: str | None
) -> dict[str, Tensor]:
    """The tensors under the names that the model has, without the words of wrappers.

    `inside` is where transformers keeps the model that a head was put on, whose files lack that word.
    """
    given: dict[str, Tensor] = {}
    for name, value in tensors.items():
        short = name
        while short not in own and short.startswith(_PREFIXES):
            short = short.partition(".")[2]
        if short not in own and f"{inside}.{short}" in own:
            short = f"{inside}.{short}"
        if short in given:
            raise ValueError(f"{file}: {name!r:.120} and another of its tensors are both {short!r:.120}")
        given[short] = value
    return given


def _filtered_by_timm(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the model's own function in timm changes published weights: positions, patches, older names."""
    module = sys.modules.get(type(model).__module__)
    change: Callable[..., dict[str, Tensor]] | None = getattr(module, "checkpoint_filter_fn", None)
    if change is None or not type(model).__module__.startswith("timm."):
        return given
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's interpolation of windows, under newer versions of torch
            return dict(change(dict(given), model))
    except Exception:  # made for published weights; what does not fit is named by the caller
        return given


def _resampled(name: str, table: Tensor, own: Tensor) -> Tensor | None:
    """A table (1, positions, width) of a square image as that of another side; the first ones may be of no place."""
    if table.ndim != 3 or own.ndim != 3 or table.shape[::2] != own.shape[::2]:
        return None
    from timm.layers import resample_abs_pos_embed

    for special in range(9):
        sides = [math.isqrt(max(0, count.shape[1] - special)) for count in (table, own)]
        if all(sides) and [side**2 + special for side in sides] == [table.shape[1], own.shape[1]]:
            return resample_abs_pos_embed(table, [sides[1]] * 2, [sides[0]] * 2, num_prefix_tokens=special)
    return None


def _stem(model: nn.Module) -> Iterator[str]:
    """The convolutions that see the image: those that timm names, else the first."""
    named = _of_timm(model, "first_conv")
    first = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    modules = dict(model.named_modules())
    yield from (name for name in (named or [next(first, "")]) if isinstance(modules.get(name), nn.Conv2d))


def _adapted(stem: nn.Module, weight: Tensor | None) -> Tensor | None:
    """The weights of the first convolution for other channels of the image, if nothing else differs."""
    own = stem.weight
    if weight is None or weight.ndim != 4 or not isinstance(own, Tensor) or weight.shape[1] == own.shape[1]:
        return None
    from timm.models import adapt_input_conv

    try:
        changed = adapt_input_conv(own.shape[1], weight, base_chans=weight.shape[1])
    except (NotImplementedError, AssertionError):
        return None
    return changed if changed.shape == own.shape else None
