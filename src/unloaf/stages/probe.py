"""What the modules of a model do: one traced run, and each candidate again with its parameters set to zero."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList

from unloaf.stages.stage import Form, call_model, result_of, stream_of

_PROBE_SEED = 0x5EED

Kind = Literal["additive", "activated"]


class Residual(NamedTuple):
    """How a block adds its input, and in which form it returns the sum (None: a tensor)."""

    kind: Kind
    form: Form | None


@dataclass(frozen=True)
class Call:
    """What the trace saw of a module that was called exactly once."""

    order: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    versions: tuple[int, ...] = ()
    autocast: torch.dtype | None = None  # to what the model's own forward let it cast

    @property
    def intact(self) -> bool:
        """Whether it is known that nobody has overwritten the tensors of the output since, in place."""
        return bool(self.versions) and self.versions == _versions(self.output)

    @property
    def stream(self) -> Tensor | None:
        """The first tensor among the arguments."""
        return stream_of(self.args, self.kwargs)

    @property
    def result(self) -> Tensor | None:
        """The output, or the first tensor of a tuple."""
        return result_of(self.output)

    @property
    def keeps_shape(self) -> bool:
        """Whether the input could take the place of the output."""
        x, y = self.stream, self.result
        return x is not None and y is not None and (x.shape, x.dtype) == (y.shape, y.dtype) and x.is_floating_point()


def _versions(output: Any) -> tuple[int, ...]:
    items = [output] if isinstance(output, Tensor) else output if type(output) in (tuple, list) else []
    return tuple(item._version for item in items if isinstance(item, Tensor) and not item.is_inference())


def _autocast_of(stream: Tensor | None) -> torch.dtype | None:
    if stream is None or stream.is_meta or not torch.is_autocast_enabled(stream.device.type):
        return None
    return torch.get_autocast_dtype(stream.device.type)


@contextmanager
def drawing_alike(model: nn.Module) -> Iterator[None]:
    """Passes inside draw the same random numbers each time; nobody else notices."""
    device, state = next(model.parameters(), torch.empty(0)).device, random.getstate()
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        random.seed(_PROBE_SEED)
        for generator in (torch.default_generator, *map(torch.get_device_module, devices)):
            generator.manual_seed(_PROBE_SEED)
        try:
            yield
        finally:
            random.setstate(state)


def trace(model: nn.Module, example: Any) -> tuple[dict[str, Call], Any]:
    """Run the model once: the modules that were called exactly once, as they returned, and the output."""
    seen: dict[str, list[Call]] = {}
    handles = []
    # What makes weights out of parameters is called as modules are, and is none of the network.
    makers = {part for m in model.modules() if isinstance(m, ParametrizationList) for part in m.modules()}
    for path, module in model.named_modules():

        def record(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            call = Call(len(seen), args, kwargs, output, _versions(output))
            seen.setdefault(path, []).append(replace(call, autocast=_autocast_of(call.stream)))

        if path and module not in makers:
            handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        with drawing_alike(model):
            output = call_model(model, example)
    except Exception as error:
        given = (
            f"of shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"of type {type(example).__name__}"
        )
        raise ValueError(
            f"{type(model).__name__} cannot run on the example {given}: {error}; "
            "give an input with a batch dimension, of the size the model was built for, on the model's device"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {path: calls[0] for path, calls in seen.items() if len(calls) == 1}, output


class NotFiniteError(Exception):
    """With its parameters zero the module gives NaN, and so no answer."""


def residual(module: nn.Module, call: Call) -> Residual | None:
    """How the module adds its input: with its parameters zero it returns it ("additive") or relu of it ("activated").

    That is not all: what it adds must come from other elements of the input as well, which tells a block from an
    activation with parameters (PReLU, FReLU) or a scale and shift.

    Raises:
        NotFiniteError: it cannot be decided.
    """
    assert call.stream is not None
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    # Fresh noise instead of the traced activation: an example of zeros, or a norm initialised to zero, would make
    # any module look like a residual block.
    noise = torch.randn(call.stream.shape, generator=generator).to(call.stream)
    for without in ((), _carried(call)):
        # The first run may have changed what the model carries along (a cache of keys): then once more without it.
        trial = _Trial(module, call, without)
        x = noise.clone()  # some blocks work in place
        try:
            answer = _without_parameters(trial, x)
        except NotFiniteError:
            raise
        except Exception:  # noqa: S112 - a module that cannot run alone, or not on noise, is no block to skip
            continue
        block = _judged(answer, noise, x)
        return block if block is not None and _adds(trial, noise, block.kind, generator) else None
    return None


@dataclass(frozen=True)
class _Trial:
    """A module called again as it was in the trace, without what the model carries along."""

    module: nn.Module
    call: Call
    without: tuple[Any, ...]

    def run(self, x: Tensor, parameters: dict[str, Tensor]) -> Call:
        """With another input and other parameters."""
        args = tuple(self._swapped(value, x) for value in self.call.args)
        kwargs = {key: self._swapped(value, x) for key, value in self.call.kwargs.items()}
        cast = nullcontext()
        if self.call.autocast is not None:
            # What is cast belongs to these parameters alone: nothing of it is kept.
            cast = torch.autocast(x.device.type, self.call.autocast, cache_enabled=False)
        with cast:
            output = functional_call(self.module, parameters, args, kwargs, tie_weights=False)
        return Call(self.call.order, args, kwargs, output)

    def _swapped(self, value: Any, x: Tensor) -> Any:
        if value is self.call.stream:
            return x
        return None if any(value is other for other in self.without) else value

    def parameters(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The parameters changed, by name; those of a frozen norm, which torchvision keeps as buffers, are some too."""
        # Each module once, and no tying: for a module under several names (CoaT's mlp2, mlp3 and mlp4 are one) torch
        # 2.15 would save the first name's parameters, then the substitutes as those of the second, and leave these
        # behind.
        return {
            f"{path}.{name}".lstrip("."): change(p)
            for path, part in self.module.named_modules()
            for name, p in (*part.named_parameters(recurse=False), *_frozen_affine(part))
        }


def _frozen_affine(part: nn.Module) -> list[tuple[str, Tensor]]:
    """Scale and shift that are buffers."""
    return [(name, b) for name, b in part.named_buffers(recurse=False) if name in ("weight", "bias")]


def _without_parameters(trial: _Trial, x: Tensor) -> Call:
    """What the module gives when it has no weights: neither parameters nor what is computed from them."""
    zeros, given = trial.parameters(torch.zeros_like), x.clone()
    with _zero_parametrized(trial.module):
        answer = trial.run(x, zeros)
        if not _has_nan(answer.result):
            return answer
        # Weights that are divided by their norm: 0/0. A layer of such weights adds nothing.
        x.copy_(given)
        with _nan_is_nothing(trial.module):
            answer = trial.run(x, zeros)
    if _has_nan(answer.result):
        raise NotFiniteError
    return answer


def _has_nan(result: Tensor | None) -> bool:
    return result is not None and bool(result.isnan().any())


@contextmanager
def _zero_parametrized(module: nn.Module) -> Iterator[None]:
    """Weights under torch's parametrizations (weight_norm, orthogonal) are zero, whatever makes them."""
    lists = [part for part in module.modules() if isinstance(part, ParametrizationList)]
    try:
        for part in lists:
            zeros = torch.zeros_like(part())
            part.__dict__["forward"] = lambda zeros=zeros: zeros
        yield
    finally:
        for part in lists:
            part.__dict__.pop("forward", None)


@contextmanager
def _nan_is_nothing(module: nn.Module) -> Iterator[None]:
    def without_nan(_: nn.Module, __: Any, output: Any) -> Any:
        return output.nan_to_num(nan=0.0) if isinstance(output, Tensor) and _has_nan(output) else None

    handles = [part.register_forward_hook(without_nan) for part in module.modules() if part is not module]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adds(trial: _Trial, noise: Tensor, kind: Kind, generator: torch.Generator) -> bool:
    """Whether it mixes what it is given, and so adds something; activations return one tensor as well."""
    if not isinstance(trial.call.output, Tensor):
        return True
    # Its own parameters first; of a fresh model some are zero. A small block may be dead: it gets another chance.
    for change in (torch.Tensor.detach, *(_noisy(generator) for _ in range(3))):
        if _mixes(trial, noise, trial.parameters(change), generator):
            return kind == "additive" or not _takes_the_larger(trial, noise, trial.parameters(_noisy(generator)))
    # On a map of one pixel a depthwise convolution has no neighbours.
    larger = noise.shape[:2] + tuple(side if side > 1 else 5 for side in noise.shape[2:])
    try:
        parameters = trial.parameters(_noisy(generator))
        return larger != noise.shape and _mixes(trial, noise.expand(larger), parameters, generator)
    except Exception:  # it cannot take another size
        return False


def _noisy(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    some = 0.1 * torch.randn(1021, generator=generator)  # repeated: as many as a network has weights take their time

    def changed(parameter: Tensor) -> Tensor:
        if not parameter.is_floating_point():
            return parameter
        times = -(-parameter.numel() // len(some))
        return parameter + some.repeat(times)[: parameter.numel()].view(parameter.shape).to(parameter)

    return changed


def _mixes(trial: _Trial, like: Tensor, parameters: dict[str, Tensor], generator: torch.Generator) -> bool:
    """Whether elements of the input that are zero come out different when the others differ."""
    if like.numel() < 2 * len(like):  # one element an example: there are no others
        return True
    one, another = (torch.randn(like.shape, generator=generator).to(like) for _ in range(2))
    others = torch.rand(like.shape, generator=generator).to(like.device) < 0.5
    a, b = (trial.run(x * others, parameters).result for x in (one, another))
    assert a is not None
    assert b is not None
    return not torch.equal(a[~others], b[~others])


def _takes_the_larger(trial: _Trial, noise: Tensor, parameters: dict[str, Tensor]) -> bool:
    """Whether it is ``max(x, f(x))`` (FReLU) and no sum: never below x, and mostly x itself where f is small."""
    whole = trial.run(noise.clone(), parameters).result
    small = trial.run(noise.clone(), {name: 0.1 * p for name, p in parameters.items()}).result
    assert whole is not None
    assert small is not None
    large = noise > 0.5
    # A branch that ends in a relu (SE-ResNet-18) is never below x either, but adds something to every second element.
    return bool((whole >= noise).all()) and float((small != noise)[large].float().mean()) < 0.2


def _carried(call: Call) -> tuple[Any, ...]:
    plain = (Tensor, tuple, list, dict, str, int, float, bool, type(None), torch.Size, torch.dtype, torch.device)
    return tuple(v for v in (*call.args, *call.kwargs.values()) if not isinstance(v, plain))


def _judged(call: Call, noise: Tensor, x: Tensor) -> Residual | None:
    result = call.result
    if result is None or result.shape != noise.shape:
        return None
    additive = torch.equal(result, noise)
    if not additive and not torch.equal(result, noise.relu()):
        return None
    x.copy_(noise)  # an in-place block has changed its input, which the other items may be compared with
    if isinstance(call.output, Tensor):
        return Residual("additive" if additive else "activated", None)
    form = form_of(call)
    if form is None:
        return None
    # A second stream (TNT's pixels beside its patches) is added to as well: output minus input is not its branch.
    others = [item for item in call.output if isinstance(item, Tensor) and item is not result]
    single = all(any(item is value for value in (*call.args, *call.kwargs.values())) for item in others)
    return Residual("additive" if additive and single else "activated", form)


def form_of(call: Call) -> Form | None:
    """The form of a tuple or list of which every item has an argument to take its place; None if one has not."""
    if type(call.output) not in (tuple, list):
        return None
    given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    sources = []
    for item in call.output:
        value = call.stream if item is call.result else item
        found = next((key for key, argument in given if _same(value, argument)), None)
        if found is None and item is not None:
            return None
        sources.append(found if item is not None else None)
    return Form(tuple(sources), isinstance(call.output, list))


def _same(item: Any, argument: Any) -> bool:
    if item is argument:
        return True
    if isinstance(item, Tensor) or isinstance(argument, Tensor):
        return isinstance(item, Tensor) and isinstance(argument, Tensor) and torch.equal(item, argument)
    return type(item) is type(argument) and isinstance(item, (tuple, list, torch.Size)) and item == argument
