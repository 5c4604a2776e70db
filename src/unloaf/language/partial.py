"""Some layers of a language model at a time: from a hidden state on, or up to an exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from unloaf.passes import logits_of
from unloaf.passes.guards import not_compiled
from unloaf.stages import Stage, result_of, stand_in
from unloaf.subnet import check_stages, replaced_forwards, replaces_forward


class PartialModel:
    """A language model of which a call runs the layers from ``first`` to before ``last``; to be used inside `open`.

    Layers before ``first`` hand on the hidden state that is given, those from ``last`` on their input. Embeddings, the
    last norm and the head are the model's own in each call, so that a call with ``first == 0`` gives what the ordered
    subnet of depth ``last`` gives, and one that starts where another has stopped what the two have together.

    Args:
        model: the user's own module.
        stages: its stages; their blocks in order are its layers.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.model = model
        self.blocks = check_stages(model, stages)
        self.depth = len(self.blocks)
        self._forms = [stage.form(path) for stage in stages for path in stage.blocks]
        self._first, self._last = 0, self.depth
        self._given: Tensor | None = None
        self._left: Tensor | None = None
        self._masks: tuple[Tensor, ...] = ()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Shadow the layers for the time of the calls; hooks on a layer see calls that skip it, too."""
        made: dict[nn.Module, Callable[..., Any]] = {
            block: replaces_forward(partial(self._layer, index, block.forward))
            for index, block in enumerate(self.blocks.values())
        }
        compiled = any(module._compiled_call_impl is not None for module in self.model.modules())
        with not_compiled(self.model) if compiled else nullcontext(), replaced_forwards(made):
            yield

    def __call__(
        self,
        tokens: Tensor,
        *,
        first: int = 0,
        last: int | None = None,
        hidden: Tensor | None = None,
        logits: int | None = None,
        mask: Tensor | Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Logits and the hidden state behind the last layer that has run.

        Args:
            tokens: (batch, length).
            first: the first layer that runs.
            last: the first one that does not; default: all to the end run.
            hidden: what stands for the output of the layers before ``first``, (batch, length, width).
            logits: for how many of the last tokens logits are computed; default: for all.
            mask: of the attention, as the model takes it.
            inputs: further arguments of the model.

        Raises:
            ValueError: the model does not hand a mask of four axes to its layers.
        """
        self._first, self._last, self._given = first, self.depth if last is None else last, hidden
        self._masks = tuple(mask.values()) if isinstance(mask, Mapping) else () if mask is None else (mask,)
        # An integer of 0 would keep all of them.
        keep: Any = tokens.new_empty(0) if logits == 0 else 0 if logits is None else logits
        try:
            output = self.model(input_ids=tokens, attention_mask=mask, logits_to_keep=keep, **inputs)
            left = hidden if self._left is None else self._left
            assert left is not None
            return logits_of(output, None), left
        finally:
            self._given = self._left = None
            self._masks = ()

    def _layer(self, index: int, forward: Callable[..., Any], block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not self._first <= index < self._last:
            if index + 1 == self._first:
                args, kwargs = _with_stream(self._given, args, kwargs)
            if self._forms[index] is None and args and isinstance(args[0], Tensor):
                return args[0]  # as stand_in finds it, sooner: most layers of most calls come here
            return stand_in(self._forms[index], args, kwargs)
        if index == self._first:
            self._check_mask(block, args, kwargs)
        output = forward(*args, **kwargs)
        if index + 1 == self._last:
            self._left = result_of(output)
        return output

    def _check_mask(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        whole = [mask for mask in self._masks if mask.ndim == 4]
        if whole and not any(value is mask for value in (*args, *kwargs.values()) for mask in whole):
            raise ValueError(
                f"{type(self.model).__name__} makes a mask of its own before it calls {type(block).__name__}, and "
                "cannot start at a layer in the middle; decode with its own generate"
            )


def _with_stream(
    given: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with another residual stream, which is the first tensor among them."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:index], given, *args[index + 1 :]), dict(kwargs)
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: given}
