"""Settings of a method that the one which is chosen does not read. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from unloaf.config.fields import Config

Read = Callable[[Config], bool]


def _of(*methods: str) -> Read:
    return lambda config: config.method in methods


_subnets = _of("st", "st++", "gkt", "st-star")
_draws = _of("st", "st++", "st-star")
_taught = _of("st", "st++", "gkt")  # by the logits of another network


def _smaller(config: Config) -> bool:
    used = config.subnet_inputs == "smaller" or (
        config.subnet_inputs == "auto" and config.method in ("st++", "st-star")
    )
    return used and _draws(config)


def _directions(config: Config) -> bool:
    return _taught(config) and (config.subnet_loss_or_default == "kl-" or config.main_logits == "direction")


# Whether a configuration reads them, and where else they are read.
_READ: tuple[tuple[tuple[str, ...], Read, str], ...] = (
    (("groups", "loops", "group_ema", "teacher"), _of("gkt"), "--method gkt"),
    (("final_survival",), _of("stochastic-depth"), "--method stochastic-depth"),
    (("num_subnets", "subnet_inputs"), _draws, "--method st, st++ or st-star"),
    (
        ("subnet_weight", "subnet_schedule", "subnet_interval", "subnet_on_epoch", "subnet_off_epoch", "sampler"),
        _subnets,
        "--method st, st++, gkt or st-star",
    ),
    (("subnet_batch_fraction", "subnet_loss", "main_logits"), _taught, "--method st, st++ or gkt"),
    (("sides",), _smaller, "--subnet-inputs smaller"),
    (
        ("min_ratio",),
        lambda config: _smaller(config) or (_draws(config) and config.subnet_inputs == "crop"),
        "--subnet-inputs smaller or crop",
    ),
    (
        ("per",),
        lambda config: _smaller(config) or (_draws(config) and config.subnet_inputs not in ("auto", "same")),
        "--subnet-inputs smaller, larger, crop, flip or jitter",
    ),
    (("max_ratio",), lambda config: _draws(config) and config.subnet_inputs == "larger", "--subnet-inputs larger"),
    (
        ("space",),
        lambda config: _subnets(config) and config.sampler_or_default == "inter-stage",
        "--sampler inter-stage",
    ),
    (("amplitude", "eps"), _directions, "--subnet-loss kl- or --main-logits direction"),
    (
        ("decay_base",),
        lambda config: _subnets(config) and config.sampler_or_default == "exponential-decay",
        "--sampler exponential-decay",
    ),
)  # fmt: skip


def without_effect(config: Config) -> list[str]:
    """A line for each setting that is not at its default and that this configuration does not read.

    A default may have been given, but then nothing is lost; a recipe or a file may well hold settings of several
    methods: so they are told of, not refused.

    >>> without_effect(Config(method="st", groups=5))
    ['groups 5 has no effect here: it is for --method gkt']
    """
    return [f"{name} {getattr(config, name)} has no effect here: it is for {where}" for name, where in _unread(config)]


def without_unread(config: Config) -> Config:
    """The configuration with such settings at their defaults: what trains the same is the same.

    >>> without_unread(Config(method="common", num_subnets=4, lr=0.2)) == Config(method="common", lr=0.2)
    True
    """
    plain = _plain()
    return dataclasses.replace(config, **{name: plain[name] for name, _ in _unread(config)})


def _plain() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Config)}


def _unread(config: Config) -> list[tuple[str, str]]:
    """Names that are not at their defaults and not read, and where they would be."""
    plain = _plain()
    return [
        (name, where)
        for names, read, where in _READ
        for name in names
        if getattr(config, name) != plain[name] and not read(config)
    ]
