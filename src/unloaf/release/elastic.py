"""One file, many networks: a model whose depth is chosen for each call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unloaf.batchnorm import estimated_statistics, names_of_statistics, statistics_replaced, tracking_norms
from unloaf.export import export_subnet, parse_subnet
from unloaf.files.tensors import load_strictly
from unloaf.release.subnet_files import (
    build_described,
    read_class_names,
    read_described,
    read_stages,
    understanding,
    write_described,
)
from unloaf.stages import Stage, call_model
from unloaf.subnet import Subnet, active_subnet, check_stages, check_subnet

_DESCRIPTION, _WEIGHTS = "elastic.json", "elastic.safetensors"

Statistics = dict[str, Tensor]


class ElasticModel(nn.Module):
    """A network and its subnets, with one set of weights and batch-norm statistics for each of the subnets.

    ``model(x)`` runs the subnet that was set, at first the main network; ``model(x, subnet="2-1-2")`` another one for
    this call. No weight is copied: skipped blocks return their input, and the buffers of the batch norms are exchanged,
    by reference, for the time of the call. Made for evaluation; calls from several threads must not overlap.

    Args:
        network: the main network, changed by `set_depths` and calls only while they run.
        stages: its stages.
        statistics: for subnets, ``running_mean`` and ``running_var`` of the norms by name.
        class_names: what the outputs stand for, in their order; empty where nobody said it.

    >>> from torchvision.models import resnet18
    >>> network, x = resnet18(num_classes=10).eval(), torch.randn(4, 3, 32, 32)
    >>> model = ElasticModel(network, unloaf.find_stages(network, x))
    >>> model.recalibrate("2-1-1-1", [x])
    >>> model(x, subnet="2-1-1-1").shape, model.subnets
    (torch.Size([4, 10]), ('2-2-2-2', '2-1-1-1'))
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[Stage],
        statistics: Mapping[Subnet, Statistics] | None = None,
        *,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_stages(network, stages)
        self.network, self.stages = network, tuple(stages)
        self.subnet = Subnet.full(stages)
        self.class_names = tuple(class_names)
        self._statistics: dict[Subnet, Statistics] = {}
        for subnet, values in (statistics or {}).items():
            check_subnet(self.stages, subnet)
            self._statistics[subnet] = dict(values)
            self._check_statistics(subnet, values)

    @property
    def subnets(self) -> tuple[str, ...]:
        """The subnets with statistics of their own, the main network first."""
        return tuple(dict.fromkeys([str(Subnet.full(self.stages)), *map(str, self._statistics)]))

    def statistics(self, subnet: str | Subnet) -> Statistics:
        """A subnet's statistics by name of the buffer; empty for the main network, which has its own.

        Raises:
            ValueError: it is no subnet of this network, or the file has no statistics for it.
        """
        chosen = self._resolve(subnet)
        if chosen in self._statistics or chosen == Subnet.full(self.stages) or not tracking_norms(self.network):
            return self._statistics.get(chosen, {})
        raise ValueError(
            f"subnet {chosen} has no batch-norm statistics here, and the main network's do not fit it; there are "
            f"{', '.join(self.subnets)}; export with this subnet among --subnets, or call model.recalibrate"
        )

    def set_depths(self, subnet: str | Subnet | Sequence[int]) -> None:
        """Chooses what ``model(x)`` runs from now on: depths, or what ``str(subnet)`` gives.

        Raises:
            ValueError: see `statistics`.
        """
        chosen = self._resolve(subnet)
        self.statistics(chosen)
        self.subnet = chosen

    @contextmanager
    def depths(self, subnet: str | Subnet | Sequence[int]) -> Iterator[None]:
        """The same for the time of a ``with`` block."""
        before = self.subnet
        self.set_depths(subnet)
        try:
            yield
        finally:
            self.subnet = before

    def forward(self, inputs: Any, *, subnet: str | Subnet | Sequence[int] | None = None) -> Any:
        """The network's output for inputs, of this subnet or of the one that was set."""
        chosen = self.subnet if subnet is None else self._resolve(subnet)
        own = self.statistics(chosen)
        with active_subnet(self.network, self.stages, chosen), statistics_replaced(self.network, own):
            return call_model(self.network, inputs)

    def export(self, subnet: str | Subnet, *, example: Any = None) -> nn.Module:
        """An ordinary module of this subnet with its statistics: `export_subnet`."""
        chosen = self._resolve(subnet)
        with statistics_replaced(self.network, self.statistics(chosen)):
            alone = export_subnet(self.network, self.stages, chosen, example=example)
        if self.class_names:
            alone.class_names = self.class_names  # type: ignore[assignment]
        return alone

    def recalibrate(self, subnet: str | Subnet, batches: Iterable[Any]) -> None:
        """Estimates statistics of a subnet by `recalibrate_bn` and keeps them; the main network's stay as they are."""
        chosen = self._resolve(subnet)
        found = estimated_statistics(self.network, self.stages, chosen, batches)
        if found and chosen != Subnet.full(self.stages):
            self._statistics[chosen] = found

    def _resolve(self, subnet: str | Subnet | Sequence[int]) -> Subnet:
        if isinstance(subnet, str):
            return parse_subnet(self.stages, subnet)
        if not isinstance(subnet, Subnet):
            return Subnet.from_depths(self.stages, subnet)
        check_subnet(self.stages, subnet)
        return subnet

    def _check_statistics(self, subnet: Subnet, values: Mapping[str, Tensor]) -> None:
        names = names_of_statistics(self.network, self.stages, subnet)
        expected = {name: self.network.get_buffer(name).shape for name in names}
        if {name: tensor.shape for name, tensor in values.items()} != expected:
            raise ValueError(f"the statistics of subnet {subnet} are not those of this network's norms")

    def _apply(self, fn: Any, recurse: bool = True) -> ElasticModel:
        # To another device or type: the stored statistics go with the weights.
        super()._apply(fn, recurse)
        for values in self._statistics.values():
            values.update({name: fn(tensor) for name, tensor in values.items()})
        return self


def save_elastic(
    folder: str | Path,
    model: ElasticModel,
    architecture: Mapping[str, Any],
    *,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``elastic.safetensors`` and ``elastic.json``, from which `load_elastic` gives the model again.

    The architecture are arguments of `build_model` for the main network; nothing reads further entries of the JSON.
    """
    subnets = [subnet for subnet in model._statistics if model._statistics[subnet]]
    tensors = {f"network.{name}": tensor for name, tensor in model.network.state_dict().items()}
    for i, subnet in enumerate(subnets):
        tensors |= {f"statistics.{i}.{name}": tensor for name, tensor in model._statistics[subnet].items()}
    fields = {
        "architecture": dict(architecture),
        "stages": [dataclasses.asdict(stage) for stage in model.stages],
        "subnets": [{"name": str(subnet), "keep": subnet.keep} for subnet in subnets],
        "class_names": model.class_names,
        **(more or {}),
    }
    write_described(Path(folder) / _DESCRIPTION, _WEIGHTS, tensors, fields, kind="elastic model")


def load_elastic(path: str | Path) -> ElasticModel:
    """The model that ``unloaf export --elastic`` wrote: one set of weights, a depth for each call.

    Args:
        path: the folder with ``elastic.json`` and ``elastic.safetensors``, or one of the two files.

    Returns:
        an `ElasticModel` in eval mode, on the CPU: ``model(x, subnet="2-1-2")``, ``model.set_depths("2-1-2")``,
        ``model.subnets``, ``model.class_names`` and ``model.export("2-1-2")``.

    Raises:
        ValueError: there is no such file, it is of something else, or the library of its network is not installed.
        CheckpointError: a file is damaged, or the two belong to different networks.

    >>> import tempfile, torch, unloaf
    >>> from unloaf.release.elastic import ElasticModel, save_elastic
    >>> from unloaf.models.build import build_model
    >>> settings = {"name": "cifar/resnet14", "num_classes": 10, "width": 2}
    >>> network, x = build_model(**settings).eval(), torch.randn(2, 3, 32, 32)
    >>> model = ElasticModel(network, unloaf.find_stages(network, x))
    >>> model.recalibrate("1-2-1", [x])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_elastic(folder, model, settings)
    ...     again = unloaf.load_elastic(folder)
    >>> torch.equal(again(x, subnet="1-2-1"), model(x, subnet="1-2-1"))
    True
    """
    file = elastic_description(path)
    fields, tensors = read_described(file, kind="elastic model")
    with understanding(file):
        stages = read_stages(fields)
        network = build_described(fields, stages)
        load_strictly(network, _below("network.", tensors))
        statistics = {
            Subnet(tuple(tuple(stage) for stage in entry["keep"])): _below(f"statistics.{i}.", tensors)
            for i, entry in enumerate(fields["subnets"])
        }
        return ElasticModel(network, stages, statistics, class_names=read_class_names(fields)).eval()


def elastic_description(path: str | Path) -> Path:
    """The JSON of an elastic file, given its folder or one of the two files."""
    given = Path(path)
    return (given.parent if given.is_file() or given.suffix in (".json", ".safetensors") else given) / _DESCRIPTION


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Statistics:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
