"""Calls of the model that compute what is new and replay what was computed before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unloaf.batchnorm import other_buffers
from unloaf.inputs import View
from unloaf.passes.containers import with_tensors
from unloaf.passes.draws import Draws
from unloaf.passes.plan import Plan, Record, Run, State, SubnetPass
from unloaf.stages import Form, Stage, between_blocks, call_model, inner_module, stand_in
from unloaf.subnet import branches, check_stages, check_subnet, replaced_forwards

Readout = Callable[[Any], Tensor]
_AUXILIARY = re.compile(r"aux\w*_(logits|outputs)")


class Session:
    """Runs the passes of a plan through the model, recording and replaying."""

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        inputs: Any,
        passes: Sequence[SubnetPass],
        *,
        detach: bool,
        readout: Readout | None = None,
    ) -> None:
        self.model, self.inner, self.readout = uncompiled(model), inner_module(model), readout
        self.inputs, self.detach, self.cloning = inputs, detach, False
        self.with_gradients = torch.is_grad_enabled()
        self.inside = 0  # calls that are being computed: what they call is a part of them
        self._pack: Callable[..., Any] | None = None
        for request in passes:
            check_subnet(stages, request.subnet)
        blocks = check_stages(self.inner, stages)
        self.plan = Plan(stages, passes)
        self.sharing = all(stage.replayable for stage in stages)
        self.run = self.plan.main
        self.state = self.plan.roots[View()]
        self.calls: Counter[tuple[State, str]] = Counter()
        self._views: dict[View, Record] = {}
        branch: dict[str, Callable[..., Any]] = {}
        for subnet in {request.subnet for request in passes}:
            branch |= branches(self.inner, stages, subnet)
        self._replacements: dict[nn.Module, Callable[..., Any]] = {
            blocks[path]: _BlockForward(self, path, blocks[path].forward, branch.get(path), stage.form(path))
            for stage in stages
            for path in stage.blocks
        }
        for path, module in between_blocks(self.inner, blocks):
            self._replacements.setdefault(module, _ModuleForward(self, path, module.forward))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Shadow the model's modules for the time of the passes."""
        self._start = other_buffers(self.inner)
        self._draws = Draws(next(self.inner.parameters(), torch.empty(0)).device)
        try:
            with not_compiled(self.model), replaced_forwards(self._replacements):
                yield
        finally:
            self._replacements.clear()  # they refer to the session: a cycle would keep activations until collected

    def forward(self, run: Run) -> Tensor:
        """Call the model as this run; its logits."""
        try:
            run.logits = self._call(run)
        except RuntimeError as error:
            # Autograd refuses in-place changes of the leaves that a suffix starts from. Few models make one there, so
            # the leaves are cloned only once it has happened.
            if self.cloning or not run.leaves or "in-place" not in str(error):
                raise
            self.cloning = True
            self.release(run)
            run.done = False
            run.logits = self._call(run)
        if self.state is not run.end:
            raise ValueError(
                f"{type(self.inner).__name__} did not call its blocks once each in the order of its stages; "
                "find the stages again on this model"
            )
        return run.logits

    def _call(self, run: Run) -> Tensor:
        self.run, self.state = run, self.plan.roots[run.view]
        self.calls.clear()
        self._pack = None
        model = self.model if run is self.plan.main else self.inner
        if run is self.plan.main:
            with self._draws.watched():
                return logits_of(call_model(model, self._input(run)), self.readout)
        # The main pass moves buffers. The others begin as it did, as all that they share was computed, and move none.
        with self._start.again(), self._draws.again():
            return logits_of(call_model(model, self._input(run)), self.readout)

    def _input(self, run: Run) -> Any:
        """What a run sees of the batch.

        Where the batch has a graph of its own, runs beside the main one get leaves, so that this graph is run through
        once: in the main backward, with the sum of the gradients.
        """
        main = self.plan.main
        record = self._views.get(run.view)
        if record is None:
            record = self._views[run.view] = Record.of(run.view.of(self.inputs))
            main.records.append(record)
        graphs = self.detach and run is not main and any(tensor.requires_grad for tensor in record.tensors)
        return self._leaves(record, read=True) if graphs else record.value

    def remember_or(
        self, key: tuple[str, int], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The recorded output of this call in this state, or else a computed one, recorded if a later run needs it."""
        state, run = self.state, self.run
        record = state.records.get(key)
        if record is not None and record.intact():
            if self._draws.own:
                self._draws.set(record.random)
            return self._hand_out(record)
        if run is self.plan.main:
            self._draws.before_call()
        self.inside += 1
        try:
            value = forward(*args, **kwargs)
        finally:
            self.inside -= 1
        random = self._draws.after_call()
        if state.visits > 1 and self.sharing:
            record = Record.of(value, random)
            if record.tensors:
                state.records[key] = record
                run.records.append(record)
        return value

    def _hand_out(self, record: Record) -> Any:
        # At the branch the next module really reads it; before, nobody computes.
        return self._leaves(record, read=self.state is self.run.branch)

    def _leaves(self, record: Record, *, read: bool) -> Any:
        """What was recorded, each tensor without its graph if a graph is not shared."""
        given: dict[int, Tensor] = {}
        for index, tensor in enumerate(record.tensors):
            output = tensor
            if self.detach and tensor.requires_grad:
                output = tensor.detach().requires_grad_()
                self.run.leaves.append((record, index, output))
            given[id(tensor)] = output.clone() if read and (self.cloning or output is tensor) else output
        return with_tensors(record.value, lambda tensor: given[id(tensor)])

    def refuse_checkpointing(self, module: nn.Module) -> None:
        """Refuse a model that computes blocks anew in the backward pass by itself: it would not compute the subnet's.

        In one graph each block may be computed anew alone: there, the forward that is called again is the right one.
        """
        # Torch has no public way to ask whether a call is checkpointed.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
        pack = hooks[0] if hooks is not None and hooks[0].__module__ == checkpoint.__module__ else None
        found = pack is not None and (self.detach or pack is self._pack)
        if self.with_gradients and not torch.is_grad_enabled():  # so are the first passes of reentrant checkpoints
            found = any(parameter.requires_grad for parameter in module.parameters())
        if found:
            raise ValueError(
                f"{type(self.inner).__name__} checkpoints activations itself, which does not go with shared passes; "
                "switch it off (timm: set_grad_checkpointing(False), transformers: gradient_checkpointing_disable()) "
                "and call unloaf.checkpoint_blocks(model, stages). If it runs modules under no_grad instead, freeze "
                "them: requires_grad_(False)"
            )
        self._pack = pack

    def release(self, run: Run) -> None:
        """Forget a finished run: its graph and all it recorded."""
        own = set(run.records)
        states = [self.plan.roots[run.view]]
        for step in run.modes.items():
            states.append(states[-1].following[step])
        for state in states:
            state.records = {key: record for key, record in state.records.items() if record not in own}
        run.records, run.leaves, run.logits = [], [], None
        run.done = True


class _BlockForward:
    """Stands in for a block's forward during a step: skip, replay or run, as the current run says."""

    unloaf_replaces_forward = True

    def __init__(
        self,
        session: Session,
        path: str,
        forward: Callable[..., Any],
        branch: Callable[..., Any] | None,
        form: Form | None,
    ) -> None:
        self.session, self.path, self.whole, self.branch, self.form = session, path, forward, branch, form

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        session.refuse_checkpointing(block)
        mode = session.run.modes.get(self.path)
        if mode is None:
            return stand_in(self.form, args, kwargs)
        following = session.state.following.get((self.path, mode))
        if following is None:
            raise ValueError(f"block {self.path!r} was called out of the order of its stages; find the stages again")
        session.state = following
        if mode == "block":
            return session.remember_or(("", 0), self.whole, args, kwargs)
        assert self.branch is not None
        return session.remember_or(("", 0), self.branch, (block, *args), kwargs)


class _ModuleForward:
    """Stands in for the forward of a module before, between or behind the blocks."""

    unloaf_replaces_forward = True

    def __init__(self, session: Session, path: str, forward: Callable[..., Any]) -> None:
        self.session, self.path, self.forward = session, path, forward

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        if session.inside:  # the same module once more, within a block or a stem: its record is theirs
            return self.forward(*args, **kwargs)
        session.refuse_checkpointing(module)
        where = (session.state, self.path)
        session.calls[where] += 1
        return session.remember_or((self.path, session.calls[where]), self.forward, args, kwargs)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model below a wrapper of torch.compile, which holds the sequence of blocks of one subnet."""
    model = getattr(model, "_orig_mod", model)
    wrapped = getattr(model, "module", None)
    if hasattr(wrapped, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} holds a compiled model, whose passes cannot share blocks; "
            "wrap the model itself, and compile its blocks: unloaf.compile_blocks(model, stages)"
        )
    return model


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Without what ``module.compile()`` made of the model or of parts of it."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def logits_of(output: Any, readout: Readout | None = None) -> Tensor:
    """The logits in a model's output: the output itself, its ``logits`` attribute (transformers) or ``["logits"]``.

    Args:
        output: what the model returned.
        readout: takes them out of any other output.

    Raises:
        ValueError: there are none, or the readout gave no tensor.
    """
    if readout is not None:
        logits = readout(output)
        if not isinstance(logits, Tensor):
            raise ValueError(f"readout returned {type(logits).__name__}; give a tensor, (batch, ..., classes)")
        return logits
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        held = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ValueError(
            f"the model returned {type(output).__name__}{held}; it must return its logits as a tensor, or an output "
            'with .logits, or give readout, a function from its output to the logits: lambda output: output["out"]'
        )
    if not isinstance(output, Tensor):
        _refuse_auxiliary(output)
    return logits


def _refuse_auxiliary(output: Any) -> None:
    """Raises ValueError for logits of further heads, as torchvision's GoogLeNet and Inception return in training."""
    fields = output._asdict() if hasattr(output, "_asdict") else getattr(output, "__dict__", {})
    entries = output if isinstance(output, Mapping) else fields
    found = [str(name) for name, value in entries.items() if value is not None and _AUXILIARY.match(str(name))]
    if found:
        raise ValueError(
            f"the model returned {', '.join(found)} beside its logits, and no loss reaches them: those heads would "
            "never be trained; build it without them (torchvision: aux_logits=False), or give readout=lambda output: "
            "output.logits to leave them as they are"
        )
