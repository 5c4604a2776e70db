"""Settings of a method that the one which is chosen does not read. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from unloaf.config.fields import Config

Read = Callable[[Config], bool]


def _of(*methods: str) -> Read:
    return lambda config: config.method in methods


_subnets = _of("st", "st++", "gkt", "st-star")
_taught = _of("st", "st++", "gkt")  # by the logits of another network


def _smaller(config: Config) -> bool:
    used = config.subnet_inputs == "smaller" or (
        config.subnet_inputs == "auto" and config.method in ("st++", "st-star")
    )
    return used and config.method in ("st", "st++", "st-star")


def _directions(config: Config) -> bool:
    return _taught(config) and (config.subnet_loss_or_default == "kl-" or config.main_logits == "direction")


# Whether a configuration reads them, and where else they are read.
_READ: tuple[tuple[tuple[str, ...], Read, str], ...] = (
    (("groups", "loops", "group_ema", "teacher"), _of("gkt"), "--method gkt"),
    (("final_survival",), _of("stochastic-depth"), "--method stochastic-depth"),
    (("num_subnets", "subnet_inputs"), _of("st", "st++", "st-star"), "--method st, st++ or st-star"),
    (
        ("subnet_weight", "subnet_schedule", "subnet_interval", "subnet_on_epoch", "subnet_off_epoch", "sampler"),
        _subnets,
        "--method st, st++, gkt or st-star",
    ),
    (("subnet_batch_fraction", "subnet_loss", "main_logits"), _taught, "--method st, st++ or gkt"),
    (("min_ratio", "sides", "per"), _smaller, "--subnet-inputs smaller"),
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
    plain = {field.name: field.default for field in dataclasses.fields(Config)}
    return [
        f"{name} {value} has no effect here: it is for {where}"
        for names, read, where in _READ
        for name in names
        if (value := getattr(config, name)) != plain[name] and not read(config)
    ]
