"""What the modules of a model do: one traced run, and each candidate again with its parameters set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

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


def trace(model: nn.Module, example: Any) -> dict[str, Call]:
    """Run the model once; the modules that were called exactly once, in the order in which they returned."""
    seen: dict[str, list[Call]] = {}
    handles = []
    for path, module in model.named_modules():

        def record(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            seen.setdefault(path, []).append(Call(len(seen), args, kwargs, output))

        if path:
            handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        call_model(model, example)
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
    return {path: calls[0] for path, calls in seen.items() if len(calls) == 1}


def residual(module: nn.Module, call: Call) -> Residual | None:
    """Whether the module returns its input ("additive") or relu of it ("activated") once its parameters are zero."""
    stream = call.stream
    assert stream is not None
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    # Fresh noise instead of the traced activation: an example of zeros, or a norm initialised to zero, would make
    # any module look like a residual block.
    noise = torch.randn(stream.shape, generator=generator).to(stream)
    # Each module once, and no tying: for a module under several names (CoaT's mlp2, mlp3 and mlp4 are one) torch 2.15
    # would save the first name's parameters, then the substitutes as those of the second, and leave these behind.
    zeros = {
        f"{path}.{name}".lstrip("."): torch.zeros_like(p)
        for path, part in module.named_modules()
        for name, p in part.named_parameters(recurse=False)
    }
    for without in ((), _carried(call)):
        # The first run may have changed what the model carries along (a cache of keys): then once more without it.
        x = noise.clone()  # some blocks work in place
        args = tuple(_swapped(value, stream, x, without) for value in call.args)
        kwargs = {key: _swapped(value, stream, x, without) for key, value in call.kwargs.items()}
        try:
            output = functional_call(module, zeros, args, kwargs, tie_weights=False)
        except Exception:  # noqa: S112 - a module that cannot run alone, or not on noise, is no block to skip
            continue
        return _judged(Call(call.order, args, kwargs, output), noise, x)
    return None


def _carried(call: Call) -> tuple[Any, ...]:
    plain = (Tensor, tuple, list, dict, str, int, float, bool, type(None), torch.Size, torch.dtype, torch.device)
    return tuple(v for v in (*call.args, *call.kwargs.values()) if not isinstance(v, plain))


def _swapped(value: Any, stream: Tensor, x: Tensor, without: tuple[Any, ...]) -> Any:
    if value is stream:
        return x
    return None if any(value is other for other in without) else value


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
