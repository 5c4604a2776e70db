"""A chain of subnets that answers as soon as it is sure: easy images leave early, no block runs twice for an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from unloaf.batchnorm import estimated_statistics, names_of_statistics, tracking_norms
from unloaf.passes import Readout, check_batch, logits_of
from unloaf.passes.cascade import (
    CascadePasses,
    Exit,
    Sharing,
    find_sharing,
    modules_of,
    outside_inference_mode,
    without_hooks,
)
from unloaf.passes.segments import Segment
from unloaf.stages import Stage, between_blocks, copy_of, inner_module, modes_kept
from unloaf.subnet import Subnet, check_stages, check_subnet

Confidence = Literal["max-probability", "entropy", "agreement"]
CONFIDENCES: tuple[str, ...] = get_args(Confidence)
_NOISE_SEED = 0xC0FFEE


class AnytimeOutput(NamedTuple):
    """What the images of a batch got.

    Attributes:
        logits: (batch, classes), of each image those of the subnet that answered.
        exits: (batch,), which one that was: its index in the chain.
    """

    logits: Tensor
    exits: Tensor


class Scores(NamedTuple):
    """What an exit says of each image: the class, its probability, and how sure that is by the rule."""

    predicted: Tensor
    probability: Tensor
    sure: Tensor

    def confidence(self, before: Scores | None, rule: Confidence) -> Tensor:
        """On what images leave, given the scores of the exit before; "agreement" is -1 where the two differ."""
        if rule != "agreement":
            return self.sure
        never = torch.full_like(self.probability, -1.0)
        if before is None:
            return never
        lower = torch.minimum(self.probability, before.probability)
        return torch.where(self.predicted == before.predicted, lower, never)


def scores(logits: Tensor, rule: Confidence) -> Scores:
    """How sure logits are, (batch, classes); a NaN among them is never sure.

    By "max-probability" it is the highest softmax probability; by "entropy" 1 - entropy / log(classes), which is 0
    where all classes are equally likely and 1 where one is certain; by "agreement" the lower of the two highest
    probabilities where the exit before has the same class.

    >>> scores(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), "max-probability").sure
    tensor([0.5000, 0.9526])
    """
    shares = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
    probability, predicted = shares.max(-1)
    sure = probability
    if rule == "entropy":
        sure = 1 - torch.special.entr(shares).sum(-1) / math.log(logits.shape[-1])
    return Scores(predicted, probability, sure)


class Anytime(nn.Module):
    """A confidence cascade: subnets answer one after another, each image by the first one that is sure.

    ``anytime(x)`` runs the smallest subnet on all images; those whose confidence reaches the threshold leave with its
    logits, the rest goes on to the next subnet; the last one answers whatever is left. What a subnet has in common with
    an earlier one, the modules up to the first block that only one of them has, is not run again. From there on the
    activations differ, so blocks run on other inputs.

    A `torch.nn.Module`: it moves, is copied and saved with the network in it. It always evaluates, without gradients,
    and leaves modes as they were; forward hooks of blocks see each image once, where it is computed. Build it when the
    network is trained. Calls from several threads must not overlap.

    Args:
        model: a trained classifier that takes a tensor, (batch, ...), and gives logits, (batch, classes).
        stages: from `find_stages`.
        subnets: at least two, each a part of the next; the last one is usually the main network. Few blocks run twice
            on different activations if they differ in the last stages.
        threshold: from 0 to 1, the confidence at which an image leaves, or one for each exit but the last: see
            `calibrate_anytime`.
        confidence: see `scores`.
        statistics: batch-norm statistics of subnets, ``running_mean`` and ``running_var`` by name; those left out use
            the model's, which do not fit smaller subnets: see `recalibrate`.
        readout: from the model's output to its logits; default the output itself, ``.logits`` or ``["logits"]``.

    Raises:
        ValueError: the subnets are no chain, thresholds are out of range, or earlier results cannot be used again in
            this model; that is tried on noise.

    Source: Teerapittayanon et al. 2016 (BranchyNet): exits by entropy; Zhou et al. 2020 (PABEE): by agreement.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10).eval(), torch.randn(4, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 2, 1, 1), (2, 2, 2, 2)]]
    >>> anytime = unloaf.Anytime(model, stages, chain, threshold=0.9)
    >>> anytime.recalibrate([x])
    >>> logits, exits = anytime(x)
    >>> logits.shape, exits.shape
    (torch.Size([4, 10]), torch.Size([4]))
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        subnets: Sequence[Subnet],
        threshold: float | Sequence[float] = 0.9,
        *,
        confidence: Confidence = "max-probability",
        statistics: Mapping[Subnet, Mapping[str, Tensor]] | None = None,
        readout: Readout | None = None,
    ) -> None:
        super().__init__()
        inner = inner_module(model)
        check_stages(inner, stages)
        self.model, self.stages, self.readout = inner, tuple(stages), readout
        self.subnets = _checked_chain(self.stages, subnets)
        if confidence not in CONFIDENCES:
            raise ValueError(f"confidence {confidence!r}: give {', '.join(CONFIDENCES)}")
        self.confidence: Confidence = confidence
        self.thresholds = _checked_thresholds(threshold, len(self.subnets))
        if not all(stage.replayable for stage in self.stages):
            raise ValueError(
                f"{type(inner).__name__} hands on more than its modules return, so that a later exit cannot use what "
                "an earlier one has computed; run its subnets by active_subnet"
            )
        self._parts = sorted(
            [path for stage in self.stages for path in stage.blocks]
            + [path for path, _ in between_blocks(inner, check_stages(inner, stages))]
        )
        self._set_statistics(self._checked_statistics(statistics or {}))

    @property
    def statistics(self) -> dict[Subnet, dict[str, Tensor]]:
        """The batch-norm statistics that were given or estimated, of each subnet by name."""
        return {one.subnet: dict(one.statistics) for one in self._exits if one.statistics}

    def recalibrate(self, batches: Iterable[Any]) -> None:
        """Estimates the batch-norm statistics of all exits by `recalibrate_bn`; the model's own stay as they are.

        The last exit's too, so that exits can be compared and share their beginnings: a norm before which two exits
        have run the same blocks has the same statistics in both.

        Args:
            batches: training inputs, as for `recalibrate_bn`; about 2,000 images, on the model's device.

        Raises:
            ValueError: no batch was given though the model has batch norms.
        """
        if not tracking_norms(self.model):
            return
        batches = list(batches) if iter(batches) is batches else batches
        origins = self._tried(self._with_groups([{} for _ in self.subnets]), _first_of(batches)).origins
        found: list[dict[str, Tensor]] = []
        for index, subnet in enumerate(self.subnets):
            own = estimated_statistics(self.model, self.stages, subnet, batches)
            for name in own:  # where an earlier exit computes it the same but for rounding: then the very same
                origin = origins[index].get(self._owner(name), index)
                own[name] = found[origin][name] if origin < index else own[name]
            found.append(own)
        self._set_statistics(found)

    def forward(self, inputs: Tensor) -> AnytimeOutput:
        """Logits of a batch, (batch, classes), and of each image which exit gave them, (batch,).

        Raises:
            ValueError: no image, another device than the model's, or outputs that are no logits.
        """
        _check_images(inputs)
        left = torch.arange(len(inputs), device=inputs.device)
        exits = torch.empty_like(left)
        answers: Tensor | None = None
        before: Scores | None = None
        with self._passes(inputs) as run:
            for index in range(len(self.subnets)):
                logits = run(index)
                answers = logits.new_empty(len(exits), logits.shape[-1]) if answers is None else answers
                if index + 1 == len(self.subnets):
                    answers[left], exits[left] = logits, index
                    break
                now = scores(logits, self.confidence)
                leave = now.confidence(before, self.confidence) >= self.thresholds[index]
                answers[left[leave]], exits[left[leave]] = logits[leave], index
                going = (~leave).nonzero().flatten()
                if not len(going):
                    break
                before, left = Scores(*(values[going] for values in now)), left[going]
                run.keep(going)
        assert answers is not None
        return AnytimeOutput(answers, exits)

    def all_exits(self, inputs: Tensor, *, on_exit: Callable[[], None] | None = None) -> list[Tensor]:
        """Logits of every exit for every image, (batch, classes) each; nothing is computed twice.

        ``on_exit`` is called after each of them.

        Raises:
            ValueError: as `forward`.
        """
        _check_images(inputs)
        found = []
        with self._passes(inputs) as run:
            for index in range(len(self.subnets)):
                found.append(run(index))
                if on_exit is not None:
                    on_exit()
        return found

    def set_threshold(self, threshold: float | Sequence[float]) -> None:
        """Chooses from which confidence on images leave: one from 0 to 1, or one for each exit but the last.

        Raises:
            ValueError: it is out of range, or these are too few or too many.
        """
        self.thresholds = _checked_thresholds(threshold, len(self.subnets))

    def segment(self, index: int, example: Tensor) -> Segment:
        """What one exit adds, as a module that an exporter takes; the example has two images at least."""
        sharing = self._sharing or self._tried(self._exits, example)
        return Segment(self.model, self.stages, self._exits, sharing, index, example, self.readout)

    @contextmanager
    def _passes(self, inputs: Tensor) -> Iterator[_Run]:
        check_batch(self.model, inputs, None)
        sharing = self._sharing = self._sharing or self._tried(self._exits, inputs)
        passes = CascadePasses(self.model, self.stages, self._exits, sharing)
        training = any(module.training for module in modules_of(self.model))
        with torch.no_grad(), modes_kept(self.model) if training else nullcontext():
            if training:
                self.model.eval()
            with passes.open():
                yield _Run(passes, inputs, self.readout)

    def _set_statistics(self, statistics: Sequence[Mapping[str, Tensor]]) -> None:
        exits = self._with_groups(statistics)
        shape = next((stage.input_shape for stage in self.stages if stage.input_shape is not None), None)
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        example = None if shape is None else torch.zeros(1, *shape).to(weight)
        self._sharing = None if example is None or not self._takes(example) else self._tried(exits, example)
        self._exits = exits

    def _takes(self, example: Tensor) -> bool:
        """Whether the model can be tried now, or has to wait for a batch: of tokens, or whatever zeros are not."""
        try:
            with torch.no_grad():
                without_hooks(copy_of(self.model)).eval()(example)
        except Exception:
            return False
        return True

    def _tried(self, exits: Sequence[Exit], example: Tensor) -> Sharing:
        """What the exits share, tried on three examples of noise like this one, or thrice this one if it is tokens."""
        with outside_inference_mode(), torch.no_grad():
            noise = example[:1].repeat(3, *(1 for _ in example.shape[1:]))
            if noise.is_floating_point():
                generator = torch.Generator().manual_seed(_NOISE_SEED)
                noise = torch.randn(noise.shape, generator=generator).to(noise)
            return find_sharing(without_hooks(copy_of(self.model)).eval(), self.stages, exits, noise)

    def _with_groups(self, statistics: Sequence[Mapping[str, Tensor]]) -> tuple[Exit, ...]:
        """The exits; statistics of a part of the model that equal those of an earlier one are the same tensors."""
        read: list[dict[str, dict[str, Tensor]]] = []
        exits = []
        for subnet, own in zip(self.subnets, statistics, strict=True):
            parts: dict[str, dict[str, Tensor]] = {}
            for name in names_of_statistics(self.model, self.stages, subnet):
                parts.setdefault(self._owner(name), {})[name] = own.get(name, self.model.get_buffer(name))
            read.append(parts)
            groups = {
                path: next(i for i, one in enumerate(read) if path in one and _same(one[path], held))
                for path, held in parts.items()
            }
            shared = {name: read[groups[path]][path][name] for path, held in parts.items() for name in held}
            exits.append(Exit(subnet, {name: shared[name] for name in own}, groups))
        return tuple(exits)

    def _owner(self, name: str) -> str:
        """The block, or the module between blocks, that a buffer lies in."""
        return next((path for path in self._parts if name.startswith(f"{path}.")), "")

    def _checked_statistics(self, given: Mapping[Subnet, Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
        for subnet, values in given.items():
            if subnet not in self.subnets:
                raise ValueError(f"statistics of subnet {subnet}, which is none of {', '.join(map(str, self.subnets))}")
            names = names_of_statistics(self.model, self.stages, subnet)
            expected = {name: self.model.get_buffer(name).shape for name in names}
            if values and {name: tensor.shape for name, tensor in values.items()} != expected:
                raise ValueError(f"the statistics of subnet {subnet} are not those of this network's norms")
        return [given.get(subnet, {}) for subnet in self.subnets]

    def _apply(self, fn: Any, recurse: bool = True) -> Anytime:
        # To another device or type: statistics go with the weights.
        super()._apply(fn, recurse)
        moved = {id(t): fn(t) for one in self._exits for t in one.statistics.values()}
        self._exits = tuple(
            one._replace(statistics={name: moved[id(t)] for name, t in one.statistics.items()}) for one in self._exits
        )
        return self


class _Run:
    """The passes over one batch."""

    def __init__(self, passes: CascadePasses, inputs: Tensor, readout: Readout | None) -> None:
        self.passes, self.inputs, self.readout = passes, inputs, readout

    def __call__(self, index: int) -> Tensor:
        try:
            logits = logits_of(self.passes.run(index, self.inputs), self.readout)
        except RuntimeError as error:
            own = next((p.dtype for p in self.passes.model.parameters() if p.is_floating_point()), None)
            if own is None or not self.inputs.is_floating_point() or own == self.inputs.dtype:
                raise
            raise ValueError(f"x is {self.inputs.dtype}, the model {own}: {error}; give x.to({own})") from error
        rows = len(self.inputs)
        if logits.ndim != 2 or len(logits) != rows or logits.shape[1] < 2 or not logits.is_floating_point():
            raise ValueError(
                f"the model gave {tuple(logits.shape)} in {logits.dtype} for {rows} images; Anytime needs logits, "
                "(batch, classes) of at least 2 classes; give readout, a function from the output to them"
            )
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these images of those that are left."""
        self.passes.keep(rows)
        self.inputs = self.inputs[rows]


def _check_images(inputs: Any) -> None:
    if not isinstance(inputs, Tensor) or not inputs.ndim:
        raise ValueError(f"x is {type(inputs).__name__}; give a tensor, (batch, ...)")
    if not len(inputs):
        raise ValueError(f"x has shape {tuple(inputs.shape)}, no image; give at least one")


def _first_of(batches: Iterable[Any]) -> Tensor:
    for batch in batches:
        return batch if isinstance(batch, Tensor) else batch[0]
    raise ValueError(
        "no batch was given to re-estimate batch-norm statistics from; give at least one, better 2,000 images"
    )


def _same(one: Mapping[str, Tensor], another: Mapping[str, Tensor]) -> bool:
    return one.keys() == another.keys() and all(
        t is another[name] or torch.equal(t, another[name]) for name, t in one.items()
    )


def _checked_chain(stages: Sequence[Stage], subnets: Sequence[Subnet]) -> tuple[Subnet, ...]:
    chain = tuple(subnets)
    for subnet in chain:
        check_subnet(stages, subnet)
    if len(chain) < 2:
        raise ValueError(
            f"subnets names {len(chain)}; give at least two, each a part of the next, and the main network last"
        )
    for small, large in pairwise(chain):
        if small == large:
            raise ValueError(f"subnets names {small} twice; give each once")
        if not small <= large:
            raise ValueError(
                f"subnet {small} is no part of {large}, which follows it; give subnets of which each keeps all blocks "
                "of the one before, smallest first"
            )
    return chain


def _checked_thresholds(threshold: float | Sequence[float], exits: int) -> tuple[float, ...]:
    several = isinstance(threshold, Sequence)
    values = tuple(threshold) if several else (threshold,) * (exits - 1)  # type: ignore[arg-type]
    if len(values) != exits - 1:
        raise ValueError(f"threshold has {len(values)} values; give one, or {exits - 1}: for each exit but the last")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"threshold {value!r}: give a confidence from 0 to 1")
    return tuple(float(value) for value in values)
