"""A cascade as an elastic file that also says which subnets answer, and when they are sure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unloaf.anytime import Anytime
from unloaf.errors import CheckpointError
from unloaf.export import parse_subnet
from unloaf.files.writing import new_folder
from unloaf.release.elastic import ElasticModel, elastic_description, load_elastic, save_elastic
from unloaf.release.subnet_files import understanding
from unloaf.runs.opened import OpenedRun


def save_anytime(
    folder: str | Path,
    anytime: Anytime,
    architecture: Mapping[str, Any],
    *,
    class_names: tuple[str, ...] = (),
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``elastic.safetensors`` and ``elastic.json``, from which `load_anytime` gives the cascade again.

    `load_elastic` reads them too: weights once, and the statistics of each exit. The architecture are arguments of
    `build_model` for the main network.
    """
    model = ElasticModel(anytime.model, anytime.stages, anytime.statistics, class_names=class_names)
    cascade = {
        "subnets": [str(subnet) for subnet in anytime.subnets],
        "thresholds": anytime.thresholds,
        "confidence": anytime.confidence,
    }
    save_elastic(folder, model, architecture, more={**(more or {}), "anytime": cascade})


def load_anytime(path: str | Path) -> Anytime:
    """The cascade that ``unloaf anytime RUN --export`` wrote, on the CPU.

    What its outputs stand for is in ``class_names``.

    Args:
        path: the folder with ``elastic.json`` and ``elastic.safetensors``, or one of the two files.

    Raises:
        ValueError: there is no such file, it holds no cascade, or the library of its network is not installed.
        CheckpointError: a file is damaged, or the two belong to different networks.

    >>> import tempfile, torch, unloaf
    >>> from unloaf.models.build import build_model
    >>> from unloaf.release.anytime_files import save_anytime
    >>> settings = {"name": "cifar/resnet14", "num_classes": 10, "width": 2}
    >>> network, x = build_model(**settings).eval(), torch.randn(4, 3, 32, 32)
    >>> stages = unloaf.find_stages(network, x)
    >>> chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 2, 1), (2, 2, 2)]]
    >>> anytime = unloaf.Anytime(network, stages, chain, threshold=0.12)
    >>> anytime.recalibrate([x])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_anytime(folder, anytime, settings)
    ...     again = unloaf.load_anytime(folder)
    >>> torch.equal(again(x).logits, anytime(x).logits)
    True
    """
    file = elastic_description(path)
    elastic = load_elastic(file)
    with understanding(file):
        described = json.loads(file.read_text(encoding="utf-8")).get("anytime")
    if described is None:
        raise ValueError(f"{file} holds no cascade; `unloaf anytime RUN --export {file.parent}` writes one")
    with understanding(file):
        chain = [parse_subnet(elastic.stages, text) for text in described["subnets"]]
        statistics = {subnet: elastic.statistics(subnet) for subnet in chain}
        anytime = Anytime(
            elastic.network,
            elastic.stages,
            chain,
            described["thresholds"],
            confidence=described["confidence"],
            statistics=statistics,
        )
        anytime.class_names = elastic.class_names  # type: ignore[assignment]
    return anytime.eval()


def export_anytime(anytime: Anytime, opened: OpenedRun, place: Path) -> None:
    """Writes the cascade of a run into a new folder, whole or not at all, and compares what is read back.

    Raises:
        ValueError: the folder exists or cannot be written.
        CheckpointError: what is read back does not answer as the cascade does.
    """
    anytime.cpu()
    need = sum(tensor.nbytes for tensor in anytime.state_dict().values())
    with new_folder(place, need=need) as folder:
        save_anytime(
            folder,
            anytime,
            opened.architecture,
            class_names=opened.class_names,
            more={"preprocessing": opened.preprocessing},
        )
        x = opened.noise(4, 1)
        both = zip(load_anytime(folder).all_exits(x), anytime.all_exits(x), strict=True)
        if not all(torch.equal(read, written) for read, written in both):
            raise CheckpointError(f"{place}: what was read back gives other logits; write it again")
