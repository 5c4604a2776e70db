"""Networks by name: the CIFAR ResNets, every timm model and torchvision classifier, transformers by configuration."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from unloaf.config.task_checks import MODELS
from unloaf.errors import in_one_line
from unloaf.models.cifar import CifarResNet
from unloaf.models.initial_weights import load_initial_weights as load_initial_weights
from unloaf.models.offline import offline

_DEEP_CIFAR = {"resnet18", "resnet50"}


def build_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    img_size: int | None = None,
    width: int = 16,
    pretrained: bool = False,
    drop: float = 0.0,
    drop_path: float = 0.0,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a classifier; its weights come from torch's global generator.

    The name is "cifar/resnet20", "timm/resnet50" or "tv/resnet50"; the family may be left out when only one has it.
    "hf/FOLDER" is the network of a local config.json of transformers, "hf/ViTConfig" or "hf/ViTForImageClassification"
    that of a class with its default values; no code of the folder is run. Options are those of `unloaf train`; the
    published weights are the only case that uses the network.

    Raises:
        ValueError: no model, or more than one, has this name, it cannot be built so, or its published weights cannot
            be fetched.

    >>> sum(p.numel() for p in build_model("cifar/resnet20", num_classes=10).parameters())
    269722
    """
    family, bare = resolve_name(name)
    rates = {rate: value for rate, value in {"drop_rate": drop, "drop_path_rate": drop_path}.items() if value}
    try:
        if model_kwargs and family not in ("timm", "hf"):
            raise ValueError(f"takes no {', '.join(model_kwargs)}; give a timm/ model, or leave out --model-kwargs")
        if rates and family != "timm":
            raise ValueError(f"takes no {' or '.join(rates)}; give a timm/ model, or leave out --drop and --drop-path")
        if family == "cifar":
            if pretrained:
                raise ValueError("there are no published weights; leave out --pretrained")
            return _cifar(bare, num_classes=num_classes, in_chans=in_chans, width=width)
        if family == "hf":
            from unloaf.models.hf import build_transformer

            return build_transformer(
                bare,
                num_classes=num_classes,
                in_chans=in_chans,
                img_size=img_size,
                pretrained=pretrained,
                entries=model_kwargs or {},
            )
        if family == "timm":
            _check_kwargs(model_kwargs or {})
            own = {"num_classes": num_classes, "in_chans": in_chans, "pretrained": pretrained}
            return _timm(bare, img_size=img_size, **own, **rates, **(model_kwargs or {}))
        return _torchvision(bare, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"model {family}/{bare}: {error}") from error
    except OSError as error:
        if not pretrained:
            raise
        raise ValueError(
            f"model {family}/{bare}: its published weights cannot be fetched ({in_one_line(error)}); check the "
            "connection, give --initial-checkpoint FILE with weights on this machine, or leave --pretrained out"
        ) from error
    except (LookupError, ArithmeticError, AttributeError) as error:
        if not model_kwargs:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in model_kwargs.items())
        raise ValueError(f"model {family}/{bare} cannot be built with {given}: {in_one_line(error)}") from error


# Of torchvision's networks: vit_h_14 takes its side of 518 pixels from the published weights, inception_v3 and
# googlenet a change of their input.
_FORM_OF_WEIGHTS = {("tv", name) for name in ("googlenet", "inception_v3", "vit_h_14")}
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def form_comes_with_weights(name: str) -> bool:
    """Whether the network is not the same one without ``pretrained``.

    >>> [form_comes_with_weights(name) for name in ("tv/vit_h_14", "tv/resnet50", "timm/resnet50")]
    [True, False, False]
    """
    return resolve_name(name) in _FORM_OF_WEIGHTS


def leaves_heads_out(name: str) -> bool:
    """Whether the network is built without the auxiliary heads that its library gives it for training.

    >>> leaves_heads_out("tv/googlenet")
    True
    """
    family, bare = resolve_name(name)
    return family == "tv" and bare in _WITH_AUXILIARY


def resolve_name(name: str) -> tuple[str, str]:
    """Family and bare name of a model.

    Raises:
        ValueError: no model, or more than one, has this name.

    >>> resolve_name("resnet20")
    ('cifar', 'resnet20')
    """
    family, slash, bare = name.partition("/")
    if slash and family == "hf":
        return family, bare
    if slash and family in ("cifar", "timm", "tv"):
        if bare in _names(family) or (family == "cifar" and _is_cifar(bare)):
            return family, bare
        raise ValueError(f"model {name!r}: no such {family} model{_suggest(bare, [family])}")
    owners = [f for f in ("cifar", "timm", "tv") if name in _names(f) or (f == "cifar" and _is_cifar(name))]
    if len(owners) == 1:
        return owners[0], name
    if owners:
        raise ValueError(f"model {name!r} is more than one: give {' or '.join(f'{f}/{name}' for f in owners)}")
    task = next((task for task, models in MODELS.items() if name in models), None)
    if task is not None:
        raise ValueError(
            f"model {name!r} is no classifier: --task {task} trains it; here give its backbone, as in timm/resnet50"
        )
    if (Path(name) / "args.yaml").is_file():
        raise ValueError(f"model {name!r} is the folder of a run; give it to `unloaf subnets` or `unloaf eval`")
    raise ValueError(f"model {name!r}: no such model{_suggest(name, ['cifar', 'timm', 'tv'])}")


def _is_cifar(name: str) -> bool:
    return name in _DEEP_CIFAR or (re.fullmatch(r"resnet\d{1,4}", name) is not None and (int(name[6:]) - 2) % 6 == 0)


def _names(family: str) -> list[str]:
    if family == "cifar":
        return ["resnet20", "resnet32", "resnet56", "resnet110", "resnet18", "resnet50"]
    if family == "timm":
        import timm

        return timm.list_models()
    import torchvision.models

    return torchvision.models.list_models(module=torchvision.models)


def _suggest(name: str, families: list[str]) -> str:
    names = {f"{family}/{known}": known for family in families for known in _names(family)}
    close = set(difflib.get_close_matches(name, names.values(), n=3))
    matches = [full for full, known in names.items() if known in close]
    return (
        f"; did you mean {', '.join(matches[:5])}?" if matches else "; give cifar/NAME, timm/NAME, tv/NAME or hf/NAME"
    )


def _cifar(name: str, *, num_classes: int, in_chans: int, width: int) -> nn.Module:
    if name not in _DEEP_CIFAR:
        return CifarResNet(int(name[6:]), num_classes=num_classes, in_chans=in_chans, width=width)
    import torchvision.models

    # The usual CIFAR stem (as in kuangliu/pytorch-cifar): a 3x3 convolution, no pooling.
    model: Any = torchvision.models.get_model(name, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


_OTHER_FLAGS = {
    "num_classes": "--num-classes", "in_chans": "--dataset", "img_size": "--img-size", "drop_rate": "--drop",
    "drop_path_rate": "--drop-path", "checkpoint_path": "--initial-checkpoint", "pretrained": "--pretrained",
}  # fmt: skip
# Of timm.create_model, and of what it calls: where weights come from, and forms that are no classifier.
_OF_TIMM = (
    "model_name", "cache_dir", "features_only", "scriptable", "exportable", "no_jit", "pretrained_cfg",
    "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn", "pretrained_custom_load",
)  # fmt: skip


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for what has a setting of its own, or is meant for timm and not for the model's class."""
    for name, value in kwargs.items():
        if name in _OTHER_FLAGS:
            raise ValueError(f"model_kwargs {name}: give {_OTHER_FLAGS[name]} instead")
        if name in _OF_TIMM:
            raise ValueError(f"model_kwargs {name}: give arguments of the model's class alone, such as depth=9")
        if value is None:
            raise ValueError(f"model_kwargs {name}: timm ignores None; leave it out")


def _timm(name: str, *, img_size: int | None, **arguments: Any) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg

    published = get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = img_size
    with nullcontext() if arguments.get("pretrained") else offline():
        return timm.create_model(name, **arguments)


def _torchvision(name: str, *, num_classes: int, in_chans: int, pretrained: bool) -> nn.Module:
    import torchvision.models

    if in_chans != 3:
        raise ValueError(f"takes images of 3 channels, not {in_chans}; give a timm/ or cifar/ model")
    # Heads in the middle have a loss of their own in torchvision's scripts (weights 0.3 and 0.4), and none here.
    form: dict[str, Any] = {"aux_logits": False} if name in _WITH_AUXILIARY else {}
    if not pretrained:
        form |= {"init_weights": True} if form else {}
        return torchvision.models.get_model(name, num_classes=num_classes, **form)
    model = torchvision.models.get_model(name, weights="DEFAULT", **form)
    _replace_head(model, num_classes)
    return model


def _replace_head(model: nn.Module, num_classes: int) -> None:
    """Puts a new last linear layer in place; torchvision's published weights are for 1,000 classes."""
    path, head = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Linear(head.in_features, num_classes))


def draw_head(model: nn.Module, *, num_classes: int, std: float) -> None:
    """Draws the weights of the classifier from N(0, std), by torch's global generator; its bias becomes 0.

    Raises:
        ValueError: no layer has an output for each class.

    >>> model = build_model("cifar/resnet8", num_classes=10)
    >>> draw_head(model, num_classes=10, std=0.01)
    >>> model.fc.bias.tolist() == [0.0] * 10, 0.009 < model.fc.weight.std().item() < 0.011
    (True, True)
    """
    layers = (module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    heads = [layer for layer in layers if len(layer.weight) == num_classes]
    if not heads:
        raise ValueError(f"head_init {std:g}: no linear layer of the model has {num_classes} outputs; leave it out")
    nn.init.normal_(heads[-1].weight, std=std)
    if heads[-1].bias is not None:
        nn.init.zeros_(heads[-1].bias)
